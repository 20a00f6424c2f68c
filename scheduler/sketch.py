"""A plan in the making: `PlanSketch`, which the scheduler fills and turns into a `StepPlan`."""

from __future__ import annotations

from .plan import NewRow, StepPlan
from .prefill_pace import NO_LIMIT
from .request import Request


class PlanSketch:
    """Who has been given what so far. Entries that decode stand apart: they come first in the plan."""

    __slots__ = (
        "budget", "chunks", "decode_block_ids", "decode_computed", "decode_requests", "decode_rows", "depths",
        "is_short", "new_rows", "num_drafts", "num_prompts",
    )  # fmt: skip

    def __init__(
        self, budget: int, depths: tuple[int, ...] = (), num_drafts: int = 0, num_prompts: int = NO_LIMIT
    ) -> None:
        self.budget = budget  # tokens that may still be planned
        self.depths = depths
        self.num_drafts = num_drafts  # that each decoding request verifies: one of `depths`, or none
        self.num_prompts = num_prompts  # requests of whose prompts a piece may still be planned
        self.is_short = False  # blocks ran out: somebody was preempted, or waits for a block
        self.new_rows: list[NewRow] = []
        self.decode_requests: list[Request] = []
        self.decode_rows: list[int] = []
        self.decode_computed: list[int] = []
        self.decode_block_ids: list[list[int]] = []
        self.chunks: list[tuple[Request, int, int, list[int], bool]] = []  # request, computed, count, new ids, samples

    @property
    def is_empty(self) -> bool:
        return not self.decode_requests and not self.chunks

    @property
    def requests(self) -> list[Request]:
        """In the order of the plan's entries."""
        return self.decode_requests + [chunk[0] for chunk in self.chunks]

    @property
    def has_tokens(self) -> bool:
        """Whether somebody can still be served, if necessary at the cost of drafts."""
        return bool(self.budget or self.num_drafts)

    def add(self, request: Request, num_computed: int, count: int, new_block_ids: list[int]) -> None:
        samples = num_computed + count == len(request.token_ids) + request.num_unread
        request.num_unread += samples and not request.pools
        # one that has just come in has no drafts to verify
        if samples and count == 1 and not self.num_drafts and not request.pools:
            self.decode_requests.append(request)
            self.decode_rows.append(request.row)
            self.decode_computed.append(num_computed)
            self.decode_block_ids.append(new_block_ids)
        else:
            self.chunks.append((request, num_computed, count, new_block_ids, samples))
        self.budget -= count

    def drop_drafts(self) -> None:
        """Let each decoding request verify the next smaller number of drafts, so that others find tokens left."""
        fewer = max((depth for depth in self.depths if depth < self.num_drafts), default=0)
        dropped, self.num_drafts = self.num_drafts - fewer, fewer
        self.budget += dropped * len(self.decode_requests)
        for request in self.decode_requests:
            request.num_ahead -= dropped

    def spares_token(self) -> bool:
        """Whether a token is left for one more request, now that drafts have been dropped for it if need be."""
        while self.num_drafts and not self.budget:
            self.drop_drafts()
        return self.budget > 0

    def finish(self, step: int, released_rows: list[int]) -> StepPlan:
        chunks = self.chunks
        num_decode, num_drafts = len(self.decode_requests), self.num_drafts
        return StepPlan(
            step=step,
            released_rows=released_rows,
            new_rows=self.new_rows,
            rows=self.decode_rows + [chunk[0].row for chunk in chunks],
            num_computed=self.decode_computed + [chunk[1] for chunk in chunks],
            num_tokens=[1 + num_drafts] * num_decode + [chunk[2] for chunk in chunks],
            new_block_ids=self.decode_block_ids + [chunk[3] for chunk in chunks],
            samples=[True] * num_decode + [chunk[4] for chunk in chunks],
            num_decode=num_decode,
            num_drafts=num_drafts,
        )
