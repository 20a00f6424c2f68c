"""Rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_angles(cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What the ops that rotate take of a step's angles, made once for all layers: here the angles as they are, float32
    [tokens, pairs] each. `dtype` is that of the heads."""
    return cos, sin


def rotate(heads: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotates the first `2 * pairs` elements of every head by its token's angles (arXiv:2104.09864).

    heads [tokens, heads, dim]; cos, sin float32 [tokens, pairs] -> [tokens, heads, dim] of the dtype of `heads`,
    computed in float32. Pair i is elements (i, pairs + i), or (2i, 2i + 1) when `interleaved`; the result always lies
    in halves. Scores do not see that reordering, as long as queries and keys both went through it. Mutates nothing.
    """
    pairs = cos.shape[-1]
    rotated = heads[..., : 2 * pairs].float()
    if interleaved:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
    else:
        first, second = rotated.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # [tokens, 1, pairs]
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(heads.dtype)
    if 2 * pairs == heads.shape[-1]:
        return turned
    return torch.cat((turned, heads[..., 2 * pairs :]), dim=-1)
