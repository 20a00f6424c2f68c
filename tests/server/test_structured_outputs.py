"""What requests ask of the form of an answer, as it reaches the engine, and how such answers are told."""

from __future__ import annotations

import json

import pytest

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "time"}},
]
NAMED = {"type": "function", "function": {"name": "weather"}}
TAG = {
    "type": "structural_tag", "triggers": ["<f"], "structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}],
}  # fmt: skip
R1 = {"reasoning_parser": "deepseek_r1"}


def constraint(engine):
    return engine.params[-1].structured_outputs


@pytest.mark.parametrize(("fields", "name", "value"), [
    ({"response_format": {"type": "json_object"}}, "json_object", True),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}},
     "json", SCHEMA),
    ({"response_format": TAG}, "structural_tag", TAG),
    ({"structured_outputs": {"json": SCHEMA}}, "json", SCHEMA),
    ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, "json", SCHEMA),
    ({"structured_outputs": {"regex": "a+", "json": None}}, "regex", "a+"),
    ({"structured_outputs": {"choice": ["a", "b"]}}, "choice", ["a", "b"]),
    ({"structured_outputs": {"grammar": "start: \"a\""}}, "grammar", 'start: "a"'),
    ({"structured_outputs": {"disable_any_whitespace": True}, "response_format": {"type": "json_object"}},
     "json_object", True),
])  # fmt: skip
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_each_spelling_reaches_the_engine(serve, path, fields, name, value):
    async def scenario(client, engine):
        status, body = await client.post(path, {"messages": USER, "prompt": "hi", **fields})
        assert status == 200, body
        found = constraint(engine)
        given = getattr(found, name)
        assert found.given == [name]
        assert (json.loads(given) if isinstance(value, dict) else given) == value
        assert found.disable_any_whitespace == bool("disable" in str(fields))

    serve(scenario)


@pytest.mark.parametrize("fields", [
    {"response_format": {"type": "text"}}, {"structured_outputs": {}}, {"structured_outputs": None},
    {"structured_outputs": {"json_object": False}}, {"thinking_token_budget": -1},
])  # fmt: skip
def test_what_asks_for_nothing_is_nothing(serve, fields):
    async def scenario(client, engine):
        assert (await client.post(CHAT, {"messages": USER, **fields}))[0] == 200
        assert not engine.params[-1].is_constrained

    serve(scenario)


@pytest.mark.parametrize(("fields", "param"), [
    ({"response_format": {"type": "json"}}, "response_format"),
    ({"response_format": {}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "response_format"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs"),
    ({"structured_outputs": {"choice": [1]}}, "structured_outputs"),
    ({"structured_outputs": {"regex": 5}}, "structured_outputs"),
    ({"structured_outputs": {"regexp": "a"}}, "structured_outputs"),
    ({"structured_outputs": {"disable_any_whitespace": "yes", "json_object": True}}, "structured_outputs"),
    ({"structured_outputs": ["a"]}, "body.structured_outputs"),
    ({"thinking_token_budget": -2}, "thinking_token_budget"),
    ({"thinking_token_budget": "5"}, "body.thinking_token_budget"),
    ({"tools": [{**TOOLS[0]}, {"type": "function", "function": {"name": "g", "parameters": {"$defs": [1]}}}],
      "tool_choice": "required"}, "tools"),
])  # fmt: skip
def test_wrong_constraints_are_refused_by_name(serve, fields, param):
    async def scenario(client, engine):
        status, body = await client.post(CHAT, {"messages": USER, **fields})
        assert (status, body["error"]["param"]) == (400, param), body
        assert not engine.params

    serve(scenario)


@pytest.mark.parametrize("settings", [{}, {"enable_auto_tool_choice": True, "tool_call_parser": "hermes"}])
def test_required_calls_are_a_list_that_a_schema_enforces(serve, joined, said, settings):
    calls = [{"name": "weather", "parameters": {"city": "Paris"}}, {"name": "time", "parameters": {}}]

    async def scenario(client, engine):
        engine.answer = json.dumps(calls)
        engine.max_model_len = 1000
        asks = {"messages": USER, "tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}}
        status, body = await client.post(CHAT, asks)
        assert status == 200, body
        (choice,) = body["choices"]
        assert said(choice["message"]) == {"calls": [("weather", '{"city": "Paris"}'), ("time", "{}")]}
        assert choice["finish_reason"] == "tool_calls"
        schema = json.loads(constraint(engine).json)
        assert schema["type"] == "array" and schema["minItems"] == 1 and "maxItems" not in schema
        assert [each["properties"]["name"]["enum"] for each in schema["items"]["anyOf"]] == [["weather"], ["time"]]
        for engine.tokens_per_output in (1, 3, 50):
            message = joined(await client.events(CHAT, asks))
            assert said(message) == said(choice["message"]) and message["finish_reason"] == "tool_calls"
        await client.post(CHAT, {**asks, "parallel_tool_calls": False})
        assert json.loads(constraint(engine).json)["maxItems"] == 1

    serve(scenario, **settings)


def test_a_named_call_is_its_arguments(serve, joined, said):
    async def scenario(client, engine):
        engine.answer = '{"city": "Paris"}'
        asks = {"messages": USER, "tools": TOOLS, "tool_choice": NAMED}
        status, body = await client.post(CHAT, asks)
        assert status == 200, body
        (choice,) = body["choices"]
        assert said(choice["message"]) == {"calls": [("weather", '{"city": "Paris"}')]}
        assert choice["finish_reason"] == "stop"
        assert json.loads(constraint(engine).json) == CITY
        assert said(joined(await client.events(CHAT, asks))) == said(choice["message"])

    serve(scenario)


def test_calls_in_another_form_than_json_cannot_be_required(serve):
    async def scenario(client, engine):
        status, body = await client.post(CHAT, {"messages": USER, "tools": TOOLS, "tool_choice": "required"})
        assert (status, body["error"]["param"]) == (400, "tool_choice") and not engine.params

    serve(scenario, enable_auto_tool_choice=True, tool_call_parser="openai")


def test_constraints_begin_behind_the_reasoning(serve):
    async def scenario(client, engine):
        engine.tokenizer.special = ["<think>", "</think>"]
        for fields in ({"structured_outputs": {"regex": "a"}}, {"thinking_token_budget": 7}):
            assert (await client.post(CHAT, {"messages": USER, **fields}))[0] == 200
            span = engine.params[-1].reasoning
            assert (span.ends, span.starts, span.barred) == (["</think>"], ["<think>"], [])
        assert engine.params[-1].thinking_token_budget == 7
        await client.post(CHAT, {"messages": USER})
        assert engine.params[-1].reasoning is None, "nobody waits for its end"
        engine.prompt_end = "<think></think>"
        both = {"structured_outputs": {"regex": "a"}, "thinking_token_budget": 7}
        await client.post(CHAT, {"messages": USER, **both})
        params = engine.params[-1]
        assert (params.reasoning, params.thinking_token_budget) == (None, None), "the prompt has ended it already"
        assert params.structured_outputs.regex == "a"

    serve(scenario, **R1)


def test_the_beginning_of_a_call_is_barred_from_reasoning_before_a_constraint(serve):
    async def scenario(client, engine):
        engine.tokenizer.special = ["<think>", "</think>", "<tool_call>"]
        await client.post(CHAT, {"messages": USER, "structured_outputs": {"regex": "a"}})
        assert engine.params[-1].reasoning.barred == ["<tool_call>"]

    serve(scenario, reasoning_parser="qwen3")


def test_harmony_answers_cannot_be_constrained_yet(serve):
    async def scenario(client, _engine):
        for fields, param in (
            ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
            ({"thinking_token_budget": 7}, "thinking_token_budget"),
        ):
            status, body = await client.post(CHAT, {"messages": USER, **fields})
            assert (status, body["error"]["param"]) == (400, param)

    serve(scenario, reasoning_parser="openai_gptoss")
