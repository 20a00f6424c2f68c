"""Rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from .contracts import FLOATING, HALF, need_dtype, need_range, need_same_dtype, need_shape

INTERLEAVED_DIM = 64  # the one size that npu_interleave_rope has


def rotary_angles(cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos, sin float32 [tokens, pairs] -> [tokens, 2 * pairs] of `dtype` each, both halves alike: the form that every
    operator wants."""
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((sin, sin), dim=-1).to(dtype)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """As `ops.rope.rotate`, with cos and sin from `rotary_angles`, rounded to the dtype of `heads`.

    heads [tokens, heads, dim], cos, sin [tokens, 2 * pairs] -> [tokens, heads, dim], in halves. By
    npu_interleave_rope where it applies (`interleave_rope`), else by npu_rotary_mul (`rotary_mul`), before which
    interleaved pairs are put into halves. Mutates nothing.
    """
    size = cos.shape[-1]
    need_range("rotate", "the last size of cos", size, 2, heads.shape[-1])
    rotated, rest = heads[..., :size], heads[..., size:]
    if interleaved and size == INTERLEAVED_DIM and heads.dtype in HALF:
        turned = interleave_rope(rotated, cos, sin)
    else:
        if interleaved:
            rotated = rotated.unflatten(-1, (size // 2, 2)).transpose(-1, -2).flatten(-2)
        turned = rotary_mul(rotated, cos, sin)
    return turned if rest.shape[-1] == 0 else torch.cat((turned, rest), dim=-1)


def rotary_mul(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates pairs (i, dim / 2 + i) by angles of their token: heads [tokens, heads, dim], cos, sin [tokens, dim], all
    of one floating dtype -> [tokens, heads, dim]. Mutates nothing.

    npu_rotary_mul in mode half: fewer than 1000 heads, an even dim below 896. Tokens stand in the sequence dimension
    of its layout BSND, which has no limit; the batch dimension has one.
    """
    operator = "npu_rotary_mul"
    tokens, count, dim = heads.shape
    need_dtype(operator, "heads", heads, *FLOATING)
    need_range(operator, "the number of heads", count, 1, 999)
    need_range(operator, "dim", dim, 2, 895)
    for name, angles in (("cos", cos), ("sin", sin)):
        need_shape(operator, name, angles, tokens, dim)
        need_same_dtype(operator, name, angles, "heads", heads)
    shape = (1, tokens, 1, dim)
    return torch.ops.npu.npu_rotary_mul(heads.unsqueeze(0), cos.view(shape), sin.view(shape)).squeeze(0)


def interleave_rope(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates pairs (2i, 2i + 1) by angles of their token; the result lies in halves: heads [tokens, heads, 64], cos,
    sin [tokens, 64] with both halves alike, all bfloat16 or all float16 -> [tokens, heads, 64]. Mutates nothing.

    npu_interleave_rope: dim 64 only.
    """
    operator = "npu_interleave_rope"
    tokens, count, _ = heads.shape
    need_shape(operator, "heads", heads, tokens, count, INTERLEAVED_DIM)
    need_dtype(operator, "heads", heads, *HALF)
    for name, angles in (("cos", cos), ("sin", sin)):
        need_shape(operator, name, angles, tokens, INTERLEAVED_DIM)
        need_same_dtype(operator, name, angles, "heads", heads)
    shape = (tokens, 1, 1, INTERLEAVED_DIM)
    return torch.ops.npu.npu_interleave_rope(heads.unsqueeze(2), cos.view(shape), sin.view(shape)).squeeze(2)
