"""The projections before latent attention as one operator."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .attention import HEAD_COUNTS
from .cache import LATENT_RANK, ROPE_DIM, need_latent_caches, need_slots
from .contracts import need_among, need_dtype, need_range, need_shape

HIDDEN_SIZES, QUERY_RANK, NOPE_DIM = (6144, 7168, 7680), 1536, 128


@dataclass(frozen=True)
class PrologWeights:
    """The bfloat16 weights of `mla_prolog`, packed for it."""

    query_down: Tensor  # [hidden, 1536], NZ
    query_up: Tensor  # [1536, heads * (128 + 64)], NZ
    key_up: Tensor  # [heads, 128, 512], ND
    latent_down: Tensor  # [hidden, 512 + 64], NZ
    query_norm: Tensor  # [1536]
    latent_norm: Tensor  # [512]


def mla_prolog(
    hidden: Tensor,
    weights: PrologWeights,
    epsilons: tuple[float, float],
    cos: Tensor,
    sin: Tensor,
    latent_cache: Tensor,
    rope_key_cache: Tensor,
    slots: Tensor,
) -> tuple[Tensor, Tensor]:
    """From the hidden state to absorbed queries, with latents and rope keys stored. Mutates both caches.

    npu_mla_prolog_v3, whose schema tells that it mutates, as the second version's does not: hidden bfloat16 [tokens,
    hidden], hidden 6144, 7168 or 7680; heads 1, 2, 4, …, 128; interleaved pairs; epsilons of the query's norm and the
    latent's; cos, sin [tokens, 64], from `ops.npu.rope.rotary_angles`; caches as in `ops.npu.cache.write_latent_cache`,
    block_size 16 or 128; slots int64 [tokens] -> (query_latent [tokens, heads, 512], query_rope [tokens, heads, 64]).
    """
    operator = "npu_mla_prolog_v3"
    need_shape(operator, "hidden", hidden, None, None)
    tokens, size = hidden.shape
    need_range(operator, "tokens", tokens, 0, 1048576)
    need_among(operator, "the hidden size", size, HIDDEN_SIZES)
    need_shape(operator, "key_up", weights.key_up, None, NOPE_DIM, LATENT_RANK)
    heads = weights.key_up.shape[0]
    need_among(operator, "the number of heads", heads, HEAD_COUNTS)
    need_shape(operator, "query_down", weights.query_down, size, QUERY_RANK)
    need_shape(operator, "query_up", weights.query_up, QUERY_RANK, heads * (NOPE_DIM + ROPE_DIM))
    need_shape(operator, "latent_down", weights.latent_down, size, LATENT_RANK + ROPE_DIM)
    need_shape(operator, "query_norm", weights.query_norm, QUERY_RANK)
    need_shape(operator, "latent_norm", weights.latent_norm, LATENT_RANK)
    need_latent_caches(operator, latent_cache, rope_key_cache)
    need_among(operator, "block_size", latent_cache.shape[1], (16, 128))
    for name, tensor in (("hidden", hidden), ("latent_cache", latent_cache), *vars(weights).items()):
        need_dtype(operator, name, tensor, torch.bfloat16)
    for name, angles in (("cos", cos), ("sin", sin)):
        need_shape(operator, name, angles, tokens, ROPE_DIM)
        need_dtype(operator, name, angles, torch.bfloat16)
    need_slots(operator, slots, tokens, torch.int64)
    query_latent, query_rope, *_ = torch.ops.npu.npu_mla_prolog_v3(
        hidden,
        weights.query_down,
        weights.query_up,
        weights.key_up,
        weights.latent_down,
        weights.query_norm,
        weights.latent_norm,
        sin,
        cos,
        latent_cache,
        rope_key_cache,
        cache_index=slots,
        rmsnorm_epsilon_cq=epsilons[0],
        rmsnorm_epsilon_ckv=epsilons[1],
        cache_mode="PA_BSND",
    )
    return query_latent, query_rope
