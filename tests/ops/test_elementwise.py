"""Norms, rope and activations against their formulas, in every dtype."""

from __future__ import annotations

import pytest
import torch

from omni_engine.ops.activation import swiglu
from omni_engine.ops.norm import add_rms_norm, rms_norm
from omni_engine.ops.rope import rotate

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


@DTYPES
def test_rms_norm_equals_the_formula_in_double(dtype: torch.dtype) -> None:
    hidden, weight = torch.randn(5, 33).to(dtype), (torch.rand(33) + 0.5).to(dtype)
    wide = hidden.double()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    output = rms_norm(hidden, weight, 1e-5)
    assert output.dtype == dtype
    torch.testing.assert_close(output, expected.to(dtype))


def test_rms_norm_of_large_half_precision_values_does_not_overflow() -> None:
    assert rms_norm(torch.full((1, 8), 6e4, dtype=torch.float16), torch.ones(8).half(), 1e-5).isfinite().all()


def test_rms_norm_of_small_values_depends_on_epsilon() -> None:
    hidden = torch.full((1, 8), 1e-3)
    assert rms_norm(hidden, torch.ones(8), 1e-5)[0, 0] < 0.9 * rms_norm(hidden, torch.ones(8), 1e-7)[0, 0]


def test_add_rms_norm_returns_the_norm_of_the_sum_and_the_sum() -> None:
    hidden, residual, weight = torch.randn(4, 16), torch.randn(4, 16), torch.rand(16)
    normalised, total = add_rms_norm(hidden, residual, weight, 1e-6)
    assert torch.equal(total, residual + hidden)
    assert torch.equal(normalised, rms_norm(total, weight, 1e-6))


@DTYPES
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_turns_each_pair_as_a_complex_number(interleaved: bool, dtype: torch.dtype) -> None:
    heads = torch.randn(6, 3, 10).to(dtype)
    angles = torch.randn(6, 5)
    pairs = heads.double().unflatten(-1, (5, 2)) if interleaved else heads.double().unflatten(-1, (2, 5)).mT
    turned = (
        torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones(6, 5), angles).to(torch.complex128)[:, None]
    )
    expected = torch.cat((turned.real, turned.imag), dim=-1).to(dtype)
    torch.testing.assert_close(rotate(heads, angles.cos(), angles.sin(), interleaved), expected)


def test_rotation_leaves_elements_behind_the_pairs() -> None:
    heads, angles = torch.randn(4, 2, 10), torch.randn(4, 3)
    rotated = rotate(heads, angles.cos(), angles.sin(), False)
    assert torch.equal(rotated[..., 6:], heads[..., 6:])
    assert (rotated[..., :6] - heads[..., :6]).abs().max() > 1e-2


def test_scores_depend_on_the_distance_of_the_positions_only() -> None:
    query, key = torch.randn(1, 1, 8), torch.randn(1, 1, 8)
    frequencies = torch.tensor([1.0, 0.3, 0.1, 0.01])

    def score(query_position: int, key_position: int) -> float:
        angles = torch.tensor([[query_position], [key_position]]) * frequencies
        cos, sin = angles.cos(), angles.sin()
        turned_query = rotate(query, cos[:1], sin[:1], False)
        turned_key = rotate(key, cos[1:], sin[1:], False)
        return float((turned_query * turned_key).sum())

    assert score(9, 4) == pytest.approx(score(25, 20), abs=1e-5)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


def test_swiglu_gates_the_second_half_by_the_first() -> None:
    gate, up = torch.randn(3, 7), torch.randn(3, 7)
    output = swiglu(torch.cat((gate, up), dim=-1))
    torch.testing.assert_close(output, gate * torch.sigmoid(gate) * up)
    assert (output - up * torch.sigmoid(up) * gate).abs().max() > 1e-2
