"""What a grammar finds in an answer: events, and the emitter that collects them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Union


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text of the model's reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    """A tool call begins. `call_id` is the one the model wrote, if its format has ids."""

    name: str
    call_id: str | None = None


@dataclass(frozen=True, slots=True)
class Arguments:
    """A piece of the arguments, a JSON text, of the call that has begun."""

    text: str


@dataclass(frozen=True, slots=True)
class CallEnded:
    """The arguments of the call are complete. A call that the end of the text cuts off has no such event."""


Event = Union[Content, Reasoning, CallBegun, Arguments, CallEnded]  # noqa: UP007  (an alias at run time, Python 3.10)
TextKind = type[Union[Content, Reasoning, Arguments]]  # noqa: UP007


class Emitter:
    """Collects events, and joins neighbours of one kind.

    Content that is only whitespace between the beginning, the calls and the end is layout and no content, if there is a
    call. With `strips_content` the whitespace directly before a call is layout too. Such whitespace is held back.
    """

    def __init__(self, *, strips_content: bool = False) -> None:
        self.strips_content = strips_content
        self._done: list[Event] = []
        self._kind: TextKind | None = None
        self._pieces: list[str] = []
        self._held: list[str] = []  # whitespace of which is not known whether it is content
        self._segment_is_blank = True
        self._called = False

    def content(self, text: str) -> None:
        """Text for the reader."""
        if not text:
            return
        if not self.strips_content and not self._segment_is_blank:
            self._text(Content, text)
            return
        solid = text.rstrip()
        if not solid:
            self._held.append(text)
            return
        self._segment_is_blank = False
        self._flush_held()
        if not self.strips_content:
            self._text(Content, text)
            return
        self._text(Content, solid)
        if len(solid) < len(text):
            self._held.append(text[len(solid) :])

    def reasoning(self, text: str) -> None:
        """Text of the reasoning."""
        if text:
            self._text(Reasoning, text)

    def begin(self, name: str, call_id: str | None = None) -> None:
        """A call, whose arguments follow."""
        if self.strips_content or self._segment_is_blank:
            self._held.clear()
        self._segment_is_blank = True
        self._called = True
        self._event(CallBegun(name, call_id))

    def arguments(self, text: str) -> None:
        """A piece of the arguments of the call that has begun."""
        if text:
            self._text(Arguments, text)

    def end(self) -> None:
        """The arguments are complete."""
        self._event(CallEnded())

    def finish(self) -> None:
        """The end of the text."""
        if self._called and self._segment_is_blank:
            self._held.clear()
        self._flush_held()

    def drain(self) -> list[Event]:
        """The events since the last call of this."""
        self._close()
        events, self._done = self._done, []
        return events

    def _flush_held(self) -> None:
        for text in self._held:
            self._text(Content, text)
        self._held.clear()

    def _text(self, kind: TextKind, text: str) -> None:
        if kind is not self._kind:
            self._close()
            self._kind = kind
        self._pieces.append(text)

    def _event(self, event: Event) -> None:
        self._close()
        self._done.append(event)

    def _close(self) -> None:
        if self._kind is not None:
            self._done.append(self._kind("".join(self._pieces)))
            self._kind = None
            self._pieces = []
