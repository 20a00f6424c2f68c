"""Normalisation: by the root mean square, alone and fused with the residual addition, and LayerNorm."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def rms_norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`hidden / rms(hidden) * weight` over the last dimension (arXiv:1910.07467).

    hidden [..., dim] and weight [dim] of one floating dtype -> [..., dim] of that dtype. The mean square is taken in
    float32; the normalised value is rounded to the input dtype before the weight multiplies it, as checkpoints of
    this family were trained. Mutates nothing.
    """
    wide = hidden.float()
    normalised = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return normalised.to(hidden.dtype) * weight


def add_rms_norm(hidden: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """`residual + hidden`, and its RMS norm: the step between two sublayers of a pre-norm decoder.

    hidden, residual [tokens, dim], weight [dim] -> (normalised, sum), both [tokens, dim]. Mutates nothing.
    """
    total = residual + hidden
    return rms_norm(total, weight, epsilon), total


def layer_norm(hidden: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """`(hidden - mean) / deviation * weight + bias` over the last dimension (arXiv:1607.06450).

    hidden [..., dim] of any floating dtype, weight and bias float32 [dim] -> [..., dim] of the dtype of `hidden`,
    computed in float32. Mutates nothing.
    """
    return functional.layer_norm(hidden.float(), hidden.shape[-1:], weight, bias, epsilon).to(hidden.dtype)
