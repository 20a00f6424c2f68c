"""A parse behind the arguments of vLLM's streaming methods, which have no beginning and no end."""

from __future__ import annotations

from collections.abc import Callable

from .deltas import DeltaBuilder, merge_deltas
from .messages import DeltaMessage
from .parse import Parse


class VllmStream:
    """A parse behind the arguments of vLLM's streaming methods."""

    def __init__(self, new_parse: Callable[[], Parse]) -> None:
        self._new_parse = new_parse
        self._parse: Parse | None = None
        self._builder = DeltaBuilder()

    def feed(self, text: str, previous_text: str | None, *, begins: bool) -> DeltaMessage | None:
        """The delta of one piece; `begins`: the first of an answer. A parser that joins late reads what came before it.

        None where the piece decides nothing.
        """
        if self._parse is None or begins:
            self._parse = self._new_parse()
            self._builder = DeltaBuilder()
            self._builder.deltas(self._parse.feed(previous_text or ""))
        return merge_deltas(self._builder.deltas(self._parse.feed(text)))

    def finish(self) -> DeltaMessage | None:
        """The delta of the end of the answer."""
        if self._parse is None:
            return None
        parse, self._parse = self._parse, None
        return merge_deltas(self._builder.deltas(parse.finish()))
