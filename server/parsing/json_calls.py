"""Tool calls written as JSON: an object with a name and arguments, or a list of such objects.

The arguments are passed on as the model wrote them, so numbers, escapes and duplicate keys stay as they are. A call
begins when its name is known and its arguments have begun as an object; what fails before that is content again.
"""

from __future__ import annotations

import json
import re

from .events import Emitter
from .text_stream import SPACE, Reading, Take, TextStream, ignore

ARGUMENT_KEYS = ("arguments", "parameters")
CALL_KEYS = ("name", "type", "id", "function", *ARGUMENT_KEYS)
_STRUCTURE = re.compile(r'["{}\[\]]')
_IN_STRING = re.compile(r'["\\]')
_SCALAR = re.compile(r"[^\s,\]}\"{\[]+")


def read_container(stream: TextStream, take: Take, depth: int = 0) -> Reading[bool]:
    """Pass on a JSON object or list; False if the text ends inside it.

    `depth` is the number of its brackets that are already read. Only quotes and brackets are looked at, so text that is
    almost JSON passes too.
    """
    quoted = escaped = False
    while (yield from stream.more()):
        text, at = stream.text, stream.position
        start = at
        closed = False
        if escaped:
            at += 1
            escaped = False
        while at < len(text) and not closed:
            found = (_IN_STRING if quoted else _STRUCTURE).search(text, at)
            if found is None:
                at = len(text)
                break
            at = found.end()
            mark = found.group()
            if mark == "\\":
                escaped = at == len(text)
                at += not escaped
            elif mark == '"':
                quoted = not quoted
            else:
                depth += 1 if mark in "{[" else -1
                closed = depth <= 0
        stream.position = at
        take(text[start:at])
        if closed:
            return True
    return False


def read_string(stream: TextStream, take: Take) -> Reading[str | None]:
    """Pass on a JSON string, quotes and all; returns what it says, None if it is cut off or not valid."""
    pieces = [(yield from stream.next())]
    take(pieces[0])
    escaped = False
    while (yield from stream.more()):
        text, at = stream.text, stream.position
        start = at
        closed = False
        if escaped:
            at += 1
            escaped = False
        while at < len(text) and not closed:
            found = _IN_STRING.search(text, at)
            at = len(text) if found is None else found.end()
            if found is not None and found.group() == '"':
                closed = True
            elif found is not None:
                escaped = at == len(text)
                at += not escaped
        stream.position = at
        pieces.append(text[start:at])
        take(pieces[-1])
        if closed:
            return _decoded("".join(pieces))
    return None


def _decoded(text: str) -> str | None:
    try:
        value = json.loads(text, strict=False)
    except ValueError:
        return None
    return value if isinstance(value, str) else None


class CallObject:
    """Reads one object {"name": …, "arguments": {…}}; "parameters" is another word for "arguments".

    Arguments in a JSON string, as some models write them, are taken out of it. `raw` is the text that belongs to the
    call so far, its marker for instance; it becomes content if this is no call. With `strict` an object with a key that
    a call does not have is no call.
    """

    def __init__(self, stream: TextStream, emit: Emitter, raw: list[str], *, strict: bool = False) -> None:
        self._stream = stream
        self._emit = emit
        self._raw = raw
        self._strict = strict
        self._name: str | None = None
        self._arguments: list[str] | None = None  # complete or not, as long as the name is not known
        self._complete = False
        self.begun = False

    def read(self) -> Reading[bool]:
        """Read the object, if one comes next; False if it was no call."""
        yield from self._members()
        if not self.begun:
            self._emit.content("".join(self._raw))
        return self.begun

    def _take(self, text: str) -> None:
        if not self.begun:
            self._raw.append(text)

    def _members(self) -> Reading[None]:
        stream = self._stream
        if (yield from stream.peek()) != "{":
            return
        self._take((yield from stream.next()))
        while True:
            yield from stream.run(SPACE, self._take)
            if (yield from stream.peek()) != '"':
                break
            key = yield from read_string(stream, self._take)
            if key is None or (self._strict and not self.begun and key not in CALL_KEYS):
                return
            yield from stream.run(SPACE, self._take)
            if (yield from stream.peek()) != ":":
                return
            self._take((yield from stream.next()))
            yield from stream.run(SPACE, self._take)
            if not (yield from self._member(key)):
                return
            yield from stream.run(SPACE, self._take)
            if (yield from stream.peek()) != ",":
                break
            self._take((yield from stream.next()))
        if (yield from stream.peek()) == "}":
            self._take((yield from stream.next()))

    def _member(self, key: str) -> Reading[bool]:
        first = yield from self._stream.peek()
        if key == "name" and self._name is None:
            self._name = (yield from read_string(self._stream, self._take)) if first == '"' else None
            if not self._name:
                return False
            self._begin()
            return True
        if key in ARGUMENT_KEYS and self._arguments is None:
            return (yield from self._read_arguments(first))
        return (yield from self._skip(first))

    def _skip(self, first: str) -> Reading[bool]:
        if first == '"':
            return (yield from read_string(self._stream, self._take)) is not None
        if first and first in "{[":
            return (yield from read_container(self._stream, self._take))
        pieces: list[str] = []
        yield from self._stream.run(_SCALAR, pieces.append)
        self._take("".join(pieces))
        return bool(pieces)

    def _read_arguments(self, first: str) -> Reading[bool]:
        stream = self._stream
        if first == '"':
            text = yield from read_string(stream, self._take)
            if text is None or not text.lstrip().startswith("{"):
                return False
            self._arguments = [text]
            self._complete = True
        elif first == "{":
            opening: list[str] = [(yield from stream.next())]
            yield from stream.run(SPACE, opening.append)
            self._take("".join(opening))
            if (yield from stream.peek()) not in ('"', "}"):
                return False
            self._arguments = opening
            self._begin()
            self._complete = yield from read_container(stream, self._take_argument, depth=1)
        else:
            pieces: list[str] = []
            yield from stream.run(_SCALAR, pieces.append)
            self._take("".join(pieces))
            if "".join(pieces) != "null":
                return False
            self._arguments = ["{}"]
            self._complete = True
        if self.begun:
            if self._complete:
                self._emit.end()
        else:
            self._begin()
        return self._complete

    def _take_argument(self, text: str) -> None:
        if self.begun:
            self._emit.arguments(text)
        else:
            self._raw.append(text)
            assert self._arguments is not None
            self._arguments.append(text)

    def _begin(self) -> None:
        """Begin the call if both parts are there, and catch up with the arguments."""
        if self._name is None or self._arguments is None or self.begun:
            return
        self.begun = True
        self._emit.begin(self._name)
        self._emit.arguments("".join(self._arguments))
        if self._complete:
            self._emit.end()


def read_call_object(stream: TextStream, emit: Emitter, raw: list[str], *, strict: bool = False) -> Reading[bool]:
    """Emit the call that comes next as an object; if it is none, emit `raw` and what was read as content, False."""
    return (yield from CallObject(stream, emit, raw, strict=strict).read())


def read_call_list(stream: TextStream, emit: Emitter, raw: list[str], *, strict: bool = False) -> Reading[bool]:
    """Emit the calls that come next as a list; if there is none, emit `raw` and what was read as content, False."""
    if (yield from stream.peek()) != "[":
        emit.content("".join(raw))
        return False
    raw.append((yield from stream.next()))
    yield from stream.run(SPACE, raw.append)
    if not (yield from read_call_object(stream, emit, raw, strict=strict)):
        return False
    while True:
        yield from stream.run(SPACE, ignore)
        separator = yield from stream.peek()
        if separator == "]":
            yield from stream.next()
        if separator != ",":
            return True
        between = [(yield from stream.next())]
        yield from stream.run(SPACE, between.append)
        if not (yield from read_call_object(stream, emit, between, strict=strict)):
            return True
