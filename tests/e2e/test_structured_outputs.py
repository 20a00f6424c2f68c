"""Structured answers over HTTP from a real engine; hostile grammars are refused in time and hold up nobody."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import time
from pathlib import Path

import jsonschema
import pytest

import omni_engine
from omni_engine import EngineArgs
from omni_engine.server.settings import ServerSettings

DEMO = Path(omni_engine.__file__).parent / "models" / "demo" / "deepseek"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "Say something."}]
SCHEMA = {
    "type": "object", "properties": {"a": {"type": "integer", "maximum": 99, "minimum": 0}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"], "additionalProperties": False,
}  # fmt: skip
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {
        "type": "object", "properties": {key: {"enum": values}}, "required": [key], "additionalProperties": False}}}
    for name, key, values in (("weather", "city", ["Paris", "Rome"]), ("sail", "knots", [3, 5]))
]  # fmt: skip


@pytest.fixture(scope="module")
def run(servers):
    """`run(scenario, name)`: a coroutine over a client of the server "plain" or "thinking"; they have one engine."""
    args = EngineArgs(model=str(DEMO), dtype="float32", max_model_len=256, max_num_seqs=8, enforce_eager=True)
    settings = {
        "plain": ServerSettings(model="demo"),
        "thinking": ServerSettings(model="demo", reasoning_parser="deepseek_r1"),
    }
    with servers(args, settings) as serve:
        yield lambda scenario, name="plain": serve(name, scenario, 120)


async def post(session, path, **body):
    async with session.post(path, json={"temperature": 1.2, "seed": 3, **body}) as response:
        return response.status, await response.json()


async def stream(session, path, **body):
    """The chunks."""
    async with session.post(path, json={"temperature": 1.0, "seed": 3, "stream": True, **body}) as response:
        assert response.status == 200, await response.text()
        lines = (await response.text()).splitlines()
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


def test_answers_and_calls_are_what_was_asked_for(run):
    async def scenario(session, _engine):
        tight = {"disable_any_whitespace": True}
        form = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
        status, body = await post(session, CHAT, messages=USER, max_tokens=60, n=3, response_format=form,
                                  structured_outputs=tight)  # fmt: skip
        assert status == 200, body
        texts = [choice["message"]["content"] for choice in body["choices"]]
        assert len(texts) == 3 and [choice["finish_reason"] for choice in body["choices"]] == ["stop"] * 3
        for text in texts:
            jsonschema.validate(json.loads(text), SCHEMA)
        chunks = await stream(session, COMPLETIONS, prompt="The", max_tokens=60, logprobs=2,
                              structured_outputs={"regex": "[a-f]{12}(x|yz)"})  # fmt: skip
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        assert len(chunks) > 1 and re.fullmatch("[a-f]{12}(x|yz)", text)

        asks = {"messages": USER, "tools": TOOLS, "max_tokens": 200, "structured_outputs": tight}
        bias = {"logit_bias": {"65": 20.0}}  # "]": so that the list of calls ends some time
        status, body = await post(session, CHAT, tool_choice="required", **asks, **bias)
        assert status == 200, body
        assert body["choices"][0]["finish_reason"] == "tool_calls", body
        for call in body["choices"][0]["message"]["tool_calls"]:
            schema = next(
                t["function"]["parameters"] for t in TOOLS if t["function"]["name"] == call["function"]["name"]
            )
            jsonschema.validate(json.loads(call["function"]["arguments"]), schema)
        named = {"type": "function", "function": {"name": "sail"}}
        chunks = await stream(session, CHAT, tool_choice=named, **asks)
        pieces = [c["choices"][0]["delta"].get("tool_calls", []) for c in chunks if c["choices"]]
        functions = [piece["function"] for calls in pieces for piece in calls]
        assert [function["name"] for function in functions if function.get("name")] == ["sail"]
        arguments = json.loads("".join(function.get("arguments", "") for function in functions))
        jsonschema.validate(arguments, TOOLS[1]["function"]["parameters"])

    run(scenario)


@pytest.mark.parametrize("budget", [0, 6])
def test_a_constraint_follows_the_reasoning_that_a_budget_ends(run, budget):
    async def scenario(session, engine):
        asks = {"messages": USER, "max_tokens": 60, "structured_outputs": {"choice": ["yes", "no"]}}
        status, body = await post(session, CHAT, thinking_token_budget=budget, return_token_ids=True, **asks)
        assert status == 200, body
        (choice,) = body["choices"]
        message = choice["message"]
        assert message["content"] in ("yes", "no") and choice["finish_reason"] == "stop"
        closing = engine.tokenizer.encode("</think>", add_special_tokens=False)
        assert choice["token_ids"][budget : budget + len(closing)] == closing
        assert bool(message["reasoning"]) == bool(budget)
        _status, body = await post(session, CHAT, **asks)
        assert body["choices"][0]["message"]["content"] is None, "without a budget this model thinks for ever"

    run(scenario, "thinking")


def test_a_thinking_budget_needs_a_reasoning_parser(run):
    async def scenario(session, _engine):
        status, body = await post(session, CHAT, messages=USER, thinking_token_budget=3)
        assert (status, body["error"]["param"]) == (400, "thinking_token_budget")

    run(scenario)


def hostile():
    """Grammars that cost too much, or more than they should: status, and what must be true of an answer."""
    deep = '{"type":"object","properties":{"a":' * 5000 + "{}" + "}}" * 5000
    return {
        "nested repetition": ({"regex": "(a+)+$"}, 200),
        "5000 levels, as text": ({"json": deep}, 400),
        "a cycle": ({"json": {"$ref": "#"}}, 400),
        "a longer cycle": ({"json": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
                                     "$ref": "#/$defs/a"}}, 400),
        "10000 values": ({"json": {"enum": [f"value {index}" for index in range(10_000)]}}, 400),
        "10000 choices": ({"choice": [f"value {index}" for index in range(10_000)]}, 400),
        "6000 properties": ({"json": {"type": "object", "properties": {f"p{i}": {} for i in range(6000)}}}, 400),
        "deep parentheses": ({"regex": "(" * 50_000 + "a" + ")" * 50_000}, 400),
        "no expression": ({"regex": "["}, 400),
        "look-behind": ({"regex": "(?<=a)b"}, 400),
        "an unknown type": ({"json": {"type": "banana"}}, 400),
        "no grammar": ({"grammar": "sum of numbers"}, 400),
    }  # fmt: skip


def test_hostile_grammars_are_refused_while_others_stream(run):
    async def scenario(session, engine):
        assert (await post(session, COMPLETIONS, prompt="The", structured_outputs={"regex": "a"}))[0] == 200
        checker = engine._front.grammars
        num_killed = checker.num_killed
        streaming = asyncio.create_task(
            stream(session, COMPLETIONS, prompt="The", max_tokens=240, ignore_eos=True, stream_options={})
        )
        told = {}
        for name, (constraint, expected) in hostile().items():
            start = time.monotonic()
            status, body = await post(session, CHAT, messages=USER, max_tokens=20, structured_outputs=constraint)
            told[name] = time.monotonic() - start
            assert status == expected, (name, body)
            if status == 400:
                assert body["error"]["param"] == "structured_outputs", body
            else:
                assert re.fullmatch("a+", body["choices"][0]["message"]["content"])
        assert checker.num_killed == num_killed + 1, "only one of them is too slow, and costs its process"
        print({name: round(seconds, 2) for name, seconds in told.items()})
        assert max(told.values()) < 10, told  # 1 s for the process, and what the machine adds
        chunks = await streaming
        assert sum(len(chunk["choices"]) for chunk in chunks) == 240
        asked = checker.num_checked
        for constraint, expected in hostile().values():
            assert (await post(session, CHAT, messages=USER, max_tokens=2, structured_outputs=constraint))[
                0
            ] == expected
        assert checker.num_checked == asked, "verdicts are remembered"
        status, body = await post(session, CHAT, messages=USER, structured_outputs={"choice": ["still here"]})
        assert body["choices"][0]["message"]["content"] == "still here"

    run(scenario)


def slow(number):
    """Many different grammars that each take far longer than they may."""
    return {"json": {"type": "object", "properties": {f"p{number} {index}": {} for index in range(6000)}}}


def test_several_hostile_grammars_at_once_hold_up_neither_streams_nor_an_honest_one(run):
    async def scenario(session, engine):
        assert (await post(session, COMPLETIONS, prompt="The", structured_outputs={"regex": "a"}))[0] == 200

        async def timed(constraint):
            start = time.monotonic()
            body = {"messages": USER, "max_tokens": 8, "temperature": 0, "structured_outputs": constraint}
            async with session.post(CHAT, json=body) as response:
                told = await response.json()
                return response.status, told, response.headers.get("Retry-After"), time.monotonic() - start

        async def all_at_once(num_slow, first):
            started = asyncio.Event()

            async def streamed():
                started.set()
                return await stream(session, COMPLETIONS, prompt="The", max_tokens=100, ignore_eos=True)

            streaming = asyncio.create_task(streamed())
            await started.wait()
            slow_ones = [asyncio.create_task(timed(slow(first + number))) for number in range(num_slow)]
            await asyncio.sleep(0.1)
            honest = await timed({"choice": [f"honest {first}"]})
            chunks = await streaming
            assert sum(len(chunk["choices"]) for chunk in chunks) == 100
            return await asyncio.gather(*slow_ones), honest

        # As many as leave a place: each has its second and then its 400; the honest one does not wait for them.
        told, honest = await all_at_once(3, 1000)
        assert [status for status, *_ in told] == [400] * 3
        assert honest[0] == 200 and honest[1]["choices"][0]["message"]["content"] == "honest 1000"
        assert honest[3] < 10
        print("3 slow:", [round(seconds, 2) for *_, seconds in told], "honest:", round(honest[3], 2))
        # More than there are places: who has had its share makes room, and may come again.
        told, honest = await all_at_once(8, 2000)
        assert {status for status, *_ in told} <= {400, 503}
        assert honest[0] == 200 and honest[3] < 10, honest
        for status, body, retry_after, seconds in told:
            assert seconds < 10
            assert (retry_after == "1") == (status == 503)
            if status == 503:
                assert body["error"]["code"] == 503 and body["error"]["type"] == "Service Unavailable"
        print("8 slow:", [(status, round(seconds, 2)) for status, *_, seconds in told], "honest:", round(honest[3], 2))
        for number, (status, *_) in enumerate(told):
            if status == 503:  # alone, it gets its verdict
                assert (await timed(slow(2000 + number)))[0] == 400
                break

    run(scenario)


def test_others_stream_on_while_a_grammar_takes_its_time(run):
    """The check is stopped on purpose: it never answers, and is given up after its second."""

    async def scenario(session, engine):
        assert (await post(session, COMPLETIONS, prompt="The", structured_outputs={"regex": "a"}))[0] == 200
        checker = engine._front.grammars
        os.kill(checker._process.pid, signal.SIGSTOP)
        waiting = asyncio.create_task(post(session, COMPLETIONS, prompt="The", structured_outputs={"regex": "b"}))
        await asyncio.sleep(0.05)
        chunks = await stream(session, COMPLETIONS, prompt="The", max_tokens=10, ignore_eos=True)
        assert len(chunks) >= 10
        status, body = await waiting
        assert status == 400 and "too long" in body["error"]["message"]
        assert (await post(session, COMPLETIONS, prompt="The", structured_outputs={"regex": "c"}))[0] == 200

    run(scenario)
