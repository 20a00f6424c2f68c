"""What is known of a request that is pooled, between its arrival and its output."""

from __future__ import annotations

from dataclasses import dataclass

from ...scheduler.pooling_params import Pooled, PoolingParams
from ...scheduler.request import RequestUpdate
from ..input_processor import ProcessedRequest
from ..outputs import RequestStats
from .outputs import PoolingOutput, PoolingRequestOutput


@dataclass(slots=True)
class PooledSequence:
    """The one sequence of a request that is pooled."""

    core_id: str
    finish_reason: str | None = None


class PoolingState:
    """As `RequestState`, of a request that is pooled."""

    def __init__(self, request: ProcessedRequest) -> None:
        assert isinstance(request.params, PoolingParams)
        self.request = request
        self.params = request.params
        self.stats = RequestStats(arrival_time=request.arrival_time)
        self.sequences = [PooledSequence(request.key)]
        self._pooled: Pooled | None = None
        self._num_cached_tokens = 0

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def key(self) -> str:
        return self.request.key

    @property
    def finished(self) -> bool:
        return self.sequences[0].finish_reason is not None

    @property
    def unfinished_core_ids(self) -> list[str]:
        return [] if self.finished else [self.key]

    def apply(self, sequence: PooledSequence, update: RequestUpdate) -> bool:
        """Take in the update that ends it; never has to be aborted."""
        sequence.finish_reason = update.finish_reason
        self._pooled = update.pooled
        self._num_cached_tokens = update.num_cached_tokens or 0
        self.stats.queued_ts, self.stats.scheduled_ts = update.queued_time, update.scheduled_time
        self.stats.num_preemptions = update.num_preemptions
        return False

    def output(self) -> PoolingRequestOutput[PoolingOutput] | None:
        """What is to be told, once it has been pooled."""
        if self._pooled is None:
            return None
        return PoolingRequestOutput(
            self.request_id,
            PoolingOutput(tuple(self._pooled.shape), self._pooled.data),
            self.request.prompt_token_ids,
            self._num_cached_tokens,
            metrics=self.stats,
        )
