"""The requests that wait, in the order in which they will be taken."""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from .request import Request

_MIN_STALE = 64  # below this many left-over entries, tidying the heap is not worth it


class WaitingQueue:
    """A heap over `Request.order` whose removed entries stay until they come up or outnumber the rest.

    Every operation is O(log n) or, where the heap is tidied, O(1) amortised over the removals that made it necessary.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int], Request]] = []
        self._waiting: set[tuple[int, int]] = set()
        self.num_prompt_tokens = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, request: Request) -> None:
        heappush(self._heap, (request.order, request))
        self._waiting.add(request.order)
        self.num_prompt_tokens += request.num_prompt_tokens

    def peek(self) -> Request | None:
        """The next request, or None where nobody waits."""
        heap = self._heap
        while heap and heap[0][0] not in self._waiting:
            heappop(heap)
        return heap[0][1] if heap else None

    def pop(self) -> Request:
        """Take out what `peek` shows; there must be one."""
        request = self.peek()
        assert request is not None
        heappop(self._heap)
        self._forget(request)
        return request

    def remove(self, request: Request) -> None:
        """Take out a request wherever it stands. It must wait here, and must not come back."""
        self._forget(request)
        if len(self._heap) > 2 * len(self._waiting) + _MIN_STALE:
            self._heap = [entry for entry in self._heap if entry[0] in self._waiting]
            heapify(self._heap)

    def _forget(self, request: Request) -> None:
        self._waiting.remove(request.order)
        self.num_prompt_tokens -= request.num_prompt_tokens
