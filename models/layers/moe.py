"""The mixture-of-experts feed-forward layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..config import MoEConfig
from ..weights import Shard, WeightSlot
from .mlp import GatedMLP
from .placement import Placement


class MoE(nn.Module):
    """Routed experts, each split over the ranks like a dense layer, plus shared experts that see every token.

    The router is kept and computed in float32: a choice of experts must not hang on the rounding of the model's dtype.
    """

    def __init__(self, hidden_size: int, moe: MoEConfig, placement: Placement, *, bias: bool = False) -> None:
        super().__init__()
        self.ops = placement.ops
        self.moe = moe
        size = moe.intermediate_size
        start, stop = placement.layout.share(size, "expert intermediate size")
        self.share = (start, stop, size) if stop - start < size else None
        self.gate = placement.empty(moe.num_experts, hidden_size, dtype=torch.float32)
        self.correction_bias = (
            placement.empty(moe.num_experts, dtype=torch.float32) if moe.has_correction_bias else None
        )
        self.gate_up = placement.empty(moe.num_experts, 2 * (stop - start), hidden_size)
        self.down = placement.empty(moe.num_experts, hidden_size, stop - start)
        self.is_packed = False
        shared_size = moe.num_shared_experts * size
        self.shared_experts = GatedMLP(hidden_size, shared_size, placement, bias=bias) if shared_size else None

    def pack(self, packed: Callable[[Tensor], Tensor]) -> None:
        """Replace the experts' weights by what `packed` makes of them, one tensor at a time, once."""
        if not self.is_packed:
            self.gate_up = nn.Parameter(packed(self.gate_up), requires_grad=False)
            self.down = nn.Parameter(packed(self.down), requires_grad=False)
            self.is_packed = True

    def route(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [tokens, hidden] -> (weights float32, expert ids), both [tokens, experts_per_token]."""
        return self.ops.table.gate_topk(
            self.ops.table.linear(hidden.float(), self.gate),
            self.moe.experts_per_token,
            scoring=self.moe.scoring,
            norm_topk_prob=self.moe.norm_topk_prob,
            scaling=self.moe.routed_scaling_factor,
            num_groups=self.moe.num_groups,
            groups_per_token=self.moe.groups_per_token,
            group_score=self.moe.group_score,
            correction_bias=self.correction_bias,
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [tokens, hidden] -> [tokens, hidden]."""
        weights, expert_ids = self.route(hidden)
        output = self.ops.table.routed_experts(hidden, weights, expert_ids, self.gate_up, self.down)
        return output if self.shared_experts is None else output + self.shared_experts(hidden)

    def weight_slots(self, prefix: str) -> Iterator[WeightSlot]:
        """Slots of the layer's tensors; `prefix` ends in a dot, e.g. `model.layers.0.mlp.`."""
        yield WeightSlot(f"{prefix}gate.weight", self.gate)
        if self.correction_bias is not None:
            yield WeightSlot(f"{prefix}gate.e_score_correction_bias", self.correction_bias)
        rows = None if self.share is None else Shard(0, *self.share)
        columns = None if self.share is None else Shard(1, *self.share)
        for expert in range(self.moe.num_experts):
            gate, up = self.gate_up[expert].chunk(2)
            yield WeightSlot(f"{prefix}experts.{expert}.gate_proj.weight", gate, rows)
            yield WeightSlot(f"{prefix}experts.{expert}.up_proj.weight", up, rows)
            yield WeightSlot(f"{prefix}experts.{expert}.down_proj.weight", self.down[expert], columns)
        if self.shared_experts is not None:
            yield from self.shared_experts.weight_slots(f"{prefix}shared_experts.")
