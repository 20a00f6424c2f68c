"""Tool calls as the models' templates and guides show them, and what becomes of text that is not quite that."""

from __future__ import annotations

import json
from typing import Any

import pytest

from omni_engine.server.parsing.messages import ExtractedToolCallInformation
from omni_engine.server.parsing.registry import TOOL_PARSERS

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "units": {"type": ["string", "null"]},
                "place": {"$ref": "#/$defs/Place"},
            },
            "$defs": {"Place": {"type": "object", "properties": {"lat": {"type": "number"}}}},
        },
    },
}


def parse(name: str, text: str, tools: list[Any] | None = None) -> ExtractedToolCallInformation:
    return TOOL_PARSERS.get(name)(None, [WEATHER] if tools is None else tools).extract_tool_calls(text, None)


def calls_of(found: ExtractedToolCallInformation) -> list[tuple[str, str]]:
    return [(call.function.name, call.function.arguments) for call in found.tool_calls]


PARIS = '{"city": "Paris", "days": 3}'
PUBLISHED = [
    # NousResearch/Hermes-2-Pro and Qwen3: chat templates
    ("hermes", f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>'),
    ("hermes", f'<tool_call>{{"arguments": {PARIS}, "name": "get_weather"}}</tool_call>'),
    ("hermes", f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}'),  # stopped at the end of turn
    ("granite4", f'<tool_call> {{"name": "get_weather", "arguments": {json.dumps(PARIS)}}} </tool_call>'),
    ("internlm", f'<|action_start|><|plugin|>{{"name": "get_weather", "parameters": {PARIS}}}<|action_end|>\n'),
    ("granite-20b-fc", f'<function_call> {{"name": "get_weather", "arguments": {PARIS}}}'),
    # meta-llama/Llama-3.1: prompt_format.md
    ("llama3_json", f'{{"name": "get_weather", "parameters": {PARIS}}}'),
    ("llama3_json", f'<|python_tag|>{{"name": "get_weather", "parameters": {PARIS}}}'),
    ("llama4_json", f'{{"type": "function", "name": "get_weather", "parameters": {PARIS}}}'),
    # meta-llama/Llama-3.2 and Llama 4: prompt formats
    ("pythonic", "[get_weather(city='Paris', days=3)]"),
    ("llama4_pythonic", "<|python_start|>[get_weather(city='Paris', days=3)]<|python_end|>"),
    ("llama4_pythonic", '[get_weather(city="Paris", days=3)]'),
    # deepseek-ai/DeepSeek-V3-0324, DeepSeek-V3.1, DeepSeek-V3.2
    ("deepseek_v3", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
     f"{PARIS}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"),
    ("deepseek_v31", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>"
     f"{PARIS}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"),
    ("deepseek_v32", '<｜DSML｜function_calls>\n<｜DSML｜invoke name="get_weather">\n'
     '<｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>\n'
     '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n'
     '</｜DSML｜invoke>\n</｜DSML｜function_calls>'),
    # moonshotai/Kimi-K2-Instruct: docs/tool_call_guidance.md
    ("kimi_k2", "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
     f"<|tool_call_argument_begin|>{PARIS}<|tool_call_end|><|tool_calls_section_end|>"),
    # Qwen/Qwen3-Coder: chat template
    ("qwen3_coder", "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3\n"
     "</parameter>\n</function>\n</tool_call>"),
    # zai-org/GLM-4.5 and GLM-4.7: chat templates
    ("glm45", "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n"
     "<arg_value>3</arg_value>\n</tool_call>"),
    ("glm47", "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value><arg_key>days</arg_key>"
     "<arg_value>3</arg_value></tool_call>"),
    # openai/harmony: docs/format.md; the recipient stands in the role or in the channel part of the header
    ("openai", "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>" + PARIS + "<|call|>"),
    ("openai", "<|start|>assistant to=functions.get_weather<|channel|>commentary<|message|>" + PARIS + "<|call|>"),
    # mistralai: tokenizer versions 3, 11 and 13
    ("mistral", f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {PARIS}}}]'),
    ("mistral", f"[TOOL_CALLS]get_weather{PARIS}"),
    ("mistral", f"[TOOL_CALLS]get_weather[ARGS]{PARIS}"),
    # ibm-granite/granite-3.0 and 3.1, Salesforce/Llama-xLAM-2
    ("granite", f'<|tool_call|>[{{"name": "get_weather", "arguments": {PARIS}}}]'),
    ("granite", f'<tool_call>[{{"name": "get_weather", "arguments": {PARIS}}}]'),
    ("xlam", f'[{{"name": "get_weather", "arguments": {PARIS}}}]'),
    ("xlam", f'```json\n[{{"name": "get_weather", "arguments": {PARIS}}}]\n```'),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text"), PUBLISHED)
def test_a_published_example_is_a_call(name: str, text: str) -> None:
    found = parse(name, text)
    assert calls_of(found) == [("get_weather", PARIS)]
    assert (found.tools_called, found.content) == (True, None)


@pytest.mark.parametrize("name", TOOL_PARSERS.names())
@pytest.mark.parametrize("text", ["Hello, world.", "", "  \n", "a < b, {x} and [1] `c` ", 'He said "(f(x))"; {"a": 1}'])
def test_text_without_a_call_is_content_as_it_is(name: str, text: str) -> None:
    found = parse(name, text)
    assert (found.tools_called, found.tool_calls, found.content) == (False, [], text or None)


def test_the_id_that_kimi_writes_is_the_calls_id() -> None:
    call = "<|tool_call_begin|>{}<|tool_call_argument_begin|>{{}}<|tool_call_end|>"
    ids = ["functions.get_weather:7", "get_weather:8", "functions.mcp:server.tool:9"]
    found = parse("kimi_k2", "<|tool_calls_section_begin|>" + "".join(map(call.format, ids)))
    assert [call.id for call in found.tool_calls] == ids
    assert [name for name, _ in calls_of(found)] == ["get_weather", "get_weather", "mcp:server.tool"]
    assert parse("mistral", "[TOOL_CALLS]f[CALL_ID]AbC123xyz[ARGS]{}").tool_calls[0].id == "AbC123xyz"
    ids = [call.id for call in parse("pythonic", "[f(), f()]").tool_calls]
    assert ids[0] != ids[1] and all(each.startswith("chatcmpl-tool-") and len(each) == 46 for each in ids)


@pytest.mark.parametrize(
    "arguments",
    [
        '{"n": 1.10, "big": 123456789012345678901234567890, "e": 1E+400}',
        '{"a": 1, "a": 2}',
        '{"u": "\\u00e9\\ud83d\\ude00 \\"q\\" \\\\ /", "tag": "</tool_call> }{][ <|tool_call_end"}',
        '{ "spaced" :\n[ ] }',
    ],
)
@pytest.mark.parametrize("name", ["hermes", "llama3_json", "deepseek_v31", "kimi_k2", "openai", "mistral", "xlam"])
def test_json_arguments_stay_as_they_were_written(name: str, arguments: str) -> None:
    frames = {
        "hermes": '<tool_call>{"name": "f", "arguments": ARGS}</tool_call>',
        "llama3_json": '{"name": "f", "parameters": ARGS}',
        "deepseek_v31": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>ARGS<｜tool▁call▁end｜>",
        "kimi_k2": "<|tool_call_begin|>f:0<|tool_call_argument_begin|>ARGS<|tool_call_end|>",
        "openai": "<|channel|>commentary to=f<|message|>ARGS<|call|>",
        "mistral": "[TOOL_CALLS]f[ARGS]ARGS",
        "xlam": '[{"name": "f", "arguments": ARGS}]',
    }
    text = frames[name].replace("ARGS", "@", 1).replace("ARGS", "@") if name != "mistral" else "[TOOL_CALLS]f[ARGS]@"
    assert calls_of(parse(name, text.replace("@", arguments))) == [("f", arguments)]


def test_values_get_the_types_of_the_schema() -> None:
    text = (
        "<tool_call><function=get_weather><parameter=city>\n42\n</parameter><parameter=days>\n007\n</parameter>"
        '<parameter=units>\nNULL\n</parameter><parameter=place>\n{"lat": 48.850, "lat": 2}\n</parameter>'
        "<parameter=other>\n1\n</parameter></function></tool_call>"
    )
    assert calls_of(parse("qwen3_coder", text)) == [
        ("get_weather", '{"city": "42", "days": 7, "units": null, "place": {"lat": 48.850, "lat": 2}, "other": "1"}')
    ]
    untyped = json.loads(calls_of(parse("qwen3_coder", text, []))[0][1])
    assert untyped["days"] == "007" and untyped["units"] == "NULL"


def test_a_nullable_string_streams_once_it_cannot_be_null() -> None:
    parser = TOOL_PARSERS.get("glm45")(None, [WEATHER])
    call = parser.new_parse()
    call.feed("<tool_call>get_weather<arg_key>units</arg_key><arg_value>")
    assert call.feed("nu") == []
    assert [event.text for event in call.feed("mber")] == ['"number']


def test_dsml_asks_the_schema_first_and_then_the_string_attribute() -> None:
    parameter = '<｜DSML｜parameter name="{}" string="{}">{}</｜DSML｜parameter>'
    cases = [
        ("days", "true", "3"),
        ("city", "false", "3"),
        ("x", "false", "[1]"),
        ("y", "true", "[1]"),
        ("z", "false", "a"),
    ]
    text = '<｜DSML｜invoke name="get_weather">' + "".join(parameter.format(*case) for case in cases)
    arguments = calls_of(parse("deepseek_v32", text + "</｜DSML｜invoke>"))[0][1]
    assert arguments == '{"days": 3, "city": "3", "x": [1], "y": "[1]", "z": "a"}'


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ('<｜DSML｜parameter name="input" string="false">{"city": "Paris"}</｜DSML｜parameter>', '{"city": "Paris"}'),
        ('<｜DSML｜parameter name="input" string="false">{"x": 1}</｜DSML｜parameter>', '{"input": {"x": 1}}'),
        ('<｜DSML｜parameter name="input" string="true">a</｜DSML｜parameter>'
         '<｜DSML｜parameter name="city" string="true">b</｜DSML｜parameter>', '{"input": "a", "city": "b"}'),
    ],
)  # fmt: skip
def test_dsml_arguments_in_one_wrapper_are_taken_out_of_it(parameters: str, expected: str) -> None:
    text = f'<｜DSML｜function_calls><｜DSML｜invoke name="get_weather">{parameters}</｜DSML｜invoke>'
    assert calls_of(parse("deepseek_v32", text)) == [("get_weather", expected)]


NOT_CALLS = [
    ("hermes", '<tool_call>{"name": "f"}</tool_call>'),
    ("hermes", '<tool_call>{"name": 1, "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": "text"}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "argum'),
    ("hermes", "The tag <tool_call> begins a call."),
    ("llama3_json", '{"name": "Bob", "age": 7, "parameters": {}}'),
    ("llama3_json", '{"name": "f", "parameters": {invalid json}'),
    ("llama3_json", '{"parameters": {}}'),
    ("llama3_json", "<|python_tag|>print(1)"),
    ("pythonic", "[1] and [see(this)] are footnotes"),
    ("pythonic", "[f(1)]"),
    ("pythonic", "[f(a"),
    ("deepseek_v3", "<｜tool▁calls▁begin｜>function<｜tool▁sep｜>f\n```json\n{}\n```<｜tool▁calls▁end｜>"),
    ("deepseek_v31", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_wea"),
    ("deepseek_v32", "<｜DSML｜function_calls>\n<｜DSML｜invoke nam"),
    (
        "kimi_k2",
        "<|tool_calls_section_begin|><|tool_call_begin|>no number<|tool_call_argument_begin|>{}<|tool_call_end|>",
    ),
    ("qwen3_coder", "<tool_call>\n<function=f\n</function>\n</tool_call>"),
    ("qwen3_coder", '<tool_call>{"name": "f"}</tool_call>'),
    ("glm45", "<tool_call> is how a call begins"),
    ("glm45", '<tool_call>{"a":1}</tool_call>'),
    ("mistral", "[TOOL_CALLS]f"),
    ("granite", '<|tool_call|> {"name": "f", "arguments": {}}'),
    ("openai", "<|channel|>commentary to=functions.f"),
]


@pytest.mark.parametrize(("name", "text"), NOT_CALLS)
def test_what_is_no_call_is_given_back_as_content(name: str, text: str) -> None:
    found = parse(name, text)
    assert (found.tools_called, found.content) == (False, text)


CUT_OFF = [
    ("hermes", '<tool_call>{"name": "f", "arguments": {"city": "Par'),
    ("llama3_json", '{"name": "f", "parameters": {"city": "Par'),
    ("pythonic", "[f(city='Par"),
    ("deepseek_v3", '<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"city": "Par'),
    ("deepseek_v32", '<｜DSML｜invoke name="f"><｜DSML｜parameter name="city" string="true">Par'),
    ("kimi_k2", '<|tool_call_begin|>f:0<|tool_call_argument_begin|>{"city": "Par'),
    ("qwen3_coder", "<function=f>\n<parameter=city>\nPar"),
    ("glm45", "<tool_call>f\n<arg_key>city</arg_key>\n<arg_value>Par"),
    ("openai", '<|channel|>commentary to=functions.f<|message|>{"city": "Par'),
    ("mistral", '[TOOL_CALLS]f[ARGS]{"city": "Par'),
]


@pytest.mark.parametrize(("name", "text"), CUT_OFF)
def test_a_call_that_is_cut_off_keeps_what_was_written(name: str, text: str) -> None:
    # It has been streamed already. Closing it would make a call that the model did not finish.
    assert calls_of(parse(name, text)) == [("f", '{"city": "Par')]


@pytest.mark.parametrize(
    ("name", "text", "content"),
    [
        ("hermes", 'Hi! <tool_call>{"name": "f", "arguments": {}}</tool_call>\nDone.', "Hi! \nDone."),
        ("hermes", '<tool_call>{"name": "f", "arguments": {}}}</tool_call>', None),
        ("granite", 'Hi! \n<|tool_call|>[{"name": "f", "arguments": {}}]', "Hi!"),
        ("glm45", "Hi! \n<tool_call>f</tool_call>\n", "Hi!"),
        ("qwen3_coder", "Hi!\n\n<function=f>\n</function>\n</tool_call>", "Hi!"),
        ("kimi_k2", "Hi! <|tool_calls_section_begin|> x <|tool_call_begin|>f:0<|tool_call_argument_begin|>"
         "<|tool_call_end|><|tool_calls_section_end|> bye", "Hi! "),
        ("deepseek_v31", "Hi! <｜tool▁call▁begin｜>f<｜tool▁sep｜><｜tool▁call▁end｜><｜tool▁calls▁end｜> bye", "Hi! "),
        ("pythonic", "[f()] Done.", " Done."),
        ("llama4_pythonic", "Hi! <|python_start|>[f()]<|python_end|>", "Hi! "),
        ("mistral", "Hi![TOOL_CALLS]f{}Done.", "Hi!Done."),
        ("llama3_json", 'Hi! {"name": "f", "parameters": null} Done.', "Hi!  Done."),
    ],
)  # fmt: skip
def test_text_around_calls_is_content_but_layout_is_not(name: str, text: str, content: str | None) -> None:
    found = parse(name, text)
    assert calls_of(found) == [("f", "{}")]
    assert found.content == content


def test_harmony_channels_are_reasoning_content_and_calls() -> None:
    text = (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>Let me look.<|end|>"
        "<|start|>assistant<|channel|>analysis to=browser.search<|message|>{}<|call|>"
        "<|start|>assistant<|channel|>commentary to=functions.f<|constrain|>json<|message|>{}<|call|>"
        "<|start|>assistant<|channel|>final<|message|>There.<|return|>"
    )
    assert parse("openai", text).content == "Let me look.\nThere."
    assert calls_of(parse("openai", text)) == [("f", "{}")]


def test_an_unclosed_parameter_ends_at_the_next_one() -> None:
    text = "<tool_call>\n<function=f>\n<parameter=a>\n1\n<parameter=b>\n\n2\n\n</parameter>\n</function>\n</tool_call>"
    assert calls_of(parse("qwen3_coder", text)) == [("f", '{"a": "1", "b": "\\n2\\n"}')]


def test_a_call_without_its_end_ends_at_the_next_one() -> None:
    text = "<tool_call>\n<function=f>\n<parameter=a>1</parameter>\n<tool_call>\n<function=g>\n</function>\n</tool_call>"
    assert calls_of(parse("qwen3_coder", text)) == [("f", '{"a": "1"}'), ("g", "{}")]
