"""POST /v1/completions: what whole answers and streams hold."""

from __future__ import annotations

import pytest

from omni_engine.scheduler.sampling_params import RequestOutputKind

PATH = "/v1/completions"


def test_a_whole_answer_has_every_field_of_the_api_with_explicit_nulls(serve):
    async def scenario(client, engine):
        status, body = await client.post(PATH, {"model": "tiny/model", "prompt": "ab"})
        assert status == 200
        assert body.pop("id").startswith("cmpl-")
        assert isinstance(body.pop("created"), int)
        assert body == {
            "object": "text_completion",
            "model": "tiny/model",
            "choices": [
                {
                    "index": 0,
                    "text": "hello",
                    "logprobs": None,
                    "finish_reason": "stop",
                    "stop_reason": None,
                    "token_ids": None,
                    "prompt_logprobs": None,
                    "prompt_token_ids": None,
                    "routed_experts": None,
                }
            ],
            "usage": {
                "prompt_tokens": 3,
                "total_tokens": 8,
                "completion_tokens": 5,
                "prompt_tokens_details": None,
                "completion_tokens_details": None,
            },
            "service_tier": None,
            "system_fingerprint": None,
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "metrics": None,
        }
        assert engine.params[0].output_kind == RequestOutputKind.FINAL_ONLY

    serve(scenario)


def test_a_stream_is_one_chunk_per_step_and_done(serve):
    async def scenario(client, _engine):
        *chunks, done = await client.events(PATH, {"prompt": "ab", "max_tokens": 3})
        assert done == "[DONE]"
        assert len(chunks) == 3
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "hel"
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "length"]
        assert len({chunk["id"] for chunk in chunks}) == 1
        first = chunks[0]
        assert set(first) == {"id", "object", "created", "model", "choices"}
        assert first["object"] == "text_completion"
        assert first["choices"][0] == {
            "index": 0, "text": "h", "logprobs": None, "finish_reason": None, "stop_reason": None,
        }  # fmt: skip

    serve(scenario)


def test_include_usage_adds_a_last_chunk_without_choices(serve):
    async def scenario(client, _engine):
        body = {"prompt": "ab", "stream_options": {"include_usage": True}}
        *chunks, usage, _done = await client.events(PATH, body)
        assert all("usage" not in chunk for chunk in chunks)
        assert usage["choices"] == []
        assert (usage["usage"]["prompt_tokens"], usage["usage"]["completion_tokens"]) == (3, 5)

    serve(scenario)


def test_continuous_usage_counts_up_in_every_chunk(serve):
    async def scenario(client, _engine):
        options = {"include_usage": True, "continuous_usage_stats": True}
        *chunks, _done = await client.events(PATH, {"prompt": "ab", "stream_options": options})
        assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 4, 5, 5]
        assert all(chunk["usage"]["total_tokens"] == 3 + chunk["usage"]["completion_tokens"] for chunk in chunks)

    serve(scenario)


def test_choices_of_several_prompts_are_numbered_prompt_times_n_plus_i(serve):
    async def scenario(client, engine):
        status, body = await client.post(PATH, {"prompt": ["a", "b"], "n": 2, "echo": True})
        assert status == 200
        assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [
            (0, "ahello"), (1, "ahello"), (2, "bhello"), (3, "bhello"),
        ]  # fmt: skip
        assert body["usage"]["prompt_tokens"] == 4
        assert body["usage"]["completion_tokens"] == 20
        assert [engine.request_ids[place].rsplit("-", 1)[1] for place in (0, 1)] == ["0", "1"]

    serve(scenario)


def test_a_stream_of_several_prompts_has_one_choice_per_chunk_and_loses_nothing(serve):
    async def scenario(client, _engine):
        *chunks, _done = await client.events(PATH, {"prompt": ["a", "b"], "n": 2, "echo": True})
        texts = [""] * 4
        for chunk in chunks:
            (choice,) = chunk["choices"]
            texts[choice["index"]] += choice["text"]
        assert texts == ["ahello", "ahello", "bhello", "bhello"]

    serve(scenario)


@pytest.mark.parametrize("prompt", [[97, 98], [[97, 98]]])
def test_token_ids_are_prompts(serve, prompt):
    async def scenario(client, engine):
        status, body = await client.post(PATH, {"prompt": prompt, "echo": True, "return_token_ids": True})
        assert status == 200
        assert engine.prompts == [{"prompt_token_ids": [97, 98]}]
        choice = body["choices"][0]
        assert choice["text"] == "abhello"
        assert choice["prompt_token_ids"] == [97, 98]
        assert choice["token_ids"] == [ord(char) for char in "hello"]

    serve(scenario)


def test_return_token_ids_puts_the_prompts_ids_in_the_first_chunk_only(serve):
    async def scenario(client, _engine):
        *chunks, _done = await client.events(PATH, {"prompt": "a", "return_token_ids": True})
        choices = [chunk["choices"][0] for chunk in chunks]
        assert choices[0]["prompt_token_ids"] == [1, 97]
        assert all("prompt_token_ids" not in choice for choice in choices[1:])
        assert [token for choice in choices for token in choice["token_ids"]] == [ord(char) for char in "hello"]

    serve(scenario)


def test_logprobs_hold_the_token_itself_and_n_others(serve):
    async def scenario(client, engine):
        _status, body = await client.post(PATH, {"prompt": "a", "logprobs": 2, "max_tokens": 2})
        assert engine.params[0].logprobs == 2
        logprobs = body["choices"][0]["logprobs"]
        assert logprobs["tokens"] == ["h", "e"]
        assert logprobs["text_offset"] == [0, 1]
        assert logprobs["token_logprobs"] == [-5.0, -5.0]
        assert logprobs["top_logprobs"][0] == {"h": -5.0, "i": -0.1, "j": -0.2}

    serve(scenario)


def test_logprobs_zero_holds_only_the_token_itself(serve):
    async def scenario(client, _engine):
        _status, body = await client.post(PATH, {"prompt": "a", "logprobs": 0})
        assert [len(top) for top in body["choices"][0]["logprobs"]["top_logprobs"]] == [1] * 5

    serve(scenario)


def test_infinite_logprobs_are_minus_9999(serve):
    async def scenario(client, _engine):
        _status, body = await client.post(PATH, {"prompt": "a", "logprobs": 3, "max_tokens": 1})
        assert body["choices"][0]["logprobs"]["top_logprobs"][0]["k"] == -9999.0

    serve(scenario)


def test_text_offsets_go_on_over_a_stream(serve):
    async def scenario(client, _engine):
        *chunks, _done = await client.events(PATH, {"prompt": "ab", "logprobs": 0, "echo": True})
        offsets = [offset for chunk in chunks for offset in chunk["choices"][0]["logprobs"]["text_offset"]]
        # The special token before the prompt is shown among the tokens, but not in the text.
        assert offsets == [0, 1, 2, 3, 3, 4, 5, 6]

    serve(scenario)


def test_echo_with_logprobs_covers_the_prompt_whose_first_token_has_none(serve):
    async def scenario(client, engine):
        _status, body = await client.post(PATH, {"prompt": [97, 98], "echo": True, "logprobs": 1, "max_tokens": 1})
        assert engine.params[0].prompt_logprobs == 1
        choice = body["choices"][0]
        assert choice["text"] == "abh"
        assert choice["logprobs"]["tokens"] == ["a", "b", "h"]
        assert choice["logprobs"]["token_logprobs"] == [None, -5.0, -5.0]
        assert choice["logprobs"]["top_logprobs"][0] is None
        assert choice["prompt_logprobs"][0] is None
        assert choice["prompt_logprobs"][1]["98"] == {"logprob": -5.0, "rank": 2, "decoded_token": "b"}

    serve(scenario)


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_no_tokens_returns_the_prompt_alone(serve, stream):
    async def scenario(client, _engine):
        body = {"prompt": [97, 98], "echo": True, "max_tokens": 0, "logprobs": 1}
        if stream:
            chunk, _done = await client.events(PATH, body)
        else:
            _status, chunk = await client.post(PATH, body)
            assert chunk["usage"]["completion_tokens"] == 0
        choice = chunk["choices"][0]
        assert choice["text"] == "ab"
        assert choice["logprobs"]["tokens"] == ["a", "b"]
        assert choice["finish_reason"] == "length"

    serve(scenario)


def test_prompt_logprobs_are_a_list_of_objects_by_token_id(serve):
    async def scenario(client, _engine):
        _status, body = await client.post(PATH, {"prompt": [97, 98], "prompt_logprobs": 1})
        assert body["choices"][0]["prompt_logprobs"] == [
            None,
            {
                "98": {"logprob": -5.0, "rank": 2, "decoded_token": "b"},
                "99": {"logprob": -0.1, "rank": 1, "decoded_token": "c"},
            },
        ]

    serve(scenario)


def test_tokens_as_ids_are_shown_so_in_logprobs(serve):
    async def scenario(client, _engine):
        _status, body = await client.post(PATH, {"prompt": "a", "logprobs": 0, "return_tokens_as_token_ids": True})
        assert body["choices"][0]["logprobs"]["tokens"][0] == "token_id:104"

    serve(scenario)


def test_every_sampling_field_reaches_the_engine(serve):
    fields = {
        "n": 2, "max_tokens": 7, "min_tokens": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 4, "min_p": 0.1,
        "presence_penalty": 0.2, "frequency_penalty": 0.3, "repetition_penalty": 1.1, "seed": 5, "stop": ["x", "y"],
        "stop_token_ids": [3], "include_stop_str_in_output": True, "ignore_eos": True, "allowed_token_ids": [1, 2],
        "bad_words": ["bad"], "skip_special_tokens": False, "spaces_between_special_tokens": False,
        "truncate_prompt_tokens": 9, "prompt_logprobs": 1, "logprobs": 2,
    }  # fmt: skip

    async def scenario(client, engine):
        body = {"prompt": "a", "logit_bias": {"5": 300}, "priority": -3, "cache_salt": "tenant", **fields}
        status, answer = await client.post(PATH, body)
        assert status == 200, answer
        (params,) = engine.params
        assert {name: getattr(params, name) for name in fields} == fields
        assert params.logit_bias == {5: 100.0}
        assert engine.priorities == [-3]
        assert engine.prompts[0]["cache_salt"] == "tenant"

    serve(scenario)


def test_fields_that_are_null_or_absent_take_the_servers_defaults_then_openais(serve):
    async def scenario(client, engine):
        engine.default_sampling_params = {"temperature": 0.6, "top_k": 20}
        await client.post(PATH, {"prompt": "a", "temperature": None, "top_p": None, "max_tokens": None})
        await client.post(PATH, {"prompt": "a", "temperature": 0.2, "top_k": 0})
        first, second = engine.params
        assert (first.temperature, first.top_k, first.top_p, first.max_tokens) == (0.6, 20, 1.0, 16)
        assert (second.temperature, second.top_k) == (0.2, 0)

    serve(scenario)


def test_the_servers_max_tokens_caps_the_requests(serve):
    async def scenario(client, engine):
        engine.default_sampling_params = {"max_tokens": 4}
        for wanted in (None, 3, 100):
            await client.post(PATH, {"prompt": "a", "max_tokens": wanted})
        assert [params.max_tokens for params in engine.params] == [4, 3, 4]

    serve(scenario)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"add_special_tokens": False}, [97, 98, 99]),
        ({"truncate_prompt_tokens": 2, "truncation_side": "left"}, [98, 99]),
        ({"truncate_prompt_tokens": 2, "truncation_side": "right"}, [1, 97]),
        ({"truncate_prompt_tokens": -1, "truncation_side": "right"}, [1, 97, 98, 99]),
    ],
)
def test_tokenizing_options_are_applied_before_the_engine(serve, options, expected):
    async def scenario(client, engine):
        status, _body = await client.post(PATH, {"prompt": "abc", **options})
        assert status == 200
        assert engine.prompts[0]["prompt_token_ids"] == expected

    serve(scenario)


def test_the_clients_request_id_becomes_the_responses(serve):
    async def scenario(client, _engine):
        _status, body = await client.post(PATH, {"prompt": "a"}, headers={"X-Request-Id": "mine"})
        assert body["id"] == "cmpl-mine"
        _status, body = await client.post(PATH, {"prompt": "a", "request_id": "other"})
        assert body["id"] == "cmpl-other"

    serve(scenario)


def test_prompt_token_details_are_reported_when_enabled(serve):
    async def scenario(client, _engine):
        _status, body = await client.post(PATH, {"prompt": "a"})
        assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}

    serve(scenario, enable_prompt_tokens_details=True)


def test_usage_can_be_forced_on_every_stream(serve):
    async def scenario(client, _engine):
        *chunks, _done = await client.events(PATH, {"prompt": "a"})
        assert all("usage" in chunk for chunk in chunks)
        assert chunks[-1]["choices"] == []

    serve(scenario, enable_force_include_usage=True)
