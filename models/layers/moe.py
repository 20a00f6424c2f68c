"""The mixture-of-experts feed-forward layer."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ...ops import comm
from ..config import MoEConfig
from ..weights import Shard, WeightSlot
from .mlp import GatedMLP
from .placement import Placement


class MoE(nn.Module):
    """Routed experts, plus shared experts that see every token.

    Without an expert group each routed expert is split over the tensor group like a dense layer, as the shared ones
    always are. With one, experts are split whole: every rank routes its own tokens, of those of its tensor group an
    equal part, and they travel to the ranks of their experts and back. `layer` is the decoder's.

    The router is kept and computed in float32: a choice of experts must not hang on the rounding of the model's dtype.
    """

    selection: Tensor | None

    def __init__(
        self, hidden_size: int, moe: MoEConfig, layer: int, placement: Placement, *, bias: bool = False
    ) -> None:
        super().__init__()
        self.ops = placement.ops
        self.moe = moe
        layout = placement.layout
        self.tensor_group, self.expert_group = layout.tensor, layout.expert
        routed_layer = sum(other < layer for other in moe.layers)
        self.local_experts = layout.experts(moe.num_experts, routed_layer)
        size = moe.intermediate_size
        start, stop = (0, size) if layout.expert_size > 1 else layout.share(size, "expert intermediate size")
        self.share = (start, stop, size) if stop - start < size else None
        self.gate = placement.empty(moe.num_experts, hidden_size, dtype=torch.float32)
        self.correction_bias = (
            placement.empty(moe.num_experts, dtype=torch.float32) if moe.has_correction_bias else None
        )
        self.gate_up = placement.empty(len(self.local_experts), 2 * (stop - start), hidden_size)
        self.down = placement.empty(len(self.local_experts), hidden_size, stop - start)
        self.is_packed = False
        selection = None
        if layout.placement is not None:
            places = layout.placement.selection(layout.expert_rank, routed_layer)
            selection = torch.tensor(places, dtype=torch.int32).to(placement.device)
        # A buffer and no weight, so that no graph takes it for a constant: experts may move.
        self.register_buffer("selection", selection, persistent=False)
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
        if self.expert_group.size > 1:
            return self.across_ranks(hidden)
        weights, expert_ids = self.route(hidden)
        shared = self.shared_term(hidden)
        output = self.ops.table.routed_experts(hidden, weights, expert_ids, self.gate_up, self.down)
        return comm.all_reduce(output if shared is None else output + shared, self.tensor_group)

    def shared_term(self, hidden: Tensor) -> Tensor | None:
        """What the shared experts add, this rank's term of it: hidden [tokens, hidden] -> [tokens, hidden]."""
        if self.shared_experts is None:
            return None
        with self.ops.table.side_stream("shared experts"):
            return self.shared_experts.term(hidden)

    def across_ranks(self, hidden: Tensor) -> Tensor:
        """hidden [tokens, hidden], the same on the ranks of a tensor group -> [tokens, hidden], likewise.

        Of n tokens each rank of the tensor group routes ceil(n / size); what is padded is routed too, and dropped.
        """
        tokens, size = hidden.shape[0], self.tensor_group.size
        per_rank = -(-tokens // size)
        padded = hidden if per_rank * size == tokens else pad(hidden, (0, 0, 0, per_rank * size - tokens))
        first = self.tensor_group.rank * per_rank
        own = padded[first : first + per_rank]
        weights, expert_ids = self.route(own)
        if self.selection is not None:
            expert_ids = self.selection[expert_ids.flatten()].view(expert_ids.shape)
        shared = self.shared_term(padded)
        output = self.ops.table.dispatched_experts(own, weights, expert_ids, self.gate_up, self.down, self.expert_group)
        if shared is not None:
            output = output + comm.reduce_scatter(shared, self.tensor_group)
        return comm.all_gather(output, self.tensor_group)[:tokens]

    def is_elsewhere(self, name: str) -> bool:
        """Whether a tensor, named without the layer's prefix, is of an expert that other ranks hold."""
        match = re.fullmatch(r"experts\.(\d+)\.(?:gate|up|down)_proj\.weight", name)
        return match is not None and int(match[1]) in self._elsewhere

    @functools.cached_property
    def _elsewhere(self) -> frozenset[int]:
        return frozenset(range(self.moe.num_experts)).difference(self.local_experts)

    def weight_slots(self, prefix: str) -> Iterator[WeightSlot]:
        """Slots of the layer's tensors; `prefix` ends in a dot, e.g. `model.layers.0.mlp.`."""
        yield WeightSlot(f"{prefix}gate.weight", self.gate)
        if self.correction_bias is not None:
            yield WeightSlot(f"{prefix}gate.e_score_correction_bias", self.correction_bias)
        rows = None if self.share is None else Shard(0, *self.share)
        columns = None if self.share is None else Shard(1, *self.share)
        for place, expert in enumerate(self.local_experts):
            gate, up = self.gate_up[place].chunk(2)
            yield WeightSlot(f"{prefix}experts.{expert}.gate_proj.weight", gate, rows)
            yield WeightSlot(f"{prefix}experts.{expert}.up_proj.weight", up, rows)
            yield WeightSlot(f"{prefix}experts.{expert}.down_proj.weight", self.down[place], columns)
        if self.shared_experts is not None:
            yield from self.shared_experts.weight_slots(f"{prefix}shared_experts.")
