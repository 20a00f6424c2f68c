"""One answer under one grammar: text in, events out."""

from __future__ import annotations

from collections.abc import Callable

from .events import Emitter, Event
from .text_stream import Reading, TextStream

Grammar = Callable[[TextStream, Emitter], Reading[None]]


class Parse:
    """Runs a grammar over text that comes in pieces.

    The events of all `feed`s and of `finish`, with neighbouring texts joined, do not depend on the pieces. The work is
    linear in the length of the text. Text that the grammar leaves unread is content.
    """

    def __init__(self, grammar: Grammar, emitter: Emitter) -> None:
        self._stream = TextStream()
        self._emitter = emitter
        self._reading = self._read(grammar)
        next(self._reading, None)

    def _read(self, grammar: Grammar) -> Reading[None]:
        yield from grammar(self._stream, self._emitter)
        yield from self._stream.rest(self._emitter.content)

    def feed(self, text: str) -> list[Event]:
        """The events that `text`, the next piece of the answer, decides."""
        if text:
            self._stream.feed(text)
            next(self._reading, None)
        return self._emitter.drain()

    def finish(self) -> list[Event]:
        """The events that the end of the answer decides. Nothing may be fed afterwards."""
        self._stream.ended = True
        next(self._reading, None)
        self._emitter.finish()
        return self._emitter.drain()
