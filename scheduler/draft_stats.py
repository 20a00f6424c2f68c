"""Counting what drafts come to: `DraftCounter` in the scheduler, `DraftStats` for whoever reports it."""

from __future__ import annotations

from itertools import zip_longest

import msgspec

from .request import Request


class DraftStats(msgspec.Struct, frozen=True):
    """Counters of speculation since the start of the engine."""

    num_drafts: int  # drafted continuations that were verified, of one token or more
    num_draft_tokens: int  # tokens of these
    num_accepted_tokens: int  # of these, those that became tokens of their request
    num_accepted_per_position: list[int]  # by place in the continuation, the first token first

    @property
    def acceptance_rate(self) -> float:
        """Share of the drafted tokens that were accepted, in [0, 1]; 0 without any."""
        return self.num_accepted_tokens / self.num_draft_tokens if self.num_draft_tokens else 0.0

    @property
    def acceptance_length(self) -> float:
        """Tokens that a step with drafts brought on average, the one behind the accepted ones included; at least 1."""
        return 1 + self.num_accepted_tokens / self.num_drafts if self.num_drafts else 1.0

    @property
    def acceptance_per_position(self) -> list[float]:
        """Share of the continuations whose token at each place was accepted. As vLLM has it, those that were not so
        long count as not accepted there."""
        return [accepted / max(1, self.num_drafts) for accepted in self.num_accepted_per_position]

    def since(self, earlier: DraftStats | None) -> DraftStats:
        """What has come on top of `earlier`; everything, where counting has begun anew since then."""
        if earlier is None:
            return self
        pairs = zip_longest(self.num_accepted_per_position, earlier.num_accepted_per_position, fillvalue=0)
        grown = DraftStats(
            self.num_drafts - earlier.num_drafts,
            self.num_draft_tokens - earlier.num_draft_tokens,
            self.num_accepted_tokens - earlier.num_accepted_tokens,
            [now - before for now, before in pairs],
        )
        counts = (grown.num_drafts, grown.num_draft_tokens, grown.num_accepted_tokens)
        return self if min(*counts, *grown.num_accepted_per_position) < 0 else grown


class DraftCounter:
    """Counts drafts as they are verified, in all and by request."""

    def __init__(self, deepest: int) -> None:
        self._num_drafts = 0
        self._num_draft_tokens = 0
        self._accepted = [0] * deepest

    def count(self, request: Request, num_drafts: int, num_tokens: int, num_kept: int) -> None:
        """`num_drafts` drafts were verified, and `num_tokens` came of it, all but the last of them drafts. If the
        request ended in between, only the first `num_kept` are its tokens, and what stood behind counts as not drafted.
        """
        num_accepted = num_tokens - 1
        if num_kept <= num_accepted:
            num_drafts = num_accepted = num_kept
        if not num_drafts:
            return
        self._num_drafts += 1
        self._num_draft_tokens += num_drafts
        for position in range(num_accepted):
            self._accepted[position] += 1
        request.num_draft_tokens += num_drafts
        request.num_accepted_tokens += num_accepted

    def stats(self) -> DraftStats:
        return DraftStats(self._num_drafts, self._num_draft_tokens, sum(self._accepted), list(self._accepted))
