"""Calls in a section between special tokens, each with a header and JSON arguments: DeepSeek V3, R1, V3.1, Kimi K2."""

from __future__ import annotations

import re
from abc import abstractmethod

from ..events import Emitter
from ..text_stream import Markers, Reading, TextStream, ignore
from ..tool_parser import ToolParser
from ..typed_arguments import TrimmedArguments

_KIMI_ID = re.compile(r"(?P<name>.+):\d+", re.DOTALL)


class SectionToolParser(ToolParser):
    """Arguments are what stands between the separator and the end of the call, valid JSON or not.

    A call whose header has no name is left out. A section without any call is content. A section ends the answer: text
    after it is dropped.
    """

    section: Markers  # its beginnings
    section_end: Markers
    call: str
    separator: Markers  # between header and arguments
    call_end: Markers

    @abstractmethod
    def name_and_id(self, header: str) -> tuple[str, str | None] | None:
        """Function name and call id in the header of a call, None if it has none."""

    def grammar(self, stream: TextStream, emit: Emitter) -> Reading[None]:
        entrance = Markers(*self.section.markers, self.call)
        inside = Markers(self.call, *self.section_end.markers)
        after_header = Markers(*self.separator.markers, *self.call_end.markers, *inside.markers)
        after_arguments = Markers(*self.call_end.markers, *inside.markers)
        num_calls = 0
        raw: list[str] = []  # of a section without a call so far
        marker = yield from stream.through(entrance, emit.content)
        while marker:
            take = ignore if num_calls else raw.append
            take(marker)
            if marker != self.call:
                marker = yield from stream.through(inside, take)
                continue
            header: list[str] = []
            marker = yield from stream.through(after_header, header.append)
            found = self.name_and_id("".join(header)) if marker in self.separator.markers else None
            if found is None:
                take("".join(header))
                continue
            num_calls += 1
            emit.begin(*found)
            arguments = TrimmedArguments(emit)
            marker = yield from stream.through(after_arguments, arguments)
            if marker:
                arguments.end()
        brackets = Markers(*self.section.markers, *self.section_end.markers)
        if not num_calls and brackets.pattern.sub("", "".join(raw)).strip():
            emit.content("".join(raw))


class DeepSeekV31ToolParser(SectionToolParser):
    """<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Paris"}<｜tool▁call▁end｜>
    <｜tool▁calls▁end｜>, without the line feed (deepseek-ai/DeepSeek-V3.1, its chat template).
    """

    special_tokens = (
        "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>",
        "<｜tool▁call▁end｜>",
    )  # fmt: skip
    section = Markers("<｜tool▁calls▁begin｜>")
    section_end = Markers("<｜tool▁calls▁end｜>")
    call = "<｜tool▁call▁begin｜>"
    separator = Markers("<｜tool▁sep｜>")
    call_end = Markers("<｜tool▁call▁end｜>")

    def name_and_id(self, header: str) -> tuple[str, str | None] | None:
        return (header.strip(), None) if header.strip() else None


class DeepSeekV3ToolParser(DeepSeekV31ToolParser):
    """As V3.1, but a call is function<｜tool▁sep｜>get_weather, a line feed, and the arguments in a ```json block.

    (deepseek-ai/DeepSeek-V3-0324 and DeepSeek-R1-0528, their chat templates)
    """

    separator = Markers("```json")
    call_end = Markers("```<｜tool▁call▁end｜>", "```\n<｜tool▁call▁end｜>", "<｜tool▁call▁end｜>")

    def name_and_id(self, header: str) -> tuple[str, str | None] | None:
        name = header.rpartition("<｜tool▁sep｜>")[2].strip()
        return (name, None) if name else None


class KimiK2ToolParser(SectionToolParser):
    """<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>
    {"city": "Paris"}<|tool_call_end|><|tool_calls_section_end|>, without the line feed

    The header is the call's id (moonshotai/Kimi-K2-Instruct, its tool calling guide; some of its checkpoints write the
    section's tokens in the singular).
    """

    special_tokens = (
        "<|tool_calls_section_begin|>", "<|tool_call_section_begin|>", "<|tool_calls_section_end|>",
        "<|tool_call_section_end|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>",
    )  # fmt: skip
    section = Markers("<|tool_calls_section_begin|>", "<|tool_call_section_begin|>")
    section_end = Markers("<|tool_calls_section_end|>", "<|tool_call_section_end|>")
    call = "<|tool_call_begin|>"
    separator = Markers("<|tool_call_argument_begin|>")
    call_end = Markers("<|tool_call_end|>")

    def name_and_id(self, header: str) -> tuple[str, str | None] | None:
        found = _KIMI_ID.fullmatch(header.strip())
        name = found["name"].removeprefix("functions.") if found else ""
        return (name, header.strip()) if name else None
