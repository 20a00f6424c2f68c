"""Tables of rotary angles for the kinds of position scaling that checkpoints use."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..config import RopeConfig
from .placement import Placement


class RotaryTable(nn.Module):
    """cos and sin of every position, computed once: float32 [positions, pairs] each."""

    cos: Tensor
    sin: Tensor

    def __init__(self, rope: RopeConfig, positions: int, placement: Placement) -> None:
        super().__init__()
        self.ops, self.dtype, device = placement.ops, placement.dtype, placement.device
        # On the host, so that every device has the same table; in float32, as in the implementations
        # that checkpoints were trained and published with
        angles = torch.arange(positions, dtype=torch.float32).unsqueeze(1) * inverse_frequencies(rope, positions)
        scale = rotary_scale(rope)
        self.register_buffer("cos", (angles.cos() * scale).to(device), persistent=False)
        self.register_buffer("sin", (angles.sin() * scale).to(device), persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions int64 [tokens] -> cos and sin of the tokens, as the op `rotary_angles` makes them of float32
        [tokens, pairs]. Positions behind the table, where only drafts that will be dropped can stand, take its last
        row."""
        rows = positions.clamp(max=self.cos.shape[0] - 1)
        return self.ops.table.rotary_angles(self.cos[rows], self.sin[rows], self.dtype)


def inverse_frequencies(rope: RopeConfig, positions: int) -> Tensor:
    """Radians per token of each pair: float32 [pairs], or [positions, pairs] where they depend on the position.

    `linear` divides all by the factor. `llama3` divides the slow ones (wavelength over original / low_freq_factor),
    keeps the fast ones and blends between (Llama 3.1 model code). `yarn`: `yarn_frequencies`. `dynamic`:
    `dynamic_frequencies`.
    """
    plain = rope.theta ** -(torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim)
    if rope.kind == "default":
        return plain
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "dynamic":
        return dynamic_frequencies(rope, positions)
    if rope.kind == "llama3":
        turns = rope.original_max_position * plain / (2 * math.pi)  # over the original context
        kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        return blend(plain / rope.factor, plain, kept.clamp(0, 1))
    if rope.kind == "yarn":
        return yarn_frequencies(rope, plain)
    raise ValueError(f"rope kind must be default, linear, dynamic, llama3 or yarn: {rope.kind}")


def dynamic_frequencies(rope: RopeConfig, positions: int) -> Tensor:
    """NTK scaling with a base that grows with the length: float32 [positions, pairs].

    Position p is rotated with the base for the length max(original_max_position, p + 1). So a token's key depends
    neither on the chunking nor on how long the prompt is, and a cached block stays valid. transformers takes the base
    from the length of the current call instead: equal for prompts within the original length and for generation token
    by token across it, different for a prompt that is longer than the original length in one call.
    """
    length = torch.arange(1, positions + 1, dtype=torch.float64).clamp(min=rope.original_max_position)
    stretch = rope.factor * length / rope.original_max_position - (rope.factor - 1)
    base = rope.theta * stretch ** (rope.dim / (rope.dim - 2))
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.float64) / rope.dim
    return (base.unsqueeze(1) ** -exponents).float()


def yarn_frequencies(rope: RopeConfig, plain: Tensor) -> Tensor:
    """YaRN (arXiv:2309.00071): pairs that turn more than beta_fast times over the original context keep their
    frequency, pairs that turn less than beta_slow times are divided by the factor, a linear ramp over the pair's index
    between. float32 [pairs]."""

    def pair_with_turns(turns: float) -> float:
        return rope.dim * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = pair_with_turns(rope.beta_fast), pair_with_turns(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.dim - 1)
    width = last - first if last != first else 0.001  # a ramp of no width is a step
    interpolated = ((torch.arange(rope.dim // 2, dtype=torch.float32) - first) / width).clamp(0, 1)
    return blend(plain, plain / rope.factor, interpolated)


def blend(at_zero: Tensor, at_one: Tensor, position: Tensor) -> Tensor:
    return at_zero * (1 - position) + at_one * position


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's growth of the attention's magnitude with the context, weighted by a checkpoint's `mscale`."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rotary_scale(rope: RopeConfig) -> float:
    """What cos and sin are multiplied by: 1 except for YaRN."""
    if rope.kind != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return yarn_mscale(rope.factor, rope.mscale) / yarn_mscale(rope.factor, rope.mscale_all_dim)
    return yarn_mscale(rope.factor, 1.0)


def mla_softmax_scale(rope: RopeConfig, query_dim: int) -> float:
    """MLA's scale of the scores: query_dim ** -0.5, times mscale² with `mscale_all_dim` (DeepSeek-V2 model code)."""
    scale = query_dim**-0.5
    if rope.kind == "yarn" and rope.mscale_all_dim:
        scale *= yarn_mscale(rope.factor, rope.mscale_all_dim) ** 2
    return scale
