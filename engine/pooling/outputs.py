"""What callers of a pooling model receive, with vLLM's names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ..outputs import RequestStats

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
