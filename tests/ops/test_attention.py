"""Paged attention against the dense formula written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from omni_engine.ops.attention import (
    bidirectional_attention,
    paged_decode_attention,
    paged_prefill_attention,
    per_token,
    write_kv_cache,
)

BLOCK_SIZE = 4
CONTEXT_LENS = (1, 9, 4, 14)
SCALE = 0.3


def dense_attention(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> Tensor:
    """The formula, one query and one head at a time: the query's tokens are the last of the context."""
    output = torch.empty(query.shape[0], query.shape[1], value.shape[2])
    groups = query.shape[1] // key.shape[1]
    for row in range(query.shape[0]):
        last = key.shape[0] - query.shape[0] + row
        first = 0 if window is None else max(0, last - window + 1)
        for head in range(query.shape[1]):
            keys, values = key[first : last + 1, head // groups], value[first : last + 1, head // groups]
            output[row, head] = torch.softmax(keys @ query[row, head] * SCALE, dim=0) @ values
    return output


class Cache:
    """Contexts of CONTEXT_LENS tokens written into shuffled blocks; every other slot holds a large number."""

    def __init__(self, kv_heads: int, dim: int, value_dim: int) -> None:
        generator = torch.Generator().manual_seed(3)
        counts = [-(-length // BLOCK_SIZE) for length in CONTEXT_LENS]
        blocks = torch.randperm(sum(counts), generator=generator) + 1
        self.table = torch.zeros(len(CONTEXT_LENS), max(counts) + 1, dtype=torch.int32)
        self.key_cache = torch.full((sum(counts) + 1, BLOCK_SIZE, kv_heads, dim), 1e4)
        self.value_cache = torch.full((sum(counts) + 1, BLOCK_SIZE, kv_heads, value_dim), 1e4)
        self.keys, self.values = [], []
        for row, (ids, length) in enumerate(zip(blocks.split(counts), CONTEXT_LENS, strict=True)):
            self.table[row, : len(ids)] = ids
            positions = torch.arange(length)
            slots = ids[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
            self.keys.append(torch.randn(length, kv_heads, dim, generator=generator))
            self.values.append(torch.randn(length, kv_heads, value_dim, generator=generator))
            write_kv_cache(self.keys[-1], self.values[-1], self.key_cache, self.value_cache, slots)


SHAPES = pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (7, 1)])
WINDOWS = pytest.mark.parametrize("window", [None, 1, 5, 100])


@SHAPES
@WINDOWS
def test_decode_equals_the_dense_formula(heads: int, kv_heads: int, window: int | None) -> None:
    cache = Cache(kv_heads, 12, 10)
    query = torch.randn(len(CONTEXT_LENS), heads, 12)
    lens = torch.tensor(CONTEXT_LENS, dtype=torch.int32)
    output = paged_decode_attention(query, cache.key_cache, cache.value_cache, cache.table, lens, SCALE, window)
    for row in range(len(CONTEXT_LENS)):
        expected = dense_attention(query[row : row + 1], cache.keys[row], cache.values[row], window)
        torch.testing.assert_close(output[row : row + 1], expected, rtol=1e-5, atol=1e-5)


@SHAPES
@WINDOWS
def test_prefill_equals_the_dense_formula(heads: int, kv_heads: int, window: int | None) -> None:
    cache = Cache(kv_heads, 12, 10)
    query_lens = (1, 4, 4, 11)  # a whole context, the end of one, a chunk behind cached tokens
    queries = [torch.randn(length, heads, 12) for length in query_lens]
    output = paged_prefill_attention(
        torch.cat(queries), cache.key_cache, cache.value_cache, cache.table, query_lens, CONTEXT_LENS, SCALE, window
    )
    for row, part in enumerate(output.split(query_lens)):
        expected = dense_attention(queries[row], cache.keys[row], cache.values[row], window)
        torch.testing.assert_close(part, expected, rtol=1e-5, atol=1e-5)


def test_a_wrong_block_changes_the_result() -> None:
    cache = Cache(2, 12, 10)
    query = torch.randn(len(CONTEXT_LENS), 4, 12)
    lens = torch.tensor(CONTEXT_LENS, dtype=torch.int32)
    args = (query, cache.key_cache, cache.value_cache)
    right = paged_decode_attention(*args, cache.table, lens, SCALE)
    swapped = cache.table.clone()
    swapped[1, :2] = cache.table[3, :2]
    wrong = paged_decode_attention(*args, swapped, lens, SCALE)
    assert (right[1] - wrong[1]).abs().max() > 1e-2
    torch.testing.assert_close(right[[0, 2, 3]], wrong[[0, 2, 3]])


def test_a_window_one_token_shorter_changes_the_result() -> None:
    cache = Cache(2, 12, 10)
    query = torch.randn(len(CONTEXT_LENS), 4, 12)
    args = (query, cache.key_cache, cache.value_cache, cache.table, torch.tensor(CONTEXT_LENS), SCALE)
    assert (paged_decode_attention(*args, 5) - paged_decode_attention(*args, 4)).abs().max() > 1e-2


def test_a_padding_row_without_context_is_finite_and_disturbs_nobody() -> None:
    cache = Cache(2, 12, 10)
    query = torch.randn(len(CONTEXT_LENS) + 1, 4, 12)
    table = torch.cat((cache.table, torch.zeros(1, cache.table.shape[1], dtype=torch.int32)))
    lens = torch.tensor((*CONTEXT_LENS, 0), dtype=torch.int32)
    padded = paged_decode_attention(query, cache.key_cache, cache.value_cache, table, lens, SCALE)
    assert padded.isfinite().all()
    alone = paged_decode_attention(query[:-1], cache.key_cache, cache.value_cache, cache.table, lens[:-1], SCALE)
    torch.testing.assert_close(padded[:-1], alone)


def test_writing_touches_only_the_named_slots() -> None:
    key_cache, value_cache = torch.zeros(3, BLOCK_SIZE, 2, 5), torch.zeros(3, BLOCK_SIZE, 2, 6)
    key, value = torch.randn(2, 2, 5), torch.randn(2, 2, 6)
    write_kv_cache(key, value, key_cache, value_cache, torch.tensor([9, 6]))
    assert torch.equal(key_cache[2, 1], key[0]) and torch.equal(key_cache[1, 2], key[1])
    assert torch.equal(value_cache[2, 1], value[0]) and torch.equal(value_cache[1, 2], value[1])
    assert key_cache.count_nonzero() == key.numel() and value_cache.count_nonzero() == value.numel()


def test_each_of_a_requests_newest_tokens_sees_those_before_it_and_nothing_behind_the_table():
    table = torch.tensor([[1, 2], [3, 4]], dtype=torch.int32)
    tables, lens = per_token(table, torch.tensor([5, 10], dtype=torch.int32), 6, 4)
    assert tables.tolist() == [[1, 2]] * 3 + [[3, 4]] * 3
    assert lens.tolist() == [3, 4, 5, 8, 8, 8] and lens.dtype == torch.int32
    tables, lens = per_token(table, torch.tensor([5, 10], dtype=torch.int32), 2, 4)
    assert tables is table and lens.tolist() == [5, 8]


def test_several_tokens_per_request_attend_as_each_would_alone():
    keys, values = torch.randn(6, 4, 2, 8), torch.randn(6, 4, 2, 8)
    query, table = torch.randn(6, 4, 8), torch.tensor([[1, 2, 5], [3, 4, 0]], dtype=torch.int32)
    lens = torch.tensor([11, 6], dtype=torch.int32)
    together = paged_decode_attention(query, keys, values, table, lens, 0.3)
    for token in range(6):
        request, place = divmod(token, 3)
        own = lens[request : request + 1] - 2 + place
        alone = paged_decode_attention(query[token : token + 1], keys, values, table[request : request + 1], own, 0.3)
        torch.testing.assert_close(together[token : token + 1], alone)


@pytest.mark.parametrize("lens", [(5,), (3, 3, 3), (1, 7, 7, 2)])
def test_bidirectional_attention_sees_its_own_sequence_and_all_of_it(lens: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(sum(lens), 3, 8, generator=generator) for _ in range(3))
    output = bidirectional_attention(query, key, value, lens, 0.3)
    owners = torch.arange(len(lens)).repeat_interleave(torch.tensor(lens))
    scores = torch.einsum("qhd,khd->hqk", query, key) * 0.3
    scores = scores.masked_fill(owners.unsqueeze(1) != owners, float("-inf"))
    expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value)
    assert torch.allclose(output, expected, atol=1e-6)
    causal = torch.einsum("hqk,khd->qhd", scores.tril().masked_fill(scores.tril() == 0, -1e9).softmax(-1), value)
    assert sum(lens) == 1 or not torch.allclose(output, causal, atol=1e-2)
