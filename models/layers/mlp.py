"""The gated feed-forward layer."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from ..weights import WeightSlot
from .linear import ColumnLinear, RowLinear, Rows
from .placement import Placement


class GatedMLP(nn.Module):
    """SwiGLU with gate and up projection fused: hidden [tokens, hidden] -> [tokens, hidden]."""

    def __init__(self, hidden_size: int, intermediate_size: int, placement: Placement, *, bias: bool = False) -> None:
        super().__init__()
        self.ops = placement.ops
        parts = (Rows("gate_proj", intermediate_size), Rows("up_proj", intermediate_size))
        self.gate_up_proj = ColumnLinear(hidden_size, parts, placement, bias=bias)
        self.down_proj = RowLinear("down_proj", intermediate_size, 1, hidden_size, placement, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(self.ops.table.swiglu(self.gate_up_proj(hidden)))

    def term(self, hidden: Tensor) -> Tensor:
        """This rank's term of the sum over the ranks: [tokens, hidden] -> [tokens, hidden]."""
        return self.down_proj.term(self.ops.table.swiglu(self.gate_up_proj(hidden)))

    def weight_slots(self, prefix: str) -> Iterator[WeightSlot]:
        """Slots of the layer's tensors; `prefix` ends in a dot, e.g. `model.layers.0.mlp.`."""
        yield from self.gate_up_proj.weight_slots(prefix)
        yield from self.down_proj.weight_slots(prefix)
