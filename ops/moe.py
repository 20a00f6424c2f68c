"""Mixture of experts: choosing experts per token, and running the chosen ones."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from . import comm
from .activation import swiglu
from .rank_group import RankGroup


def gate_topk(
    logits: Tensor,
    experts_per_token: int,
    *,
    scoring: str,
    norm_topk_prob: bool,
    scaling: float = 1.0,
    num_groups: int = 1,
    groups_per_token: int = 1,
    group_score: str = "max",
    correction_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The experts of each token and their weights.

    logits float32 [tokens, experts] -> (weights float32, expert ids int64), both [tokens, experts_per_token], in no
    promised order. Scores are `softmax` or `sigmoid` of the logits. correction_bias float32 [experts] is added for the
    choice only (arXiv:2408.15664). With num_groups > 1 the choice is limited to the best groups_per_token groups of
    neighbouring experts, a group counting its `max` choice score (DeepSeek-V2, arXiv:2405.04434) or the sum of its
    `top2` (DeepSeek-V3, arXiv:2412.19437). Weights are the unbiased scores, made to sum to one if `norm_topk_prob`,
    then multiplied by `scaling`. Shapes depend on no value. Mutates nothing.
    """
    scores = torch.softmax(logits, dim=-1) if scoring == "softmax" else torch.sigmoid(logits)
    choice = scores if correction_bias is None else scores + correction_bias
    if num_groups > 1:
        grouped = choice.view(choice.shape[0], num_groups, -1)
        group_scores = grouped.topk(2 if group_score == "top2" else 1, dim=-1).values.sum(dim=-1)
        best_groups = group_scores.topk(groups_per_token, dim=-1).indices
        excluded = torch.ones_like(group_scores, dtype=torch.bool).scatter(1, best_groups, False)
        choice = grouped.masked_fill(excluded.unsqueeze(-1), float("-inf")).flatten(1)
    expert_ids = choice.topk(experts_per_token, dim=-1).indices
    weights = scores.gather(1, expert_ids)
    if norm_topk_prob:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)  # sigmoid scores can all underflow to zero
    return weights * scaling, expert_ids


def routed_experts(hidden: Tensor, weights: Tensor, expert_ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The weighted sum of each token's chosen SwiGLU experts.

    hidden [tokens, dim]; weights float32 and expert_ids int64 [tokens, experts_per_token], an expert at most once per
    token; gate_up [experts, 2 * inter, dim] (gate rows, then up rows); down [experts, dim, inter] -> [tokens, dim] of
    the dtype of `hidden`, summed in float32 in order of expert id. This plain body reads the load of each expert on
    the host and runs the used ones one by one, so it cannot stand in a static graph. Mutates nothing.
    """
    tokens, experts_per_token = expert_ids.shape
    order = expert_ids.flatten().argsort(stable=True)
    token_of = order // experts_per_token  # [tokens * experts_per_token], grouped by expert
    sorted_weights = weights.flatten()[order].unsqueeze(1)
    loads = torch.bincount(expert_ids.flatten(), minlength=gate_up.shape[0]).tolist()
    output = torch.zeros(tokens, hidden.shape[1], dtype=torch.float32, device=hidden.device)
    start = 0
    for expert, load in enumerate(loads):
        if load == 0:
            continue
        rows = token_of[start : start + load]
        inner = swiglu(functional.linear(hidden[rows], gate_up[expert]))
        result = functional.linear(inner, down[expert])
        output.index_add_(0, rows, result.float() * sorted_weights[start : start + load])
        start += load
    return output.to(hidden.dtype)


def dispatched_experts(
    hidden: Tensor, weights: Tensor, expert_ids: Tensor, gate_up: Tensor, down: Tensor, group: RankGroup
) -> Tensor:
    """`routed_experts` of experts that are divided over the ranks of a group, in order of rank and evenly.

    hidden [tokens, dim], weights float32 and expert_ids int32 or int64 [tokens, experts_per_token] of this rank, as
    many tokens on every rank; expert ids count the experts of all ranks; gate_up [local experts, 2 * inter, dim], down
    [local experts, dim, inter] -> [tokens, dim]. This plain body brings all tokens to all ranks, lets each compute
    what its experts add, and sums; the terms are rounded to the dtype of `hidden` before. Mutates nothing.
    """
    local = gate_up.shape[0]
    everyone, their_weights, their_ids = (comm.all_gather(part, group) for part in (hidden, weights, expert_ids.long()))
    places = their_ids - group.rank * local
    is_here = (places >= 0) & (places < local)
    # A choice of another rank's expert becomes one of this rank's first, which counts nothing.
    terms = routed_experts(everyone, their_weights * is_here, places * is_here, gate_up, down)
    return comm.reduce_scatter(terms, group)
