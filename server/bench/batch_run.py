"""One batch of requests through an engine core, timed from the first prompt to the last token."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...scheduler.request import RequestInput

if TYPE_CHECKING:  # it brings torch
    from ...engine.core import EngineCore


@dataclass(frozen=True)
class BatchRun:
    """What a batch took. Full means: from when all its requests had their first token until one of them ended."""

    seconds: float
    full_seconds: float
    full_tokens: int  # that came meanwhile
    token_ids: list[list[int]]  # by request

    @property
    def rate(self) -> float:
        """Tokens per second, prompts included in the time."""
        return sum(map(len, self.token_ids)) / self.seconds

    @property
    def full_rate(self) -> float:
        """Tokens per second of the full batch."""
        return self.full_tokens / self.full_seconds


def run_batch(core: EngineCore, requests: Sequence[RequestInput]) -> BatchRun:
    """Complete the requests, all of which are there from the start. Raises ValueError where they are refused, or never
    decode all at once."""
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    num_waiting, num_tokens = len(tokens), 0
    filled: tuple[float, int] | None = None  # the time, and the tokens that had come
    ended: tuple[float, int] | None = None
    start = time.perf_counter()
    for request in requests:
        for refusal in core.add(request):
            raise ValueError(refusal.error)
    while core.has_unfinished:
        updates = core.step()
        now = time.perf_counter()
        has_end = False
        for update in updates:
            own = tokens[update.request_id]
            num_waiting -= not own and bool(update.new_token_ids)
            own += update.new_token_ids
            num_tokens += len(update.new_token_ids)
            has_end = has_end or update.finish_reason is not None
        if has_end and ended is None:
            ended = now, num_tokens
        if not num_waiting and filled is None:
            filled = now, num_tokens
    end = time.perf_counter()
    if filled is None or ended is None or ended[0] <= filled[0]:
        raise ValueError(
            "the first request ended before the last one had its first token, so they never decode all at once; raise "
            f"--output-len or --max-num-batched-tokens, or lower --input-len: {len(tokens)} requests"
        )
    return BatchRun(end - start, ended[0] - filled[0], ended[1] - filled[1], list(tokens.values()))
