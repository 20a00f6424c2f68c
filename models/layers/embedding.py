"""The token embedding and the output head, which may share one tensor."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn import functional

from ...ops import comm
from ...ops.rank_group import RankGroup
from ..weights import Shard, WeightSlot
from .placement import Placement


class Embedding(nn.Module):
    """Rows of a [vocab, hidden] table, the whole of it on every rank."""

    def __init__(self, vocab_size: int, hidden_size: int, placement: Placement) -> None:
        super().__init__()
        self.ops = placement.ops
        self.weight = placement.empty(vocab_size, hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids int64 [tokens] -> [tokens, hidden]."""
        return functional.embedding(input_ids, self.weight)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [n, hidden] -> float32 [n, vocab]: the table as output head."""
        return self.ops.table.linear(hidden, self.weight).float()

    def weight_slots(self, prefix: str) -> Iterator[WeightSlot]:
        yield WeightSlot(f"{prefix}.weight", self.weight)


class OutputHead(nn.Module):
    """An output head of its own. Its rows are split over the ranks where the vocabulary divides, so that no size needs
    padding; otherwise every rank holds all."""

    def __init__(self, vocab_size: int, hidden_size: int, placement: Placement) -> None:
        super().__init__()
        self.ops = placement.ops
        divides = vocab_size % placement.layout.tensor_size == 0
        self.group = placement.layout.tensor if divides else RankGroup()
        start, stop = placement.layout.share(vocab_size, "vocab_size") if divides else (0, vocab_size)
        self.shard = Shard(0, start, stop, vocab_size) if stop - start < vocab_size else None
        self.weight = placement.empty(stop - start, hidden_size)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [n, hidden] -> float32 [n, vocab], on every rank."""
        own = self.ops.table.linear(hidden, self.weight)
        if self.group.size == 1:
            return own.float()
        parts = comm.all_gather(own, self.group).unflatten(0, (self.group.size, -1))
        return parts.transpose(0, 1).flatten(1).float()

    def weight_slots(self, prefix: str) -> Iterator[WeightSlot]:
        yield WeightSlot(f"{prefix}.weight", self.weight, self.shard)
