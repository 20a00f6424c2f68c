"""Calls whose parameters stand one by one between tags, without types: Qwen3-Coder, GLM-4.5."""

from __future__ import annotations

import re

from ..events import Emitter
from ..text_stream import SPACE, Markers, Reading, TextStream, ignore
from ..tool_parser import ToolParser
from ..typed_arguments import TypedArguments, WithoutOneNewline

_TOOL_CALL, _TOOL_CALL_END = "<tool_call>", "</tool_call>"
_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"


class Qwen3CoderToolParser(ToolParser):
    """<tool_call>
    <function=get_weather>
    <parameter=city>
    Paris
    </parameter>
    </function>
    </tool_call>

    (Qwen/Qwen3-Coder-30B-A3B-Instruct, its chat template.) The line feeds around a value belong to the format. The tags
    around the function may be missing, and so may </parameter>.
    """

    special_tokens = (_TOOL_CALL, _TOOL_CALL_END)
    strips_content = True
    begin = Markers(_TOOL_CALL, _FUNCTION)
    begin_or_end = Markers(_TOOL_CALL, _FUNCTION, _TOOL_CALL_END)
    function = Markers(_FUNCTION)
    name_end = Markers(">", "<", "\n")
    in_function = Markers(_PARAMETER, _FUNCTION_END, _TOOL_CALL_END, _TOOL_CALL, _FUNCTION)
    value_end = Markers(_PARAMETER_END, _PARAMETER, _FUNCTION_END, _TOOL_CALL_END)

    def grammar(self, stream: TextStream, emit: Emitter) -> Reading[None]:
        marker = yield from stream.through(self.begin, emit.content)
        while marker:
            raw = [marker]
            if marker == _TOOL_CALL:
                yield from stream.run(SPACE, raw.append)
                raw.append((yield from stream.starts_with(self.function)))
            if raw[-1] == _FUNCTION and (name := (yield from self._name(stream, raw))):
                emit.begin(name)
                marker = yield from self._parameters(stream, emit, name)
                if marker == _FUNCTION_END:
                    marker = yield from stream.through(self.begin_or_end, emit.content)
                if marker not in (_TOOL_CALL_END, _FUNCTION_END):
                    continue
            else:
                emit.content("".join(raw))
            marker = yield from stream.through(self.begin, emit.content)

    def _name(self, stream: TextStream, raw: list[str]) -> Reading[str]:
        """Read a function's name and its >; "" if it is cut off or malformed, and then `raw` has what was read."""
        name: list[str] = []
        ending = yield from stream.through(self.name_end, name.append)
        if ending == ">" and "".join(name).strip():
            return "".join(name).strip()
        raw += name
        stream.position -= len(ending)  # it may begin the next tag
        return ""

    def _parameters(self, stream: TextStream, emit: Emitter, name: str) -> Reading[str]:
        """Read the parameters of a call; returns the marker after them."""
        arguments = TypedArguments(emit, self.types.get(name, {}))
        marker = yield from stream.through(self.in_function, ignore)
        while marker == _PARAMETER:
            key: list[str] = []
            if (yield from stream.through(self.name_end, key.append)) != ">":
                marker = yield from stream.through(self.in_function, ignore)
                continue
            arguments.begin_value("".join(key).strip())
            marker = yield from stream.through(self.value_end, WithoutOneNewline(arguments))
            if not marker:
                return ""
            arguments.end_value()
            if marker == _PARAMETER_END:
                marker = yield from stream.through(self.in_function, ignore)
        if marker:
            arguments.end()
        return marker


class Glm4MoeToolParser(ToolParser):
    """<tool_call>get_weather
    <arg_key>city</arg_key>
    <arg_value>Paris</arg_value>
    </tool_call>

    (zai-org/GLM-4.5, its chat template; GLM-4.7 writes the same without line feeds.)
    """

    special_tokens = (
        _TOOL_CALL, _TOOL_CALL_END, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>",
    )  # fmt: skip
    strips_content = True
    begin = Markers(_TOOL_CALL)
    name_characters = re.compile(r"[\w.:/-]+")
    after_name = Markers("<arg_key>", _TOOL_CALL_END)
    in_call = Markers("<arg_key>", "<arg_value>", _TOOL_CALL_END)
    key_end = Markers("</arg_key>", *in_call.markers)
    value_end = Markers("</arg_value>", _TOOL_CALL_END)

    def grammar(self, stream: TextStream, emit: Emitter) -> Reading[None]:
        while marker := (yield from stream.through(self.begin, emit.content)):
            raw = [marker]
            yield from stream.run(SPACE, raw.append)
            name: list[str] = []
            yield from stream.run(self.name_characters, name.append)
            raw += name
            yield from stream.run(SPACE, raw.append)
            marker = yield from stream.starts_with(self.after_name)
            if not marker or not name:
                emit.content("".join(raw) + marker)
                continue
            emit.begin("".join(name))
            yield from self._parameters(stream, emit, "".join(name), marker)

    def _parameters(self, stream: TextStream, emit: Emitter, name: str, marker: str) -> Reading[None]:
        """Read the parameters of a call from its first marker on."""
        arguments = TypedArguments(emit, self.types.get(name, {}))
        while marker and marker != _TOOL_CALL_END:
            key: list[str] = []
            if marker == "<arg_key>":
                marker = yield from stream.through(self.key_end, key.append)
            if marker == "</arg_key>":
                marker = yield from stream.through(self.in_call, ignore)
            if marker == "<arg_value>" and key:
                arguments.begin_value("".join(key).strip())
                marker = yield from stream.through(self.value_end, arguments.value)
                if not marker:
                    return
                arguments.end_value()
                if marker == _TOOL_CALL_END:
                    break
            elif marker == "<arg_key>" or marker == _TOOL_CALL_END or not marker:
                continue
            marker = yield from stream.through(self.in_call, ignore)
        if marker:
            arguments.end()
