"""Where a layer's tensors live: the rank's share, the dtype and the device, passed to every layer as one value."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from ...ops.table import BoundOps
from ..parallel import ParallelLayout


@dataclass(frozen=True)
class Placement:
    """The same for all layers of a model on one rank. On the device `meta` a model has shapes and no memory."""

    layout: ParallelLayout
    dtype: torch.dtype
    device: torch.device
    ops: BoundOps = field(default_factory=BoundOps)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
        """A parameter whose memory is not touched: the loader fills it, once."""
        data = torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
        return nn.Parameter(data, requires_grad=False)
