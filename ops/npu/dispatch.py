"""Expert parallelism: tokens sent to the ranks of their experts and back, by two operators that belong together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..rank_group import RankGroup
from .activation import swiglu
from .contracts import HALF, need, need_dtype, need_range, need_shape
from .moe import grouped_matmul

DYNAMIC_QUANT = 2
ASSIST_PER_ROW = 128


@dataclass(frozen=True)
class ExpertGroup:
    """The ranks among which experts are divided evenly, by rank: those of rank r are [r * local, (r + 1) * local)."""

    name: str  # of the HCCL communicator
    size: int
    rank: int
    experts: int  # of all ranks, redundant copies included

    @property
    def local_experts(self) -> int:
        return self.experts // self.size


@dataclass(frozen=True)
class Dispatched:
    """What a rank received, and what `combine` needs to send the results back."""

    rows: Tensor  # [capacity, dim], in order of local expert; those behind the sum of the loads are undefined
    row_scales: Tensor | None  # float32 [capacity] of int8 rows
    loads: Tensor  # int64 [local experts]
    assist: Tensor  # int32 [capacity * 128]
    counts: Tensor  # int32 [ranks * local experts]
    tensor_parallel_counts: Tensor


def capacity(group: ExpertGroup, tokens: int, experts_per_token: int) -> int:
    """Rows that a rank must have room for: the worst case, in which every token of all ranks goes to it."""
    return tokens * group.size * min(group.local_experts, experts_per_token)


def dispatched_experts(
    hidden: Tensor, weights: Tensor, expert_ids: Tensor, gate_up: Tensor, down: Tensor, group: RankGroup
) -> Tensor:
    """As `ops.moe.dispatched_experts`, by `dispatch` and `combine` and grouped products between them, from weights
    packed by `ops.npu.weights.pack_experts`.

    hidden bfloat16 or float16 [tokens, dim], tokens and dim as `dispatch` takes them; weights float32 and expert_ids
    int32 [tokens, k]; gate_up [local experts, dim, 2 * inter], down [local experts, inter, dim], 2 experts or more.
    The group has HCCL's name of its communicator. Mutates nothing.
    """
    ranks = ExpertGroup(group.communicator_name, group.size, group.rank, group.size * gate_up.shape[0])
    sent = dispatch(hidden, expert_ids, ranks)
    inner = swiglu(grouped_matmul(sent.rows, gate_up, sent.loads))
    return combine(grouped_matmul(inner, down, sent.loads), expert_ids, weights, sent, ranks)


def dispatch(
    hidden: Tensor, expert_ids: Tensor, group: ExpertGroup, live: Tensor | None = None, quantised: bool = False
) -> Dispatched:
    """Sends each token to the ranks of its experts.

    npu_moe_distribute_dispatch_v2: hidden [tokens, dim] of bfloat16 or float16, tokens from 1 to 512, the same number
    on every rank, dim from 1024 to 8192 (Atlas A3); expert_ids int32 [tokens, k], k at most 16; 2 to 768 ranks, at
    most 1024 experts, a multiple of the ranks. `live` bool [tokens]: tokens that take part, those first. With
    `quantised` rows travel as int8. `capacity` says how many rows come out. Mutates nothing.
    """
    operator = "npu_moe_distribute_dispatch_v2"
    _check_group(operator, group)
    _check_tokens(operator, "hidden", hidden, expert_ids, live)
    rows, scales, assist, loads, counts, tensor_parallel, _ = torch.ops.npu.npu_moe_distribute_dispatch_v2(
        hidden,
        expert_ids,
        group.name,
        group.size,
        group.rank,
        group.experts,
        x_active_mask=live,
        expert_shard_type=0,
        shared_expert_num=0,
        shared_expert_rank_num=0,
        quant_mode=DYNAMIC_QUANT if quantised else 0,
        global_bs=0,
        expert_token_nums_type=1,
    )
    return Dispatched(rows, scales if quantised else None, loads, assist, counts, tensor_parallel)


def combine(
    rows: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    dispatched: Dispatched,
    group: ExpertGroup,
    live: Tensor | None = None,
) -> Tensor:
    """Sends the experts' results back to the tokens' ranks and sums them, weighted.

    npu_moe_distribute_combine_v2: rows [capacity, dim] of bfloat16 or float16, in the order of `dispatched.rows`;
    expert_ids, group and live as they were dispatched; weights float32 [tokens, k] -> [tokens, dim]. Mutates nothing.
    """
    operator = "npu_moe_distribute_combine_v2"
    _check_group(operator, group)
    need_shape(operator, "expert_ids", expert_ids, None, None)
    tokens, chosen = expert_ids.shape
    need_shape(operator, "rows", rows, capacity(group, tokens, chosen), None)
    need_dtype(operator, "rows", rows, *HALF)
    need_range(operator, "dim", rows.shape[1], 1024, 8192)
    need_dtype(operator, "expert_ids", expert_ids, torch.int32)
    need_shape(operator, "weights", weights, tokens, chosen)
    need_dtype(operator, "weights", weights, torch.float32)
    need_shape(operator, "assist", dispatched.assist, rows.shape[0] * ASSIST_PER_ROW)
    need_dtype(operator, "assist", dispatched.assist, torch.int32)
    _check_live(operator, live, tokens)
    return torch.ops.npu.npu_moe_distribute_combine_v2(
        rows,
        expert_ids,
        dispatched.assist,
        dispatched.counts,
        weights,
        group.name,
        group.size,
        group.rank,
        group.experts,
        tp_send_counts=dispatched.tensor_parallel_counts,
        x_active_mask=live,
        expert_shard_type=0,
        shared_expert_num=0,
        shared_expert_rank_num=0,
        global_bs=0,
    )


def _check_group(operator: str, group: ExpertGroup) -> None:
    need_range(operator, "the length of the group's name", len(group.name), 1, 127)
    need_range(operator, "ranks", group.size, 2, 768)
    need_range(operator, "the rank", group.rank, 0, group.size - 1)
    need_range(operator, "experts", group.experts, 1, 1024)
    need(group.experts % group.size == 0, operator, f"experts to be a multiple of {group.size} ranks", group.experts)
    need_range(operator, "ranks * local experts", group.size * group.local_experts, 1, 2048)


def _check_tokens(operator: str, name: str, hidden: Tensor, expert_ids: Tensor, live: Tensor | None) -> None:
    need_shape(operator, name, hidden, None, None)
    need_dtype(operator, name, hidden, *HALF)
    tokens, dim = hidden.shape
    need_range(operator, "tokens", tokens, 1, 512)
    need_range(operator, "dim", dim, 1024, 8192)
    need_shape(operator, "expert_ids", expert_ids, tokens, None)
    need_dtype(operator, "expert_ids", expert_ids, torch.int32)
    need_range(operator, "experts per token", expert_ids.shape[1], 1, 16)
    _check_live(operator, live, tokens)


def _check_live(operator: str, live: Tensor | None, tokens: int) -> None:
    if live is not None:
        need_shape(operator, "live", live, tokens)
        need_dtype(operator, "live", live, torch.bool)
