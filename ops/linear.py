"""The product with a weight matrix."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`: x [..., inputs], weight [outputs, inputs] and bias [outputs] of one floating dtype ->
    [..., outputs] of that dtype. Mutates nothing."""
    return functional.linear(x, weight, bias)


def head_linear(x: Tensor, weight: Tensor, transposed: bool = False) -> Tensor:
    """A weight matrix per head, such as the halves of MLA's up-projection (arXiv:2405.04434) in absorbed decoding.

    x [rows, heads, inputs] and weight [heads, outputs, inputs], or [heads, inputs, outputs] when `transposed`, of one
    floating dtype -> [rows, heads, outputs] of that dtype. The weight may be a view. Mutates nothing.
    """
    matrices = weight if transposed else weight.mT
    return (x.transpose(0, 1) @ matrices).transpose(0, 1)
