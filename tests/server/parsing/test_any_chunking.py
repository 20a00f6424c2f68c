"""Every format: calls that were written are read back, and the result never depends on how the text is cut."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from omni_engine.server.parsing.events import Arguments, CallBegun, Content, Event, Reasoning
from omni_engine.server.parsing.parse import Parse
from omni_engine.server.parsing.registry import REASONING_PARSERS, TOOL_PARSERS

Call = tuple[str, dict[str, Any]]
TYPES = {"text": "string", "count": "integer", "ratio": "number", "flag": "boolean", "tree": "object", "rows": "array"}
PROPERTIES = {name: {"type": kind} for name, kind in TYPES.items()} | {"note": {"type": ["string", "null"]}}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": PROPERTIES}}}
    for name in ("look_up", "send-mail", "math.sum")
]


def dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def plain(value: Any) -> str:
    """A value as formats write it that have no quotes around strings."""
    return value if isinstance(value, str) else dumps(value)


def deepseek_v32(calls: list[Call]) -> str:
    invokes = []
    for name, arguments in calls:
        lines = [
            f'<｜DSML｜parameter name="{key}" string="{str(isinstance(value, str)).lower()}">{plain(value)}'
            "</｜DSML｜parameter>\n"
            for key, value in arguments.items()
        ]
        invokes.append(f'<｜DSML｜invoke name="{name}">\n{"".join(lines)}</｜DSML｜invoke>\n')
    return f"<｜DSML｜function_calls>\n{''.join(invokes)}</｜DSML｜function_calls>"


def qwen3_coder(calls: list[Call]) -> str:
    texts = []
    for name, arguments in calls:
        parameters = [f"<parameter={key}>\n{plain(value)}\n</parameter>\n" for key, value in arguments.items()]
        texts.append(f"<tool_call>\n<function={name}>\n{''.join(parameters)}</function>\n</tool_call>")
    return "\n".join(texts)


def glm45(calls: list[Call]) -> str:
    texts = []
    for name, arguments in calls:
        pairs = [
            f"<arg_key>{key}</arg_key>\n<arg_value>{plain(value)}</arg_value>\n" for key, value in arguments.items()
        ]
        texts.append(f"<tool_call>{name}\n{''.join(pairs)}</tool_call>")
    return "\n".join(texts)


def pythonic(calls: list[Call]) -> str:
    texts = [f"{name}({', '.join(f'{key}={value!r}' for key, value in args.items())})" for name, args in calls]
    return f"[{', '.join(texts)}]"


def objects(calls: list[Call], key: str = "arguments") -> list[str]:
    return [dumps({"name": name, key: arguments}) for name, arguments in calls]


def each(calls: list[Call], template: str) -> str:
    """`template` once per call, with NAME, ARGUMENTS and INDEX filled in."""
    return "".join(
        template.replace("NAME", name).replace("ARGUMENTS", dumps(arguments)).replace("INDEX", str(index))
        for index, (name, arguments) in enumerate(calls)
    )


DEEPSEEK_V3 = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\nARGUMENTS\n```<｜tool▁call▁end｜>"
DEEPSEEK_V31 = "<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>ARGUMENTS<｜tool▁call▁end｜>"
KIMI = "<|tool_call_begin|>functions.NAME:INDEX<|tool_call_argument_begin|>ARGUMENTS<|tool_call_end|>"
HARMONY = "<|start|>assistant<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>ARGUMENTS<|call|>"
RENDERERS: dict[str, Callable[[list[Call]], str]] = {
    "deepseek_v3": lambda calls: f"<｜tool▁calls▁begin｜>{each(calls, DEEPSEEK_V3)}<｜tool▁calls▁end｜>",
    "deepseek_v31": lambda calls: f"<｜tool▁calls▁begin｜>{each(calls, DEEPSEEK_V31)}<｜tool▁calls▁end｜>",
    "deepseek_v32": deepseek_v32,
    "glm45": glm45,
    "glm47": lambda calls: glm45(calls).replace("\n<arg", "<arg").replace("\n</tool_call>", "</tool_call>"),
    "granite": lambda calls: f"<|tool_call|> [{', '.join(objects(calls))}]",
    "granite-20b-fc": lambda calls: "\n".join(f"<function_call> {text}" for text in objects(calls)),
    "granite4": lambda calls: "".join(f"<tool_call>\n{text}\n</tool_call>\n" for text in objects(calls)),
    "hermes": lambda calls: "".join(f"<tool_call>\n{text}\n</tool_call>\n" for text in objects(calls)),
    "internlm": lambda calls: "".join(
        f"<|action_start|><|plugin|>{text}<|action_end|>" for text in objects(calls, "parameters")
    ),
    "kimi_k2": lambda calls: f"<|tool_calls_section_begin|>{each(calls, KIMI)}<|tool_calls_section_end|>",
    "llama3_json": lambda calls: "<|python_tag|>" + "; ".join(objects(calls, "parameters")),
    "llama4_json": lambda calls: "; ".join(objects(calls, "parameters")),
    "llama4_pythonic": lambda calls: f"<|python_start|>{pythonic(calls)}<|python_end|>",
    "mistral": lambda calls: each(calls, "[TOOL_CALLS]NAME[ARGS]ARGUMENTS"),
    "openai": lambda calls: each(calls, HARMONY),
    "pythonic": pythonic,
    "qwen3_coder": qwen3_coder,
    "qwen3_json": lambda calls: "".join(f"<tool_call>{text}</tool_call>" for text in objects(calls)),
    "qwen3_xml": qwen3_coder,
    "xlam": lambda calls: f"```json\n[{', '.join(objects(calls))}]\n```",
}
SAME_CLASS = {"glm47", "llama4_json", "qwen3_json", "qwen3_xml"}  # as another name's
UNTIL_A_TOKEN = ("deepseek_v3", "deepseek_v31", "kimi_k2", "openai")  # arguments end at a special token
UNTYPED = (
    "deepseek_v32",
    "glm45",
    "glm47",
    "qwen3_coder",
    "qwen3_xml",
)  # the texts of values cannot hold their own tags

numbers = st.one_of(st.integers(-(10**20), 10**20), st.floats(allow_nan=False, allow_infinity=False))
texts = st.text(st.characters(codec="utf-8"), max_size=12)
leaves = st.one_of(texts, numbers, st.booleans(), st.none())
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3))
of_type = {
    "text": texts, "count": st.integers(-(10**30), 10**30), "ratio": numbers, "flag": st.booleans(),
    "tree": st.dictionaries(texts, values, max_size=3), "rows": st.lists(values, max_size=3),
    "note": st.one_of(st.none(), texts),
}  # fmt: skip
arguments = st.fixed_dictionaries({}, optional=of_type)
calls = st.lists(st.tuples(st.sampled_from(["look_up", "send-mail", "math.sum"]), arguments), min_size=1, max_size=3)


def tool_parse(name: str) -> Parse:
    return TOOL_PARSERS.get(name)(None, TOOLS).new_parse()


def reasoning_parse(name: str) -> Parse:
    return REASONING_PARSERS.get(name)(None, chat_template_kwargs={"thinking": True}).new_parse()


def joined(events: Iterable[Event]) -> list[Event]:
    """`events` with neighbouring texts of one kind made one."""
    found: list[Event] = []
    for event in events:
        last = found[-1] if found else None
        if isinstance(event, (Content, Reasoning, Arguments)) and type(last) is type(event):
            found[-1] = type(event)(last.text + event.text)
        else:
            found.append(event)
    return found


def whole(parse: Parse, text: str) -> list[Event]:
    return joined([*parse.feed(text), *parse.finish()])


def in_pieces(parse: Parse, text: str, cuts: Iterable[int]) -> list[Event]:
    bounds = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    events: list[Event] = []
    for start, stop in pairwise(bounds):
        events += parse.feed(text[start:stop])
    return joined([*events, *parse.finish()])


def assert_chunks_do_not_matter(make: Callable[[], Parse], text: str, cuts: list[int]) -> None:
    expected = whole(make(), text)
    assert in_pieces(make(), text, cuts) == expected
    assert in_pieces(make(), text, range(len(text))) == expected


def calls_in(events: list[Event]) -> list[Call]:
    found: list[tuple[str, list[str]]] = []
    for event in events:
        if isinstance(event, CallBegun):
            found.append((event.name, []))
        elif isinstance(event, Arguments):
            found[-1][1].append(event.text)
    return [(name, json.loads("".join(pieces))) for name, pieces in found]


def is_written_faithfully(name: str, written: list[Call]) -> bool:
    """Whether a format without quotes around strings can say `written` at all."""
    if name in UNTIL_A_TOKEN:
        return not any("<" in dumps(args) or "```" in dumps(args) for _, args in written)
    if name not in UNTYPED:
        return name not in ("pythonic", "llama4_pythonic") or not any("-" in call for call, _ in written)
    flat = [(key, value) for _, args in written for key, value in args.items()]
    if any("<" in plain(value) for _, value in flat):
        return False  # might be a tag
    # null is what the type of `note` prefers, and a number without a fraction is an integer
    return not any(key == "note" and isinstance(value, str) and value.strip().lower() == "null" for key, value in flat)


def test_every_tool_parser_has_a_renderer() -> None:
    assert sorted(RENDERERS) == TOOL_PARSERS.names()


@pytest.mark.parametrize("name", sorted(RENDERERS))
@settings(max_examples=20)
@given(written=calls, cuts=st.lists(st.integers(0, 10**6), max_size=12), prefix=st.sampled_from(["", "Let me see.\n"]))
def test_calls_are_read_back_however_they_are_cut(name: str, written: list[Call], cuts: list[int], prefix: str) -> None:
    assume(is_written_faithfully(name, written))
    if name == "pythonic":
        prefix = ""  # its list begins the answer
    text = (f"<|channel|>final<|message|>{prefix}" if name == "openai" and prefix else prefix) + RENDERERS[name](
        written
    )
    events = whole(tool_parse(name), text)
    assert calls_in(events) == written
    assert "".join(event.text for event in events if isinstance(event, Content)).strip() == prefix.strip()
    assert_chunks_do_not_matter(lambda: tool_parse(name), text, cuts)


MARKS = [
    *"<>{}[]()\"'\\`=:,;\n 1a", "</", "<|", "<think>", "</think>", "null", "```", "<tool_call>", "</tool_call>",
    '{"name": ',
    '"arguments": ', "<｜", "｜>", "é🎉", "<|start|>", "<|message|>", "<|channel|>final", "[TOOL_CALLS]",
]  # fmt: skip


@st.composite
def hostile(draw: st.DrawFn, rendered: st.SearchStrategy[str]) -> str:
    """Text of a format that was cut, spliced, repeated and littered."""
    text = draw(rendered)
    for _ in range(draw(st.integers(0, 5))):
        start, stop = sorted(draw(st.tuples(*[st.integers(0, len(text))] * 2)))
        middle = draw(st.sampled_from(["", text[start:stop] * 2, *MARKS]))
        text = text[:start] + middle + text[draw(st.sampled_from([start, stop])) :]
    return text


@pytest.mark.parametrize("name", sorted(set(RENDERERS) - SAME_CLASS))
@settings(max_examples=25)
@given(data=st.data(), cuts=st.lists(st.integers(0, 10**6), max_size=12))
def test_broken_text_is_read_the_same_however_it_is_cut(name: str, data: st.DataObject, cuts: list[int]) -> None:
    text = data.draw(hostile(calls.map(RENDERERS[name])))
    assert_chunks_do_not_matter(lambda: tool_parse(name), text, cuts)


REASONING_TEXT = {
    "granite": "Here is my thought process: I see.\nHere's my response: Yes.",
    "kimi_k2": "<think>I see. <|tool_calls_section_begin|><|tool_call_begin|>",
    "openai_gptoss": "<|channel|>analysis<|message|>I see.<|end|><|start|>assistant<|channel|>final<|message|>Yes.",
}
TAGGED = "\n<think>\nI see. \n</think>\n\nYes. <tool_call>no</tool_call></think><think>more</think> end"


@pytest.mark.parametrize("name", REASONING_PARSERS.names())
@settings(max_examples=25)
@given(data=st.data(), cuts=st.lists(st.integers(0, 10**6), max_size=12))
def test_reasoning_is_divided_the_same_however_it_is_cut(name: str, data: st.DataObject, cuts: list[int]) -> None:
    text = data.draw(hostile(st.sampled_from([TAGGED, REASONING_TEXT.get(name, TAGGED)])))
    assert_chunks_do_not_matter(lambda: reasoning_parse(name), text, cuts)


class _SeesPieces(Parse):
    """Holds back nothing, as a parser that looks for a tag in each piece alone."""

    def feed(self, text: str) -> list[Event]:
        return [Content(text.replace("</think>", ""))]


def test_a_parser_that_sees_the_pieces_is_noticed() -> None:
    with pytest.raises(AssertionError):
        assert_chunks_do_not_matter(lambda: _broken("deepseek_r1"), "a</think>b", [4])


def _broken(name: str) -> Parse:
    parse = reasoning_parse(name)
    parse.__class__ = _SeesPieces
    return parse
