"""Writes into the paged caches, all in place through operators whose schema declares it.

An undeclared write is dropped from a compiled graph when nobody uses its result, and a write through a view leaves a
copy of the whole cache behind. So caches come in the very shape that the operator takes, and are contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .contracts import (
    HALF,
    need_contiguous,
    need_dtype,
    need_same_dtype,
    need_shape,
)
from .norm import rms_norm
from .rope import rotate

LATENT_RANK, ROPE_DIM = 512, 64  # the sizes that the fused MLA operators have


def write_kv_cache(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    """As `ops.attention.write_kv_cache`. Mutates both caches.

    npu_scatter_pa_kv_cache in cache mode Norm: key [tokens, kv_heads, dim], value [tokens, kv_heads, value_dim]; caches
    [blocks, block_size, kv_heads, …] of the same dtype, bfloat16, float16, float32 or int8; slots int32 or int64
    [tokens]. Slots are distinct; of padding tokens that share one, any may be written.
    """
    operator = "npu_scatter_pa_kv_cache"
    need_shape(operator, "key", key, None, None, None)
    tokens, kv_heads, dim = key.shape
    need_dtype(operator, "key", key, torch.bfloat16, torch.float16, torch.float32, torch.int8)
    need_shape(operator, "value", value, tokens, kv_heads, None)
    need_shape(operator, "key_cache", key_cache, None, None, kv_heads, dim)
    need_shape(operator, "value_cache", value_cache, *key_cache.shape[:2], kv_heads, value.shape[-1])
    for name, tensor in (("value", value), ("key_cache", key_cache), ("value_cache", value_cache)):
        need_same_dtype(operator, name, tensor, "key", key)
    need_slots(operator, slots, tokens, torch.int32, torch.int64)
    need_contiguous(operator, "key_cache", key_cache)
    need_contiguous(operator, "value_cache", value_cache)
    torch.ops.npu.npu_scatter_pa_kv_cache(
        key.contiguous(), value.contiguous(), key_cache, value_cache, slots, cache_mode="Norm"
    )


def put_rows(target: Tensor, rows: Tensor, values: Tensor) -> None:
    """As `ops.rows.put_rows`, by the form of it that TorchAir lowers."""
    if target.dim() > 1:
        rows = rows.view(-1, *[1] * (target.dim() - 1)).expand_as(values)
    target.scatter_(0, rows, values)


def write_index_keys(keys: Tensor, index_key_cache: Tensor, slots: Tensor) -> None:
    """As `ops.dsa.write_index_keys`. Mutates the cache.

    npu_scatter_nd_update_ by (block, offset), in the cache's own shape: keys [tokens, 1, dim], index_key_cache [blocks,
    block_size, 1, dim] of the same dtype; slots int64 [tokens].
    """
    operator = "npu_scatter_nd_update_"
    need_shape(operator, "keys", keys, None, 1, None)
    tokens, _, dim = keys.shape
    need_dtype(operator, "keys", keys, torch.bfloat16, torch.float16, torch.float32, torch.int8)
    need_shape(operator, "index_key_cache", index_key_cache, None, None, 1, dim)
    need_same_dtype(operator, "index_key_cache", index_key_cache, "keys", keys)
    need_slots(operator, slots, tokens, torch.int64)
    need_contiguous(operator, "index_key_cache", index_key_cache)
    block_size = index_key_cache.shape[1]
    places = torch.stack((slots // block_size, slots % block_size), dim=-1)
    torch.ops.npu.npu_scatter_nd_update_(index_key_cache, places, keys)


def write_latent_cache(
    latent_and_key: Tensor,
    norm_weight: Tensor,
    epsilon: float,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    latent_cache: Tensor,
    rope_key_cache: Tensor,
    slots: Tensor,
) -> None:
    """As `ops.mla.write_latent_cache`. Mutates both caches.

    One operator, `fused_latent_write`, where the sizes are DeepSeek's (512 and 64), the pairs interleaved and the dtype
    is bfloat16 or float16; else norm, rotation and write one by one.
    """
    rank, rope_dim = latent_cache.shape[-1], rope_key_cache.shape[-1]
    if (rank, rope_dim) == (LATENT_RANK, ROPE_DIM) and interleaved and latent_and_key.dtype in HALF:
        fused_latent_write(latent_and_key, norm_weight, epsilon, cos, sin, latent_cache, rope_key_cache, slots)
        return
    latent, rope_key = latent_and_key.split((rank, rope_dim), dim=-1)
    latent = rms_norm(latent.contiguous(), norm_weight, epsilon).unsqueeze(1)
    rope_key = rotate(rope_key.unsqueeze(1), cos, sin, interleaved)
    write_kv_cache(latent, rope_key, latent_cache, rope_key_cache, slots)


def fused_latent_write(
    latent_and_key: Tensor,
    norm_weight: Tensor,
    epsilon: float,
    cos: Tensor,
    sin: Tensor,
    latent_cache: Tensor,
    rope_key_cache: Tensor,
    slots: Tensor,
) -> None:
    """`write_latent_cache` by one operator. Mutates both caches.

    npu_kv_rmsnorm_rope_cache_v2 in cache mode PA: latent_and_key [tokens, 576], norm_weight [512], caches [blocks,
    block_size, 1, 512] and [blocks, block_size, 1, 64], all bfloat16 or all float16; cos, sin [tokens, 64] of
    that dtype, from `rope.rotary_angles`; slots int64 [tokens], distinct. The second version, because the schema of the
    first does not tell that it mutates. It takes the rope cache before the latent one.
    """
    operator = "npu_kv_rmsnorm_rope_cache_v2"
    tokens = latent_and_key.shape[0]
    need_shape(operator, "latent_and_key", latent_and_key, tokens, LATENT_RANK + ROPE_DIM)
    need_dtype(operator, "latent_and_key", latent_and_key, *HALF)
    need_shape(operator, "norm_weight", norm_weight, LATENT_RANK)
    need_latent_caches(operator, latent_cache, rope_key_cache)
    for name, tensor in (("norm_weight", norm_weight), ("latent_cache", latent_cache)):
        need_same_dtype(operator, name, tensor, "latent_and_key", latent_and_key)
    for name, angles in (("cos", cos), ("sin", sin)):
        need_shape(operator, name, angles, tokens, ROPE_DIM)
        need_same_dtype(operator, name, angles, "latent_and_key", latent_and_key)
    need_slots(operator, slots, tokens, torch.int64)
    shape = (tokens, 1, 1, ROPE_DIM)
    torch.ops.npu.npu_kv_rmsnorm_rope_cache_v2(
        latent_and_key.contiguous().view(tokens, 1, 1, LATENT_RANK + ROPE_DIM),
        norm_weight,
        cos.view(shape),
        sin.view(shape),
        slots,
        rope_key_cache,
        latent_cache,
        epsilon=epsilon,
        cache_mode="PA",
    )


def need_latent_caches(operator: str, latent_cache: Tensor, rope_key_cache: Tensor) -> None:
    """Latents [blocks, block_size, 1, 512] and rope keys [blocks, block_size, 1, 64] as the MLA operators take them."""
    need_shape(operator, "latent_cache", latent_cache, None, None, 1, LATENT_RANK)
    need_shape(operator, "rope_key_cache", rope_key_cache, *latent_cache.shape[:2], 1, ROPE_DIM)
    need_same_dtype(operator, "rope_key_cache", rope_key_cache, "latent_cache", latent_cache)
    need_contiguous(operator, "latent_cache", latent_cache)
    need_contiguous(operator, "rope_key_cache", rope_key_cache)


def need_slots(operator: str, slots: Tensor, tokens: int, *dtypes: torch.dtype) -> None:
    need_shape(operator, "slots", slots, tokens)
    need_dtype(operator, "slots", slots, *dtypes)
