"""Arguments of a call whose format writes them one by one and without types, as a JSON object that grows."""

from __future__ import annotations

from collections.abc import Mapping

from .events import Emitter
from .schema_types import STRING, json_of_text, json_string

_NULLABLE_STRING = frozenset({"string", "null"})


class TypedArguments:
    """Writes {"key": value, …} as the values come; `types` has the allowed JSON types of the known parameters.

    A string passes on while it comes; the value of another type, or of several, is converted when it is complete.
    Parameters that the schema does not know are `unknown`, by default strings. A key that comes twice is written twice.
    """

    def __init__(self, emit: Emitter, types: Mapping[str, frozenset[str]], unknown: frozenset[str] = STRING) -> None:
        self._emit = emit
        self._types = types
        self._unknown = unknown
        self._opening = "{"
        self._of_value = STRING
        self._pieces: list[str] = []
        self._streams = False

    def begin_value(self, key: str, unknown: frozenset[str] | None = None) -> None:
        """The value of `key` follows; `unknown`: its types if the schema does not know it."""
        self._emit.arguments(f"{self._opening}{json_string(key)}: ")
        self._opening = ", "
        self._of_value = self._types.get(key, self._unknown if unknown is None else unknown)
        self._pieces = []
        self._streams = False
        if self._of_value == STRING:
            self._begin_string()

    def value(self, text: str) -> None:
        """A piece of the value."""
        if self._streams:
            self._emit.arguments(json_string(text)[1:-1])
            return
        self._pieces.append(text)
        # Only a beginning of "null" leaves open whether this is a string. Long whitespace is one as well.
        if self._of_value == _NULLABLE_STRING:
            so_far = "".join(self._pieces)
            if len(so_far) > 64 or not "null".startswith(so_far.strip().lower()):
                self._begin_string()

    def end_value(self) -> None:
        """The value is complete."""
        if self._streams:
            self._emit.arguments('"')
        else:
            self._emit.arguments(json_of_text("".join(self._pieces), self._of_value))

    def raw_object(self, text: str) -> None:
        """All arguments at once, as the text of a JSON object; nothing was written before."""
        self._emit.arguments(text)
        self._opening = ""

    def end(self) -> None:
        """No further value follows."""
        if self._opening:
            self._emit.arguments("{}" if self._opening == "{" else "}")
        self._emit.end()

    def _begin_string(self) -> None:
        self._streams = True
        self._emit.arguments('"' + json_string("".join(self._pieces))[1:-1])
        self._pieces = []


class WithoutOneNewline:
    """Passes text to `arguments` without the one newline at its beginning and the one at its end."""

    def __init__(self, arguments: TypedArguments) -> None:
        self._arguments = arguments
        self._begun = False
        self._held = ""

    def __call__(self, text: str) -> None:
        if not self._begun:
            self._begun = True
            text = text.removeprefix("\n")
            if not text:
                return
        text = self._held + text
        self._held = "\n" if text.endswith("\n") else ""
        if text.removesuffix("\n"):
            self._arguments.value(text.removesuffix("\n"))


class TrimmedArguments:
    """Passes text on to an emitter as arguments without the whitespace around it."""

    def __init__(self, emit: Emitter) -> None:
        self._emit = emit
        self._held: list[str] = []
        self._begun = False

    def __call__(self, text: str) -> None:
        if not self._begun:
            text = text.lstrip()
        solid = text.rstrip()
        if solid:
            self._begun = True
            self._emit.arguments("".join(self._held) + solid)
            self._held = []
        if self._begun and len(solid) < len(text):
            self._held.append(text[len(solid) :])

    def end(self) -> None:
        """The arguments are complete; an empty text stands for no arguments."""
        if not self._begun:
            self._emit.arguments("{}")
        self._emit.end()
