"""Choosing and running experts."""

from __future__ import annotations

import torch

from omni_engine.ops.moe import gate_topk, routed_experts


def chosen(expert_ids: torch.Tensor) -> list[set[int]]:
    return [set(row) for row in expert_ids.tolist()]


def test_softmax_weights_are_the_probabilities_of_the_best_experts() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0]])
    weights, expert_ids = gate_topk(logits, 2, scoring="softmax", norm_topk_prob=False, scaling=3.0)
    assert chosen(expert_ids) == [{1, 2}]
    torch.testing.assert_close(weights, 3.0 * logits.softmax(-1).gather(1, expert_ids))


def test_normalised_weights_sum_to_the_scaling_factor() -> None:
    weights, _ = gate_topk(torch.randn(5, 8), 3, scoring="sigmoid", norm_topk_prob=True, scaling=2.5)
    torch.testing.assert_close(weights.sum(-1), torch.full((5,), 2.5))


def test_groups_are_limited_by_their_best_expert() -> None:
    logits = torch.tensor([[3.0, -9.0, 2.0, 2.0, 2.5, -9.0]])  # groups of two: best 3.0, 2.0, 2.5
    limits = {"num_groups": 3, "groups_per_token": 2, "group_score": "max"}
    _, expert_ids = gate_topk(logits, 3, scoring="softmax", norm_topk_prob=False, **limits)
    assert {0, 4} < chosen(expert_ids)[0] <= {0, 1, 4, 5}
    _, unlimited = gate_topk(logits, 3, scoring="softmax", norm_topk_prob=False)
    assert chosen(unlimited) != chosen(expert_ids)


def test_groups_are_limited_by_the_sum_of_their_top_two() -> None:
    logits = torch.tensor([[3.0, -9.0, 2.0, 2.0, 2.5, -9.0]])  # sigmoids sum highest in the middle group
    limits = {"num_groups": 3, "groups_per_token": 1, "group_score": "top2"}
    _, expert_ids = gate_topk(logits, 2, scoring="sigmoid", norm_topk_prob=False, **limits)
    assert chosen(expert_ids) == [{2, 3}]


def test_groups_of_negative_choice_scores_stay_excluded() -> None:
    bias = torch.full((4,), -5.0)
    limits = {"num_groups": 2, "groups_per_token": 1, "group_score": "top2"}
    logits = torch.tensor([[0.1, 0.2, 3.0, -3.0]])
    _, expert_ids = gate_topk(logits, 2, scoring="sigmoid", norm_topk_prob=True, correction_bias=bias, **limits)
    assert chosen(expert_ids) == [{0, 1}]


def test_correction_bias_changes_the_choice_and_not_the_weights() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    bias = torch.tensor([-1.0, 0.0, 1.0])
    weights, expert_ids = gate_topk(logits, 1, scoring="sigmoid", norm_topk_prob=False, correction_bias=bias)
    assert chosen(expert_ids) == [{2}]
    torch.testing.assert_close(weights, logits.sigmoid()[:, 2:])


def test_scores_that_underflow_give_finite_weights() -> None:
    weights, _ = gate_topk(torch.full((1, 4), -200.0), 2, scoring="sigmoid", norm_topk_prob=True)
    assert weights.isfinite().all()


def test_routed_experts_equal_the_formula_per_token() -> None:
    tokens, experts, dim, inter = 9, 5, 6, 7
    hidden = torch.randn(tokens, dim)
    gate_up, down = torch.randn(experts, 2 * inter, dim), torch.randn(experts, dim, inter)
    weights, expert_ids = gate_topk(torch.randn(tokens, experts), 2, scoring="softmax", norm_topk_prob=True)
    expected = torch.zeros_like(hidden)
    for token in range(tokens):
        for weight, expert in zip(weights[token], expert_ids[token].tolist(), strict=True):
            gate, up = (gate_up[expert] @ hidden[token]).chunk(2)
            expected[token] += weight * (down[expert] @ (gate * gate.sigmoid() * up))
    torch.testing.assert_close(routed_experts(hidden, weights, expert_ids, gate_up, down), expected)
    exchanged = routed_experts(hidden, weights, (expert_ids + 1) % experts, gate_up, down)
    assert (exchanged - expected).abs().max() > 1e-2
