"""Multi-head latent attention over a paged cache of latents and rope keys (DeepSeek-V2, arXiv:2405.04434)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from .attention import causal_attention, decode_mask, gather_blocks, masked_softmax, per_token, write_rows
from .norm import rms_norm
from .rope import rotate


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
    norm: Callable[..., Tensor] = rms_norm,
    rotation: Callable[..., Tensor] = rotate,
    write: Callable[..., None] = write_rows,
) -> None:
    """Normalises the latent, rotates the shared rope key and stores both. Mutates both caches.

    latent_and_key [tokens, rank + rope_dim], the output of the KV down-projection; norm_weight [rank]; cos, sin
    float32 [tokens, rope_dim / 2]; latent_cache [blocks, block_size, 1, rank]; rope_key_cache [blocks, block_size, 1,
    rope_dim]; slots int64 [tokens], as in `write_rows`. `norm`, `rotation`, `write`: bodies of those operations.
    """
    rank, rope_dim = latent_cache.shape[-1], rope_key_cache.shape[-1]
    latent, rope_key = latent_and_key.unsqueeze(1).split((rank, rope_dim), dim=-1)  # [tokens, 1, …]
    write(norm(latent, norm_weight, epsilon), latent_cache, slots)
    write(rotation(rope_key, cos, sin, interleaved), rope_key_cache, slots)


def mla_decode_attention(
    query_latent: Tensor,
    query_rope: Tensor,
    latent_cache: Tensor,
    rope_key_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    scale: float,
) -> Tensor:
    """Absorbed attention of the newest tokens of each request: all heads attend to the one cached latent.

    query_latent [tokens, heads, rank] is the query already multiplied by the heads' key up-projection; query_rope
    [tokens, heads, rope_dim] is rotated; caches as in `write_latent_cache`; block_table int32 [requests, max_blocks]
    and context_lens int32 [requests] as in `paged_decode_attention` -> [tokens, heads, rank], to be multiplied by the
    heads' value up-projection. Shapes depend on no value; nothing is read on the host. Mutates nothing.
    """
    block_table, context_lens = per_token(block_table, context_lens, query_latent.shape[0], latent_cache.shape[1])
    latents = gather_blocks(latent_cache, block_table).squeeze(2)  # [requests, tokens, rank]
    rope_keys = gather_blocks(rope_key_cache, block_table).squeeze(2)  # [requests, tokens, rope_dim]
    scores = torch.matmul(query_latent, latents.mT) + torch.matmul(query_rope, rope_keys.mT)
    mask = decode_mask(context_lens, latents.shape[1], window=None).unsqueeze(1)
    weights = masked_softmax(scores * scale, mask).to(latents.dtype)
    return torch.matmul(weights, latents)


def mla_prefill_attention(
    query_nope: Tensor,
    query_rope: Tensor,
    up_projection: Tensor,
    latent_cache: Tensor,
    rope_key_cache: Tensor,
    block_table: Tensor,
    query_lens: tuple[int, ...],
    context_lens: tuple[int, ...],
    scale: float,
    selected: tuple[Tensor | None, ...] | None = None,
    attention: Callable[..., Tensor] = causal_attention,
) -> Tensor:
    """Expanded attention of a chunk of tokens per request: every head's keys and values are rebuilt from the latents.

    query_nope [tokens, heads, nope_dim], query_rope [tokens, heads, rope_dim] (rotated), tokens = sum(query_lens);
    up_projection [heads, nope_dim + value_dim, rank]: per head the key's rows, then the value's; caches as in
    `write_latent_cache`; block_table int32 [requests, max_blocks]; lengths on the host -> [tokens, heads, value_dim].
    `selected`, of sparse attention (`ops.dsa`): per request bool [query_len, context_len], which tokens each token
    sees, or None for all before it and itself. `attention`: a body of `causal_attention`. Mutates nothing.
    """
    heads, rows, rank = up_projection.shape
    nope_dim = query_nope.shape[-1]
    block_size = latent_cache.shape[1]
    query = torch.cat((query_nope, query_rope), dim=-1)
    outputs = []
    for row, (chunk, context_len) in enumerate(zip(query.split(query_lens), context_lens, strict=True)):
        blocks = block_table[row : row + 1, : -(-context_len // block_size)]
        latents = gather_blocks(latent_cache, blocks)[0, :context_len, 0]  # [context_len, rank]
        rope_keys = gather_blocks(rope_key_cache, blocks)[0, :context_len]  # [context_len, 1, rope_dim]
        expanded = functional.linear(latents, up_projection.reshape(heads * rows, rank)).view(context_len, heads, rows)
        keys = torch.cat((expanded[..., :nope_dim], rope_keys.expand(-1, heads, -1)), dim=-1)
        mask = None if selected is None else selected[row]
        outputs.append(attention(chunk, keys, expanded[..., nope_dim:], scale, selected=mask))
    return torch.cat(outputs)
