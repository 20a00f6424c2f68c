"""Calls as JSON objects between tags or after a marker: Hermes, Granite 4, Granite 20B-FC, InternLM 2.

<tool_call>
{"name": "get_weather", "arguments": {"city": "Paris"}}
</tool_call>
(chat templates of NousResearch/Hermes-2-Pro-Llama-3-8B and Qwen/Qwen3-8B)
"""

from __future__ import annotations

from ..events import Emitter
from ..json_calls import read_call_object
from ..text_stream import SPACE, Markers, Reading, TextStream, ignore
from ..tool_parser import ToolParser


def tagged_objects(stream: TextStream, emit: Emitter, begin: Markers, end: Markers) -> Reading[None]:
    """One object after every begin marker. What stands between a call and its end marker is dropped."""
    both = Markers(*begin.markers, *end.markers)
    marker = yield from stream.through(begin, emit.content)
    while marker:
        raw = [marker]
        yield from stream.run(SPACE, raw.append)
        is_call = yield from read_call_object(stream, emit, raw)
        marker = (yield from stream.through(both, ignore)) if is_call else ""
        if marker not in begin.markers:
            marker = yield from stream.through(begin, emit.content)


class Hermes2ProToolParser(ToolParser):
    """Objects between <tool_call> and </tool_call>; the end tag may be missing at the end of the answer."""

    special_tokens = ("<tool_call>", "</tool_call>")
    begin = Markers("<tool_call>")
    end = Markers("</tool_call>")

    def grammar(self, stream: TextStream, emit: Emitter) -> Reading[None]:
        return tagged_objects(stream, emit, self.begin, self.end)


class Granite4ToolParser(Hermes2ProToolParser):
    """IBM Granite 4 writes as Hermes does, sometimes with the arguments in a string."""


class Internlm2ToolParser(Hermes2ProToolParser):
    """<|action_start|><|plugin|>{"name": …, "parameters": {…}}<|action_end|> (internlm/internlm2_5-7b-chat)."""

    special_tokens = ("<|action_start|>", "<|plugin|>", "<|action_end|>")
    begin = Markers("<|action_start|><|plugin|>")
    end = Markers("<|action_end|>")


class Granite20bFCToolParser(ToolParser):
    """<function_call> {"name": …, "arguments": {…}}, without an end (ibm-granite/granite-20b-functioncalling)."""

    special_tokens = ("<function_call>",)
    begin = Markers("<function_call>")

    def grammar(self, stream: TextStream, emit: Emitter) -> Reading[None]:
        while marker := (yield from stream.through(self.begin, emit.content)):
            raw = [marker]
            yield from stream.run(SPACE, raw.append)
            yield from read_call_object(stream, emit, raw)
