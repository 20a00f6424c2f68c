"""From what the model says to output items, and to the events that tell a stream's client how they come about."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import msgspec

from ..parsing.messages import DeltaMessage, DeltaToolCall
from ..responses import ChatTokenLogprobs

Event = dict[str, Any]


class OutputItems:
    """The output of a response while it is written: reasoning, messages and function calls in the order they are said.

    One item is open at a time. Events lack their `sequence_number`, which counts over the whole response.
    """

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._open: _Item | None = None
        self._call_index = -1  # of the call that is open, as the parser numbers it
        self._held: list[ChatTokenLogprobs] = []  # of tokens that no event has told of

    def feed(self, deltas: list[DeltaMessage], logprobs: list[ChatTokenLogprobs]) -> list[Event]:
        """What the next piece of the answer changes; `logprobs` are those of its tokens."""
        self._held += logprobs
        is_mixed = any(not delta.content for delta in deltas)
        events: list[Event] = []
        for delta in deltas:
            if delta.reasoning:
                events += self._say(_Reasoning, delta.reasoning, [])
            if delta.content:
                events += self._say(_Message, delta.content, self._take_logprobs(delta.content, is_mixed))
            for piece in delta.tool_calls:
                events += self._call(piece)
        if is_mixed:
            self._held = []  # of tokens that were no text
        return events

    def finish(self, *, cut: bool = False) -> list[Event]:
        """The end of the answer; `cut`: before the model had ended it. An answer of nothing is an empty message."""
        events = [] if self.items else self._begin(_Message())
        return [*events, *self._close("incomplete" if cut else "completed")]

    def _say(
        self, kind: type[_Message] | type[_Reasoning], text: str, logprobs: list[ChatTokenLogprobs]
    ) -> Iterator[Event]:
        if type(self._open) is not kind:
            yield from self._begin(kind())
        assert self._open is not None
        yield from self._open.add(text, logprobs)

    def _take_logprobs(self, text: str, is_mixed: bool) -> list[ChatTokenLogprobs]:
        """Those of the tokens of `text`; others among the held, of tags before it, belong to nothing."""
        held, self._held = self._held, []
        if not is_mixed and (isinstance(self._open, _Message) or not self.items):
            return held
        first, end = _places_of(text, held)
        self._held = held[end:]
        return held[first:end]

    def _call(self, piece: DeltaToolCall) -> Iterator[Event]:
        assert piece.function is not None  # the parsers always tell a name or arguments
        if piece.index != self._call_index:
            self._call_index = piece.index
            yield from self._begin(_FunctionCall(piece.id or "", piece.function.name or ""))
        assert self._open is not None
        if piece.function.arguments:
            yield from self._open.add(piece.function.arguments, [])

    def _begin(self, item: _Item) -> list[Event]:
        events = self._close("completed")
        item.output_index = len(self.items)
        self.items.append(item.snapshot("in_progress"))
        self._open = item
        return [*events, *item.begin()]

    def _close(self, status: str) -> list[Event]:
        item, self._open = self._open, None
        if item is None:
            return []
        if isinstance(item, _Message):
            item.logprobs += self._held  # of the token that ended it
            self._held = []
        events = list(item.end(status))
        self.items[-1] = item.snapshot(status)
        return events


def _places_of(text: str, logprobs: list[ChatTokenLogprobs]) -> tuple[int, int]:
    """Which of the tokens `text` is written in, [first, end); all where it is not found in them."""
    data = text.encode("utf-8", "replace")
    start = b"".join(bytes(entry.bytes) for entry in logprobs).rfind(data)
    if start < 0:
        return 0, len(logprobs)
    places, length = [], 0
    for place, entry in enumerate(logprobs):
        if length < start + len(data) and length + len(entry.bytes) > start:
            places.append(place)
        length += len(entry.bytes)
    return places[0], places[-1] + 1


class _Item(ABC):
    """An item while it is open. Its text comes in events `response.<told_as>.delta`."""

    prefix = told_as = text_name = ""
    has_part = True  # its text is in the one part of its content

    def __init__(self) -> None:
        self.id = f"{self.prefix}_{uuid.uuid4().hex}"
        self.output_index = 0
        self.logprobs: list[ChatTokenLogprobs] = []
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    @abstractmethod
    def snapshot(self, status: str) -> dict[str, Any]:
        """The item as it is now."""

    def part(self) -> dict[str, Any]:
        """The part of the item's content as it is now, where it has one."""
        return {}

    def begin(self) -> Iterator[Event]:
        yield self._item_event("added", "in_progress")
        if self.has_part:
            yield self._event("response.content_part.added", part=self.part())

    def add(self, text: str, logprobs: list[ChatTokenLogprobs]) -> Iterator[Event]:
        self._pieces.append(text)
        yield self._event(f"response.{self.told_as}.delta", delta=text, **self._told_logprobs(logprobs))
        self.logprobs += logprobs

    def end(self, status: str) -> Iterator[Event]:
        if not self._pieces:  # clients pair each end with a beginning
            yield from self.add("", [])
        done = {self.text_name: self.text, **self._told_logprobs(self.logprobs)}
        yield self._event(f"response.{self.told_as}.done", **done)
        if self.has_part:
            yield self._event("response.content_part.done", part=self.part())
        yield self._item_event("done", status)

    def _told_logprobs(self, logprobs: list[ChatTokenLogprobs]) -> dict[str, Any]:
        return {}

    def _event(self, kind: str, **fields: Any) -> Event:
        place = {"item_id": self.id, "output_index": self.output_index}
        return {"type": kind, **place, **({"content_index": 0} if self.has_part else {}), **fields}

    def _item_event(self, what: str, status: str) -> Event:
        item = self.snapshot(status)
        if what == "added" and self.has_part:
            item["content"] = []  # its part comes with an event of its own
        return {"type": f"response.output_item.{what}", "output_index": self.output_index, "item": item}


class _Message(_Item):
    prefix, told_as, text_name = "msg", "output_text", "text"

    def snapshot(self, status: str) -> dict[str, Any]:
        return {"id": self.id, "type": "message", "role": "assistant", "status": status, "content": [self.part()]}

    def part(self) -> dict[str, Any]:
        logprobs = msgspec.to_builtins(self.logprobs)
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": logprobs}

    def _told_logprobs(self, logprobs: list[ChatTokenLogprobs]) -> dict[str, Any]:
        return {"logprobs": msgspec.to_builtins(logprobs)}


class _Reasoning(_Item):
    prefix, told_as, text_name = "rs", "reasoning_text", "text"

    def snapshot(self, status: str) -> dict[str, Any]:
        return {"id": self.id, "type": "reasoning", "summary": [], "content": [self.part()], "status": status}

    def part(self) -> dict[str, Any]:
        return {"type": "reasoning_text", "text": self.text}


class _FunctionCall(_Item):
    prefix, told_as, text_name = "fc", "function_call_arguments", "arguments"
    has_part = False

    def __init__(self, call_id: str, name: str) -> None:
        super().__init__()
        self.call_id = call_id
        self.name = name

    def snapshot(self, status: str) -> dict[str, Any]:
        call = {"call_id": self.call_id, "name": self.name, "arguments": self.text}
        return {"id": self.id, "type": "function_call", **call, "status": status}

    def end(self, status: str) -> Iterator[Event]:
        for event in super().end(status):
            if event["type"] == "response.function_call_arguments.done":
                event["name"] = self.name
            yield event
