"""The Responses API: what chat says, as items and typed events; the store; what is made in the background."""

from __future__ import annotations

import asyncio
import json

import pytest

RESPONSES = "/v1/responses"
TOOL = {"type": "function", "name": "get_weather", "parameters": {"type": "object", "properties": {"city": {}}}}
HERMES = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes", "reasoning_parser": "deepseek_r1"}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
EVERYTHING = f"<think>Let me see.</think>I look.{CALL}{CALL}"
ENDINGS = {
    "response.completed": "response.created",
    "response.output_item.done": "response.output_item.added",
    "response.content_part.done": "response.content_part.added",
    "response.output_text.done": "response.output_text.delta",
    "response.reasoning_text.done": "response.reasoning_text.delta",
    "response.function_call_arguments.done": "response.function_call_arguments.delta",
}


async def events_of(client, body, method="POST", path=RESPONSES):
    """The events of a stream, each named by its type, numbered from the first one's number on."""
    options = {"json": {"stream": True, **body}} if method == "POST" else {}
    async with client.session.request(method, client.address + path, **options) as response:
        assert response.status == 200, await response.text()
        assert response.content_type == "text/event-stream"
        text = await response.text()
    assert text.endswith("\n\n") and "[DONE]" not in text
    events = []
    for block in text[:-2].split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    first = events[0]["sequence_number"]
    assert [event["sequence_number"] for event in events] == list(range(first, first + len(events)))
    return events


def check_order(events):
    """Each end has its beginning, nested; the fields of an item's events are its own."""
    assert events[0]["type"] == "response.created" and events[1]["type"] == "response.in_progress"
    stack, item = [], None
    for event in events:
        kind = event["type"]
        if kind in ENDINGS:
            assert stack.pop() == ENDINGS[kind], kind
        elif kind in ENDINGS.values() and not (kind.endswith("delta") and stack[-1] == kind):
            stack.append(kind)
        if kind == "response.output_item.added":
            item = event
        elif item is not None and "item_id" in event:
            assert (event["item_id"], event["output_index"]) == (item["item"]["id"], item["output_index"])
    assert not stack


def rebuilt(events):
    """The output, from nothing but the events before the last."""
    items = []
    for event in events[:-1]:
        kind = event["type"]
        if kind == "response.output_item.added":
            assert event["output_index"] == len(items)
            items.append(event["item"])
        elif kind == "response.content_part.added":
            items[event["output_index"]]["content"].append(event["part"])
        elif kind in ("response.output_text.delta", "response.reasoning_text.delta"):
            items[event["output_index"]]["content"][event["content_index"]]["text"] += event["delta"]
        elif kind == "response.function_call_arguments.delta":
            items[event["output_index"]]["arguments"] += event["delta"]
        elif kind == "response.output_item.done":
            assert items[event["output_index"]] | {"status": event["item"]["status"]} == event["item"]
            items[event["output_index"]]["status"] = event["item"]["status"]
    return items


def without_ids(output):
    return [{name: value for name, value in item.items() if name not in ("id", "call_id")} for item in output]


def test_a_whole_response_tells_text_usage_and_what_was_asked_for(serve):
    async def scenario(client, engine):
        body = {"input": "hi", "instructions": "Be kind.", "temperature": 0.5, "max_output_tokens": 9, "metadata": {}}
        status, response = await client.post(RESPONSES, body)
        assert status == 200
        assert response["id"].startswith("resp_") and response["object"] == "response"
        assert (response["status"], response["error"], response["incomplete_details"]) == ("completed", None, None)
        (message,) = response["output"]
        assert message["id"].startswith("msg_") and message["status"] == "completed"
        assert message["content"] == [{"type": "output_text", "text": "hello", "annotations": [], "logprobs": []}]
        prompt = "<system>Be kind.<user>hi"
        assert response["usage"] == {
            "input_tokens": len(prompt), "output_tokens": 5, "total_tokens": len(prompt) + 5,
            "input_tokens_details": {"cached_tokens": 2, "cache_write_tokens": 0},
            "output_tokens_details": {"reasoning_tokens": 0},
        }  # fmt: skip
        told = {name: response[name] for name in ("temperature", "max_output_tokens", "instructions", "text", "tools")}
        assert told == {
            "temperature": 0.5, "max_output_tokens": 9, "instructions": "Be kind.",
            "text": {"format": {"type": "text"}}, "tools": [],
        }  # fmt: skip
        assert engine.prompts[0]["prompt"] == prompt and engine.params[0].max_tokens == 9

    serve(scenario)


def test_a_stream_says_what_the_whole_response_says_however_it_is_cut(serve):
    async def scenario(client, engine):
        engine.answer, engine.max_model_len = EVERYTHING, 1000
        engine.tokenizer.special = ["<think>", "</think>"]
        body = {"input": "hi", "tools": [TOOL]}
        _status, whole = await client.post(RESPONSES, body)
        kinds = [item["type"] for item in whole["output"]]
        assert kinds == ["reasoning", "message", "function_call", "function_call"]
        assert whole["output"][0]["content"] == [{"type": "reasoning_text", "text": "Let me see."}]
        assert json.loads(whole["output"][2]["arguments"]) == {"city": "Paris"}
        assert whole["output"][2]["call_id"] != whole["output"][3]["call_id"]
        assert whole["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
        for engine.tokens_per_output in (1, 2, 5, 17, 1000):
            events = await events_of(client, body)
            check_order(events)
            last = events[-1]["response"]
            assert rebuilt(events) == last["output"]
            assert without_ids(last["output"]) == without_ids(whole["output"])
            assert last["usage"] == whole["usage"] and last["status"] == "completed"
            assert events[0]["response"]["output"] == [] and events[0]["response"]["usage"] is None

    serve(scenario, **HERMES)


def test_an_answer_that_is_cut_is_incomplete(serve):
    async def scenario(client, engine):
        engine.answer, engine.max_model_len = EVERYTHING, 1000
        for length, kind in ((12, "reasoning"), (30, "message"), (90, "function_call")):
            body = {"input": "hi", "tools": [TOOL], "max_output_tokens": length}
            events = await events_of(client, body)
            _status, whole = await client.post(RESPONSES, body)
            for response in (events[-1]["response"], whole):
                assert response["status"] == "incomplete"
                assert response["incomplete_details"] == {"reason": "max_output_tokens"}
                assert (response["output"][-1]["type"], response["output"][-1]["status"]) == (kind, "incomplete")
            assert events[-1]["type"] == "response.incomplete"
            assert without_ids(whole["output"]) == without_ids(events[-1]["response"]["output"])

    serve(scenario, **HERMES)


def test_an_answer_of_nothing_is_an_empty_message(serve):
    async def scenario(client, engine):
        engine.answer, engine.tokenizer.special = "<eos>", ["<eos>"]
        events = await events_of(client, {"input": "hi"})
        check_order(events)
        (message,) = events[-1]["response"]["output"]
        assert message["content"][0]["text"] == ""

    serve(scenario)


def test_the_items_of_a_conversation_become_chat_messages(serve):
    async def scenario(client, engine):
        items = [
            {"role": "developer", "content": [{"type": "input_text", "text": "Brief."}]},
            {"type": "message", "role": "user", "content": "Weather?"},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
            {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
             "content": [{"type": "output_text", "text": "I look."}]},
            {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": "{}"},
            {"type": "function_call", "call_id": "c2", "name": "get_weather", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "warm"},
            {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "cold"}]},
            {"type": "reasoning", "summary": [], "encrypted_content": "xyz"},
            {"role": "assistant", "content": "Both."},
            {"role": "user", "content": "Why?"},
        ]  # fmt: skip
        engine.max_model_len = 1000
        status, response = await client.post(RESPONSES, {"input": items, "instructions": "Be kind."})
        assert status == 200, response
        calls = [
            {"id": name, "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}
            for name in ("c1", "c2")
        ]
        text = [{"type": "text", "text": "I look."}]
        assert engine.rendered[0][0] == [
            {"role": "system", "content": "Be kind."},
            {"role": "developer", "content": [{"type": "text", "text": "Brief."}]},
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": text, "reasoning": "Hm.", "tool_calls": calls},
            {"role": "tool", "tool_call_id": "c1", "content": "warm"},
            {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "cold"}]},
            {"role": "assistant", "content": "Both."},
            {"role": "user", "content": "Why?"},
        ]

    serve(scenario)


def test_the_fields_of_the_request_become_chats(serve):
    async def scenario(client, engine):
        body = {
            "input": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "status": "incomplete"}],
            "tools": [{**TOOL, "description": "D", "strict": True}],
            "reasoning": {"effort": "low"}, "truncation": "auto", "parallel_tool_calls": False,
            "top_k": 3, "stop": ["x"], "seed": 5, "chat_template_kwargs": {"a": 1}, "n": 4, "max_tokens": 1,
        }  # fmt: skip
        status, response = await client.post(RESPONSES, body)
        assert status == 200, response
        options = engine.rendered[0][1]
        assert options["tools"] == [
            {"type": "function", "function": {
                "name": "get_weather", "description": "D", "strict": True, "parameters": TOOL["parameters"]}}
        ]  # fmt: skip
        assert (options["continue_final_message"], options["add_generation_prompt"]) == (True, False)
        assert options["chat_template_kwargs"] == {"a": 1, "enable_thinking": True, "reasoning_effort": "low"}
        params = engine.params[0]
        assert (params.n, params.top_k, params.stop, params.seed, params.max_tokens) == (1, 3, ["x"], 5, None)
        assert params.truncate_prompt_tokens == -1
        assert response["reasoning"] == {"effort": "low", "summary": None} and response["truncation"] == "auto"
        assert response["tools"] == [{**TOOL, "description": "D", "strict": True}]

    serve(scenario, **HERMES)


def test_logprobs_belong_to_the_text_alone(serve):
    async def scenario(client, engine):
        engine.answer = "<think>ab</think>cd"
        body = {"input": "hi", "include": ["message.output_text.logprobs"], "top_logprobs": 2}
        for engine.tokens_per_output in (1, 2, 3, 5, 100):
            _status, response = await client.post(RESPONSES, body)
            found = response["output"][1]["content"][0]["logprobs"]
            assert [entry["token"] for entry in found] == ["c", "d"]
            assert all(len(entry["top_logprobs"]) == 2 for entry in found)
            events = await events_of(client, body)
            deltas = [event for event in events if event["type"] == "response.output_text.delta"]
            assert [entry for event in deltas for entry in event["logprobs"]] == found
            assert response["output"][0] == {**response["output"][0], "content": [
                {"type": "reasoning_text", "text": "ab"}]}  # fmt: skip
        _status, response = await client.post(RESPONSES, {"input": "hi", "top_logprobs": 2})
        assert response["output"][1]["content"][0]["logprobs"] == [] and engine.params[-1].logprobs is None

    serve(scenario, reasoning_parser="deepseek_r1")


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "body.input"),
        ({"input": []}, 400, "input"),
        ({"input": [{"role": 1, "content": "a"}]}, 400, "body.input.0.role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, 400, "body.input.0.content.0"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, 400, "body.input.0"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, 400, "body.input.0.call_id"),
        ({"input": [{"type": "reasoning", "content": ["a"]}]}, 400, "body.input.0.content"),
        ({"input": "a", "prompt": {"id": "x"}}, 400, "prompt"),
        ({"input": "a", "conversation": "x"}, 400, "conversation"),
        ({"input": "a", "background": True, "store": False}, 400, "background"),
        ({"input": "a", "include": ["all"]}, 400, "include"),
        ({"input": "a", "top_logprobs": -1}, 400, "top_logprobs"),
        ({"input": "a", "tools": [{"type": "web_search"}]}, 400, "body.tools.0"),
        ({"input": "a", "tool_choice": "required"}, 400, "tool_choice"),
        ({"input": "a", "tool_choice": {"type": "file_search"}}, 400, "tool_choice"),
        ({"input": "a", "text": {"format": {"type": "json_schema"}}, "structured_outputs": {"a": 1}}, 400,
         "structured_outputs"),
        ({"input": "a", "metadata": {"a": 1}}, 400, "body.metadata[...]"),
        ({"input": "a", "reasoning": {"effort": "much"}}, 400, "body.reasoning.effort"),
        ({"input": "a", "previous_response_id": "resp_x"}, 404, "previous_response_id"),
        ({"input": "a", "model": "other"}, 404, "model"),
        ({"input": "a" * 99}, 400, "input_tokens"),
        ({"input": "a", "temperature": 9}, 400, "temperature"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_a_wrong_request_is_answered_with_its_field(serve, body, status, param, stream):
    async def scenario(client, _engine):
        found, answer = await client.post(RESPONSES, {**body, "stream": stream})
        assert found == status, answer
        if param != "body.metadata[...]":
            assert answer["error"]["param"] == param

    serve(scenario)


def test_a_stored_response_is_found_continued_and_forgotten(serve):
    async def scenario(client, engine):
        engine.answer, engine.max_model_len = "I am Ada.", 500
        _status, first = await client.post(RESPONSES, {"input": "Who?", "instructions": "Lie."})
        assert await client.get(f"{RESPONSES}/{first['id']}") == (200, first)
        second = (await events_of(client, {"input": "Again?", "previous_response_id": first["id"]}))[-1]["response"]
        assert engine.rendered[-1][0] == [  # without the earlier instructions
            {"role": "user", "content": "Who?"},
            {"role": "assistant", "content": [{"type": "text", "text": "I am Ada."}]},
            {"role": "user", "content": "Again?"},
        ]
        assert (await client.get(f"{RESPONSES}/{second['id']}"))[1] == second
        _status, items = await client.get(f"{RESPONSES}/{second['id']}/input_items?order=asc&limit=2")
        assert [item["role"] for item in items["data"]] == ["user", "assistant"] and items["has_more"] is True
        assert items["data"][0]["content"] == [{"type": "input_text", "text": "Who?"}]
        path = f"{RESPONSES}/{second['id']}/input_items?order=asc&after={items['last_id']}"
        _status, rest = await client.get(path)
        assert [item["content"][0]["text"] for item in rest["data"]] == ["Again?"] and rest["has_more"] is False
        assert (await client.get(f"{RESPONSES}/{second['id']}/input_items?limit=x"))[0] == 400
        async with client.session.delete(client.address + f"{RESPONSES}/{first['id']}") as response:
            assert (await response.json())["deleted"] is True
        status, body = await client.get(f"{RESPONSES}/{first['id']}")
        assert (status, body["error"]["message"]) == (404, f"Response with id '{first['id']}' not found.")
        # What was built on it knows it still.
        await client.post(RESPONSES, {"input": "?", "previous_response_id": second["id"]})
        assert len(engine.rendered[-1][0]) == 5

    serve(scenario)


def test_without_store_a_response_is_not_found(serve):
    async def scenario(client, _engine):
        for stream in (False, True):
            body = {"input": "hi", "store": False, "request_id": f"mine{stream}", "stream": stream}
            async with client.session.post(client.address + RESPONSES, json=body) as response:
                assert response.status == 200 and f"resp_mine{stream}" in await response.text()
            assert (await client.get(f"{RESPONSES}/resp_mine{stream}"))[0] == 404

    serve(scenario)


def test_an_id_is_not_given_twice(serve):
    async def scenario(client, _engine):
        body = {"input": "hi", "request_id": "resp_mine"}
        assert (await client.post(RESPONSES, body))[0] == 200
        status, answer = await client.post(RESPONSES, body)
        assert (status, answer["error"]["param"]) == (400, "request_id")

    serve(scenario)


async def settled(client, response_id, *, leaves=("queued", "in_progress")):
    for _ in range(200):
        _status, response = await client.get(f"{RESPONSES}/{response_id}")
        if response["status"] not in leaves:
            return response
        await asyncio.sleep(0.01)
    raise AssertionError("it did not happen within 2 s")


def test_what_is_made_in_the_background_is_asked_for_later(serve):
    async def scenario(client, engine):
        engine.pause = 0.01
        status, promise = await client.post(RESPONSES, {"input": "hi", "background": True})
        assert (status, promise["status"], promise["output"]) == (200, "queued", [])
        status, answer = await client.post(RESPONSES, {"input": "?", "previous_response_id": promise["id"]})
        assert (status, answer["error"]["param"]) == (400, "previous_response_id")
        response = await settled(client, promise["id"])
        assert response["status"] == "completed" and response["output"][0]["content"][0]["text"] == "hello"
        status, answer = await client.post(f"{RESPONSES}/{promise['id']}/cancel")
        assert (status, answer["error"]["type"]) == (400, "BadRequestError")

    serve(scenario)


def test_what_is_made_in_the_background_can_be_cancelled(serve):
    async def scenario(client, engine):
        engine.hangs = True
        _status, promise = await client.post(RESPONSES, {"input": "hi", "background": True})
        await settled(client, promise["id"], leaves=("queued",))
        status, response = await client.post(f"{RESPONSES}/{promise['id']}/cancel")
        assert (status, response["status"]) == (200, "cancelled")
        assert (response["output"][0]["status"], response["output"][0]["content"][0]["text"]) == ("incomplete", "h")
        assert not engine.running and engine.closed_early == [promise["id"]]
        assert await client.post(f"{RESPONSES}/{promise['id']}/cancel") == (200, response)
        assert await client.get(f"{RESPONSES}/{promise['id']}") == (200, response)

    serve(scenario)


def test_a_failure_in_the_background_is_told_in_the_response(serve):
    async def scenario(client, _engine):
        _status, promise = await client.post(RESPONSES, {"input": "x" * 99, "background": True})
        response = await settled(client, promise["id"])
        assert (response["status"], response["error"]["code"]) == ("failed", "invalid_prompt")
        assert "maximum context length" in response["error"]["message"]

    serve(scenario)


def test_a_synchronous_response_cannot_be_cancelled(serve):
    async def scenario(client, _engine):
        _status, response = await client.post(RESPONSES, {"input": "hi"})
        status, answer = await client.post(f"{RESPONSES}/{response['id']}/cancel")
        assert (status, answer["error"]["message"]) == (400, "Cannot cancel a synchronous response.")
        assert (await client.post(f"{RESPONSES}/resp_none/cancel"))[0] == 404

    serve(scenario)


def test_a_stream_in_the_background_goes_on_without_its_client_and_is_read_again(serve):
    async def scenario(client, engine):
        engine.pause = 0.02
        body = {"input": "hi", "background": True, "stream": True}
        async with client.session.post(client.address + RESPONSES, json=body) as response:
            line = await response.content.readuntil(b"\n\n")
        first = json.loads(line.split(b"data: ")[1])
        assert first["type"] == "response.created" and first["response"]["status"] == "queued"
        path = f"{RESPONSES}/{first['response']['id']}"
        events = await events_of(client, {}, "GET", path + "?stream=true")
        assert [event["type"] for event in events[:3]] == [
            "response.created", "response.queued", "response.in_progress"]  # fmt: skip
        assert events[-1]["type"] == "response.completed"
        assert events[-1]["response"]["output"][0]["content"][0]["text"] == "hello"
        assert await events_of(client, {}, "GET", path + "?stream=true&starting_after=4") == events[5:]
        async with client.session.get(client.address + path + "?stream=true&starting_after=999") as response:
            assert response.status == 200 and (await response.text()).startswith(":")
        assert (await client.get(path + "?stream=true&starting_after=x"))[0] == 400
        _status, other = await client.post(RESPONSES, {"input": "hi"})
        assert (await client.get(f"{RESPONSES}/{other['id']}?stream=true"))[0] == 400

    serve(scenario)


def test_a_failure_after_the_first_event_is_the_last_one(serve):
    async def scenario(client, engine):
        engine.failure_after = (2, RuntimeError("secret"))
        events = await events_of(client, {"input": "hi"})
        assert events[-1]["type"] == "response.failed"
        assert events[-1]["response"]["error"] == {
            "code": "server_error", "message": "Internal server error; the server's log says why."}  # fmt: skip
        assert (await client.post(RESPONSES, {"input": "hi"}))[0] == 200  # in one output, before the failure
        engine.failure_after = (0, RuntimeError("secret"))
        status, answer = await client.post(RESPONSES, {"input": "hi", "stream": True})
        assert (status, answer["error"]["type"]) == (500, "InternalServerError")

    serve(scenario)


def test_a_client_that_leaves_ends_its_response(serve):
    async def scenario(client, engine):
        engine.hangs = True
        async with client.session.post(client.address + RESPONSES, json={"input": "hi", "stream": True}) as response:
            await response.content.readuntil(b"\n\n")
        for _ in range(200):
            if not engine.running:
                break
            await asyncio.sleep(0.01)
        assert engine.closed_early == engine.request_ids

    serve(scenario)


def test_raw_messages_are_shown_where_they_are_asked_for(serve):
    async def scenario(client, _engine):
        _status, plain = await client.post(RESPONSES, {"input": "hi"})
        assert "input_messages" not in plain
        _status, response = await client.post(RESPONSES, {"input": "hi", "enable_response_messages": True})
        (sent,), (said,) = response["input_messages"], response["output_messages"]
        assert sent == {"type": "raw_message_tokens", "message": "<user>hi", "tokens": [ord(c) for c in "<user>hi"]}
        assert said["message"] == "hello" and len(said["tokens"]) == 5

    serve(scenario)
