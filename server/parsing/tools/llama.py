"""Llama 3.1's JSON calls, which stand in the answer without any marker, or after <|python_tag|>.

{"name": "get_weather", "parameters": {"city": "Paris"}}; {"name": …}
(meta-llama/llama-models, models/llama3_1/prompt_format.md)
"""

from __future__ import annotations

from ..events import Emitter
from ..json_calls import read_call_object
from ..text_stream import SPACE, Markers, Reading, TextStream, ignore
from ..tool_parser import ToolParser

_PYTHON_TAG = "<|python_tag|>"
_BEGIN = Markers("{", _PYTHON_TAG)
_OBJECT = Markers("{")
_SEPARATOR = Markers(";", ",")


class Llama3JsonToolParser(ToolParser):
    """An object is a call if its keys are a call's. Text around the calls is content."""

    special_tokens = (_PYTHON_TAG,)

    def grammar(self, stream: TextStream, emit: Emitter) -> Reading[None]:
        while marker := (yield from stream.through(_BEGIN, emit.content)):
            raw: list[str] = []
            if marker == _PYTHON_TAG:
                raw.append(marker)
                yield from stream.run(SPACE, raw.append)
                if not (yield from stream.starts_with(_OBJECT)):
                    emit.content("".join(raw))
                    continue
            stream.position -= 1  # the bracket
            if (yield from read_call_object(stream, emit, raw, strict=True)):
                yield from self._skip_separator(stream, emit)

    def _skip_separator(self, stream: TextStream, emit: Emitter) -> Reading[None]:
        between: list[str] = []
        yield from stream.run(SPACE, between.append)
        if not (yield from stream.starts_with(_SEPARATOR)):
            emit.content("".join(between))
            return
        yield from stream.run(SPACE, ignore)
