"""The norm layers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ...ops.norm import layer_norm
from ..weights import WeightSlot
from .placement import Placement


class RMSNorm(nn.Module):
    """Normalises the last dimension, of size `dim`."""

    def __init__(self, dim: int, epsilon: float, placement: Placement) -> None:
        super().__init__()
        self.ops = placement.ops
        self.epsilon = epsilon
        self.weight = placement.empty(dim)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.ops.table.rms_norm(hidden, self.weight, self.epsilon)

    def add(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of `residual + hidden`, and that sum."""
        return self.ops.table.add_rms_norm(hidden, residual, self.weight, self.epsilon)

    def weight_slots(self, prefix: str) -> Iterator[WeightSlot]:
        yield WeightSlot(f"{prefix}.weight", self.weight)


class LayerNorm(nn.Module):
    """Normalises the last dimension, of size `dim`, with a bias; weight and bias are kept in float32."""

    def __init__(self, dim: int, epsilon: float, placement: Placement) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = placement.empty(dim, dtype=torch.float32)
        self.bias = placement.empty(dim, dtype=torch.float32)

    def forward(self, hidden: Tensor) -> Tensor:
        return layer_norm(hidden, self.weight, self.bias, self.epsilon)

    def weight_slots(self, prefix: str) -> Iterator[WeightSlot]:
        yield WeightSlot(f"{prefix}.weight", self.weight)
        yield WeightSlot(f"{prefix}.bias", self.bias)
