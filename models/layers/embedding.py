"""The token embedding and the output head, which may share one tensor."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn import functional

from ..weights import WeightSlot
from .placement import Placement


class Embedding(nn.Module):
    """Rows of a [vocab, hidden] table. Every rank holds the whole table, so no vocabulary size needs padding."""

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
