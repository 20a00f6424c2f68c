"""Grouped-query and latent attention over the paged caches, by the one fused operator that the NPU has for both.

The lengths of a compiled graph are a tensor: TorchAir's form of the operator takes one, torch-npu's own takes Python
numbers and would make a new graph of every step. TorchAir's form exists in its graph mode only; eager steps and
captured ones (npugraph_ex) call torch-npu's, with the lengths as numbers. The functions here take either: a tensor
makes the first call, a sequence of numbers the second. A tensor outside a graph is read, which waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .cache import LATENT_RANK, ROPE_DIM, need_latent_caches
from .contracts import (
    HALF,
    need,
    need_among,
    need_contiguous,
    need_dtype,
    need_int32_elements,
    need_multiple,
    need_range,
    need_same_dtype,
    need_shape,
)
from .library import causal_mask

_OPERATOR = "npu_fused_infer_attention_score_v2"
HEAD_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128)  # of latent attention
NO_MASK, CAUSAL = 0, 3  # sparse modes: all that the lengths leave visible; aligned to the last token

Lengths = Tensor | Sequence[int]


def paged_decode_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    context_lens: Lengths,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """As `ops.attention.paged_decode_attention`, for the last `T` tokens of each request: T = rows of query / requests.

    npu_fused_infer_attention_score_v2 in layout BSND: query [requests * T, heads, dim], requests one after another,
    T from 1 to 16; caches [blocks, block_size, kv_heads, dim], both of one shape and of the query's dtype, bfloat16 or
    float16; heads at most 256 and at most 64 per kv head; dim a multiple of 16, at most 512, kv_heads * dim at most
    65535; block_size a multiple of 16, at most 512, or with T > 1 of 128; a cache of less than 2**31 elements.
    block_table int32 [requests, max_blocks]; context_lens [requests], the T tokens included -> [requests * T, heads,
    dim]. Several tokens see each other causally. A window is a mask of its own, [requests, 1, T, max_blocks *
    block_size]. Mutates nothing.
    """
    requests, tokens = _tokens_per_request(query, block_table, context_lens)
    _, heads, dim = query.shape
    need_dtype(_OPERATOR, "query", query, *HALF)
    need_shape(_OPERATOR, "key_cache", key_cache, None, None, None, dim)
    need_shape(_OPERATOR, "value_cache", value_cache, *key_cache.shape)
    blocks, block_size, kv_heads, _ = key_cache.shape
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        need_same_dtype(_OPERATOR, name, cache, "query", query)
        need_contiguous(_OPERATOR, name, cache)
        need_int32_elements(_OPERATOR, name, cache)
    need_range(_OPERATOR, "the number of heads", heads, 1, 256)
    need_multiple(_OPERATOR, "the number of heads over kv_heads", heads, kv_heads)
    need_range(_OPERATOR, "heads per kv head", heads // kv_heads, 1, 64)
    need_multiple(_OPERATOR, "dim", dim, 16)
    need_range(_OPERATOR, "dim", dim, 16, 512)
    need_range(_OPERATOR, "kv_heads * dim", kv_heads * dim, 1, 65535)
    need_multiple(_OPERATOR, "block_size" if tokens == 1 else "block_size with several tokens per request", block_size,
                  16 if tokens == 1 else 128)  # fmt: skip
    need_range(_OPERATOR, "block_size", block_size, 16, 512)
    if tokens > 1:
        need_range(_OPERATOR, "heads * dim", heads * dim, 1, 65534)
    sparse_mode, mask = _visibility(query.device, tokens)
    if window is not None:
        need_range(_OPERATOR, "window", window, 1, 2**31 - 1)
        sparse_mode, mask = NO_MASK, window_mask(context_lens, block_table, tokens, block_size, window)
    attended = _fused_attention(
        query.contiguous().view(requests, tokens, heads, dim),
        key_cache.view(blocks, block_size, kv_heads * dim),
        value_cache.view(blocks, block_size, kv_heads * dim),
        context_lens,
        block_table=block_table,
        atten_mask=mask,
        num_query_heads=heads,
        num_key_value_heads=kv_heads,
        softmax_scale=scale,
        input_layout="BSND",
        sparse_mode=sparse_mode,
        block_size=block_size,
    )
    return attended.view(requests * tokens, heads, dim)


def mla_decode_attention(
    query_latent: Tensor,
    query_rope: Tensor,
    latent_cache: Tensor,
    rope_key_cache: Tensor,
    block_table: Tensor,
    context_lens: Lengths,
    scale: float,
) -> Tensor:
    """As `ops.mla.mla_decode_attention`, for the last `T` tokens of each request: T = rows of the query / requests.

    npu_fused_infer_attention_score_v2 in layout BSND with rope parts, which static graphs may schedule ahead, as TND
    may not: query_latent [requests * T, heads, 512], query_rope [requests * T, heads, 64], requests one after another,
    T from 1 to 16; heads 1, 2, 4, …, 128; caches as in `ops.npu.cache.write_latent_cache`, of the query's dtype,
    bfloat16 or float16, block_size 16 or 128, less than 2**31 elements; block_table int32 [requests, max_blocks];
    context_lens [requests], the T tokens included -> [requests * T, heads, 512]. Mutates nothing.
    """
    requests, tokens = _tokens_per_request(query_latent, block_table, context_lens)
    heads = query_latent.shape[1]
    need_shape(_OPERATOR, "query_latent", query_latent, None, None, LATENT_RANK)
    need_shape(_OPERATOR, "query_rope", query_rope, requests * tokens, heads, ROPE_DIM)
    need_dtype(_OPERATOR, "query_latent", query_latent, *HALF)
    need_among(_OPERATOR, "the number of heads", heads, HEAD_COUNTS)
    need_latent_caches(_OPERATOR, latent_cache, rope_key_cache)
    need_int32_elements(_OPERATOR, "latent_cache", latent_cache)
    for name, tensor in (("query_rope", query_rope), ("latent_cache", latent_cache)):
        need_same_dtype(_OPERATOR, name, tensor, "query_latent", query_latent)
    blocks, block_size = latent_cache.shape[:2]
    need_among(_OPERATOR, "block_size", block_size, (16, 128))
    sparse_mode, mask = _visibility(query_latent.device, tokens)
    latents = latent_cache.view(blocks, block_size, LATENT_RANK)
    attended = _fused_attention(
        query_latent.contiguous().view(requests, tokens, heads, LATENT_RANK),
        latents,
        latents,
        context_lens,
        query_rope=query_rope.contiguous().view(requests, tokens, heads, ROPE_DIM),
        key_rope=rope_key_cache.view(blocks, block_size, ROPE_DIM),
        block_table=block_table,
        atten_mask=mask,
        num_query_heads=heads,
        num_key_value_heads=1,
        softmax_scale=scale,
        input_layout="BSND",
        sparse_mode=sparse_mode,
        block_size=block_size,
    )
    return attended.view(requests * tokens, heads, LATENT_RANK)


def window_mask(context_lens: Lengths, block_table: Tensor, tokens: int, block_size: int, window: int) -> Tensor:
    """What is hidden where a token sees only the `window` newest, itself included: bool [requests, 1, tokens,
    max_blocks * block_size], true where hidden."""
    device = block_table.device
    if not isinstance(context_lens, Tensor):
        context_lens = torch.tensor(context_lens, dtype=torch.int32, device=device)
    newest = torch.arange(1 - tokens, 1, dtype=torch.int32, device=device)
    ends = context_lens.to(torch.int32).view(-1, 1, 1, 1) + newest.view(1, 1, -1, 1)
    positions = torch.arange(block_table.shape[1] * block_size, dtype=torch.int32, device=device)
    return (positions >= ends) | (positions < ends - window)


def _visibility(device: torch.device, tokens: int) -> tuple[int, Tensor | None]:
    """Sparse mode and mask for the last `tokens` of each context."""
    return (NO_MASK, None) if tokens == 1 else (CAUSAL, causal_mask(device))


def _tokens_per_request(query: Tensor, block_table: Tensor, context_lens: Lengths) -> tuple[int, int]:
    need_shape(_OPERATOR, "query", query, None, None, None)
    need_shape(_OPERATOR, "block_table", block_table, None, None)
    need_dtype(_OPERATOR, "block_table", block_table, torch.int32)
    requests, rows = block_table.shape[0], query.shape[0]
    need_range(_OPERATOR, "requests", requests, 1, 65536)
    need_multiple(_OPERATOR, f"rows of the query over {requests} requests", rows, requests)
    need_range(_OPERATOR, "tokens per request", rows // requests, 1, 16)
    if isinstance(context_lens, Tensor):
        need_shape(_OPERATOR, "context_lens", context_lens, requests)
        need_dtype(_OPERATOR, "context_lens", context_lens, torch.int32, torch.int64)
    else:
        need(len(context_lens) == requests, _OPERATOR, f"{requests} context_lens", len(context_lens))
    return requests, rows // requests


def _fused_attention(query: Tensor, keys: Tensor, values: Tensor, context_lens: Lengths, **arguments: object) -> Tensor:
    if isinstance(context_lens, Tensor) and not (torch.compiler.is_compiling() or context_lens.is_meta):
        context_lens = context_lens.tolist()
    if isinstance(context_lens, Tensor):
        operator, lengths = torch.ops.air.npu_fused_infer_attention_score_v2, context_lens.to(torch.int64)
    else:
        operator, lengths = torch.ops.npu.npu_fused_infer_attention_score_v2, list(context_lens)
    return operator(query, keys, values, actual_seq_kvlen=lengths, **arguments)[0]
