"""Calls as a list of Python calls with keyword arguments: Llama 3.2, Llama 4, ToolACE.

[get_weather(city='Paris', days=3), get_time()]
(meta-llama/llama-models, models/llama3_2/text_prompt_format.md and models/llama4/prompt_format.md)
"""

from __future__ import annotations

import re

from ..events import Emitter
from ..python_literals import read_literal
from ..schema_types import json_string
from ..text_stream import SPACE, Markers, Reading, TextStream, ignore
from ..tool_parser import ToolParser

_NAME = re.compile(r"[\w.]+")
_PYTHON_START, _PYTHON_END = Markers("<|python_start|>"), Markers("<|python_end|>")


class PythonicToolParser(ToolParser):
    """An answer is a list of calls if it begins as one; then what follows the list is content again.

    The arguments are literals; nothing is evaluated. A call with anything else ends there, cut off.
    """

    def grammar(self, stream: TextStream, emit: Emitter) -> Reading[None]:
        raw: list[str] = []
        yield from stream.run(SPACE, raw.append)
        yield from self._calls(stream, emit, raw)

    def _calls(self, stream: TextStream, emit: Emitter, raw: list[str]) -> Reading[None]:
        """Read the list, if it comes next, and the separators between its calls."""
        separator = "["
        while (yield from stream.peek()) == separator:
            raw.append((yield from stream.next()))
            yield from stream.run(SPACE, raw.append)
            if not (yield from self._call(stream, emit, raw)):
                return
            raw = []
            yield from stream.run(SPACE, raw.append)
            separator = ","
        if (yield from stream.peek()) == "]" and separator == ",":
            yield from stream.next()
        else:
            emit.content("".join(raw))

    def _call(self, stream: TextStream, emit: Emitter, raw: list[str]) -> Reading[bool]:
        """Read one call; False if it is none, which makes `raw` content, or if it is cut off."""
        name: list[str] = []
        yield from stream.run(_NAME, name.append)
        raw += name
        yield from stream.run(SPACE, raw.append)
        if not name or (yield from stream.peek()) != "(":
            emit.content("".join(raw))
            return False
        raw.append((yield from stream.next()))
        yield from stream.run(SPACE, raw.append)
        opening = "{"
        begun = False
        while (yield from stream.peek()) != ")":
            key: list[str] = []
            yield from stream.run(_NAME, key.append)
            raw += key
            yield from stream.run(SPACE, raw.append)
            if not key or (yield from stream.peek()) != "=":
                if not begun:
                    emit.content("".join(raw))
                return False
            yield from stream.next()
            yield from stream.run(SPACE, ignore)
            if not begun:
                emit.begin("".join(name))
                begun = True
            emit.arguments(f"{opening}{json_string(''.join(key))}: ")
            opening = ", "
            if not (yield from read_literal(stream, emit.arguments)):
                return False
            yield from stream.run(SPACE, ignore)
            if (yield from stream.peek()) == ",":
                yield from stream.next()
                yield from stream.run(SPACE, ignore)
            elif (yield from stream.peek()) != ")":
                return False
        yield from stream.next()
        if not begun:
            emit.begin("".join(name))
        emit.arguments("{}" if opening == "{" else "}")
        emit.end()
        return True


class Llama4PythonicToolParser(PythonicToolParser):
    """As pythonic, also between <|python_start|> and <|python_end|>, before which there may be text."""

    special_tokens = (*_PYTHON_START.markers, *_PYTHON_END.markers)

    def grammar(self, stream: TextStream, emit: Emitter) -> Reading[None]:
        raw: list[str] = []
        yield from stream.run(SPACE, raw.append)
        marker = yield from stream.starts_with(_PYTHON_START)
        if not marker and (yield from stream.peek()) != "[":
            emit.content("".join(raw))
            raw = []
            marker = yield from stream.through(_PYTHON_START, emit.content)
        while True:
            raw.append(marker)
            yield from self._calls(stream, emit, raw)
            yield from stream.run(SPACE, emit.content)
            yield from stream.starts_with(_PYTHON_END)
            marker = yield from stream.through(_PYTHON_START, emit.content)
            if not marker:
                return
            raw = []
