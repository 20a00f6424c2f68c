"""The responses that clients may ask for again: in memory, bounded, the least recently used forgotten first."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator
from typing import Any

import msgspec

from ..streaming import named_event_bytes
from .input_items import Item
from .protocol import ResponseBody

MAX_RESPONSES = 1000
MAX_BYTES = 256 * 2**20


class StoredResponse:
    """A response with the conversation that led to it; while it is made in the background, with the task that does.

    `earlier` are the items of the conversation before `new`, those of the request itself.
    """

    def __init__(self, response: ResponseBody, earlier: list[Item], new: list[Item], *, keeps_events: bool) -> None:
        self.response = response
        self.earlier = earlier
        self.new = new
        self.task: asyncio.Task[None] | None = None
        self.events: list[bytes] | None = [] if keeps_events else None
        self._changed = asyncio.Event()

    @property
    def is_running(self) -> bool:
        return self.task is not None and not self.task.done()

    @property
    def conversation(self) -> list[Item]:
        """The items with which a response to this one begins."""
        return [*self.earlier, *self.new, *self.response.output]

    @property
    def num_bytes(self) -> int:
        """About what it takes in memory; the items it shares with its predecessors count for each."""
        return len(msgspec.json.encode([self.response, self.earlier, self.new])) + sum(map(len, self.events or ()))

    def add_event(self, event: dict[str, Any]) -> None:
        if self.events is not None:
            self.events.append(named_event_bytes(event))
        self.wake()

    def wake(self) -> None:
        """Tell those who follow that there is more, or that it has ended."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def follow(self, start: int) -> AsyncGenerator[bytes, None]:
        """The written events from number `start` on, up to the end of the response."""
        events = [] if self.events is None else self.events
        while True:
            changed = self._changed
            while start < len(events):
                yield events[start]
                start += 1
            if self.response.status not in ("queued", "in_progress"):
                return
            await changed.wait()


class ResponseStore:
    """Responses by id. What runs is never forgotten."""

    def __init__(self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._stored: OrderedDict[str, tuple[StoredResponse, int]] = OrderedDict()
        self._num_bytes = 0

    def __len__(self) -> int:
        return len(self._stored)

    @property
    def is_full_of_running(self) -> bool:
        """Whether there is no room because everything in it still runs."""
        return len(self) >= self._max_responses and all(entry.is_running for entry, _ in self._stored.values())

    def get(self, response_id: str) -> StoredResponse | None:
        found = self._stored.get(response_id)
        if found is None:
            return None
        self._stored.move_to_end(response_id)
        return found[0]

    def put(self, entry: StoredResponse) -> None:
        """Keep `entry`, or weigh it anew once it has changed."""
        self.remove(entry.response.id)
        size = entry.num_bytes
        self._stored[entry.response.id] = (entry, size)
        self._num_bytes += size
        self._forget_oldest()

    def remove(self, response_id: str) -> StoredResponse | None:
        found = self._stored.pop(response_id, None)
        if found is None:
            return None
        self._num_bytes -= found[1]
        return found[0]

    def running_tasks(self) -> list[asyncio.Task[None]]:
        return [entry.task for entry, _ in self._stored.values() if entry.task is not None and entry.is_running]

    def _forget_oldest(self) -> None:
        for response_id in list(self._stored):
            if len(self) <= self._max_responses and self._num_bytes <= self._max_bytes:
                return
            if not self._stored[response_id][0].is_running:
                self.remove(response_id)
