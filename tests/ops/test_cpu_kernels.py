"""The C++ kernels against the plain torch bodies, and what they promise beyond them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omni_engine.ops.cpu.build import KernelsUnavailable, chosen_form, find_compiler
from omni_engine.ops.dsa import pages_of_one
from omni_engine.ops.table import PLAIN, OpTable, cpu_table

# Differences to a float32 reference over its largest value: rounding of inputs is shared, that of results is not.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@pytest.fixture(scope="module")
def own() -> OpTable:
    try:
        find_compiler()
        chosen_form()
    except KernelsUnavailable as error:
        pytest.skip(str(error))
    return cpu_table()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(5)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_close(result: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert result.dtype == dtype and result.shape == expected.shape
    difference = (result.float() - expected.float()).abs().max()
    assert difference <= TOLERANCE[dtype] * expected.float().abs().max(), difference


def widened(*arguments: Any) -> list[Any]:
    return [part.float() if isinstance(part, Tensor) and part.is_floating_point() else part for part in arguments]


def randn(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape).to(dtype)


# Products


@DTYPES
@pytest.mark.parametrize(
    "shape", [(1, 64, 64), (3, 37, 45), (8, 100, 256), (33, 66, 100), (7, 5, 3), (2, 1, 1), (3, 3107, 40)], ids=str
)
def test_linear_equals_the_plain_body(own: OpTable, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    rows, outputs, inputs = shape
    x, weight, bias = randn(dtype, rows, inputs), randn(dtype, outputs, inputs), randn(dtype, outputs)
    assert_close(own.linear(x, weight, bias), PLAIN.linear(*widened(x, weight, bias)), dtype)
    assert_close(own.linear(x, weight), PLAIN.linear(*widened(x, weight)), dtype)


@settings(max_examples=40)
@given(
    rows=st.integers(1, 20), outputs=st.integers(1, 40), inputs=st.integers(1, 140), dtype=st.sampled_from([*TOLERANCE])
)
def test_linear_takes_any_size(own: OpTable, rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> None:
    x, weight = randn(dtype, rows, inputs), randn(dtype, outputs, inputs)
    assert_close(own.linear(x, weight), PLAIN.linear(*widened(x, weight)), dtype)


@DTYPES
def test_a_row_of_linear_does_not_depend_on_the_other_rows(own: OpTable, dtype: torch.dtype) -> None:
    x, weight = randn(dtype, 32, 300), randn(dtype, 70, 300)
    whole = own.linear(x, weight)
    for rows in (1, 2, 3, 5, 8, 13, 31):
        assert torch.equal(own.linear(x[:rows], weight), whole[:rows])
        assert torch.equal(own.linear(x[-rows:], weight), whole[-rows:])


@DTYPES
def test_rows_are_the_same_where_inputs_and_rows_are_taken_block_by_block(own: OpTable, dtype: torch.dtype) -> None:
    # 1100 inputs are two whole blocks and a piece of one; 200 rows are more than are taken at once
    x, weight = randn(dtype, 64 if dtype == torch.float32 else 200, 1100), randn(dtype, 21, 1100)
    whole = own.linear(x, weight)
    assert_close(whole, PLAIN.linear(*widened(x, weight)), dtype)
    for rows in (1, 3, 4, 6, 7, 12, 13, 64):
        assert torch.equal(own.linear(x[-rows:], weight), whole[-rows:])
    for changed in (0, 511, 512, 1023, 1024, 1099):  # every block counts
        other = weight.clone()
        other[9, changed] += 64
        differs = (own.linear(x, other) != whole).any(dim=0)
        assert differs.nonzero().flatten().tolist() == [9]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_are_rounded_as_torch_rounds_them(own: OpTable, dtype: torch.dtype) -> None:
    special = [float("inf"), -float("inf"), float("nan"), 3e38, -3e38, 1.0, -0.0, 1e-40]
    x = torch.cat([randn(dtype, 40, 2), torch.tensor([[1.0, value] for value in special]).to(dtype)])
    weight = torch.tensor([[1.0, scale] for scale in (2**-8, 2**-9, 3 * 2**-9, 1.0, 2.0, 0.5, 2**-11, 2**-12)]).to(
        dtype
    )
    exact = x.float()[:, :1] * weight.float()[:, 0] + x.float()[:, 1:] * weight.float()[:, 1]  # one rounding each
    rounded = own.linear(x, weight)
    assert torch.equal(rounded.isnan(), exact.to(dtype).isnan())
    assert torch.equal(rounded.nan_to_num(nan=0.0), exact.to(dtype).nan_to_num(nan=0.0))
    assert not torch.equal(rounded.float(), exact)  # some sums had to be rounded at all


@DTYPES
def test_linear_of_many_rows_equals_the_plain_body(own: OpTable, dtype: torch.dtype) -> None:
    x, weight = randn(dtype, 600, 40), randn(dtype, 30, 40)
    assert_close(own.linear(x, weight), PLAIN.linear(*widened(x, weight)), dtype)


def test_linear_takes_views_and_leading_dimensions(own: OpTable) -> None:
    x, weight, bias = torch.randn(4, 3, 50), torch.randn(20, 60)[3:17, :50], torch.randn(28)[::2]
    for view in (x, x.transpose(0, 1), x[:, 1], x[:, :, :50], torch.randn(50, 6).T, x[0, 0]):
        assert_close(own.linear(view, weight, bias), PLAIN.linear(view, weight, bias), torch.float32)
    assert own.linear(x[:0], weight).shape == (0, 3, 14)


def test_another_weight_gives_another_result(own: OpTable) -> None:
    x, weight = torch.randn(3, 100), torch.randn(20, 100)
    other = weight.clone()
    other[7, 99] += 0.01
    with pytest.raises(AssertionError):
        assert_close(own.linear(x, weight), PLAIN.linear(x, other), torch.float32)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 4, 20, 24), (9, 3, 128, 130), (2, 5, 7, 11), (41, 2, 96, 160)], ids=str)
@pytest.mark.parametrize("transposed", [True, False])
def test_head_linear_equals_the_plain_body(
    own: OpTable, dtype: torch.dtype, shape: tuple[int, ...], transposed: bool
) -> None:
    rows, heads, nope, rank = shape
    weight = randn(dtype, heads, nope + 6, rank)[:, 6:]  # a view, as the halves of kv_b_proj are
    x = randn(dtype, rows, heads, (nope if transposed else rank) + 3)[..., 3:]
    expected = PLAIN.head_linear(*widened(x, weight), transposed)
    result = own.head_linear(x, weight, transposed)
    assert_close(result, expected, dtype)
    assert torch.equal(own.head_linear(x[:1], weight, transposed), result[:1])


# Attention


class Paged:
    """Caches of two parts with shuffled blocks. What no row sees is NaN, so that reading it shows."""

    def __init__(
        self, dtype: torch.dtype, heads: int, sizes: tuple[int, int], lens: list[int], block_size: int
    ) -> None:
        counts = [max(-(-length // block_size), 1) for length in lens]
        blocks = torch.randperm(sum(counts)) + 1
        self.table = torch.full((len(lens), max(counts) + 3), -7, dtype=torch.int32)
        self.lens = torch.tensor(lens, dtype=torch.int32)
        self.caches = [torch.full((sum(counts) + 1, block_size, heads, size), torch.nan, dtype=dtype) for size in sizes]
        for row, (ids, length) in enumerate(zip(blocks.split(counts), lens, strict=True)):
            self.table[row, : len(ids)] = ids
            positions = torch.arange(length)
            for cache, size in zip(self.caches, sizes, strict=True):
                cache[ids[positions // block_size], positions % block_size] = randn(dtype, length, heads, size)

    def plain(self) -> list[Tensor]:
        """The caches and the table as the plain body can take them: it reads everything, with weight 0."""
        return [*(cache.nan_to_num(0.0).float() for cache in self.caches), self.table.clamp(min=0)]


ATTENTION = pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "value_dim", "block_size"),
    [
        (4, 4, 64, 64, 16),
        (6, 2, 24, 20, 4),
        (8, 1, 128, 128, 32),
        (7, 7, 12, 10, 5),
        (10, 2, 33, 1, 16),
        (20, 1, 16, 24, 16),
    ],
)
LENS = [1, 33, 700, 4, 64]


@DTYPES
@ATTENTION
@pytest.mark.parametrize("window", [None, 1, 40, 600])
def test_attention_equals_the_plain_body(
    own: OpTable,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    dim: int,
    value_dim: int,
    block_size: int,
    window: int | None,
) -> None:
    paged = Paged(dtype, kv_heads, (dim, value_dim), LENS, block_size)
    query = randn(dtype, len(LENS), heads, dim)
    arguments = (paged.lens, dim**-0.5, window)
    result = own.paged_decode_attention(query, *paged.caches, paged.table, *arguments)
    assert_close(result, PLAIN.paged_decode_attention(query.float(), *paged.plain(), *arguments), dtype)


@DTYPES
@pytest.mark.parametrize(("heads", "rank", "rope_dim"), [(3, 24, 8), (16, 512, 64), (21, 40, 6), (1, 7, 3)])
def test_mla_attention_equals_the_plain_body(
    own: OpTable, dtype: torch.dtype, heads: int, rank: int, rope_dim: int
) -> None:
    lens = [1, 33, 300, 4]
    paged = Paged(dtype, 1, (rank, rope_dim), lens, 16)
    latent, rope = randn(dtype, len(lens), heads, rank), randn(dtype, len(lens), heads, rope_dim)
    scale = (rank + rope_dim) ** -0.5
    result = own.mla_decode_attention(latent, rope, *paged.caches, paged.table, paged.lens, scale)
    expected = PLAIN.mla_decode_attention(latent.float(), rope.float(), *paged.plain(), paged.lens, scale)
    assert_close(result, expected, dtype)


@DTYPES
def test_mla_attention_over_pages_of_one_token_reads_only_those_of_the_context(
    own: OpTable, dtype: torch.dtype
) -> None:
    """Sparse attention: a block table of slots, more of them than a short context has tokens."""
    selected, lens = 24, torch.tensor([24, 5, 0, 24], dtype=torch.int32)
    caches = [randn(dtype, 40, 16, 1, dim) for dim in (48, 8)]
    order = torch.randperm(40 * 16)[: 4 * selected].view(4, selected).to(torch.int32)
    unread = order[torch.arange(selected) >= lens.unsqueeze(1)].long()
    latent, rope = randn(dtype, 4, 6, 48), randn(dtype, 4, 6, 8)
    plain = [pages_of_one(cache).float() for cache in caches]
    expected = PLAIN.mla_decode_attention(latent.float(), rope.float(), *plain, order, lens, 0.2)
    for cache in caches:
        cache.flatten(0, 1)[unread] = float("nan")
    result = own.mla_decode_attention(latent, rope, *(pages_of_one(cache) for cache in caches), order, lens, 0.2)
    seen = lens > 0
    assert_close(result[seen], expected[seen], dtype)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None) -> Tensor:
    """The kernel itself, also where the table leaves bfloat16 to the library."""
    return torch.ops.omni.causal_attention(query, key, value, scale, -1 if window is None else window)


@DTYPES
@pytest.mark.parametrize("window", [None, 1, 40, 150])
@pytest.mark.parametrize(
    ("queries", "context", "heads", "kv_heads", "dim", "value_dim"),
    [
        (1, 1, 1, 1, 5, 3),
        (100, 163, 4, 2, 64, 64),
        (33, 300, 8, 1, 192, 128),
        (130, 130, 7, 7, 40, 24),
        (5, 64, 100, 1, 20, 8),
    ],
)
def test_causal_attention_equals_the_plain_body(
    own: OpTable, dtype: torch.dtype, window: int | None, queries: int, context: int,
    heads: int, kv_heads: int, dim: int, value_dim: int,
) -> None:  # fmt: skip
    query = randn(dtype, queries, heads, dim)
    key, value = randn(dtype, context, kv_heads, dim), randn(dtype, context, kv_heads, value_dim)
    result = causal_attention(query, key, value, dim**-0.5, window)
    assert_close(result, PLAIN.causal_attention(*widened(query, key, value), dim**-0.5, window), dtype)
    if dtype == torch.float32 and window is None and context > 1:  # control: a small error is seen
        with pytest.raises(AssertionError):
            assert_close(causal_attention(query, key, value, 1.001 * dim**-0.5), result, dtype)


@DTYPES
@pytest.mark.parametrize("window", [None, 70])
def test_a_token_of_causal_attention_depends_on_nothing_behind_it(
    own: OpTable, dtype: torch.dtype, window: int | None
) -> None:
    """Nor on where a prompt is cut into chunks, nor on the number of threads."""
    query, key, value = randn(dtype, 300, 6, 24), randn(dtype, 300, 2, 24), randn(dtype, 300, 2, 20)
    whole = causal_attention(query, key, value, 0.2, window)
    for first, last in ((0, 1), (0, 77), (77, 201), (201, 202), (202, 300)):
        part = causal_attention(query[first:last], key[:last], value[:last], 0.2, window)
        assert torch.equal(part, whole[first:last])
    for count in (2, 5):
        with threads(count):
            assert torch.equal(causal_attention(query, key, value, 0.2, window), whole)


def test_causal_attention_takes_views_and_selections(own: OpTable) -> None:
    joined = torch.randn(90, 4 * 24 + 2 * 24 + 2 * 24)
    query, key, value = (part.unflatten(1, (-1, 24)) for part in joined.split((96, 48, 48), dim=1))
    result = own.causal_attention(query, key, value, 0.2)
    assert torch.equal(own.causal_attention(query.clone(), key.clone(), value.clone(), 0.2), result)
    backwards = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in (query, key, value)]  # rows in pieces
    assert torch.equal(own.causal_attention(*backwards, 0.2), result)
    selected = torch.rand(90, 90).tril() > 0.5
    selected.fill_diagonal_(True)
    expected = PLAIN.causal_attention(query, key, value, 0.2, selected=selected)
    assert torch.equal(own.causal_attention(query, key, value, 0.2, selected=selected), expected)
    assert not torch.allclose(expected, result)


def attention_call(own: OpTable, op: str, paged: Paged, lens: list[int]) -> Callable[[slice], Tensor]:
    """`call(rows)`: the op over some rows of one set of inputs."""
    if op == "grouped":
        query = torch.randn(len(lens), 6, 24)
        return lambda rows: own.paged_decode_attention(
            query[rows], *paged.caches, paged.table[rows], paged.lens[rows], 0.2, None
        )
    latent, rope = torch.randn(len(lens), 20, 24), torch.randn(len(lens), 20, 10)
    return lambda rows: own.mla_decode_attention(
        latent[rows], rope[rows], *paged.caches, paged.table[rows], paged.lens[rows], 0.2
    )


@pytest.mark.parametrize("op", ["grouped", "latent"])
def test_a_row_of_attention_depends_on_nothing_but_itself(own: OpTable, op: str) -> None:
    lens = [1300, 1, 700, 90, 513]
    paged = Paged(torch.float32, 2 if op == "grouped" else 1, (24, 10), lens, 16)
    call = attention_call(own, op, paged, lens)
    whole = call(slice(None))
    for row in range(len(lens)):
        assert torch.equal(call(slice(row, row + 1)), whole[row : row + 1])
    with threads(2):
        assert torch.equal(call(slice(None)), whole)
        assert torch.equal(call(slice(0, 1)), whole[:1])
    with threads(5):
        assert torch.equal(call(slice(None)), whole)


@pytest.mark.parametrize("op", ["grouped", "latent"])
def test_padding_rows_are_finite(own: OpTable, op: str) -> None:
    lens = [9, 0, 1]
    paged = Paged(torch.float32, 2 if op == "grouped" else 1, (24, 10), lens, 4)
    paged.table[1:] = 0
    for cache in paged.caches:
        cache[0] = 0
    result = attention_call(own, op, paged, lens)(slice(None))
    assert result.isfinite().all() and result[0].abs().min() > 0 and result[1].abs().max() == 0


def test_attention_takes_split_queries_and_int64_indices(own: OpTable) -> None:
    paged = Paged(torch.float32, 2, (24, 24), LENS, 16)
    query = torch.randn(len(LENS), 4 * 24 + 2 * 24).split((96, 48), dim=1)[0]
    arguments = (*paged.caches, paged.table, paged.lens, 0.2, None)
    expected = own.paged_decode_attention(query.reshape(-1, 4, 24).clone(), *arguments)
    assert torch.equal(own.paged_decode_attention(query.unflatten(1, (4, 24)), *arguments), expected)
    wide = (*paged.caches, paged.table.long(), paged.lens.long(), 0.2, None)
    assert torch.equal(own.paged_decode_attention(query.unflatten(1, (4, 24)), *wide), expected)
    apart = [torch.cat((cache, cache), dim=2)[:, :, 2:] for cache in paged.caches]  # heads of a larger cache
    result = own.paged_decode_attention(query.unflatten(1, (4, 24)), *apart, paged.table, paged.lens, 0.2, None)
    assert torch.equal(result, expected)


@pytest.mark.parametrize("position", [0, 32, 699])
def test_a_changed_token_changes_its_row_alone(own: OpTable, position: int) -> None:
    paged = Paged(torch.float32, 2, (24, 20), LENS, 16)
    query = torch.randn(len(LENS), 4, 24)
    before = own.paged_decode_attention(query, *paged.caches, paged.table, paged.lens, 0.2, None)
    paged.caches[1][paged.table[2, position // 16], position % 16] += 1
    after = own.paged_decode_attention(query, *paged.caches, paged.table, paged.lens, 0.2, None)
    assert (after - before).abs().amax(dim=(1, 2)).nonzero().flatten().tolist() == [2]


# Experts


def experts_inputs(dtype: torch.dtype, tokens: int, experts: int, chosen: int, dim: int, inner: int) -> list[Tensor]:
    return [
        randn(dtype, tokens, dim),
        torch.rand(tokens, chosen),
        torch.rand(tokens, experts).topk(chosen, dim=-1).indices,
        (torch.randn(experts, 2 * inner, dim) / dim**0.5).to(dtype),
        (torch.randn(experts, dim, inner) / inner**0.5).to(dtype),
    ]


@DTYPES
@pytest.mark.parametrize(
    "shape",
    [
        *((1, 8, 2, 64, 32), (5, 12, 3, 70, 24), (40, 16, 4, 100, 45), (600, 6, 2, 33, 20), (3, 2, 2, 5, 3)),
        *((40, 16, 4, 112, 48), (90, 5, 3, 64, 160), (700, 2, 2, 32, 16)),
    ],
    ids=str,
)
def test_experts_equal_the_plain_body(own: OpTable, dtype: torch.dtype, shape: tuple[int, int, int, int, int]) -> None:
    inputs = experts_inputs(dtype, *shape)
    assert_close(own.routed_experts(*inputs), PLAIN.routed_experts(*inputs), dtype)  # the same roundings in between


def test_only_the_chosen_experts_are_read(own: OpTable) -> None:
    hidden, weights, ids, gate_up, down = experts_inputs(torch.float32, 3, 20, 2, 64, 32)
    others = [expert for expert in range(20) if expert not in ids]
    gate_up[others], down[others] = torch.nan, torch.nan
    assert own.routed_experts(hidden, weights, ids, gate_up, down).isfinite().all()
    down[ids[0, 0], 5, 31] = torch.nan
    assert own.routed_experts(hidden, weights, ids, gate_up, down)[0].isnan().sum() == 1


@DTYPES
@pytest.mark.parametrize("sizes", [(70, 40), (96, 48)], ids=str)
def test_a_token_of_experts_depends_on_nothing_but_itself(
    own: OpTable, dtype: torch.dtype, sizes: tuple[int, int]
) -> None:
    hidden, weights, ids, gate_up, down = experts_inputs(dtype, 24, 10, 3, *sizes)
    whole = own.routed_experts(hidden, weights, ids, gate_up, down)
    for rows in (slice(0, 1), slice(7, 12), slice(23, 24)):
        assert torch.equal(own.routed_experts(hidden[rows], weights[rows], ids[rows], gate_up, down), whole[rows])
    with threads(2):
        assert torch.equal(own.routed_experts(hidden, weights, ids, gate_up, down), whole)


@pytest.mark.parametrize("count", [2, 3])
def test_products_do_not_depend_on_the_number_of_threads(own: OpTable, count: int) -> None:
    x, weight, heads = torch.randn(5, 100), torch.randn(203, 100), torch.randn(4, 30, 25)
    linear, up = own.linear(x, weight), own.head_linear(x.view(5, 4, 25), heads)
    with threads(count):
        assert torch.equal(own.linear(x, weight), linear)
        assert torch.equal(own.head_linear(x.view(5, 4, 25), heads), up)


# Between the products


def assert_rounded_alike(result: Tensor, expected: Tensor) -> None:
    """Also where the plain body rounds halfway: sums in another order change few results, a rounding left out many."""
    assert_close(result, expected, result.dtype)
    if result.dtype != torch.float32:
        assert (result == expected).float().mean() > 0.98


@DTYPES
@pytest.mark.parametrize("shape", [(1, 64), (5, 33), (300, 770), (7, 3, 40), (2, 3, 4, 16), (12,), (0, 8)], ids=str)
def test_norms_equal_the_plain_body(own: OpTable, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    hidden, weight = randn(dtype, *shape), (torch.rand(shape[-1]) + 0.5).to(dtype)
    if hidden.numel():
        assert_rounded_alike(own.rms_norm(hidden, weight, 1e-5), PLAIN.rms_norm(hidden, weight, 1e-5))
    assert own.rms_norm(hidden, weight, 1e-5).shape == shape
    if len(shape) == 2 and hidden.numel():
        residual = randn(dtype, *shape)
        normalised, total = own.add_rms_norm(hidden, residual, weight, 1e-5)
        expected, expected_total = PLAIN.add_rms_norm(hidden, residual, weight, 1e-5)
        assert torch.equal(total, expected_total)
        assert_rounded_alike(normalised, expected)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 64), (5, 34), (300, 1540), (3, 2, 48), (6,), (0, 8)], ids=str)
def test_gated_activation_equals_the_plain_body(own: OpTable, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    gate_up = randn(dtype, *shape) * 4
    if gate_up.numel():
        assert_rounded_alike(own.swiglu(gate_up), PLAIN.swiglu(gate_up))
    assert own.swiglu(gate_up).shape == (*shape[:-1], shape[-1] // 2)


def test_large_gates_neither_overflow_nor_vanish(own: OpTable) -> None:
    gate_up = torch.tensor([[-3e4, -100.0, 100.0, 3e4, 1.0, 1.0, 2.0, 2.0]])
    torch.testing.assert_close(own.swiglu(gate_up), torch.tensor([[0.0, 0.0, 200.0, 6e4]]))


@DTYPES
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("heads", "dim", "pairs"), [(1, 64, 32), (3, 40, 20), (5, 24, 8), (2, 6, 3)])
def test_rotation_equals_the_plain_body(
    own: OpTable, dtype: torch.dtype, interleaved: bool, heads: int, dim: int, pairs: int
) -> None:
    angles = torch.randn(70, pairs) * 3
    rows = randn(dtype, 70, heads, dim)
    cos, sin = angles.cos(), angles.sin()
    assert_rounded_alike(own.rotate(rows, cos, sin, interleaved), PLAIN.rotate(rows, cos, sin, interleaved))


@DTYPES
def test_pieces_of_a_fused_product_are_read_where_they_lie(own: OpTable, dtype: torch.dtype) -> None:
    fused = randn(dtype, 9, 3 * 32 + 7)
    query, rest = fused.split((2 * 32, 32 + 7), dim=-1)
    heads, weight = query.unflatten(-1, (2, 32)), torch.rand(32).to(dtype)
    angles = torch.randn(9, 16)
    assert_rounded_alike(own.rms_norm(heads, weight, 1e-6), PLAIN.rms_norm(heads, weight, 1e-6))
    turned = own.rotate(heads, angles.cos(), angles.sin(), False)
    assert_rounded_alike(turned, PLAIN.rotate(heads, angles.cos(), angles.sin(), False))
    assert_rounded_alike(own.swiglu(rest[:, :32]), PLAIN.swiglu(rest[:, :32]))
    assert_rounded_alike(own.swiglu(fused.mT[:, :8]), PLAIN.swiglu(fused.mT[:, :8]))
    caches = [torch.zeros(4, 4, 2, 32, dtype=dtype) for _ in range(4)]
    slots = torch.tensor([4, 5, 6, 7, 12, 13, 0, 0, 9])
    own.write_kv_cache(heads, heads * 2, caches[0], caches[1], slots)
    PLAIN.write_kv_cache(heads[:8], heads[:8] * 2, caches[2], caches[3], slots[:8])
    PLAIN.write_kv_cache(heads[8:], heads[8:] * 2, caches[2], caches[3], slots[8:])
    for written, expected in zip(caches[:2], caches[2:], strict=True):
        assert torch.equal(written[1:], expected[1:])  # of block 0 any one stays


@DTYPES
@pytest.mark.parametrize("interleaved", [False, True])
def test_latents_are_written_as_by_the_plain_body(own: OpTable, dtype: torch.dtype, interleaved: bool) -> None:
    rows, weight, angles = randn(dtype, 6, 40 + 16), torch.rand(40).to(dtype), torch.randn(6, 8)
    slots = torch.tensor([9, 8, 4, 5, 15, 11])
    written, expected = ([torch.zeros(4, 4, 1, size, dtype=dtype) for size in (40, 16)] for _ in range(2))
    for table, caches in ((own, written), (PLAIN, expected)):
        table.write_latent_cache(rows, weight, 1e-6, angles.cos(), angles.sin(), interleaved, *caches, slots)
    for result, wanted in zip(written, expected, strict=True):
        assert_rounded_alike(result, wanted)


def test_a_cache_of_another_order_of_dimensions_is_written_too(own: OpTable) -> None:
    rows, slots = torch.randn(3, 2, 8), torch.tensor([1, 6, 3])
    by_head = torch.zeros(2, 2, 4, 8).transpose(1, 2)  # [blocks, block_size, heads, dim]
    own.write_kv_cache(rows, rows, by_head, torch.zeros(2, 4, 2, 8), slots)
    assert torch.equal(by_head.reshape(8, 2, 8)[slots], rows) and by_head.count_nonzero() == rows.count_nonzero()


@DTYPES
def test_a_token_between_the_products_depends_on_nothing_but_itself(own: OpTable, dtype: torch.dtype) -> None:
    hidden, weight = randn(dtype, 90, 300), torch.rand(300).to(dtype)  # more than one task
    whole, gated = own.rms_norm(hidden, weight, 1e-5), own.swiglu(hidden)
    for rows in (slice(0, 1), slice(41, 60), slice(89, 90)):
        assert torch.equal(own.rms_norm(hidden[rows], weight, 1e-5), whole[rows])
        assert torch.equal(own.swiglu(hidden[rows]), gated[rows])
    with threads(2):
        assert torch.equal(own.rms_norm(hidden, weight, 1e-5), whole) and torch.equal(own.swiglu(hidden), gated)


# What graphs and wrong calls see


def test_schemas_and_shapes_without_data_are_right(own: OpTable) -> None:
    assert own is not PLAIN
    paged, latent = Paged(torch.float32, 2, (24, 20), [5, 9], 4), Paged(torch.float32, 1, (24, 10), [5, 9], 4)
    ops = torch.ops.omni
    calls = [
        (ops.linear, (torch.randn(2, 3, 8), torch.randn(5, 8), torch.randn(5))),
        (ops.head_linear, (torch.randn(2, 3, 8), torch.randn(3, 8, 6), True)),
        (ops.head_linear, (torch.randn(2, 3, 8), torch.randn(3, 6, 8), False)),
        (ops.paged_decode_attention, (torch.randn(2, 4, 24), *paged.caches, paged.table, paged.lens, 0.2, -1)),
        (
            ops.mla_decode_attention,
            (torch.randn(2, 4, 24), torch.randn(2, 4, 10), *latent.caches, latent.table, latent.lens, 0.2),
        ),
        (ops.routed_experts, tuple(experts_inputs(torch.float32, 2, 4, 2, 8, 6))),
    ]
    for op, arguments in calls:
        torch.library.opcheck(op.default, arguments, test_utils=("test_schema", "test_faketensor"))


def wrong_calls() -> Iterator[Any]:
    paged = Paged(torch.float32, 2, (24, 20), [5, 9], 4)
    query, lens = torch.randn(2, 4, 24), paged.lens
    table = paged.table.clone()
    table[1, 2] = 99
    keys, values = paged.caches
    hidden, weights, ids, gate_up, down = experts_inputs(torch.float32, 2, 4, 2, 8, 6)
    attention, experts = "paged_decode_attention", "routed_experts"
    yield "linear", (torch.randn(2, 7), torch.randn(3, 8)), ValueError, r"must be 8, the columns.*\[2, 7\]"
    yield "linear", (torch.randn(2, 8), randn(torch.float16, 3, 8)), ValueError, "dtype Float: Half"
    yield "linear", (torch.ones(2, 8).int(), torch.ones(3, 8).int()), ValueError, "must be float32.*: Int"
    yield "linear", (torch.randn(2, 8), torch.randn(3, 8), torch.randn(4)), ValueError, r"shape \[3\]: \[4\]"
    yield "head_linear", (torch.randn(2, 3, 8), torch.randn(2, 5, 8)), ValueError, r"3 heads .*: \[2, 5, 8\]"
    yield attention, (query, keys, values, table, lens, 0.2), IndexError, r"blocks of \[0, \d+\): 99"
    yield attention, (query, keys, values, paged.table, -lens, 0.2), ValueError, "context_lens must be .*: -5"
    yield attention, (query[:, :3], keys, values, paged.table, lens, 0.2), ValueError, "multiple of 2: 3"
    yield attention, (query[:1], keys, values, paged.table, lens, 0.2), ValueError, "block_table must have 1 rows"
    causal = "causal_attention"
    yield causal, (query, keys[0], values[0], 0.2, 0), ValueError, "window must be positive.*: 0"
    yield causal, (query[:, :3], keys[0], values[0], 0.2), ValueError, "multiple of 2: 3"
    yield causal, (query.repeat(9, 1, 1), keys[0], values[0], 0.2), ValueError, "hold the 18 tokens of the query: 4"
    yield causal, (query, keys[0], values[0, :3], 0.2), ValueError, r"value must be of shape \[4, 2, 20\]"
    yield experts, (hidden, weights, ids + 4, gate_up, down), IndexError, r"expert_ids must be in \[0, 4\): \d"
    yield experts, (hidden, weights.double(), ids, gate_up, down), ValueError, "weights must be float32: Double"
    rows, angles, write = torch.randn(2, 2, 24), torch.randn(2, 13), "write_kv_cache"
    yield "rms_norm", (hidden, torch.randn(7), 1e-5), ValueError, "last dimension of hidden must be 7"
    yield "add_rms_norm", (hidden, hidden[:1], torch.randn(8), 1e-5), ValueError, r"residual must be of shape \[2, 8\]"
    yield "swiglu", (torch.randn(2, 7),), ValueError, r"must be even: \[2, 7\]"
    yield "rotate", (rows, angles, angles, True), ValueError, "at least 26 elements"
    yield "rotate", (rows, angles[:1], angles[:1], True), ValueError, r"cos must be of shape \[2, 13\]"
    for slot in (-1, len(keys) * 4):
        yield (
            write,
            (rows, rows[..., :20], keys, values, torch.tensor([0, slot])),
            IndexError,
            f"slots must be.*: {slot}",
        )
    yield write, (rows, rows, keys, values, torch.tensor([0, 1])), ValueError, "cache must be of shape"
    yield write, (rows, rows, keys, values, torch.tensor([0])), ValueError, r"slots must be of shape \[2\]"


@pytest.mark.parametrize(("op", "arguments", "error", "message"), [*wrong_calls()])
def test_a_call_that_would_read_elsewhere_is_refused(
    own: OpTable, op: str, arguments: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        getattr(own, op)(*arguments)
