"""DeepSeek Sparse Attention: which tokens of a context the lightning indexer selects (DeepSeek-V3.2, arXiv:2512.02556).

Attention itself is that of `ops.mla`. A decode step runs it over pages of one token, those that were selected; a chunk
of a prompt runs it under the mask of its selection. Where a context is no longer than the selection, every token
is selected, and callers leave the indexer out.

Scores tie often: ReLU leaves exact zeros. A tie breaks to the lower position, so that a selection depends neither on
the shapes of a step nor on the algorithm that finds it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .attention import decode_mask, gather_blocks, per_token, write_rows
from .mla import mla_decode_attention

# Products of a chunk's heads with its context that are held at once: 2**24 float64 are 128 MiB.
PRODUCTS_AT_ONCE = 2**24


def write_index_keys(keys: Tensor, index_key_cache: Tensor, slots: Tensor) -> None:
    """Stores this step's indexer keys. Mutates the cache.

    keys [tokens, 1, dim], normalised and rotated; index_key_cache [blocks, block_size, 1, dim]; slots int64 [tokens],
    as in `write_rows`.
    """
    write_rows(keys, index_key_cache, slots)


def indexer_scores(query: Tensor, head_weights: Tensor, keys: Tensor) -> Tensor:
    """Σ over heads of weight · ReLU(query · key).

    Summed in float64 and rounded once: a library adds up in another order at the edge of a matrix than in its middle,
    and in float32 equal keys would get unequal scores.

    query [batch, tokens, heads, dim]; head_weights float32 [batch, tokens, heads], the scales of queries and heads
    included; keys [batch, context, dim], one for all heads -> float32 [batch, tokens, context]. Mutates nothing.
    """
    heads = query.shape[2]
    products = torch.matmul(query.double().flatten(1, 2), keys.double().mT).relu().unflatten(1, (-1, heads))
    return torch.matmul(head_weights.double().unsqueeze(2), products).squeeze(2).float()


def topk_mask(scores: Tensor, topk: int) -> Tensor:
    """The `topk` largest of each row, of equal ones those at lower positions: scores [..., tokens], tokens >= topk, no
    NaN -> bool [..., tokens] with exactly `topk` true per row. Mutates nothing."""
    threshold = scores.topk(topk, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    above, tied = scores > threshold, scores == threshold
    room = topk - above.sum(dim=-1, keepdim=True)
    return above | (tied & (tied.cumsum(dim=-1) <= room))


def true_positions(mask: Tensor, count: int) -> Tensor:
    """The positions that are true, ascending: bool [rows, tokens] with `count` true per row -> int64 [rows, count].
    Shapes depend on no value. Mutates nothing."""
    rows, tokens = mask.shape
    places = torch.where(mask, mask.cumsum(dim=-1) - 1, count)  # all others go to one more column, which is cut off
    positions = torch.arange(tokens, device=mask.device).expand(rows, tokens)
    return positions.new_zeros(rows, count + 1).scatter(1, places, positions)[:, :count]


def lightning_indexer(
    query: Tensor,
    head_weights: Tensor,
    index_key_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    topk: int,
) -> Tensor:
    """The tokens that each of the newest tokens of a request attends to.

    query [tokens, heads, dim], rotated; head_weights float32 [tokens, heads]; index_key_cache [blocks, block_size, 1,
    dim]; block_table int32 [requests, max_blocks] of at least `topk` tokens and context_lens int32 [requests] as in
    `paged_decode_attention` -> positions int64 [tokens, topk], ascending: those of the context come first, and a token
    whose context is shorter than `topk` has them all, followed by positions behind its end. Shapes depend on no value;
    nothing is read on the host. Mutates nothing.
    """
    block_table, context_lens = per_token(block_table, context_lens, query.shape[0], index_key_cache.shape[1])
    keys = gather_blocks(index_key_cache, block_table).squeeze(2)  # [tokens, context, dim]
    scores = indexer_scores(query.unsqueeze(1), head_weights.unsqueeze(1), keys).squeeze(1)
    visible = decode_mask(context_lens, keys.shape[1], window=None)
    return true_positions(topk_mask(scores.masked_fill(~visible, float("-inf")), topk), topk)


def lightning_indexer_prefill(
    query: Tensor,
    head_weights: Tensor,
    index_key_cache: Tensor,
    block_table: Tensor,
    query_lens: tuple[int, ...],
    context_lens: tuple[int, ...],
    topk: int,
) -> tuple[Tensor | None, ...]:
    """The tokens that each token of a chunk per request attends to.

    query [tokens, heads, dim], head_weights float32 [tokens, heads], tokens = sum(query_lens), requests one after
    another; caches as in `lightning_indexer`; block_table int32 [requests, max_blocks]; lengths on the host -> for each
    request bool [query_len, context_len], at most `topk` true per row and none behind the row's own token, or None
    where the context has no more than `topk` tokens. Mutates nothing.
    """
    block_size = index_key_cache.shape[1]
    masks: list[Tensor | None] = []
    chunks = zip(query.split(query_lens), head_weights.split(query_lens), context_lens, strict=True)
    for row, (chunk, weights, context_len) in enumerate(chunks):
        if context_len <= topk:
            masks.append(None)
            continue
        blocks = block_table[row : row + 1, : -(-context_len // block_size)]
        keys = gather_blocks(index_key_cache, blocks)[:, :context_len, 0]  # [1, context_len, dim]
        positions = torch.arange(context_len, device=query.device)
        own = positions[context_len - len(chunk) :, None]
        at_once = max(1, PRODUCTS_AT_ONCE // (context_len * query.shape[1]))
        parts = zip(chunk.split(at_once), weights.split(at_once), own.split(at_once), strict=True)
        masks.append(torch.cat([_selected(*part, keys, positions, topk) for part in parts]))
    return tuple(masks)


def _selected(query: Tensor, head_weights: Tensor, own: Tensor, keys: Tensor, positions: Tensor, topk: int) -> Tensor:
    visible = positions <= own
    scores = indexer_scores(query.unsqueeze(0), head_weights.unsqueeze(0), keys).squeeze(0)
    # The first tokens see fewer than `topk`: what fills up their selection is not theirs to see.
    return topk_mask(scores.masked_fill(~visible, float("-inf")), topk) & visible


def sparse_mla_decode_attention(
    query_latent: Tensor,
    query_rope: Tensor,
    latent_cache: Tensor,
    rope_key_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    selected: Tensor,
    scale: float,
    attention: Callable[..., Tensor] = mla_decode_attention,
) -> Tensor:
    """Absorbed attention of the newest tokens of each request to the tokens that `lightning_indexer` selected.

    As `mla_decode_attention`, which `attention` is a body of; selected int64 [tokens, topk], of which as many positions
    are read as the token's context has -> [tokens, heads, rank]. Mutates nothing.
    """
    block_table, context_lens = per_token(block_table, context_lens, query_latent.shape[0], latent_cache.shape[1])
    slots = selected_slots(selected, block_table, latent_cache.shape[1])
    lens = context_lens.clamp(max=selected.shape[1])
    return attention(
        query_latent, query_rope, pages_of_one(latent_cache), pages_of_one(rope_key_cache), slots, lens, scale
    )


def pages_of_one(cache: Tensor) -> Tensor:
    """A cache [blocks, block_size, heads, dim] as the view [blocks * block_size, 1, heads, dim], whose blocks are its
    slots. Mutates nothing."""
    return cache.flatten(0, 1).unsqueeze(1)


def selected_slots(selected: Tensor, block_table: Tensor, block_size: int) -> Tensor:
    """Where the selected tokens lie: positions int64 [requests, topk], block_table int32 [requests, max_blocks] ->
    int32 [requests, topk], a block table for `pages_of_one`. Mutates nothing."""
    blocks = block_table.gather(1, selected // block_size)
    return blocks * block_size + (selected % block_size).to(torch.int32)
