"""Anthropic's Messages API: what chat says, as content blocks and named events; errors in its form."""

from __future__ import annotations

import json

import pytest

MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
ASKS = {"model": "tiny/model", "max_tokens": 500, "messages": [{"role": "user", "content": "hi"}]}
TOOL = {"name": "get_weather", "description": "D", "input_schema": {"properties": {"city": {}}}}
HERMES = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes", "reasoning_parser": "deepseek_r1"}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
EVERYTHING = f"<think>Let me see.</think>I look.{CALL}{CALL}"


async def events_of(client, body):
    async with client.session.post(client.address + MESSAGES, json={"stream": True, **body}) as response:
        assert response.status == 200, await response.text()
        assert response.content_type == "text/event-stream"
        text = await response.text()
    events = []
    for block in text[:-2].split("\n\n"):
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def rebuilt(events):
    """The message as a client puts it together; one block is open at a time."""
    assert [events[0]["type"], events[-2]["type"], events[-1]["type"]] == [
        "message_start", "message_delta", "message_stop"]  # fmt: skip
    message, is_open, written = events[0]["message"], False, ""
    assert message["content"] == [] and message["stop_reason"] is None
    for event in events[1:-2]:
        if event["type"] == "content_block_start":
            assert not is_open and event["index"] == len(message["content"])
            message["content"].append(event["content_block"])
            is_open, written = True, ""
            continue
        assert is_open and event["index"] == len(message["content"]) - 1
        block = message["content"][-1]
        if event["type"] == "content_block_stop":
            is_open = False
            if block["type"] == "tool_use":
                block["input"] = json.loads(written)
            continue
        delta = event["delta"]
        name = {"text_delta": "text", "thinking_delta": "thinking", "signature_delta": "signature"}.get(delta["type"])
        if name is None:
            assert delta["type"] == "input_json_delta" and block["type"] == "tool_use"
            written += delta["partial_json"]
        else:
            block[name] += delta[name]
    assert not is_open
    message["usage"] |= events[-2]["usage"]
    return message | events[-2]["delta"]


def without_ids(message):
    blocks = [{name: value for name, value in block.items() if name != "id"} for block in message["content"]]
    return {**message, "id": None, "content": blocks}


def test_a_whole_message(serve):
    async def scenario(client, engine):
        body = {**ASKS, "system": [{"type": "text", "text": "Be kind."}], "temperature": 0.5, "top_k": 3}
        status, message = await client.post(MESSAGES, body)
        assert status == 200, message
        assert message.pop("id").startswith("msg_")
        num_tokens = len(engine.tokenizer.encode(engine.prompts[0]["prompt"], add_special_tokens=False))
        assert message == {
            "type": "message", "role": "assistant", "model": "tiny/model", "stop_reason": "end_turn",
            "stop_sequence": None, "content": [{"type": "text", "text": "hello"}],
            "usage": {"input_tokens": num_tokens - 2, "cache_read_input_tokens": 2, "cache_creation_input_tokens": 0,
                      "output_tokens": 5},
        }  # fmt: skip
        assert engine.rendered[0][0][0] == {"role": "system", "content": [{"type": "text", "text": "Be kind."}]}
        params = engine.params[0]
        assert (params.temperature, params.top_k, params.max_tokens) == (0.5, 3, 500)

    serve(scenario)


def test_a_stream_says_what_the_whole_message_says_however_it_is_cut(serve):
    async def scenario(client, engine):
        engine.answer, engine.max_model_len = EVERYTHING, 1000
        body = {**ASKS, "tools": [TOOL]}
        _status, whole = await client.post(MESSAGES, body)
        assert [block["type"] for block in whole["content"]] == ["thinking", "text", "tool_use", "tool_use"]
        thinking, text, call, _other = whole["content"]
        assert thinking["thinking"] == "Let me see." and thinking["signature"] and text["text"] == "I look."
        assert (call["name"], call["input"]) == ("get_weather", {"city": "Paris"})
        assert whole["stop_reason"] == "tool_use" and whole["usage"]["output_tokens"] == len(EVERYTHING)
        assert engine.rendered[0][1]["tools"] == [
            {"type": "function", "function": {
                "name": "get_weather", "description": "D",
                "parameters": {"type": "object", "properties": {"city": {}}}}}
        ]  # fmt: skip
        for engine.tokens_per_output in (1, 2, 5, 17, 1000):
            events = await events_of(client, body)
            assert events[0]["message"]["usage"]["output_tokens"] == 0
            assert without_ids(rebuilt(events)) == without_ids(whole)

    serve(scenario, **HERMES)


def test_why_an_answer_ended(serve):
    async def scenario(client, engine):
        engine.answer, engine.max_model_len = EVERYTHING, 1000
        for length in (5, 30, 90):
            body = {**ASKS, "tools": [TOOL], "max_tokens": length}
            _status, whole = await client.post(MESSAGES, body)
            assert whole["stop_reason"] == "max_tokens" and whole["stop_sequence"] is None
            events = await events_of(client, body)
            assert events[-2]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
        assert whole["content"][-1]["input"] == {}  # what was cut off is no input

    serve(scenario, **HERMES)


def test_a_stop_sequence_is_told(serve):
    async def scenario(client, engine):
        engine.stop_reason = "END"
        status, message = await client.post(MESSAGES, {**ASKS, "stop_sequences": ["END", "STOP"]})
        assert (status, message["stop_reason"], message["stop_sequence"]) == (200, "stop_sequence", "END")
        assert engine.params[0].stop == ["END", "STOP"]
        events = await events_of(client, ASKS)
        assert events[-2]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "END"}

    serve(scenario)


def test_blocks_become_chat_messages(serve):
    async def scenario(client, engine):
        engine.max_model_len = 1000
        blocks = [
            {"role": "user", "content": [{"type": "text", "text": "Weather?", "cache_control": {"type": "ephemeral"}}]},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "x"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "Rome"}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "warm"}]},
                {"type": "tool_result", "tool_use_id": "t2", "is_error": True},
                {"type": "text", "text": "And?"}]},
        ]  # fmt: skip
        status, message = await client.post(MESSAGES, {**ASKS, "messages": blocks})
        assert status == 200, message
        function = {"name": "get_weather", "arguments": '{"city":"Rome"}'}
        assert engine.rendered[0][0] == [
            {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "I look."}], "reasoning": "Hm.",
             "tool_calls": [{"id": "t1", "type": "function", "function": function}]},
            {"role": "tool", "tool_call_id": "t1", "content": [{"type": "text", "text": "warm"}]},
            {"role": "tool", "tool_call_id": "t2", "content": ""},
            {"role": "user", "content": [{"type": "text", "text": "And?"}]},
        ]  # fmt: skip

    serve(scenario)


def test_an_answer_goes_on_where_the_client_began_it(serve):
    async def scenario(client, engine):
        messages = [*ASKS["messages"], {"role": "assistant", "content": "I"}]
        assert (await client.post(MESSAGES, {**ASKS, "messages": messages}))[0] == 200
        options = engine.rendered[0][1]
        assert (options["continue_final_message"], options["add_generation_prompt"]) == (True, False)

    serve(scenario)


def test_thinking_is_switched_by_the_template(serve):
    async def scenario(client, engine):
        for kind, expected in (("adaptive", True), ("disabled", False)):
            await client.post(MESSAGES, {**ASKS, "thinking": {"type": kind}, "output_config": {"effort": "low"}})
            options = engine.rendered[-1][1]["chat_template_kwargs"]
            assert options == {"enable_thinking": expected, "reasoning_effort": "low"}

    serve(scenario)


@pytest.mark.parametrize(
    ("change", "status", "kind", "text"),
    [
        ({"model": "other"}, 404, "not_found_error", "does not exist"),
        ({"model": None}, 400, "invalid_request_error", "body.model"),
        ({"max_tokens": 0}, 400, "invalid_request_error", "max_tokens"),
        ({"max_tokens": None}, 400, "invalid_request_error", "max_tokens"),
        ({"messages": []}, 400, "invalid_request_error", "must not be empty"),
        ({"messages": [{"role": "robot", "content": "a"}]}, 400, "invalid_request_error", "robot"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, 400, "invalid_request_error",
         "'image'"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f"}]}]}, 400,
         "invalid_request_error", "`input` must be an object"),
        ({"messages": [{"role": "user", "content": "a" * 99}]}, 400, "invalid_request_error", "maximum context"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, 400, "invalid_request_error", "bash_20250124"),
        ({"tools": [{"name": "f"}]}, 400, "invalid_request_error", "input_schema"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, 400, "invalid_request_error", "`name` is needed"),
        ({"tool_choice": {"type": "any"}}, 400, "invalid_request_error", "`tools` must be set"),
        ({"thinking": {"type": "enabled", "budget_tokens": 10}}, 400, "invalid_request_error", "at least 1024"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, 400, "invalid_request_error", "less than"),
        ({"mcp_servers": [{"name": "a"}]}, 400, "invalid_request_error", "mcp_servers"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_a_wrong_request_is_answered_in_anthropics_form(serve, change, status, kind, text, stream):
    async def scenario(client, _engine):
        found, answer = await client.post(MESSAGES, {**ASKS, **change, "stream": stream})
        assert (found, set(answer)) == (status, {"type", "error"})
        assert (answer["type"], answer["error"]["type"]) == ("error", kind)
        assert text in answer["error"]["message"]

    serve(scenario)


def test_other_failures_have_anthropics_form_too(serve):
    async def scenario(client, engine):
        status, answer = await client.post(MESSAGES, ASKS)
        assert (status, answer["error"]["type"]) == (401, "authentication_error")
        key = {"x-api-key": "k"}
        engine.failure = RuntimeError("secret")
        status, answer = await client.post(MESSAGES, ASKS, headers=key)
        assert (status, answer["error"]["type"]) == (500, "api_error") and "secret" not in str(answer)
        status, answer = await client.get(MESSAGES, headers=key)
        assert (status, answer["error"]["type"]) == (405, "invalid_request_error")

    serve(scenario, api_keys=("k",))


def test_a_failure_after_the_first_event_is_an_error_event(serve):
    async def scenario(client, engine):
        engine.failure_after = (2, RuntimeError("secret"))
        events = await events_of(client, ASKS)
        assert events[-1]["type"] == "error" and events[-1]["error"]["type"] == "api_error"
        engine.failure_after = None
        engine.finish_reason = "abort"  # by a server that ends
        events = await events_of(client, ASKS)
        assert events[-1]["error"]["type"] == "overloaded_error"
        assert (await client.post(MESSAGES, ASKS))[0] == 503

    serve(scenario)


def test_tokens_are_counted_without_an_answer(serve):
    async def scenario(client, engine):
        body = {"model": "tiny/model", "messages": ASKS["messages"], "system": "Be kind.", "tools": [TOOL]}
        status, answer = await client.post(COUNT, body)
        assert (status, answer) == (200, {"input_tokens": len("<system>Be kind.<user>hi")})
        assert not engine.prompts and engine.rendered[0][1]["tools"]
        status, answer = await client.post(COUNT, {"model": "tiny/model", "messages": []})
        assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
        status, answer = await client.post(COUNT, {"model": "other", "messages": ASKS["messages"]})
        assert (status, answer["error"]["type"]) == (404, "not_found_error")

    serve(scenario)
