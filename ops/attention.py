"""Grouped-query attention over a paged cache of keys and values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional


def write_rows(rows: Tensor, cache: Tensor, slots: Tensor) -> None:
    """Stores a row per token. Mutates the cache.

    rows [tokens, heads, dim]; cache [blocks, block_size, heads, dim] of the same dtype; slots int64 [tokens] =
    block_id * block_size + offset. Slots are distinct, except that padding tokens may all write to the null block. The
    scatter indexes the cache in its own shape: through a flattened view, graph compilers leave a copy of the whole
    cache behind.
    """
    block_size = cache.shape[1]
    cache.index_put_((slots // block_size, slots % block_size), rows)


def write_kv_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
    write: Callable[..., None] = write_rows,
) -> None:
    """Stores this step's keys and values. Mutates both caches.

    key [tokens, kv_heads, dim], value [tokens, kv_heads, value_dim]; caches [blocks, block_size, kv_heads, …] of the
    same dtype; slots as in `write_rows`. `write`: a body of that.
    """
    write(key, key_cache, slots)
    write(value, value_cache, slots)


def gather_blocks(cache: Tensor, block_table: Tensor) -> Tensor:
    """The tokens of the named blocks in order: cache [blocks, block_size, heads, dim], block_table int32
    [requests, max_blocks] -> [requests, max_blocks * block_size, heads, dim]. Mutates nothing."""
    requests, max_blocks = block_table.shape
    tokens = max_blocks * cache.shape[1]
    return cache.index_select(0, block_table.reshape(-1)).view(requests, tokens, *cache.shape[2:])


def decode_mask(context_lens: Tensor, tokens: int, window: int | None) -> Tensor:
    """Which cached tokens the newest token of each request sees: context_lens int32 [requests] -> bool
    [requests, tokens], true for [context_len - window, context_len). Mutates nothing."""
    ages = context_lens.unsqueeze(1) - torch.arange(tokens, device=context_lens.device)  # 1: the newest token itself
    mask = ages > 0
    return mask if window is None else mask & (ages <= window)


def per_token(block_table: Tensor, context_lens: Tensor, num_tokens: int, block_size: int) -> tuple[Tensor, Tensor]:
    """The decoding requests' table and lengths again for each of their tokens, which decode as if on their own.

    block_table int32 [requests, max_blocks]; context_lens int32 [requests], all of a request's tokens counted;
    `num_tokens` a multiple of requests -> [num_tokens, max_blocks], [num_tokens]. A token sees those before it and
    itself, and nothing behind the end of the table. Mutates nothing.
    """
    capacity = block_table.shape[1] * block_size
    tokens_per_request = num_tokens // block_table.shape[0]
    if tokens_per_request == 1:
        return block_table, context_lens.clamp(max=capacity)
    behind = torch.arange(tokens_per_request - 1, -1, -1, dtype=context_lens.dtype, device=context_lens.device)
    lens = (context_lens.unsqueeze(1) - behind).clamp(max=capacity)
    return block_table.repeat_interleave(tokens_per_request, dim=0), lens.flatten()


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax in float32 over the last dimension where `mask` is true. The lowest finite number stands for minus
    infinity, so that a padding row that sees nothing comes out finite. Mutates nothing."""
    wide = scores.float().masked_fill(~mask, torch.finfo(torch.float32).min)
    return torch.softmax(wide, dim=-1)


def paged_decode_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Attention of the newest tokens of each request, the same number for all, over its cached context and themselves.

    query [tokens, heads, dim], a request's tokens side by side; key_cache [blocks, block_size, kv_heads, dim] and
    value_cache [blocks, block_size, kv_heads, value_dim]; heads any multiple of kv_heads, neighbours sharing one
    (arXiv:2305.13245); block_table int32 [requests, max_blocks], tokens a multiple of requests; context_lens int32
    [requests], see `per_token` -> [tokens, heads, value_dim]. With `window` w a token at position p sees (p - w, p].
    Shapes depend on no value; nothing is read on the host. Mutates nothing.
    """
    requests, heads = query.shape[:2]
    block_table, context_lens = per_token(block_table, context_lens, requests, key_cache.shape[1])
    keys = gather_blocks(key_cache, block_table).permute(0, 2, 3, 1)  # [requests, kv_heads, dim, tokens]
    values = gather_blocks(value_cache, block_table).transpose(1, 2)  # [requests, kv_heads, tokens, value_dim]
    kv_heads, tokens = values.shape[1:3]
    grouped = query.unflatten(1, (kv_heads, heads // kv_heads))
    mask = decode_mask(context_lens, tokens, window)[:, None, None, :]
    weights = masked_softmax(torch.matmul(grouped, keys) * scale, mask).to(values.dtype)
    return torch.matmul(weights, values).reshape(requests, heads, -1)


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None = None,
    selected: Tensor | None = None,
) -> Tensor:
    """Dense causal attention of the last `query_len` tokens of one context.

    query [query_len, heads, dim]; key [context_len, kv_heads, dim], value [context_len, kv_heads, value_dim]; heads
    any multiple of kv_heads; the query's tokens are the last of the context -> [query_len, heads, value_dim]. With
    `window` w a token at position p sees (p - w, p]. `selected` bool [query_len, context_len] says instead what each
    token sees, at least one and none behind itself. Mutates nothing.
    """
    query_len, context_len = query.shape[0], key.shape[0]
    whole = selected is None and query_len == context_len and (window is None or window >= context_len)
    mask = selected
    if mask is None and not whole:
        query_positions = torch.arange(context_len - query_len, context_len, device=query.device).unsqueeze(1)
        ages = query_positions - torch.arange(context_len, device=query.device)  # 0: the token itself
        mask = ages >= 0
        if window is not None:
            mask &= ages < window
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    query, key, value = (part.transpose(0, 1).unsqueeze(0) for part in (query, key, value))
    output = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=whole, scale=scale)
    return output.squeeze(0).transpose(0, 1)


def paged_prefill_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    query_lens: tuple[int, ...],
    context_lens: tuple[int, ...],
    scale: float,
    window: int | None = None,
    attention: Callable[..., Tensor] = causal_attention,
) -> Tensor:
    """Attention of a chunk of tokens per request over its cached context, whose last tokens the chunk is.

    query [sum(query_lens), heads, dim], requests one after another; caches as in `paged_decode_attention`; block_table
    int32 [requests, max_blocks]; lengths on the host; `attention`: a body of `causal_attention` -> [sum(query_lens),
    heads, value_dim]. Mutates nothing.
    """
    block_size = key_cache.shape[1]
    outputs = []
    for row, (chunk, context_len) in enumerate(zip(query.split(query_lens), context_lens, strict=True)):
        blocks = block_table[row : row + 1, : -(-context_len // block_size)]
        keys = gather_blocks(key_cache, blocks)[0, :context_len]
        values = gather_blocks(value_cache, blocks)[0, :context_len]
        outputs.append(attention(chunk, keys, values, scale, window))
    return torch.cat(outputs)


def bidirectional_attention(query: Tensor, key: Tensor, value: Tensor, lens: tuple[int, ...], scale: float) -> Tensor:
    """Attention of whole sequences in which every token sees every other of its own, as in BERT (arXiv:1810.04805).

    query, key, value [sum(lens), heads, dim], sequences one after another without padding; lens on the host, each at
    least 1 -> [sum(lens), heads, dim]. Neighbours of one length are computed together. Mutates nothing.
    """
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    start = index = 0
    while index < len(lens):
        length, count = lens[index], 1
        while index + count < len(lens) and lens[index + count] == length:
            count += 1
        stop = start + count * length
        here = [part[start:stop].unflatten(0, (count, length)).transpose(1, 2) for part in (query, key, value)]
        attended = functional.scaled_dot_product_attention(here[0], here[1], here[2], scale=scale)
        output[start:stop].unflatten(0, (count, length)).copy_(attended.transpose(1, 2))
        start, index = stop, index + count
    return output
