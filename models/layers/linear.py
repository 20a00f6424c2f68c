"""Linear layers that fuse several checkpoint tensors and hold this rank's share of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from ...ops import comm
from ..weights import Shard, WeightSlot
from .placement import Placement


@dataclass(frozen=True)
class Rows:
    """Output rows that come from one checkpoint tensor: `units` pieces of `unit` rows that a split must not cut."""

    name: str
    units: int
    unit: int = 1
    split: bool = True  # over tensor parallel ranks; False: every rank holds all


class ColumnLinear(nn.Module):
    """`x @ W.T + b`, where W stacks this rank's rows of one or more checkpoint tensors (column parallel, fused).

    hidden [..., in_features] -> [..., sum of `sizes`]; `sizes` are this rank's rows per checkpoint tensor, in order.
    """

    def __init__(self, in_features: int, parts: tuple[Rows, ...], placement: Placement, *, bias: bool = False) -> None:
        super().__init__()
        self.ops = placement.ops
        self.parts = parts
        self.shards: list[Shard | None] = []
        self.sizes: list[int] = []
        for part in parts:
            total = part.units * part.unit
            start, stop = placement.layout.share(part.units, part.name) if part.split else (0, part.units)
            start, stop = start * part.unit, stop * part.unit
            self.sizes.append(stop - start)
            self.shards.append(Shard(0, start, stop, total) if stop - start < total else None)
        self.weight = placement.empty(sum(self.sizes), in_features)
        self.bias = placement.empty(sum(self.sizes)) if bias else None

    def forward(self, hidden: Tensor) -> Tensor:
        return self.ops.table.linear(hidden, self.weight, self.bias)

    def last(self, hidden: Tensor) -> Tensor:
        """The last part of the output alone: hidden [..., in_features] -> [..., sizes[-1]]."""
        rows = self.sizes[-1]
        return self.ops.table.linear(hidden, self.weight[-rows:], None if self.bias is None else self.bias[-rows:])

    def weight_slots(self, prefix: str) -> Iterator[WeightSlot]:
        """Slots of `{prefix}{part}.weight` and, with a bias, `{prefix}{part}.bias`."""
        start = 0
        for part, size, shard in zip(self.parts, self.sizes, self.shards, strict=True):
            yield WeightSlot(f"{prefix}{part.name}.weight", self.weight[start : start + size], shard)
            if self.bias is not None:
                yield WeightSlot(f"{prefix}{part.name}.bias", self.bias[start : start + size], shard)
            start += size


class RowLinear(nn.Module):
    """`x @ W.T + b`, where W holds the columns of this rank's share of the input (row parallel).

    hidden [..., this rank's in_features] -> [..., out_features], the sum of the ranks' terms; rank 0 adds the bias. The
    input is `units` pieces of `unit` features that a split must not cut.
    """

    def __init__(
        self, name: str, units: int, unit: int, out_features: int, placement: Placement, *, bias: bool = False
    ) -> None:
        super().__init__()
        self.ops = placement.ops
        self.group = placement.layout.tensor
        self.name = name
        start, stop = placement.layout.share(units, name)
        self.shard = Shard(1, start * unit, stop * unit, units * unit) if stop - start < units else None
        self.weight = placement.empty(out_features, (stop - start) * unit)
        self.bias = placement.empty(out_features) if bias and placement.layout.tensor_rank == 0 else None

    def forward(self, hidden: Tensor) -> Tensor:
        return comm.all_reduce(self.term(hidden), self.group)

    def term(self, hidden: Tensor) -> Tensor:
        """This rank's term of the sum, for those who add more before they sum over the ranks."""
        return self.ops.table.linear(hidden, self.weight, self.bias)

    def weight_slots(self, prefix: str) -> Iterator[WeightSlot]:
        """Slots of `{prefix}{name}.weight` and, with a bias, `{prefix}{name}.bias`."""
        yield WeightSlot(f"{prefix}{self.name}.weight", self.weight, self.shard)
        if self.bias is not None:
            yield WeightSlot(f"{prefix}{self.name}.bias", self.bias)
