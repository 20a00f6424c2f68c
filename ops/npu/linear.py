"""Products with weight matrices, of floats."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .contracts import FLOATING, need_dtype, need_range, need_same_dtype, need_shape

INNER_LIMIT = 65536

# torch's product with a transposed weight becomes two nodes of the graph engine, of which one moves the whole weight.
# This one has a converter of its own (`ops.npu.converters`): one product, which reads the weight as it lies.
_library = torch.library.Library("omni_engine_npu", "DEF")
_library.define("linear(Tensor x, Tensor weight) -> Tensor")
_library.impl("linear", functional.linear, "CompositeExplicitAutograd")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `ops.linear.linear`: the weight [outputs, inputs] in ND or NZ (`ops.npu.weights.to_nz`). Without a bias and of
    rows alone it is one node of a graph; otherwise torch's own product. Mutates nothing."""
    operator = "MatMul"
    need_shape(operator, "weight", weight, None, x.shape[-1])
    need_dtype(operator, "x", x, *FLOATING)
    need_same_dtype(operator, "weight", weight, "x", x)
    if bias is None and x.dim() == 2:
        return torch.ops.omni_engine_npu.linear(x, weight)
    return functional.linear(x, weight, bias)


def head_linear(x: Tensor, weight: Tensor, transposed: bool = False) -> Tensor:
    """As `ops.linear.head_linear`; the fused form needs the weight packed as [heads, inputs, outputs], `transposed`.

    x [rows, heads, inputs] and weight [heads, inputs, outputs] if `transposed`, else [heads, outputs, inputs] -> [rows,
    heads, outputs]. By npu_transpose_batchmatmul where it applies (`transposed`, inputs and outputs multiples of 16,
    heads * inputs below 65536, so not the value projection of 128 heads of DeepSeek on one device), else as three
    nodes. Mutates nothing.
    """
    heads, inputs = x.shape[1:]
    outputs = weight.shape[2 if transposed else 1]
    if transposed and inputs % 16 == 0 and outputs % 16 == 0 and heads * inputs < INNER_LIMIT and x.dtype in FLOATING:
        return transpose_batchmatmul(x, weight)
    matrices = weight if transposed else weight.mT
    return torch.matmul(x.transpose(0, 1), matrices).transpose(0, 1)


def transpose_batchmatmul(x: Tensor, weight: Tensor) -> Tensor:
    """A matrix per head, without a transposition: x [rows, heads, inputs] and weight [heads, inputs, outputs] of one
    floating dtype -> [rows, heads, outputs]. Mutates nothing.

    npu_transpose_batchmatmul: inputs and outputs multiples of 16, heads * inputs and outputs below 65536.
    """
    operator = "npu_transpose_batchmatmul"
    need_shape(operator, "x", x, None, None, None)
    _, heads, inputs = x.shape
    need_dtype(operator, "x", x, *FLOATING)
    need_shape(operator, "weight", weight, heads, inputs, None)
    need_same_dtype(operator, "weight", weight, "x", x)
    outputs = weight.shape[2]
    need_range(operator, "inputs modulo 16", inputs % 16, 0, 0)
    need_range(operator, "outputs modulo 16", outputs % 16, 0, 0)
    need_range(operator, "heads * inputs", heads * inputs, 1, INNER_LIMIT - 1)
    need_range(operator, "outputs", outputs, 1, INNER_LIMIT - 1)
    return torch.ops.npu.npu_transpose_batchmatmul(x, weight, perm_x1=(1, 0, 2), perm_x2=(0, 1, 2), perm_y=(1, 0, 2))
