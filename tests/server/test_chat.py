"""POST /v1/chat/completions: what whole answers and streams hold, and what reaches the template."""

from __future__ import annotations

PATH = "/v1/chat/completions"
MESSAGES = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]


def test_a_whole_answer_has_every_field_of_the_api_with_explicit_nulls(serve):
    async def scenario(client, engine):
        status, body = await client.post(PATH, {"messages": MESSAGES})
        assert status == 200
        assert body.pop("id").startswith("chatcmpl-")
        assert isinstance(body.pop("created"), int)
        usage = body.pop("usage")
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (18, 5)
        assert body == {
            "object": "chat.completion",
            "model": "tiny/model",
            "choices": [
                {
                    "index": 0,
                    "message": {
                        "role": "assistant", "content": "hello", "refusal": None, "annotations": None, "audio": None,
                        "function_call": None, "reasoning": None,
                    },
                    "logprobs": None,
                    "finish_reason": "stop",
                    "stop_reason": None,
                    "token_ids": None,
                    "routed_experts": None,
                }
            ],
            "service_tier": None,
            "system_fingerprint": None,
            "prompt_logprobs": None,
            "prompt_token_ids": None,
            "prompt_text": None,
            "kv_transfer_params": None,
            "metrics": None,
        }  # fmt: skip
        assert engine.prompts[0]["prompt"] == "<system>be<user>hi"
        assert 1 not in engine.prompts[0]["prompt_token_ids"]  # the template writes the special tokens
        assert engine.params[0].max_tokens is None

    serve(scenario)


def test_a_stream_begins_with_the_role_and_ends_with_the_reason(serve):
    async def scenario(client, _engine):
        first, *rest, done = await client.events(PATH, {"messages": MESSAGES})
        assert done == "[DONE]"
        assert set(first) == {"id", "object", "created", "model", "choices"}
        assert first["object"] == "chat.completion.chunk"
        assert first["choices"] == [
            {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        ]
        assert [chunk["choices"][0]["delta"] for chunk in rest] == [{"content": char} for char in "hello"]
        assert [chunk["choices"][0]["finish_reason"] for chunk in rest] == [None] * 4 + ["stop"]
        assert "stop_reason" in rest[-1]["choices"][0] and "stop_reason" not in rest[0]["choices"][0]

    serve(scenario)


def test_each_of_n_choices_begins_with_its_role(serve):
    async def scenario(client, _engine):
        *chunks, _done = await client.events(PATH, {"messages": MESSAGES, "n": 2})
        assert [(chunk["choices"][0]["index"], chunk["choices"][0]["delta"].get("role")) for chunk in chunks[:2]] == [
            (0, "assistant"), (1, "assistant"),
        ]  # fmt: skip
        texts = ["", ""]
        for chunk in chunks:
            texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["delta"]["content"]
        assert texts == ["hello", "hello"]

    serve(scenario)


def test_usage_in_streams(serve):
    async def scenario(client, _engine):
        options = {"include_usage": True, "continuous_usage_stats": True}
        *chunks, _done = await client.events(PATH, {"messages": MESSAGES, "stream_options": options})
        assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [0, 1, 2, 3, 4, 5, 5]
        assert chunks[-1]["choices"] == []

    serve(scenario)


def test_logprobs_hold_the_best_tokens_first_with_their_bytes(serve):
    async def scenario(client, engine):
        engine.answer = "é"
        body = {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2}
        _status, answer = await client.post(PATH, body)
        (token,) = answer["choices"][0]["logprobs"]["content"]
        assert (token["token"], token["logprob"], token["bytes"]) == ("é", -5.0, [0xC3, 0xA9])
        assert [(top["token"], top["logprob"]) for top in token["top_logprobs"]] == [("ê", -0.1), ("ë", -0.2)]

    serve(scenario)


def test_logprobs_without_top_logprobs_have_none(serve):
    async def scenario(client, _engine):
        _status, answer = await client.post(PATH, {"messages": MESSAGES, "logprobs": True})
        assert answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []

    serve(scenario)


def test_streamed_logprobs_cover_every_token(serve):
    async def scenario(client, _engine):
        _role, *chunks, _done = await client.events(PATH, {"messages": MESSAGES, "logprobs": True, "top_logprobs": 1})
        tokens = [item["token"] for chunk in chunks for item in chunk["choices"][0]["logprobs"]["content"]]
        assert "".join(tokens) == "hello"

    serve(scenario)


def test_max_completion_tokens_wins_over_max_tokens(serve):
    async def scenario(client, engine):
        await client.post(PATH, {"messages": MESSAGES, "max_tokens": 4, "max_completion_tokens": 2})
        assert engine.params[0].max_tokens == 2

    serve(scenario)


def test_template_options_reach_the_template(serve):
    async def scenario(client, engine):
        body = {
            "messages": MESSAGES, "add_generation_prompt": False, "continue_final_message": True,
            "documents": [{"title": "t"}], "chat_template_kwargs": {"b": 2}, "reasoning_effort": "none",
            "tools": [{"function": {"name": "f", "x": 1}}], "tool_choice": "none",
        }  # fmt: skip
        status, answer = await client.post(PATH, body)
        assert status == 200, answer
        messages, options = engine.rendered[0]
        assert messages == MESSAGES
        assert options == {
            "tools": [{"function": {"name": "f", "x": 1}}],
            "documents": [{"title": "t"}],
            "add_generation_prompt": False,
            "continue_final_message": True,
            "chat_template": "server template",
            "chat_template_kwargs": {"a": 1, "b": 2, "reasoning_effort": "none", "enable_thinking": False},
        }
        assert answer["choices"][0]["message"]["role"] == "user"  # the role of the message that goes on

    serve(scenario, chat_template="server template", default_chat_template_kwargs={"a": 1, "b": 1})


def test_a_requests_template_is_used_only_where_it_is_trusted(serve):
    async def refused(client, _engine):
        status, body = await client.post(PATH, {"messages": MESSAGES, "chat_template": "{{ 1 }}"})
        assert (status, body["error"]["param"]) == (400, "chat_template")

    async def used(client, engine):
        await client.post(PATH, {"messages": MESSAGES, "chat_template": "{{ 1 }}"})
        await client.post(PATH, {"messages": MESSAGES, "chat_template_kwargs": {"chat_template": "{{ 2 }}"}})
        assert [options["chat_template"] for _, options in engine.rendered] == ["{{ 1 }}", "{{ 2 }}"]

    serve(refused)
    serve(used, trust_request_chat_template=True)


def test_echo_repeats_a_last_message_of_the_answers_role(serve):
    messages = [*MESSAGES, {"role": "assistant", "content": "Oh, "}]
    body = {"messages": messages, "echo": True, "continue_final_message": True, "add_generation_prompt": False}

    async def scenario(client, _engine):
        _status, answer = await client.post(PATH, body)
        assert answer["choices"][0]["message"]["content"] == "Oh, hello"
        *chunks, _done = await client.events(PATH, body)
        assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == "Oh, hello"

    serve(scenario)


def test_ids_and_prompt_text_are_returned_on_request(serve):
    async def scenario(client, _engine):
        options = {"messages": MESSAGES, "return_token_ids": True}
        _status, answer = await client.post(PATH, {**options, "return_prompt_text": True})
        ids = [ord(char) for char in "<system>be<user>hi"]
        assert answer["prompt_token_ids"] == ids
        assert answer["prompt_text"] == "<system>be<user>hi"
        assert answer["choices"][0]["token_ids"] == [ord(char) for char in "hello"]
        first, *chunks, _done = await client.events(PATH, options)
        assert first["prompt_token_ids"] == ids
        assert [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]] == [
            ord(char) for char in "hello"
        ]

    serve(scenario)
