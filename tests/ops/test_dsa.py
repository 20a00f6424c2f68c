"""The lightning indexer's selections and sparse latent attention against plain loops; ties; static decode steps."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from omni_engine.ops import dsa
from omni_engine.ops.dsa import (
    indexer_scores,
    lightning_indexer,
    lightning_indexer_prefill,
    selected_slots,
    sparse_mla_decode_attention,
    topk_mask,
    true_positions,
    write_index_keys,
)
from omni_engine.ops.mla import mla_prefill_attention

BLOCK_SIZE, HEADS, DIM, TOPK = 4, 9, 10, 6
CONTEXT_LENS = (5, 1, 23, 6, 17)


@dataclass
class Paged:
    """Contexts of random keys in shuffled blocks; slots nobody wrote hold large values."""

    cache: Tensor
    table: Tensor
    keys: list[Tensor]  # per request [tokens, DIM]


def paged(keys: list[Tensor], extra_blocks: int = 1) -> Paged:
    counts = [-(-len(one) // BLOCK_SIZE) for one in keys]
    blocks = (torch.randperm(sum(counts), generator=torch.Generator().manual_seed(3)) + 1).split(counts)
    cache = torch.full((sum(counts) + 1, BLOCK_SIZE, 1, keys[0].shape[-1]), 1e4)
    table = torch.zeros(len(keys), max(counts) + extra_blocks, dtype=torch.int32)
    for row, (ids, one) in enumerate(zip(blocks, keys, strict=True)):
        table[row, : len(ids)] = ids
        positions = torch.arange(len(one))
        write_index_keys(one.unsqueeze(1), cache, ids[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE)
    return Paged(cache, table, keys)


def random_contexts(seed: int = 0) -> Paged:
    generator = torch.Generator().manual_seed(seed)
    return paged([torch.randn(length, DIM, generator=generator) for length in CONTEXT_LENS])


def queries(tokens: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, HEADS, DIM, generator=generator), torch.randn(tokens, HEADS, generator=generator)


def plain_score(query: Tensor, weights: Tensor, key: Tensor) -> float:
    pairs = zip(query.double(), weights.tolist(), strict=True)
    return sum(weight * max(0.0, float(head @ key.double())) for head, weight in pairs)


def best(scores: list[float], topk: int) -> list[int]:
    """Positions of the largest, of equal ones the lower; ascending."""
    return sorted(sorted(range(len(scores)), key=lambda position: (-scores[position], position))[:topk])


def decode(contexts: Paged, query: Tensor, weights: Tensor, topk: int = TOPK) -> list[list[int]]:
    """The selected positions of each request that lie in its context."""
    lens = torch.tensor([len(keys) for keys in contexts.keys], dtype=torch.int32)
    selected = lightning_indexer(query, weights, contexts.cache, contexts.table, lens, topk)
    assert selected.shape == (len(lens), topk)
    for row, length in zip(selected.tolist(), lens.tolist(), strict=True):
        assert all(position >= length for position in row[min(length, topk) :])
    return [row[: min(length, topk)] for row, length in zip(selected.tolist(), lens.tolist(), strict=True)]


def prefill(
    contexts: Paged, query: Tensor, weights: Tensor, query_lens: tuple[int, ...], topk: int = TOPK
) -> list[list[list[int]]]:
    """The same for each token of a chunk per request."""
    lens = tuple(len(keys) for keys in contexts.keys)
    masks = lightning_indexer_prefill(query, weights, contexts.cache, contexts.table, query_lens, lens, topk)
    found = []
    for mask, chunk, length in zip(masks, query_lens, lens, strict=True):
        if mask is None:
            assert length <= topk
            found.append([list(range(position + 1)) for position in range(length - chunk, length)])
        else:
            assert mask.shape == (chunk, length)
            found.append([row.nonzero().flatten().tolist() for row in mask])
    return found


def test_scores_are_weighted_sums_of_positive_products() -> None:
    query, weights = queries(3)
    keys = torch.randn(1, 7, DIM)
    scores = indexer_scores(query.unsqueeze(0), weights.unsqueeze(0), keys)[0]
    expected = [[plain_score(query[token], weights[token], key) for key in keys[0]] for token in range(3)]
    torch.testing.assert_close(scores, torch.tensor(expected))


def test_decode_selects_the_highest_scores_of_the_context() -> None:
    contexts = random_contexts()
    query, weights = queries(len(CONTEXT_LENS))
    for row, selected in enumerate(decode(contexts, query, weights)):
        assert selected == best([plain_score(query[row], weights[row], key) for key in contexts.keys[row]], TOPK)


@pytest.mark.parametrize("products_at_once", [1, 500, 2**24])
def test_a_chunk_selects_for_each_token_the_highest_scores_before_it(
    products_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dsa, "PRODUCTS_AT_ONCE", products_at_once)
    contexts = random_contexts()
    query_lens = (2, 1, 23, 6, 3)
    query, weights = queries(sum(query_lens))
    start = 0
    for row, (chunk, found) in enumerate(zip(query_lens, prefill(contexts, query, weights, query_lens), strict=True)):
        for index, selected in enumerate(found):
            seen = contexts.keys[row][: len(contexts.keys[row]) - chunk + index + 1]
            scores = [plain_score(query[start + index], weights[start + index], key) for key in seen]
            assert selected == best(scores, TOPK)
        start += chunk


# --- ties ---


def test_equal_keys_are_selected_from_the_lowest_position_on_in_decode_and_prefill_alike() -> None:
    generator = torch.Generator().manual_seed(9)
    for length in (TOPK + 1, 18, 33, 130):
        for seed in range(20):
            contexts = paged([torch.randn(1, DIM, generator=generator).repeat(length, 1)])
            query, weights = queries(length, seed)
            assert decode(contexts, query[-1:], weights[-1:]) == [list(range(TOPK))]
            (found,) = prefill(contexts, query, weights, (length,))
            assert found == [list(range(min(TOPK, position + 1))) for position in range(length)]


def test_scores_that_relu_leaves_at_zero_are_selected_from_the_lowest_position_on() -> None:
    length = 40
    keys = torch.randn(length, DIM, generator=torch.Generator().manual_seed(2)).abs()
    liked = [7, 23, 31]
    keys[liked] *= -1
    contexts = paged([keys])
    query = -torch.ones(length, HEADS, DIM)  # ReLU leaves nothing of any other key
    weights = torch.ones(length, HEADS)
    assert decode(contexts, query[-1:], weights[-1:]) == [[0, 1, 2, *liked]]
    (found,) = prefill(contexts, query, weights, (length,))
    assert found[-1] == [0, 1, 2, *liked]
    assert found[10] == [0, 1, 2, 3, 4, 7]


def test_negative_weights_leave_zeros_that_tie_with_positive_ones() -> None:
    """A head that says nothing adds 0 or -0; neither may be preferred."""
    keys = torch.ones(20, DIM)
    weights = torch.tensor([[1.0, -1.0] * 4 + [0.0]])
    assert decode(paged([keys]), -torch.ones(1, HEADS, DIM), weights) == [list(range(TOPK))]


def test_a_mask_of_the_largest_has_exactly_that_many_whatever_ties() -> None:
    scores = torch.randint(0, 4, (200, 30), generator=torch.Generator().manual_seed(0)).float()
    scores[:50, 5:] = float("-inf")
    mask = topk_mask(scores, 9)
    assert (mask.sum(-1) == 9).all()
    for row, selected in zip(scores.tolist(), true_positions(mask, 9).tolist(), strict=True):
        assert selected == best(row, 9)


def test_a_library_would_break_the_same_ties_in_another_way() -> None:
    """The control: torch.topk promises no order, so these tests can fail."""
    scores = torch.zeros(1, 130)
    assert sorted(scores.topk(TOPK).indices[0].tolist()) != list(range(TOPK))


# --- attention over the selection ---

RANK, ROPE, NOPE, VALUE, MAIN_HEADS, SCALE = 12, 4, 6, 5, 3, 0.4


def latent_caches(contexts: Paged) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    blocks = contexts.cache.shape[0]
    return (
        torch.randn(blocks, BLOCK_SIZE, 1, RANK, generator=generator),
        torch.randn(blocks, BLOCK_SIZE, 1, ROPE, generator=generator),
    )


def test_sparse_decode_reads_the_selected_tokens_and_no_other() -> None:
    contexts = random_contexts()
    latents, rope_keys = latent_caches(contexts)
    query, weights = queries(len(CONTEXT_LENS))
    query_latent, query_rope = torch.randn(5, MAIN_HEADS, RANK), torch.randn(5, MAIN_HEADS, ROPE)
    lens = torch.tensor(CONTEXT_LENS, dtype=torch.int32)
    selected = lightning_indexer(query, weights, contexts.cache, contexts.table, lens, TOPK)

    def attend() -> Tensor:
        caches = latents, rope_keys, contexts.table
        return sparse_mla_decode_attention(query_latent, query_rope, *caches, lens, selected, SCALE)

    output = attend()
    unread = torch.ones(latents.shape[0] * BLOCK_SIZE, dtype=torch.bool)
    for row, positions in enumerate(decode(contexts, query, weights)):
        place = torch.tensor(
            [int(contexts.table[row, p // BLOCK_SIZE]) * BLOCK_SIZE + p % BLOCK_SIZE for p in positions]
        )
        unread[place] = False
        latent, rope_key = latents.flatten(0, 2)[place], rope_keys.flatten(0, 2)[place]
        scores = (query_latent[row] @ latent.T + query_rope[row] @ rope_key.T) * SCALE
        torch.testing.assert_close(output[row], scores.softmax(-1) @ latent)
    latents.flatten(0, 2)[unread] = 1e3
    rope_keys.flatten(0, 2)[unread] = 1e3
    torch.testing.assert_close(attend(), output)


def test_sparse_prefill_equals_sparse_decode() -> None:
    contexts = random_contexts()
    latents, rope_keys = latent_caches(contexts)
    query, weights = queries(len(CONTEXT_LENS))
    query_nope, query_rope = torch.randn(5, MAIN_HEADS, NOPE), torch.randn(5, MAIN_HEADS, ROPE)
    up = torch.randn(MAIN_HEADS, NOPE + VALUE, RANK)
    lens = torch.tensor(CONTEXT_LENS, dtype=torch.int32)
    selected = lightning_indexer(query, weights, contexts.cache, contexts.table, lens, TOPK)
    attended = sparse_mla_decode_attention(
        torch.einsum("rhn,hnl->rhl", query_nope, up[:, :NOPE]),
        query_rope,
        latents,
        rope_keys,
        contexts.table,
        lens,
        selected,
        SCALE,
    )
    ones = (1,) * len(CONTEXT_LENS)
    masks = lightning_indexer_prefill(query, weights, contexts.cache, contexts.table, ones, CONTEXT_LENS, TOPK)
    arguments = (query_nope, query_rope, up, latents, rope_keys, contexts.table, ones, CONTEXT_LENS, SCALE)
    decoded = torch.einsum("rhl,hvl->rhv", attended, up[:, NOPE:])
    torch.testing.assert_close(decoded, mla_prefill_attention(*arguments, masks), rtol=1e-4, atol=1e-5)
    dense = mla_prefill_attention(*arguments)
    assert [bool((decoded[row] - dense[row]).abs().max() < 1e-4) for row in range(5)] == [
        length <= TOPK for length in CONTEXT_LENS
    ]


def test_a_decode_selection_has_static_shapes_and_reads_nothing_on_the_host() -> None:
    meta = torch.device("meta")
    cache = torch.zeros(9, BLOCK_SIZE, 1, DIM, device=meta)
    table = torch.zeros(3, 4, dtype=torch.int32, device=meta)
    lens = torch.zeros(3, dtype=torch.int32, device=meta)
    query, weights = torch.zeros(3, HEADS, DIM, device=meta), torch.zeros(3, HEADS, device=meta)
    selected = lightning_indexer(query, weights, cache, table, lens, TOPK)
    assert selected_slots(selected, table, BLOCK_SIZE).shape == (3, TOPK)


def test_a_selection_does_not_depend_on_the_width_of_the_block_table() -> None:
    contexts = random_contexts()
    query, weights = queries(len(CONTEXT_LENS))
    wide = Paged(contexts.cache, torch.nn.functional.pad(contexts.table, (0, 50)), contexts.keys)
    assert decode(wide, query, weights) == decode(contexts, query, weights)
