"""Python literals as JSON, without evaluating anything and without recursion.

Strings, numbers, True, False, None (and JSON's names for them), lists, tuples, sets and dicts, nested as deep as they
come. Tuples and sets become lists; keys of dicts become strings as `json.dumps` makes them.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from .schema_types import json_string
from .text_stream import SPACE, Markers, Reading, Take, TextStream, ignore

_NAMES = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_WORD = re.compile(r"[\w.+-]+")
_INTEGER = re.compile(r"(?P<sign>[+-]?)0*(?P<digits>[0-9]+)", re.ASCII)
_BASED = re.compile(r"(?P<sign>[+-]?)(?P<digits>0(?:[xX][0-9a-fA-F]+|[oO][0-7]+|[bB][01]+))", re.ASCII)
_FLOAT = re.compile(
    r"(?P<sign>[+-]?)0*(?P<whole>[0-9]*)(?:\.(?P<fraction>[0-9]*))?(?P<exponent>[eE][+-]?[0-9]+)?", re.ASCII
)
_MAX_BASED_DIGITS = 1024  # more would not be a number that anybody can read
_SIMPLE_ESCAPES = {
    "\\": "\\", "'": "'", '"': '"', "a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v",
    "\n": "",
}  # fmt: skip
_HEX_ESCAPES = {"x": 2, "u": 4, "U": 8}
_OCTAL, _HEXADECIMAL = "01234567", "0123456789abcdefABCDEF"
_STRING_PREFIXES = frozenset({"", "r", "f", "u", "rf", "fr"})
_TRIPLE = {quote: Markers(quote * 2) for quote in "'\""}
_IN_TEXT = {end: Markers(end, "\\") for end in ("'", '"', "'''", '"""')}
_IN_FORMAT = {end: Markers(end, "\\", "{", "}", "{{", "}}") for end in _IN_TEXT}
_CLOSING = {"[": "]", "(": ")", "{": "}"}


@dataclass(slots=True)
class _Frame:
    """An open bracket. `place`: where its JSON bracket goes, once it is known which, else None."""

    bracket: str
    place: int | None = None
    is_dict: bool = False


class _Output:
    """Passes pieces of JSON on, but keeps them while it is not known what an open bracket becomes."""

    def __init__(self, take: Take) -> None:
        self._take = take
        self._num_open = 0
        self.pieces: list[str] = []

    def write(self, text: str) -> None:
        self.pieces.append(text)
        self._flush()

    def reserve(self) -> int:
        """Keep a place for a bracket."""
        self._num_open += 1
        self.pieces.append("")
        return len(self.pieces) - 1

    def decide(self, place: int, text: str) -> None:
        """Fill a place that was kept."""
        self._num_open -= 1
        self.pieces[place] = text
        self._flush()

    def _flush(self) -> None:
        if not self._num_open:
            self._take("".join(self.pieces))
            self.pieces.clear()


def read_literal(stream: TextStream, take: Take) -> Reading[bool]:
    """Pass the literal that comes next on as JSON; False if it is none, or cut off, from there on."""
    return (yield from _LiteralReader(stream, take).read())


class _LiteralReader:
    def __init__(self, stream: TextStream, take: Take) -> None:
        self._stream = stream
        self._output = _Output(take)
        self._frames: list[_Frame] = []
        self._kind = ""  # of the value read last: string, scalar, container

    def read(self) -> Reading[bool]:
        while True:
            found = yield from self._value()
            if found is None:
                return False
            if found:
                after = yield from self._after_value()
                if after is not None:
                    return after

    def _value(self) -> Reading[bool | None]:
        """Read a value, True, or the bracket that opens one, False. None: malformed."""
        character = yield from self._peek()
        if character not in _CLOSING:
            return (yield from self._scalar()) or None
        yield from self._stream.next()
        if (yield from self._peek()) == _CLOSING[character]:
            yield from self._stream.next()
            self._output.write("{}" if character == "{" else "[]")
            self._kind = "container"
            return True
        frame = _Frame(character)
        if character == "[":
            self._output.write("[")
        else:
            frame.place = self._output.reserve()
        self._frames.append(frame)
        return False

    def _after_value(self) -> Reading[bool | None]:
        """Close what ends here. None: another value follows; True: all is read; False: malformed."""
        while self._frames:
            frame = self._frames[-1]
            character = yield from self._peek()
            if character == ":" and frame.bracket == "{" and frame.place is not None:
                if not self._become_dict(frame):
                    return False
                yield from self._stream.next()
                self._output.write(": ")
                return None
            if character == "," or (character == "}" and frame.bracket == "{"):
                self._become_list(frame)
            if character == ",":
                yield from self._stream.next()
                character = yield from self._peek()
                if character != _CLOSING[frame.bracket]:
                    self._output.write(", ")
                    return (yield from self._key()) if frame.is_dict else None
            if character != _CLOSING[frame.bracket] or not character:
                return False
            yield from self._stream.next()
            self._frames.pop()
            if frame.place is not None:
                self._output.decide(frame.place, "")  # (5) is 5
            else:
                self._output.write("}" if frame.is_dict else "]")
            self._kind = "container"
        return True

    def _become_list(self, frame: _Frame) -> None:
        if frame.place is not None:
            self._output.decide(frame.place, "[")
            frame.place = None

    def _become_dict(self, frame: _Frame) -> bool:
        if self._kind == "container" or frame.place is None:
            return False
        if self._kind == "scalar":
            self._output.pieces[-1] = f'"{self._output.pieces[-1]}"'
        self._output.decide(frame.place, "{")
        frame.place = None
        frame.is_dict = True
        return True

    def _key(self) -> Reading[bool | None]:
        """Read a key and its colon; None as a value follows, False if it is malformed."""
        place = self._output.reserve()
        if not (yield from self._scalar()) or (yield from self._peek()) != ":":
            return False
        yield from self._stream.next()
        if self._kind == "scalar":
            self._output.pieces[-1] = f'"{self._output.pieces[-1]}"'
        self._output.decide(place, "")
        self._output.write(": ")
        return None

    def _peek(self) -> Reading[str]:
        yield from self._stream.run(SPACE, ignore)
        return (yield from self._stream.peek())

    def _scalar(self) -> Reading[bool]:
        """Read a string, a number or a name; False if it is none."""
        word: list[str] = []
        yield from self._stream.run(_WORD, word.append)
        text = "".join(word)
        if (yield from self._stream.peek()) in ("'", '"'):
            return (yield from self._strings(text.lower()))
        found = _NAMES.get(text) or _number(text)
        if found is None:
            return False
        self._output.write(found)
        self._kind = "scalar"
        return True

    def _strings(self, prefix: str) -> Reading[bool]:
        """Read string literals that stand side by side, which are one string."""
        self._kind = "string"
        self._output.write('"')
        while prefix in _STRING_PREFIXES:
            if not (yield from self._string("r" in prefix, "f" in prefix)):
                return False
            yield from self._stream.run(SPACE, ignore)
            word: list[str] = []
            yield from self._stream.run(_WORD, word.append)
            prefix = "".join(word).lower()
            if (yield from self._stream.peek()) not in ("'", '"'):
                self._output.write('"')
                return not prefix
        return False

    def _string(self, is_raw: bool, is_format: bool) -> Reading[bool]:
        """Read one string literal from its opening quote on."""
        end = yield from self._stream.next()
        if (yield from self._stream.starts_with(_TRIPLE[end])):
            end *= 3
        markers = (_IN_FORMAT if is_format else _IN_TEXT)[end]
        while True:
            marker = yield from self._stream.through(markers, self._text)
            if marker == end:
                return True
            if marker in ("{{", "}}"):
                self._text(marker[0])
            elif marker != "\\":
                return False  # cut off, or a replacement field
            elif is_raw:
                self._text("\\" + (yield from self._stream.next()))
            elif not (yield from self._escape()):
                return False

    def _text(self, text: str) -> None:
        self._output.write(json_string(text)[1:-1])

    def _escape(self) -> Reading[bool]:
        """Read what follows a backslash."""
        character = yield from self._stream.next()
        if character in _SIMPLE_ESCAPES:
            self._text(_SIMPLE_ESCAPES[character])
        elif character in _HEX_ESCAPES:
            digits = yield from self._digits(_HEXADECIMAL, _HEX_ESCAPES[character])
            if len(digits) < _HEX_ESCAPES[character] or int(digits, 16) > 0x10FFFF:
                return False
            self._code_point(int(digits, 16))
        elif character and character in _OCTAL:
            self._code_point(int(character + (yield from self._digits(_OCTAL, 2)), 8))
        elif character == "N":
            return False
        else:
            self._text("\\" + character)
        return True

    def _digits(self, allowed: str, count: int) -> Reading[str]:
        digits = ""
        while len(digits) < count:
            character = yield from self._stream.peek()
            if not character or character not in allowed:
                break
            digits += yield from self._stream.next()
        return digits

    def _code_point(self, code: int) -> None:
        # Half of a surrogate pair has no UTF-8; as an escape two of them make a character in JSON.
        if 0xD800 <= code < 0xE000:
            self._output.write(f"\\u{code:04x}")
        else:
            self._text(chr(code))


def _number(text: str) -> str | None:
    """A Python number as a JSON number with the same digits; None if it is not one, or not finite."""
    plain = re.sub(r"(?<=[0-9a-fA-FxXoObB])_(?=[0-9a-fA-F])", "", text)
    if found := _INTEGER.fullmatch(plain):
        return ("-" if found["sign"] == "-" and found["digits"] != "0" else "") + found["digits"]
    if found := _BASED.fullmatch(plain):
        digits = found["digits"]
        return str(int(found["sign"] + digits, 0)) if len(digits) <= _MAX_BASED_DIGITS else None
    found = _FLOAT.fullmatch(plain)
    if found is None or not any(character.isdigit() for character in plain.partition("e")[0].partition("E")[0]):
        return None
    if not math.isfinite(float(plain)):
        return None
    fraction = found["fraction"]
    sign = "-" if found["sign"] == "-" else ""
    return (
        sign
        + (found["whole"] or "0")
        + (f".{fraction or '0'}" if fraction is not None else "")
        + (found["exponent"] or "")
    )
