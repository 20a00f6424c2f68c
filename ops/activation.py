"""Gated activations of feed-forward layers."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of a fused projection (arXiv:2002.05202).

    gate_up [..., 2 * size]: the gate in the first half, the value in the second -> [..., size]. Mutates nothing.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up
