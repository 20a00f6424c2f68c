"""Reasoning in chat completions: told apart from the content, whole and in streams, and counted."""

from __future__ import annotations

import pytest

from omni_engine.models.chat_template import ChatTemplate

CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "hi"}]
TEXT = "<think>Two and two.</think>\n\nIt is 4."
SAID = {"reasoning": "Two and two.", "content": "\n\nIt is 4."}
R1 = {"reasoning_parser": "deepseek_r1"}


def tags_are_tokens(engine):
    engine.tokenizer.special = ["<think>", "</think>", "<|end|>"]
    engine.answer = TEXT


def test_a_whole_answer_has_its_reasoning_apart(serve, said):
    async def scenario(client, engine):
        engine.answer = TEXT
        _status, body = await client.post(CHAT, {"messages": USER})
        (choice,) = body["choices"]
        assert said(choice["message"]) == SAID
        assert set(choice["message"]) == {
            "role", "content", "refusal", "annotations", "audio", "function_call", "reasoning",
        }  # fmt: skip
        assert choice["finish_reason"] == "stop"

    serve(scenario, **R1)


def test_without_a_parser_reasoning_is_content(serve, joined, said):
    async def scenario(client, engine):
        engine.answer = TEXT
        _status, body = await client.post(CHAT, {"messages": USER})
        assert said(body["choices"][0]["message"]) == {"content": TEXT}
        assert body["usage"]["completion_tokens_details"] is None
        assert said(joined(await client.events(CHAT, {"messages": USER}))) == {"content": TEXT}

    serve(scenario)


@pytest.mark.parametrize("text_delay", [0, 3])
def test_a_stream_says_the_same_however_it_is_cut(serve, joined, said, text_delay):
    async def scenario(client, engine):
        engine.answer, engine.text_delay = TEXT, text_delay
        for engine.tokens_per_output in range(1, len(TEXT) + 2):
            events = await client.events(CHAT, {"messages": USER})
            message = joined(events)
            assert said(message) == SAID and message["finish_reason"] == "stop"
            # Tags alone make no chunk: every one but the first and the last says something.
            assert all(event["choices"][0]["delta"] for event in events[:-2])

    serve(scenario, **R1)


def test_reasoning_tokens_are_counted_in_usage(serve):
    async def scenario(client, engine):
        tags_are_tokens(engine)
        _status, body = await client.post(CHAT, {"messages": USER})
        assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": len("Two and two.")}
        options = {"include_usage": True, "continuous_usage_stats": True}
        *chunks, _done = await client.events(CHAT, {"messages": USER, "stream_options": options})
        counts = [
            (chunk["usage"]["completion_tokens"], chunk["usage"]["completion_tokens_details"]["reasoning_tokens"])
            for chunk in chunks
        ]
        # The first chunk tells the role; the start tag is the first token, and the twelve after it are reasoning.
        assert counts[0] == (0, 0)
        assert all(reasoning == min(max(tokens - 1, 0), 12) for tokens, reasoning in counts)
        assert counts[-1] == (24, 12)
        *_, last, _done = await client.events(CHAT, {"messages": USER, "stream_options": {"include_usage": True}})
        assert last["usage"]["completion_tokens_details"] == {"reasoning_tokens": 12}

    serve(scenario, **R1)


def test_reasoning_that_is_not_wanted_leaves_no_trace(serve, joined, said):
    async def scenario(client, engine):
        tags_are_tokens(engine)
        body = {"messages": USER, "include_reasoning": False, "logprobs": True, "return_token_ids": True}
        _status, answer = await client.post(CHAT, body)
        (choice,) = answer["choices"]
        assert said(choice["message"]) == {"content": SAID["content"]}
        assert (choice["logprobs"], choice["token_ids"]) == (None, None)
        assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 12}
        events = await client.events(CHAT, body)
        assert said(joined(events)) == {"content": SAID["content"]}
        assert all(event["choices"][0]["logprobs"] is None for event in events[:-1])
        assert not any("token_ids" in event["choices"][0] for event in events[:-1])

    serve(scenario, **R1)


def test_an_answer_cut_in_its_reasoning_has_no_content(serve, joined):
    async def scenario(client, engine):
        engine.answer = TEXT
        body = {"messages": USER, "max_tokens": 10}
        _status, answer = await client.post(CHAT, body)
        (choice,) = answer["choices"]
        assert choice["message"]["content"] is None and choice["message"]["reasoning"] == "Two"
        assert choice["finish_reason"] == "length"
        message = joined(await client.events(CHAT, body))
        assert message == {"reasoning": "Two", "finish_reason": "length"}

    serve(scenario, **R1)


def test_an_aborted_answer_tells_what_was_held_back(serve, joined):
    async def scenario(client, engine):
        engine.answer, engine.finish_reason = "<think>Two</th", "abort"
        message = joined(await client.events(CHAT, {"messages": USER}))
        assert message == {"reasoning": "Two</th", "finish_reason": "abort"}

    serve(scenario, **R1)


def test_a_failure_in_a_stream_is_its_last_event(serve):
    async def scenario(client, engine):
        engine.answer, engine.failure_after = TEXT, (9, RuntimeError("broken"))
        *_chunks, error, done = await client.events(CHAT, {"messages": USER})
        assert done == "[DONE]" and error["error"]["code"] == 500

    serve(scenario, **R1)


def test_a_prompt_that_closes_the_reasoning_leaves_only_content(serve, joined, said):
    async def scenario(client, engine):
        tags_are_tokens(engine)
        engine.answer = "It is 4."
        for engine.prompt_end, expected in [
            ("<think>", {"reasoning": "It is 4."}),
            ("<think></think>", {"content": "It is 4."}),
        ]:
            _status, body = await client.post(CHAT, {"messages": USER})
            assert said(body["choices"][0]["message"]) == expected
            assert said(joined(await client.events(CHAT, {"messages": USER}))) == expected
        assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}

    serve(scenario, **R1)


@pytest.mark.parametrize(
    ("options", "thinks"),
    [
        ({}, True),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "high"}, True),
        ({"chat_template_kwargs": {"enable_thinking": False}}, False),
        ({"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "high"}, False),
    ],
)
def test_the_templates_switch_is_the_parsers_too(serve, said, options, thinks):
    async def scenario(client, engine):
        engine.answer = TEXT
        _status, body = await client.post(CHAT, {"messages": USER, **options})
        assert said(body["choices"][0]["message"]) == (SAID if thinks else {"content": TEXT})

    serve(scenario, reasoning_parser="qwen3")


def test_the_field_for_the_effort_goes_before_the_templates_variable(serve):
    async def scenario(client, engine):
        body = {"messages": USER, "reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "high"}}
        await client.post(CHAT, body)
        assert engine.rendered[0][1]["chat_template_kwargs"] == {"reasoning_effort": "low", "enable_thinking": True}

    serve(scenario)


def test_special_tokens_are_kept_where_the_format_has_them_and_dropped_elsewhere(serve, said):
    async def with_parser(client, engine):
        tags_are_tokens(engine)
        _status, body = await client.post(CHAT, {"messages": USER, "skip_special_tokens": True})
        assert said(body["choices"][0]["message"]) == SAID
        assert engine.params[0].skip_special_tokens is False

    async def without(client, engine):
        tags_are_tokens(engine)
        _status, body = await client.post(CHAT, {"messages": USER})
        assert said(body["choices"][0]["message"]) == {"content": "Two and two.\n\nIt is 4."}
        assert engine.params[0].skip_special_tokens is True

    serve(with_parser, **R1)
    serve(without)


def test_each_choice_is_read_for_itself(serve, joined, said):
    async def scenario(client, engine):
        engine.answers = ["<think>One</think>1", "<think>Two and two</think>22", "3"]
        expected = [
            {"reasoning": "One", "content": "1"}, {"reasoning": "Two and two", "content": "22"}, {"reasoning": "3"},
        ]  # fmt: skip
        body = {"messages": USER, "n": 3, "temperature": 1}
        _status, answer = await client.post(CHAT, body)
        assert [said(choice["message"]) for choice in answer["choices"]] == expected
        events = await client.events(CHAT, body)
        assert [said(joined(events, index)) for index in range(3)] == expected

    serve(scenario, **R1)


def test_logprobs_and_token_ids_of_tags_come_with_an_empty_delta(serve):
    async def scenario(client, engine):
        tags_are_tokens(engine)
        for option in ({"logprobs": True}, {"return_token_ids": True}):
            *chunks, _done = await client.events(CHAT, {"messages": USER, **option})
            choices = [chunk["choices"][0] for chunk in chunks[1:]]
            assert len(choices) == 24 and choices[0]["delta"] == {}
            if "logprobs" in option:
                assert all(len(choice["logprobs"]["content"]) == 1 for choice in choices)
            else:
                ids = [i for choice in choices for i in choice["token_ids"]]
                assert ids == engine.tokenizer.encode(TEXT, add_special_tokens=False)

    serve(scenario, **R1)


def test_echo_stands_before_the_content(serve, joined, said):
    messages = [*USER, {"role": "assistant", "content": "Oh."}]
    body = {"messages": messages, "echo": True, "continue_final_message": True, "add_generation_prompt": False}

    async def scenario(client, engine):
        engine.answer = TEXT
        expected = {"reasoning": SAID["reasoning"], "content": "Oh." + SAID["content"]}
        _status, answer = await client.post(CHAT, body)
        assert said(answer["choices"][0]["message"]) == expected
        assert said(joined(await client.events(CHAT, body))) == expected

    serve(scenario, **R1)


def test_reasoning_of_earlier_answers_reaches_the_template(serve):
    source = "{% for m in messages %}[{{ m.role }}|{{ m.reasoning_content }}|{{ m.content }}]{% endfor %}"

    async def scenario(client, engine):
        engine.template = ChatTemplate(source)
        engine.max_model_len = 1000
        for name in ("reasoning", "reasoning_content"):
            messages = [*USER, {"role": "assistant", "content": "4", name: "Hm"}, {"role": "user", "content": "5?"}]
            status, body = await client.post(CHAT, {"messages": messages, "return_prompt_text": True})
            assert status == 200 and "[assistant|Hm|4]" in body["prompt_text"]

    serve(scenario, **R1)


def test_completions_are_not_parsed(serve):
    async def scenario(client, engine):
        tags_are_tokens(engine)
        _status, body = await client.post("/v1/completions", {"prompt": "a", "max_tokens": 30})
        assert body["choices"][0]["text"] == "Two and two.\n\nIt is 4."
        assert body["usage"]["completion_tokens_details"] is None

    serve(scenario, **R1)
