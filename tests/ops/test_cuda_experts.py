"""The static form of the routed experts, as CUDA graphs hold it: equal to the plain body, here on a CPU."""

import pytest
import torch

from omni_engine.ops import moe
from omni_engine.ops.cuda.experts import routed_experts


def problem(dtype, tokens=9, experts=6, per_token=3, dim=32, inner=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, dim, generator=generator).to(dtype)
    ids = torch.stack([torch.randperm(experts, generator=generator)[:per_token] for _ in range(tokens)])
    weights = torch.rand(tokens, per_token, generator=generator)
    gate_up = (torch.randn(experts, 2 * inner, dim, generator=generator) / dim**0.5).to(dtype)
    down = (torch.randn(experts, dim, inner, generator=generator) / inner**0.5).to(dtype)
    return hidden, weights, ids, gate_up, down


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 2, 9, 40])
def test_static_experts_equal_the_plain_body(dtype, tokens):
    arguments = problem(dtype, tokens)
    error = (routed_experts(*arguments).float() - moe.routed_experts(*arguments).float()).abs().max()
    assert error < {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    hidden, weights, ids, gate_up, down = arguments
    other = moe.routed_experts(hidden, weights, (ids + 1) % 6, gate_up, down)
    assert (routed_experts(*arguments).float() - other.float()).abs().max() > 0.1  # other experts are seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_expert_nobody_chose_changes_nothing(dtype):
    hidden, weights, ids, gate_up, down = problem(dtype)
    ids = torch.where(ids == 4, 5, ids)
    ids[:, 0], ids[:, 1], ids[:, 2] = 0, 2, 5
    expected = routed_experts(hidden, weights, ids, gate_up, down)
    gate_up[4], down[1] = 7, 7
    assert torch.equal(routed_experts(hidden, weights, ids, gate_up, down), expected)


def test_no_value_decides_a_shape():
    """A host read or a shape by value would raise on tensors without data."""
    meta = [tensor.to("meta") for tensor in problem(torch.bfloat16)]
    assert routed_experts(*meta).shape == (9, 32)
    meta = [tensor.to("meta") for tensor in problem(torch.float32)]
    assert routed_experts(*meta).shape == (9, 32)
