"""Every parser's work grows with the length of the text and not faster, whatever the text."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from omni_engine.server.parsing.events import Emitter
from omni_engine.server.parsing.parse import Parse
from omni_engine.server.parsing.registry import REASONING_PARSERS, TOOL_PARSERS
from omni_engine.server.parsing.text_stream import Reading, TextStream

PROPERTIES = {"s": {"type": "string"}, "i": {"type": "integer"}, "n": {"type": ["string", "null"]}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": PROPERTIES}}}]
# a beginning, and what is repeated after it
HOSTILE = {
    "hermes": [("", "<"), ("", "<tool_call>"), ("", '<tool_call>{"name":'), ("", '<tool_call>{"arguments": {"'),
               ('<tool_call>{"name": "f", "arguments": {"a": "', '\\"'), ('<tool_call>{"x": ', "[")],
    "llama3_json": [("", "{"), ("", '{"name": "f", "parameters": {'), ('{"parameters": {"a": ', "{"), ("", '{"name"')],
    "pythonic": [("[f(a=", "["), ("[f(a=", "{1,"), ("[f(a=", "'a' "), ("[f(a=", "("), ("[f(a='", "\\"), ("[f(",
    "a=1,")],
    "llama4_pythonic": [("", "<|python_start|>["), ("", "<|python_start|>[f(a=1),")],
    "deepseek_v3": [("", "<｜tool▁call▁begin｜>"), ("<｜tool▁call▁begin｜>f\n```json\n", "```"), ("", "<｜tool▁calls")],
    "deepseek_v32": [("", '<｜DSML｜invoke name="f">'), ("", "<｜DSML｜"),
                     ('<｜DSML｜invoke name="f"><｜DSML｜parameter name="i" string="false">', "1")],
    "kimi_k2": [("", "<|tool_call_begin|>f:0<|tool_call_argument_begin|>"), ("<|tool_calls_section_begin|>", " x")],
    "qwen3_coder": [("", "<function="), ("<function=f>", "<parameter=s>"), ("<function=f><parameter=n>", " "),
                    ("<function=f><parameter=s>", "\n"), ("<function=f><parameter=i>", "</param")],
    "glm45": [("", "<tool_call>f"), ("<tool_call>f", "<arg_key>"),
    ("<tool_call>f<arg_key>s</arg_key><arg_value>", "<")],
    "openai": [("", "<|channel|>"), ("", "<|start|>x<|message|>"), ("<|channel|>", "a "), ("", "<|end|>")],
    "mistral": [("", "[TOOL_CALLS]"), ("", "[TOOL_CALLS]a["), ("[TOOL_CALLS][", "{")],
    "xlam": [("", "["), ("", "```"), ("", '[{"name": "f", "arguments": {}},')],
    "granite": [("", "<|tool_call|>[{"), ("<tool_call>[", '{"name": "f", "arguments": {}},')],
}  # fmt: skip
REASONING = {
    "deepseek_r1": [("", "</thin"), ("", " "), ("<think>", "<")],
    "glm45": [("", "<think>"), ("<think>", " \n"), ("", "</think><think>")],
    "granite": [("Here is my thought process:", "Here is my ")],
    "openai_gptoss": [("<|channel|>analysis<|message|>", "<|")],
}
CASES = [
    *((TOOL_PARSERS.get(name)(None, TOOLS).new_parse, *case) for name, cases in HOSTILE.items() for case in cases),
    *((REASONING_PARSERS.get(name)(None).new_parse, *case) for name, cases in REASONING.items() for case in cases),
]


def work(make: Callable[[], Parse], text: str, piece: int) -> int:
    """Lines of Python that are run, and all characters that a search can see: those in the buffer at each piece."""
    steps = 0

    def trace(frame, event, _):
        nonlocal steps
        steps += event == "line"
        return trace

    parse = make()
    before = sys.gettrace()
    for start in range(0, len(text), piece):
        sys.settrace(trace)
        try:
            parse.feed(text[start : start + piece])
        finally:
            sys.settrace(before)
        steps += len(parse._stream.text)
    return steps


def grown(make: Callable[[], Parse], start: str, repeated: str, length: int, num_pieces: int | None) -> float:
    """By what factor the work grows when the text becomes four times as long."""
    texts = [start + repeated * (size // len(repeated)) for size in (length, 4 * length)]
    small, large = (work(make, text, len(text) if num_pieces == 1 else 3) for text in texts)
    return large / small


@pytest.mark.parametrize(("make", "start", "repeated"), CASES)
def test_four_times_the_text_is_four_times_the_work(make: Callable[[], Parse], start: str, repeated: str) -> None:
    assert grown(make, start, repeated, 400, None) < 6
    assert grown(make, start, repeated, 800, 1) < 6


@pytest.mark.parametrize(("name", "start", "repeated"), [(name, *cases[0]) for name, cases in HOSTILE.items()])
def test_a_megabyte_is_read(name: str, start: str, repeated: str) -> None:
    parse = TOOL_PARSERS.get(name)(None, TOOLS).new_parse()
    unit = repeated + "-" * 100  # something else in between, or reading every bracket would take the time
    for _ in range(2**20 // 2**14):
        parse.feed(start + unit * (2**14 // len(unit)))
    parse.finish()


def _keeps_everything(stream: TextStream, emit: Emitter) -> Reading[None]:
    while not stream.ended:
        yield
    yield from stream.rest(emit.content)


def _starts_over(stream: TextStream, emit: Emitter) -> Reading[None]:
    while not stream.ended:
        for character in stream.text:
            if character == "!":
                return
        yield


def test_reading_everything_again_for_each_piece_is_noticed() -> None:
    for grammar in (_keeps_everything, _starts_over):
        assert grown(lambda grammar=grammar: Parse(grammar, Emitter()), "", "x", 400, None) > 6
