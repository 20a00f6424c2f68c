"""What callers of a pooling model receive, with vLLM's names, and the state of a request until then."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ..scheduler.pooling_params import Pooled, PoolingParams
from ..scheduler.request import RequestUpdate
from .input_processor import ProcessedRequest
from .outputs import RequestStats

if TYPE_CHECKING:
    import numpy as np

OutputT = TypeVar("OutputT")


@dataclass(frozen=True, slots=True)
class PoolingOutput:
    """A vector, or one for each token: `raw` is float32 in the machine's byte order, row after row."""

    shape: tuple[int, ...]
    raw: bytes = field(repr=False)

    @property
    def data(self) -> np.ndarray:
        """The same as a read-only numpy array, float32 of `shape`."""
        import numpy as np

        return np.frombuffer(self.raw, np.float32).reshape(self.shape)

    def tolist(self) -> Any:
        """Floats, nested as `shape` says."""
        return memoryview(self.raw).cast("f", self.shape).tolist()


@dataclass(frozen=True, slots=True)
class EmbeddingOutput:
    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        return len(self.embedding)


@dataclass(frozen=True, slots=True)
class ClassificationOutput:
    probs: list[float]  # logits, where no activation was wanted

    @property
    def num_classes(self) -> int:
        return len(self.probs)


@dataclass(frozen=True, slots=True)
class ScoringOutput:
    score: float


@dataclass(frozen=True, slots=True)
class PoolingRequestOutput(Generic[OutputT]):
    """What became of one prompt."""

    request_id: str
    outputs: OutputT
    prompt_token_ids: list[int]
    num_cached_tokens: int = 0
    finished: bool = True
    metrics: RequestStats | None = field(default=None, repr=False)

    def holding(self, outputs: Any) -> PoolingRequestOutput[Any]:
        """The same request with other outputs."""
        return PoolingRequestOutput(
            self.request_id, outputs, self.prompt_token_ids, self.num_cached_tokens, self.finished, self.metrics
        )


EmbeddingRequestOutput = PoolingRequestOutput[EmbeddingOutput]
ClassificationRequestOutput = PoolingRequestOutput[ClassificationOutput]
ScoringRequestOutput = PoolingRequestOutput[ScoringOutput]


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
