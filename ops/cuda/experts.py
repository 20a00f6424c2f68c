"""Routed experts without a look at the loads on the host, so that a CUDA graph can hold them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..activation import swiglu


def routed_experts(hidden: Tensor, weights: Tensor, expert_ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """As `ops.moe.routed_experts`; shapes depend on no value and nothing is read on the host.

    In bfloat16 the chosen experts alone are computed, by a grouped product over the tokens sorted by expert (torch's
    `grouped_mm`, compute capability 8.0 and above). In other dtypes, for which that has no static form, every expert
    computes every token and the weights choose: right, and as slow as it sounds.
    """
    if hidden.dtype != torch.bfloat16:
        return _all_experts(hidden, weights, expert_ids, gate_up, down)
    tokens, experts_per_token = expert_ids.shape
    chosen = expert_ids.flatten()
    order = chosen.argsort(stable=True)  # [tokens * experts_per_token], grouped by expert
    loads = torch.zeros(gate_up.shape[0], dtype=torch.int32, device=hidden.device)
    ends = loads.index_add(0, chosen, torch.ones_like(chosen, dtype=torch.int32)).cumsum(0).to(torch.int32)
    inner = swiglu(functional.grouped_mm(hidden[order // experts_per_token], gate_up.mT, offs=ends))
    results = functional.grouped_mm(inner, down.mT, offs=ends)
    scaled = torch.empty(results.shape, dtype=torch.float32, device=hidden.device)
    scaled[order] = results.float() * weights.flatten()[order, None]
    return scaled.view(tokens, experts_per_token, -1).sum(dim=1).to(hidden.dtype)


def _all_experts(hidden: Tensor, weights: Tensor, expert_ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    share = torch.zeros(hidden.shape[0], gate_up.shape[0], dtype=torch.float32, device=hidden.device)
    share.scatter_(1, expert_ids, weights)  # [tokens, experts]
    inner = swiglu(torch.matmul(hidden, gate_up.mT))  # [experts, tokens, inter]
    results = torch.matmul(inner, down.mT).float()  # [experts, tokens, dim]
    return (results * share.T.unsqueeze(-1)).sum(dim=0).to(hidden.dtype)
