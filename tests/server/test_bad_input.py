"""Whatever is wrong with a request costs only that request: a clear status, and the one error shape."""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus

import pytest

from omni_engine.engine.errors import EngineDeadError, RequestFailedError, RequestRejectedError
from omni_engine.server import body as body_module

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = [{"role": "user", "content": "hi"}]
JSON_TYPE = {"Content-Type": "application/json"}


def check_error(response, expected_status, error_type=None, param=..., text=""):
    status, answer = response
    assert status == expected_status, answer
    assert set(answer) == {"error"}
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == expected_status
    assert text in error["message"]
    assert error["type"] == (error_type or HTTPStatus(expected_status).phrase)
    if param is not ...:
        assert error["param"] == param


WRONG_COMPLETIONS = [
    # types: the body does not fit the API's schema
    ({}, "prompt", "Either prompt or prompt_embeds must be provided and non-empty."),
    ({"prompt": None, "prompt_embeds": []}, "prompt", "Either prompt or prompt_embeds must be provided"),
    ({"prompt": ""}, "prompt", "non-empty"),
    ({"prompt": []}, "prompt", "non-empty"),
    ({"prompt": 5}, "body.prompt", "got `int`"),
    ({"prompt": {"text": "a"}}, "body.prompt", "got `object`"),
    ({"prompt": ["a", 1]}, "prompt", "only"),
    ({"prompt": [[1, "a"]]}, "body.prompt.0.1", "got `str`"),
    ({"prompt": [-1]}, "body.prompt.0", ">= 0"),
    ({"prompt": [1.5]}, "body.prompt.0", "got `float`"),
    ({"prompt": ["a"] * 1025}, "prompt", "at most 1024"),
    ({"prompt": ["a"] * 2, "n": 16384}, "n", "times n"),
    ({"prompt": "a", "model": 3}, "body.model", "got `int`"),
    ({"prompt": "a", "max_tokens": "ten"}, "body.max_tokens", "got `str`"),
    ({"prompt": "a", "max_tokens": 10**30}, "body.max_tokens", "less_than_equal"),
    ({"prompt": "a", "temperature": "hot"}, "body.temperature", "got `str`"),
    ({"prompt": "a", "stream": "yes"}, "body.stream", "got `str`"),
    ({"prompt": "a", "stop": 5}, "body.stop", "got `int`"),
    ({"prompt": "a", "stop": ["ab"] * 65}, "stop", "at most 64"),
    ({"prompt": "a", "user": 5}, "body.user", "got `int`"),
    ({"prompt": "a", "session_id": ["s"]}, "body.session_id", "got `array`"),
    ({"prompt": "a", "length_penalty": "long"}, "body.length_penalty", "got `str`"),
    ({"prompt": "a", "seed": 2**63}, "body.seed", "less_than_equal"),
    ({"prompt": "a", "seed": -(2**63) - 1}, "body.seed", "greater_than_equal"),
    ({"prompt": "a", "logit_bias": {"1": "much"}}, "body.logit_bias", "got `str`"),
    ({"prompt": "a", "logprobs": "many"}, "body.logprobs", "got `str`"),
    ({"prompt": "a", "logprobs": -2}, "logprobs", "-1"),
    ({"prompt": "a", "prompt_logprobs": -2}, "prompt_logprobs", "-1"),
    ({"prompt": "a", "prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "not available when `stream=True`"),
    ({"prompt": "a", "prompt_logprobs": -1, "stream": True}, "prompt_logprobs", "not available when `stream=True`"),
    ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options", "`stream=True`"),
    ({"prompt": "a", "stream_options": 1, "stream": True}, "body.stream_options", "got `int`"),
    ({"prompt": "a", "truncate_prompt_tokens": -2}, "body.truncate_prompt_tokens", "greater_than_equal"),
    ({"prompt": "a", "truncation_side": "top"}, "truncation_side", "left or right"),
    ({"prompt": "a", "cache_salt": "x" * 129}, "cache_salt", "128"),
    ({"prompt": "a", "cache_salt": "a@b"}, "cache_salt", "no @"),
    ({"prompt": "a", "cache_salt": ""}, "cache_salt", "1 to"),
]


@pytest.mark.parametrize(("body", "param", "text"), WRONG_COMPLETIONS, ids=lambda value: str(value)[:40])
def test_a_body_that_breaks_the_schema_is_a_bad_request_naming_the_field(serve, body, param, text):
    async def scenario(client, engine):
        check_error(await client.post(COMPLETIONS, body), 400, "Bad Request", param, text)
        assert engine.params == []

    serve(scenario)


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("n", 0, "n must be at least 1, got 0."),
        ("n", -3, "n must be at least 1"),
        ("n", 10**9, "n must be at most 16384"),
        ("temperature", -0.1, "temperature must be non-negative"),
        ("temperature", 2.5, "temperature must be in [0, 2]"),
        ("top_p", 0, "top_p must be in (0, 1], got 0"),
        ("top_p", 1.1, "top_p must be in (0, 1]"),
        ("top_k", -2, "top_k must be 0 (disable), or at least 1"),
        ("min_p", 2, "min_p must be in [0, 1]"),
        ("presence_penalty", 3, "presence_penalty must be in [-2, 2]"),
        ("repetition_penalty", 0, "must be greater than zero"),
        ("max_tokens", 0, "max_tokens must be at least 1"),
        ("max_tokens", -5, "max_tokens must be at least 1"),
        ("min_tokens", 17, "min_tokens must be less than or equal to max_tokens=16"),
        ("logit_bias", {"x": 1.0}, "logit_bias maps token ids to"),
        ("allowed_token_ids", [], "allowed_token_ids must not be empty"),
        ("bad_words", [""], "bad_words cannot contain an empty string"),
        ("stop", "", "stop cannot contain an empty string"),
    ],
)
def test_a_sampling_value_out_of_range_is_refused_with_its_name(serve, field, value, text):
    async def scenario(client, _engine):
        answer = await client.post(CHAT, {"messages": USER, "max_tokens": 16, field: value})
        check_error(answer, 400, "BadRequestError", field, text)

    serve(scenario)


def test_several_sequences_of_a_greedy_request_are_refused(serve):
    async def scenario(client, _engine):
        answer = await client.post(COMPLETIONS, {"prompt": "a", "n": 2, "temperature": 0})
        check_error(answer, 400, "BadRequestError", "n", "n must be 1 when using greedy sampling")

    serve(scenario)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_beam_search", True),
        ("suffix", "end"),
        ("prompt_embeds", "AAAA"),
        ("logits_processors", ["x"]),
        ("logprob_token_ids", [1]),
        ("kv_transfer_params", {"do_remote_decode": True}),
        ("vllm_xargs", {"a": 1}),
        ("repetition_detection", {"max_pattern_size": 3}),
        ("stream_interval", 2),
        ("watermarking", True),
        ("guided_json", {"type": "object"}),
    ],
)
def test_a_field_that_is_not_built_is_refused_by_name_and_never_ignored(serve, field, value):
    async def scenario(client, _engine):
        answer = await client.post(COMPLETIONS, {"prompt": "a", field: value})
        check_error(answer, 400, "BadRequestError", field, f"not supported yet by this server: {field}")

    serve(scenario)


def test_neutral_values_of_fields_that_are_not_built_are_accepted(serve):
    neutral = {
        "use_beam_search": False, "response_format": {"type": "text"}, "structured_outputs": None, "suffix": "",
        "prompt_embeds": [], "stream_interval": 1, "thinking_token_budget": -1, "best_of": 4, "user": "me",
        "length_penalty": 1, "session_id": None, "no_such_field": {"a": 1},
    }  # fmt: skip

    async def scenario(client, _engine):
        status, answer = await client.post(COMPLETIONS, {"prompt": "a", **neutral})
        assert status == 200, answer

    serve(scenario)


TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("body", "error_type", "param", "text"),
    [
        ({}, "Bad Request", "body.messages", "Field required"),
        ({"messages": []}, "Bad Request", "messages", "empty"),
        ({"messages": "hi"}, "Bad Request", "body.messages", "got `str`"),
        ({"messages": ["hi"]}, "Bad Request", "body.messages.0", "got `str`"),
        ({"messages": [{"content": "hi"}]}, "Bad Request", "body.messages.0.role", "role"),
        ({"messages": [{"role": 1, "content": "hi"}]}, "Bad Request", "body.messages.0.role", "role"),
        ({"messages": [*USER, {"role": "user", "content": 1}]}, "Bad Request", "body.messages.1.content", "content"),
        ({"messages": [{"role": "refused", "content": ""}]}, "BadRequestError", None, "the template knows no role"),
        ({"messages": USER, "top_logprobs": 2}, "Bad Request", "top_logprobs", "`logprobs` must be set to true"),
        ({"messages": USER, "logprobs": True, "top_logprobs": -2}, "Bad Request", "top_logprobs", "-1"),
        ({"messages": USER, "continue_final_message": True}, "Bad Request", "continue_final_message", "both"),
        ({"messages": USER, "tools": []}, "Bad Request", "tools", "empty"),
        ({"messages": USER, "tool_choice": "auto"}, "Bad Request", "tool_choice", "`tools` must be set"),
        ({"messages": USER, "tools": [], "tool_choice": "none"}, "Bad Request", "tools", "empty"),
        ({"messages": USER, "tools": [{"type": "function"}]}, "Bad Request", "body.tools.0.function", "Field required"),
        ({"messages": USER, "tools": [TOOL, {"type": "function", "function": {}}], "tool_choice": "none"},
         "Bad Request", "body.tools.1.function.name", "Field required"),
        ({"messages": USER, "tools": [{"type": "web", "function": {"name": "f"}}]}, "Bad Request", "body.tools.0.type",
         "'web'"),
        ({"messages": USER, "tools": [{"function": {"name": "f", "parameters": 1}}]}, "Bad Request",
         "body.tools.0.function.parameters", "got `int`"),
        ({"messages": USER, "tools": [TOOL]}, "BadRequestError", "tool_choice",
         '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'),
        ({"messages": USER, "tools": [TOOL], "tool_choice": None}, "BadRequestError", "tool_choice", '"auto" tool'),
        ({"messages": USER, "tools": [TOOL], "tool_choice": "maybe"}, "Bad Request", "tool_choice", "none, auto"),
        ({"messages": USER, "tools": [TOOL], "tool_choice": {"type": "function"}}, "Bad Request", "tool_choice",
         "one of the functions"),
        ({"messages": USER, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
         "Bad Request", "tool_choice", "one of the functions in tools: 'g'"),
        ({"messages": USER, "tool_choice": "required"}, "Bad Request", "tool_choice", "`tools` must be set"),
        ({"messages": USER, "functions": [{"name": "f"}]}, "BadRequestError", "functions", "not supported yet"),
        ({"messages": USER, "logprobs": 3}, "Bad Request", "body.logprobs", "got `int`"),
        ({"messages": USER, "user": {}}, "Bad Request", "body.user", "got `object`"),
        ({"messages": USER, "parallel_tool_calls": "no"}, "Bad Request", "body.parallel_tool_calls", "got `str`"),
        ({"messages": USER, "include_reasoning": 1}, "Bad Request", "body.include_reasoning", "got `int`"),
        ({"messages": USER, "media_io_kwargs": []}, "Bad Request", "body.media_io_kwargs", "got `array`"),
        ({"messages": USER, "mm_processor_kwargs": 1}, "Bad Request", "body.mm_processor_kwargs", "got `int`"),
        ({"messages": USER, "reasoning_effort": "some"}, "Bad Request", "body.reasoning_effort", "'some'"),
        ({"messages": USER, "reasoning_effort": 3}, "Bad Request", "body.reasoning_effort", "got `int`"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_wrong_chat_requests(serve, body, error_type, param, text):
    async def scenario(client, engine):
        check_error(await client.post(CHAT, body), 400, error_type, param, text)
        assert engine.params == []

    serve(scenario)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "JSON decode error"),
        (b"{", "JSON decode error"),
        (b'{"prompt": "a"} x', "JSON decode error"),
        (b'{"prompt": NaN}', "JSON decode error"),
        (b"[]", "got `array`"),
        (b"null", "got `null`"),
        (b'{"prompt": "\xff"}', "not valid UTF-8 (byte 12)"),
        (b'{"prompt": "a", "ignored": "\xff"}', "not valid UTF-8"),
        (b'{"prompt": "\\ud800"}', "JSON decode error"),
        (b'{"prompt": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"prompt": "a", "response_format": ' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}", "nested too deeply"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_body_that_is_not_json_is_a_bad_request(serve, data, text):
    async def scenario(client, _engine):
        check_error(await client.post(COMPLETIONS, data=data, headers=JSON_TYPE), 400, param=None, text=text)

    serve(scenario)


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/json", 200),
        ("application/json; charset=utf-8", 200),
        ("application/x-www-form-urlencoded", 400),
        ("text/plain", 400),
    ],
)
def test_only_json_bodies_are_read(serve, content_type, status):
    async def scenario(client, _engine):
        answer = await client.post(
            COMPLETIONS, data=json.dumps({"prompt": "a"}).encode(), headers={"Content-Type": content_type}
        )
        if status == 200:
            assert answer[0] == 200
        else:
            check_error(answer, 400, text="Unsupported Media Type: Only 'application/json' is allowed")

    serve(scenario)


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_that_is_too_large_is_refused(serve, monkeypatch, announced):
    monkeypatch.setattr(body_module, "MAX_BODY_BYTES", 1000)
    monkeypatch.setattr("omni_engine.server.app.MAX_BODY_BYTES", 1000)
    data = json.dumps({"prompt": "a" * 2000}).encode()

    async def pieces():
        yield data

    async def scenario(client, _engine):
        answer = await client.post(COMPLETIONS, data=data if announced else pieces(), headers=JSON_TYPE)
        check_error(answer, 413, text="larger")

    serve(scenario)


def test_an_unknown_model_is_not_found_and_the_names_are_told(serve):
    async def scenario(client, _engine):
        for path, body in ((COMPLETIONS, {"prompt": "a"}), (CHAT, {"messages": USER})):
            answer = await client.post(path, {"model": "x", **body})
            check_error(answer, 404, "NotFoundError", "model", "The model `x` does not exist. Valid aliases: a, b.")
            for model in (None, "a", "b"):
                status, body_ = await client.post(path, {"model": model, **body})
                assert (status, body_["model"]) == (200, "a")

    serve(scenario, served_model_names=("a", "b"))


def test_unknown_urls_and_methods(serve):
    async def scenario(client, _engine):
        check_error(await client.get("/v1/nothing"), 404, param=None, text="Not Found")
        check_error(await client.get(COMPLETIONS), 405, param=None, text="Method Not Allowed")
        check_error(await client.post("/v1/embeddings", {}), 404)

    serve(scenario)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "status", "error_type"),
    [
        (RequestRejectedError("too many requests are waiting"), 503, "Service Unavailable"),
        (EngineDeadError("/secret/path broke"), 503, "ServiceUnavailableError"),
        (RequestFailedError("/secret/path broke"), 500, "InternalServerError"),
        (RuntimeError("/secret/path broke"), 500, "InternalServerError"),
        (ValueError("this cannot be done"), 400, "BadRequestError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_a_failure_before_the_first_output_has_its_status(serve, failure, status, error_type, stream):
    async def scenario(client, engine):
        engine.failure = failure
        for prompt in ("a", ["a", "b"]):
            answer = await client.post(COMPLETIONS, {"prompt": prompt, "stream": stream})
            check_error(answer, status, error_type)
            assert "secret" not in answer[1]["error"]["message"]
        assert not engine.running

    serve(scenario)


@pytest.mark.parametrize("stream", [False, True])
def test_an_over_long_prompt_is_refused_with_its_length(serve, stream):
    async def scenario(client, _engine):
        answer = await client.post(COMPLETIONS, {"prompt": "a" * 100, "stream": stream})
        check_error(answer, 400, "BadRequestError", "input_tokens", "your prompt contains 101 input tokens")
        assert answer[1]["error"]["message"].endswith("(parameter=input_tokens, value=101)")

    serve(scenario)


def test_a_failure_inside_a_stream_is_an_error_event_before_done(serve):
    async def scenario(client, engine):
        engine.failure_after = (2, RuntimeError("/secret/path broke"))
        *chunks, error, done = await client.events(COMPLETIONS, {"prompt": "a"})
        assert len(chunks) == 2
        assert set(error) == {"error"} and error["error"]["code"] == 500
        assert "secret" not in str(error)
        assert done == "[DONE]"

    serve(scenario)


def test_one_bad_prompt_of_several_fails_the_request_and_aborts_the_others(serve):
    async def scenario(client, engine):
        engine.hangs = True
        answer = await client.post(COMPLETIONS, {"prompt": ["a", "a" * 100, "b"]})
        check_error(answer, 400, "BadRequestError", "input_tokens")
        assert not engine.running
        assert len(engine.closed_early) == 2

    serve(scenario)


def test_a_request_id_that_is_no_text_does_no_harm(serve):
    async def scenario(client, _engine):
        host, port = client.address.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
            b'X-Request-Id: caf\xe9\r\nContent-Length: 15\r\n\r\n{"prompt": "a"}'
        )
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        assert head.startswith(b"HTTP/1.1 200")
        assert b"X-Request-Id: caf?" in head
        assert json.loads(body)["id"] == "cmpl-caf?"

    serve(scenario, enable_request_id_headers=True)
