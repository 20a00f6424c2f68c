"""DeepSeek V3.2's DSML: tags with the parameters of a call, which say whether a value is a string.

<｜DSML｜function_calls>
<｜DSML｜invoke name="get_weather">
<｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>
<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>
</｜DSML｜invoke>
</｜DSML｜function_calls>
(deepseek-ai/DeepSeek-V3.2, encoding/README.md)
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from ..events import Emitter
from ..schema_types import STRING, json_of_text
from ..text_stream import Markers, Reading, TextStream, ignore
from ..tool_parser import ToolParser
from ..typed_arguments import TypedArguments

_TAG = "｜DSML｜"
_BLOCK = f"<{_TAG}function_calls>"
_BLOCK_END = f"</{_TAG}function_calls>"
_INVOKE = f'<{_TAG}invoke name="'
_INVOKE_END = f"</{_TAG}invoke>"
_PARAMETER = f'<{_TAG}parameter name="'
_PARAMETER_END = f"</{_TAG}parameter>"
_ENTRANCE = Markers(_BLOCK, _INVOKE)
_BRACKETS = Markers(_BLOCK, _BLOCK_END)
_BETWEEN = Markers(_BLOCK, _BLOCK_END, _INVOKE)
_NAME_END = Markers('">', "\n", "<")
_HEADER_END = Markers(">", "\n", "<")
_IN_INVOKE = Markers(_PARAMETER, _INVOKE_END, _BLOCK_END, _INVOKE)
_VALUE_END = Markers(_PARAMETER_END, *_IN_INVOKE.markers)
_HEADER = re.compile(r'(?P<key>[^"]*)"(?:\s+string="(?P<string>true|false)")?\s*')
_WRAPPERS = ("arguments", "input")
_UNKNOWN = frozenset({"unknown"})  # any JSON value, else a string


class DeepSeekV32ToolParser(ToolParser):
    """A block ends the answer: text after it is dropped. A block without any call is content."""

    special_tokens = (_TAG,)

    def grammar(self, stream: TextStream, emit: Emitter) -> Reading[None]:
        num_calls = 0
        raw: list[str] = []  # of a block without a call so far
        marker = yield from stream.through(_ENTRANCE, emit.content)
        while marker:
            take = ignore if num_calls else raw.append
            take(marker)
            if marker != _INVOKE:
                marker = yield from stream.through(_BETWEEN, take)
                continue
            name: list[str] = []
            ending = yield from stream.through(_NAME_END, name.append)
            if ending != '">' or not name:
                take("".join([*name, ending]))
                marker = yield from stream.through(_BETWEEN, take)
                continue
            num_calls += 1
            emit.begin("".join(name))
            marker = yield from self._parameters(stream, emit, self.types.get("".join(name), {}))
        if not num_calls and _BRACKETS.pattern.sub("", "".join(raw)).strip():
            emit.content("".join(raw))

    def _parameters(self, stream: TextStream, emit: Emitter, types: Mapping[str, frozenset[str]]) -> Reading[str]:
        """Read the parameters of a call; returns the marker after them."""
        arguments = TypedArguments(emit, types)
        wrapper: _Wrapper | None = None
        is_first = True
        marker = yield from stream.through(_IN_INVOKE, ignore)
        while marker == _PARAMETER:
            header: list[str] = []
            yield from stream.through(_HEADER_END, header.append)
            found = _HEADER.fullmatch("".join(header))
            if wrapper is not None:
                wrapper.write(arguments)
                wrapper = None
            if found is None:
                marker = yield from stream.through(_IN_INVOKE, ignore)
                continue
            unknown = _UNKNOWN if found["string"] == "false" else STRING
            if is_first and found["key"] in _WRAPPERS and types and found["key"] not in types:
                wrapper = _Wrapper(found["key"], unknown)
                marker = yield from stream.through(_VALUE_END, wrapper.value)
            else:
                arguments.begin_value(found["key"], unknown)
                marker = yield from stream.through(_VALUE_END, arguments.value)
                if not marker:
                    return ""
                arguments.end_value()
            is_first = False
            if marker == _PARAMETER_END:
                marker = yield from stream.through(_IN_INVOKE, ignore)
        if wrapper is not None:
            wrapper.unwrap(arguments, types)
        if marker:
            arguments.end()
        return (yield from stream.through(_BETWEEN, ignore)) if marker == _INVOKE_END else marker


class _Wrapper:
    """A first parameter that the schema does not know and that may hold all arguments as one object."""

    def __init__(self, key: str, types: frozenset[str]) -> None:
        self._key = key
        self._types = types
        self._pieces: list[str] = []

    def value(self, text: str) -> None:
        self._pieces.append(text)

    def write(self, arguments: TypedArguments) -> None:
        """It is a parameter like any other."""
        arguments.begin_value(self._key, self._types)
        arguments.value("".join(self._pieces))
        arguments.end_value()

    def unwrap(self, arguments: TypedArguments, known: Mapping[str, frozenset[str]]) -> None:
        """It is the only parameter: take the arguments out if they are ones that the schema knows."""
        text = json_of_text("".join(self._pieces), frozenset({"object"}))
        if text.startswith("{") and known.keys() & json.loads(text).keys():
            arguments.raw_object(text)
        else:
            self.write(arguments)
