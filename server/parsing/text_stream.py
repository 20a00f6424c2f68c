"""Text that arrives in pieces, read by grammars that cannot see where the pieces end.

A grammar is a generator that reads from a `TextStream` with the methods below and yields when the text read so far does
not decide what comes next. What a method returns, and the concatenation of what it passes on, depend on the text alone
and never on how it was cut: a method waits while what is left could still be the beginning of what it looks for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar("T")
Reading = Generator[None, None, T]
Take = Callable[[str], object]

SPACE = re.compile(r"\s+")


class Markers:
    """Literal strings to look for; of two that begin at the same place the longer one counts."""

    def __init__(self, *markers: str) -> None:
        self.markers = markers
        self.pattern = re.compile("|".join(map(re.escape, sorted(set(markers), key=len, reverse=True))))
        self.longest = max(map(len, markers))
        self.prefixes = frozenset(marker[:length] for marker in markers for length in range(1, len(marker)))

    def undecided_from(self, text: str, start: int) -> int:
        """Where in text[start:] the first beginning of a marker is that the end of the text cuts off; else its end."""
        for at in range(max(start, len(text) - self.longest + 1), len(text)):
            if text[at:] in self.prefixes:
                return at
        return len(text)


class TextStream:
    """The text that has come and is not yet read is text[position:]."""

    def __init__(self) -> None:
        self.text = ""
        self.position = 0
        self.ended = False

    def feed(self, text: str) -> None:
        """Append what has come."""
        self.text = self.text[self.position :] + text
        self.position = 0

    def more(self) -> Reading[bool]:
        """Wait for a character; False at the end of the text."""
        while self.position >= len(self.text):
            if self.ended:
                return False
            yield
        return True

    def peek(self) -> Reading[str]:
        """The next character, unread; "" at the end of the text."""
        return self.text[self.position] if (yield from self.more()) else ""

    def next(self) -> Reading[str]:
        """The next character; "" at the end of the text."""
        character = yield from self.peek()
        self.position += len(character)
        return character

    def through(self, markers: Markers, take: Take) -> Reading[str]:
        """Pass on what stands before the first of `markers`; returns that marker, read, or "" at the end of the text.

        Held back is only an end of the text that may be the beginning of a marker.
        """
        while True:
            found = markers.pattern.search(self.text, self.position)
            stop = len(self.text) if self.ended else markers.undecided_from(self.text, self.position)
            if found is not None and (self.ended or found.start() < stop):
                self._pass_on(found.start(), take)
                self.position = found.end()
                return found.group()
            self._pass_on(stop, take)
            if self.ended:
                return ""
            yield

    def starts_with(self, markers: Markers) -> Reading[str]:
        """The one of `markers` that comes next, read; "" if none does."""
        while True:
            # a slice is compared, not the whole rest of the text
            ahead = self.text[self.position : self.position + markers.longest]
            if self.ended or (ahead and ahead not in markers.prefixes):
                found = markers.pattern.match(self.text, self.position)
                if found is None:
                    return ""
                self.position = found.end()
                return found.group()
            yield

    def run(self, pattern: re.Pattern[str], take: Take) -> Reading[None]:
        """Pass on the longest run of characters of a class; `pattern` is the class with a plus."""
        while (yield from self.more()):
            found = pattern.match(self.text, self.position)
            if found is None:
                return
            self._pass_on(found.end(), take)

    def rest(self, take: Take) -> Reading[None]:
        """Pass on everything to the end of the text."""
        while (yield from self.more()):
            self._pass_on(len(self.text), take)

    def _pass_on(self, stop: int, take: Take) -> None:
        if stop > self.position:
            take(self.text[self.position : stop])
            self.position = stop


def ignore(_: str) -> None:
    """Takes text that belongs to nothing."""
