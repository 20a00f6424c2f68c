"""Tool calls in chat completions: found in the model's text, whole and in streams, with tool_choice auto and none."""

from __future__ import annotations

import json

import pytest

from omni_engine.models.chat_template import ChatTemplate
from omni_engine.server.cli import main

CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "hi"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
ASKS = {"messages": USER, "tools": [TOOL]}
HERMES = {"enable_auto_tool_choice": True, "tool_call_parser": "hermes"}
PARIS, ROME = '{"city": "Paris"}', '{"city": "Rome"}'
TEXT = (
    f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>\n'
    f'<tool_call>\n{{"name": "get_weather", "arguments": {ROME}}}\n</tool_call>'
)
CALLS = [("get_weather", PARIS), ("get_weather", ROME)]


def test_a_whole_answer_of_calls_has_no_content(serve, said):
    async def scenario(client, engine):
        engine.answer = TEXT
        _status, body = await client.post(CHAT, ASKS)
        (choice,) = body["choices"]
        assert said(choice["message"]) == {"calls": CALLS}
        assert choice["message"]["content"] is None
        first, second = choice["message"]["tool_calls"]
        assert set(first) == {"id", "type", "function"} and first["type"] == "function"
        assert first["id"].startswith("chatcmpl-tool-") and first["id"] != second["id"]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("tool_calls", None)
        assert body["usage"]["completion_tokens_details"] is None
        assert engine.rendered[0][1]["tools"] == [TOOL]

    serve(scenario, **HERMES)


@pytest.mark.parametrize("text_delay", [0, 5])
@pytest.mark.parametrize("before", ["", "I look. "])
def test_a_stream_says_the_same_however_it_is_cut(serve, joined, said, before, text_delay):
    async def scenario(client, engine):
        engine.answer, engine.text_delay = before + TEXT, text_delay
        engine.max_model_len = 1000
        expected = {"calls": CALLS} if not before else {"content": before, "calls": CALLS}
        _status, body = await client.post(CHAT, ASKS)
        assert said(body["choices"][0]["message"]) == expected
        sizes = [*range(1, 40), *range(40, len(before + TEXT) + 2, 7)]
        for engine.tokens_per_output in sizes:
            message = joined(await client.events(CHAT, ASKS))
            assert said(message) == expected and message["finish_reason"] == "tool_calls"

    serve(scenario, **HERMES)


def test_arguments_come_in_pieces_while_they_are_written(serve):
    async def scenario(client, engine):
        engine.answer = TEXT
        events = await client.events(CHAT, ASKS)
        pieces = [piece for event in events[:-1] for piece in event["choices"][0]["delta"].get("tool_calls", [])]
        first = [piece for piece in pieces if piece["index"] == 0]
        assert first[0]["function"]["name"] == "get_weather" and len(first) > 5
        # What is no news makes no chunk, but for the last one, which tells the reason.
        assert [event["choices"][0]["delta"] for event in events[1:-1]].count({}) == 1

    serve(scenario, **HERMES)


def test_an_answer_without_calls_is_content(serve, joined, said):
    async def scenario(client, engine):
        engine.answer = "It is <b>warm</b>, 2 < 3 <tool"
        _status, body = await client.post(CHAT, ASKS)
        (choice,) = body["choices"]
        assert said(choice["message"]) == {"content": engine.answer} and "tool_calls" not in choice["message"]
        assert choice["finish_reason"] == "stop"
        message = joined(await client.events(CHAT, ASKS))
        assert message == {"content": engine.answer, "finish_reason": "stop"}

    serve(scenario, **HERMES)


@pytest.mark.parametrize("body", [{**ASKS, "tool_choice": "none"}, {"messages": USER}])
def test_calls_are_content_where_nobody_asked_for_them(serve, joined, said, body):
    async def scenario(client, engine):
        engine.tokenizer.special = ["<tool_call>"]
        engine.answer = "a" + TEXT
        _status, answer = await client.post(CHAT, body)
        assert said(answer["choices"][0]["message"]) == {"content": engine.answer.replace("<tool_call>", "")}
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert said(joined(await client.events(CHAT, body))) == {"content": engine.answer.replace("<tool_call>", "")}
        assert engine.params[0].skip_special_tokens is True
        assert engine.rendered[0][1]["tools"] == body.get("tools")

    serve(scenario, **HERMES)


def test_only_the_first_call_is_shown_where_one_is_wanted(serve, joined, said):
    async def scenario(client, engine):
        engine.answer = TEXT
        body = {**ASKS, "parallel_tool_calls": False}
        _status, answer = await client.post(CHAT, body)
        assert said(answer["choices"][0]["message"]) == {"calls": CALLS[:1]}
        assert said(joined(await client.events(CHAT, body))) == {"calls": CALLS[:1]}

    serve(scenario, **HERMES)


def test_a_call_that_is_cut_off_ends_for_its_length(serve, joined, said):
    async def scenario(client, engine):
        engine.answer = TEXT
        body = {**ASKS, "max_tokens": TEXT.index("Paris") + 3}
        _status, answer = await client.post(CHAT, body)
        (choice,) = answer["choices"]
        assert said(choice["message"]) == {"calls": [("get_weather", '{"city": "Par')]}
        assert choice["finish_reason"] == "length"
        message = joined(await client.events(CHAT, body))
        assert said(message) == said(choice["message"]) and message["finish_reason"] == "length"

    serve(scenario, **HERMES)


def test_what_the_end_decides_belongs_to_the_piece_of_its_call(serve, joined, said):
    async def scenario(client, engine):
        engine.answer = "<tool_call><function=f><parameter=a>x</param"
        for engine.tokens_per_output in (1, 4, 1000):
            assert said(joined(await client.events(CHAT, ASKS))) == {"calls": [("f", '{"a": "x</param')]}

    serve(scenario, enable_auto_tool_choice=True, tool_call_parser="qwen3_coder")


def test_each_choice_has_its_own_calls(serve, joined, said):
    async def scenario(client, engine):
        engine.answers = ["warm", TEXT]
        body = {**ASKS, "n": 2, "temperature": 1}
        _status, answer = await client.post(CHAT, body)
        assert [said(choice["message"]) for choice in answer["choices"]] == [{"content": "warm"}, {"calls": CALLS}]
        assert [choice["finish_reason"] for choice in answer["choices"]] == ["stop", "tool_calls"]
        events = await client.events(CHAT, body)
        assert [said(joined(events, index)) for index in range(2)] == [{"content": "warm"}, {"calls": CALLS}]

    serve(scenario, **HERMES)


def test_reasoning_comes_before_the_calls(serve, joined, said):
    async def scenario(client, engine):
        engine.answer = f"<think>Hm <tool_x</think>\n\n{TEXT}"
        expected = {"reasoning": "Hm <tool_x", "calls": CALLS}
        _status, answer = await client.post(CHAT, ASKS)
        assert said(answer["choices"][0]["message"]) == expected
        for engine.tokens_per_output in (1, 2, 3, 7, 19, 50, 1000):
            message = joined(await client.events(CHAT, ASKS))
            assert said(message) == expected and message["finish_reason"] == "tool_calls"

    serve(scenario, **HERMES, reasoning_parser="deepseek_r1")


KIMI = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
    + PARIS
    + "<|tool_call_end|><|tool_calls_section_end|>"
)
HARMONY = (
    "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather "
    "<|constrain|>json<|message|>" + PARIS
)


@pytest.mark.parametrize(
    ("parser", "text", "expected"),
    [
        ("kimi_k2", "See: " + KIMI, {"content": "See: ", "calls": CALLS[:1]}),
        ("openai", HARMONY, {"reasoning": "Hm.", "calls": CALLS[:1]}),
    ],
)
def test_formats_made_of_special_tokens_are_found(serve, joined, said, parser, text, expected):
    async def scenario(client, engine):
        engine.tokenizer.special = [f"<|{piece.split('|>')[0]}|>" for piece in text.split("<|")[1:]]
        engine.tokenizer.special = list(dict.fromkeys([*engine.tokenizer.special, "<|start|>", "<|call|>"]))
        engine.answer = text
        status, answer = await client.post(CHAT, ASKS)
        assert status == 200, answer
        assert said(answer["choices"][0]["message"]) == expected
        assert engine.params[0].skip_special_tokens is False
        for engine.tokens_per_output in (1, 2, 3, 5, 1000):
            assert said(joined(await client.events(CHAT, ASKS))) == expected

    serve(scenario, enable_auto_tool_choice=True, tool_call_parser=parser)


def test_the_id_that_the_model_writes_is_the_calls_id(serve, joined):
    async def scenario(client, engine):
        engine.answer = KIMI
        assert joined(await client.events(CHAT, ASKS))["tool_calls"][0]["id"] == "functions.get_weather:0"

    serve(scenario, enable_auto_tool_choice=True, tool_call_parser="kimi_k2")


def test_usage_logprobs_and_ids_cover_all_tokens(serve):
    async def scenario(client, engine):
        engine.answer = TEXT
        options = {"include_usage": True, "continuous_usage_stats": True}
        body = {**ASKS, "stream_options": options, "logprobs": True, "return_token_ids": True}
        *chunks, _done = await client.events(CHAT, body)
        choices = [chunk["choices"][0] for chunk in chunks[1:-1]]
        assert "".join(item["token"] for choice in choices for item in choice["logprobs"]["content"]) == TEXT
        assert [token for choice in choices for token in choice["token_ids"]] == [ord(char) for char in TEXT]
        assert [chunk["usage"]["completion_tokens"] for chunk in chunks[:-1]] == list(range(len(TEXT) + 1))
        assert chunks[-1]["usage"]["completion_tokens"] == len(TEXT)

    serve(scenario, **HERMES)


def test_a_conversation_with_calls_and_results_reaches_the_template(serve):
    source = (
        "{% for m in messages %}[{{ m.role }}|{{ m.content }}"
        "{% for c in m.tool_calls or [] %}|{{ c.id }} {{ c.function.name }} {{ c.function.arguments | tojson }}"
        "{% endfor %}{% if m.tool_call_id %}|{{ m.tool_call_id }}{% endif %}]{% endfor %}{{ tools | tojson }}"
    )
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": PARIS}}
    messages = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "warm"},
    ]

    async def scenario(client, engine):
        engine.template, engine.max_model_len = ChatTemplate(source), 1000
        status, body = await client.post(CHAT, {**ASKS, "messages": messages, "return_prompt_text": True})
        assert status == 200, body
        shown, tools = body["prompt_text"].split("[tool|warm|c1]")
        assert shown.startswith("[user|hi][assistant|") and shown.endswith('|c1 get_weather {"city": "Paris"}]')
        assert json.loads(tools) == [TOOL]
        call["function"]["arguments"] = "{broken"
        status, body = await client.post(CHAT, {**ASKS, "messages": messages})
        assert status == 400 and "must be JSON" in body["error"]["message"]

    serve(scenario, **HERMES)


def test_a_parser_alone_does_not_allow_auto(serve):
    async def scenario(client, _engine):
        status, body = await client.post(CHAT, ASKS)
        assert (status, body["error"]["type"]) == (400, "BadRequestError")
        assert body["error"]["message"] == (
            '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'
        )

    serve(scenario, tool_call_parser="hermes")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--enable-auto-tool-choice"], "with --tool-call-parser beside: --enable-auto-tool-choice"),
        (["--tool-call-parser", "none_such"], "--tool-call-parser must be one of deepseek_v3, "),
        (["--enable-auto-tool-choice", "--tool-call-parser=x"], ", xlam: x"),
        (["--reasoning-parser", "r2"], "--reasoning-parser must be one of deepseek_r1, "),
        (["--tool-parser-plugin", "a.py"], "not supported yet: --tool-parser-plugin"),
    ],
)
def test_parsers_that_are_not_there_are_refused_at_the_start(capsys, words, message):
    try:
        status = main(["serve", *words, "--print-config"])
    except SystemExit as error:
        status = error.code
    assert status and message in capsys.readouterr().err


def test_parsers_that_are_there_start(capsys):
    words = ["--enable-auto-tool-choice", "--tool-call-parser", "kimi_k2", "--reasoning-parser", "deepseek_v3"]
    assert main(["serve", *words, "--print-config"]) == 0
    assert "tool-call-parser: kimi_k2" in capsys.readouterr().out
