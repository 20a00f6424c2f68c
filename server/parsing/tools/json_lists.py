"""Calls as a JSON list after a marker: Mistral, Granite 3, xLAM."""

from __future__ import annotations

import re

from ..events import Emitter
from ..json_calls import read_call_list, read_call_object, read_container
from ..text_stream import SPACE, Markers, Reading, TextStream
from ..tool_parser import ToolParser

_NAME = re.compile(r"[\w.-]+")


class GraniteToolParser(ToolParser):
    """<|tool_call|> (3.0) or <tool_call> (3.1) and [{"name": …, "arguments": {…}}] (ibm-granite/granite-3.1-8b)."""

    strips_content = True
    special_tokens = ("<|tool_call|>", "<tool_call>")
    begin = Markers(*special_tokens)

    def grammar(self, stream: TextStream, emit: Emitter) -> Reading[None]:
        while marker := (yield from stream.through(self.begin, emit.content)):
            raw = [marker]
            yield from stream.run(SPACE, raw.append)
            yield from read_call_list(stream, emit, raw)


class XLAMToolParser(ToolParser):
    """A list anywhere, also in a code block or after [TOOL_CALLS] or <tool_call> (Salesforce/Llama-xLAM-2-8b-fc-r)."""

    strips_content = True
    special_tokens = ("[TOOL_CALLS]", "<tool_call>", "</tool_call>")
    begin = Markers("[TOOL_CALLS]", "<tool_call>", "```json", "```", "[")
    end = Markers("</tool_call>", "```")

    def grammar(self, stream: TextStream, emit: Emitter) -> Reading[None]:
        while marker := (yield from stream.through(self.begin, emit.content)):
            raw = [] if marker == "[" else [marker]
            if marker == "[":
                stream.position -= 1
            else:
                yield from stream.run(SPACE, raw.append)
            if (yield from read_call_list(stream, emit, raw, strict=True)):
                yield from self._skip_end(stream, emit)

    def _skip_end(self, stream: TextStream, emit: Emitter) -> Reading[None]:
        between: list[str] = []
        yield from stream.run(SPACE, between.append)
        if not (yield from stream.starts_with(self.end)):
            emit.content("".join(between))


class MistralToolParser(ToolParser):
    """[TOOL_CALLS] and a list, or from tokenizer version 11 on the name, [ARGS] and the arguments of one call.

    [TOOL_CALLS]get_weather[CALL_ID]abcdefghi[ARGS]{"city": "Paris"} (mistralai/Mistral-Small-3.2-24B-Instruct-2506)
    """

    special_tokens = ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")
    begin = Markers("[TOOL_CALLS]")
    after_name = Markers("[CALL_ID]", "[ARGS]")
    after_id = Markers("[ARGS]")

    def grammar(self, stream: TextStream, emit: Emitter) -> Reading[None]:
        while marker := (yield from stream.through(self.begin, emit.content)):
            raw = [marker]
            yield from stream.run(SPACE, raw.append)
            first = yield from stream.peek()
            if first == "[":
                if (yield from stream.starts_with(self.begin)):
                    stream.position -= len(marker)  # the marker twice
                    continue
                yield from read_call_list(stream, emit, raw)
            elif first == "{":
                yield from read_call_object(stream, emit, raw)
            else:
                yield from self._named_call(stream, emit, raw)

    def _named_call(self, stream: TextStream, emit: Emitter, raw: list[str]) -> Reading[None]:
        name: list[str] = []
        yield from stream.run(_NAME, name.append)
        raw += name
        call_id: list[str] = []
        marker = yield from stream.starts_with(self.after_name)
        raw.append(marker)
        if marker == "[CALL_ID]":
            yield from stream.run(_NAME, call_id.append)
            raw += call_id
            raw.append((yield from stream.starts_with(self.after_id)))
        yield from stream.run(SPACE, raw.append)
        if not name or (yield from stream.peek()) != "{":
            emit.content("".join(raw))
            return
        emit.begin("".join(name), "".join(call_id) or None)
        if (yield from read_container(stream, emit.arguments)):
            emit.end()
