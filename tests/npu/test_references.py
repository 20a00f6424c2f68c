"""The NPU functions over CPU kernels of their operators, against the project's plain bodies."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
import torch

from omni_engine.ops import activation, attention, dsa, linear, mla, moe, norm, rope
from omni_engine.ops.npu import activation as npu_activation
from omni_engine.ops.npu import attention as npu_attention
from omni_engine.ops.npu import cache as npu_cache
from omni_engine.ops.npu import dispatch as npu_dispatch
from omni_engine.ops.npu import dsa as npu_dsa
from omni_engine.ops.npu import linear as npu_linear
from omni_engine.ops.npu import mla as npu_mla
from omni_engine.ops.npu import moe as npu_moe
from omni_engine.ops.npu import norm as npu_norm
from omni_engine.ops.npu import quant as npu_quant
from omni_engine.ops.npu import rope as npu_rope

pytestmark = pytest.mark.usefixtures("references")

BF16, F32 = torch.bfloat16, torch.float32
# A rounding to the dtype, or two, at a magnitude of about one.
TOLERANCE = {BF16: {"rtol": 2**-7, "atol": 2**-7}, F32: {"rtol": 2e-6, "atol": 2e-6}}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype | None = None, factor: float = 1.0) -> None:
    bound = {name: value * factor for name, value in TOLERANCE[dtype or expected.dtype].items()}
    torch.testing.assert_close(actual, expected, **bound)


def far(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return not torch.allclose(actual.float(), expected.float(), rtol=0.05, atol=0.05)


def two(
    first: tuple[int, ...], second: tuple[int, ...], dtype: torch.dtype = BF16
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(first).to(dtype), torch.randn(second).to(dtype)


def copies(caches: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return caches[0].clone(), caches[1].clone()


Angles = tuple[torch.Tensor, torch.Tensor]


def angles(tokens: int, pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    turned = torch.rand(tokens, pairs) * 6.28
    return turned.cos(), turned.sin()


def prepared(tokens: int, pairs: int, dtype: torch.dtype) -> tuple[Angles, Angles]:
    """The same angles as the plain ops take them, and as the NPU's do."""
    plain = angles(tokens, pairs)
    return plain, npu_rope.rotary_angles(*plain, dtype)


def tables(requests: int, blocks: int, width: int) -> torch.Tensor:
    return (torch.randperm(blocks - 1)[: requests * width] + 1).view(requests, width).to(torch.int32)


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_norms(dtype: torch.dtype) -> None:
    hidden, residual, weight = torch.randn(5, 48).to(dtype), torch.randn(5, 48).to(dtype), torch.rand(48).to(dtype)
    close(npu_norm.rms_norm(hidden, weight, 1e-6), norm.rms_norm(hidden, weight, 1e-6), factor=2)
    normalised, total = npu_norm.add_rms_norm(hidden, residual, weight, 1e-6)
    expected, expected_total = norm.add_rms_norm(hidden, residual, weight, 1e-6)
    close(normalised, expected, factor=2)
    assert torch.equal(total, expected_total)
    assert far(npu_norm.rms_norm(hidden, weight, 1.0), expected)


def test_norm_that_leaves_as_int8() -> None:
    hidden, residual, weight = torch.randn(5, 48).to(BF16), torch.randn(5, 48).to(BF16), torch.rand(48).to(BF16)
    quantised, scale, total = npu_norm.add_rms_norm_dynamic_quant(hidden, residual, weight, 1e-6)
    expected, expected_total = norm.add_rms_norm(hidden, residual, weight, 1e-6)
    assert quantised.dtype == torch.int8 and torch.equal(total, expected_total)
    step = scale.unsqueeze(1)
    assert ((quantised * step - expected.float()).abs() <= 0.5 * step + 2**-6).all()
    assert int(quantised.abs().amax()) == 127


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_swiglu(dtype: torch.dtype) -> None:
    gate_up = torch.randn(5, 48).to(dtype)
    close(npu_activation.swiglu(gate_up), activation.swiglu(gate_up), factor=2)
    assert far(npu_activation.swiglu(gate_up.flip(-1)), activation.swiglu(gate_up))


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "pairs"), [(64, 32), (128, 64), (128, 32), (20, 4)])
def test_rotation(dtype: torch.dtype, interleaved: bool, dim: int, pairs: int) -> None:
    heads, (plain, (cos, sin)) = torch.randn(5, 3, dim).to(dtype), prepared(5, pairs, dtype)
    expected = rope.rotate(heads, *plain, interleaved)
    close(npu_rope.rotate(heads, cos, sin, interleaved), expected, factor=4)  # cos and sin are rounded too
    assert far(npu_rope.rotate(heads, cos, sin, not interleaved), expected)
    assert far(npu_rope.rotate(heads, cos, -sin, interleaved), expected)


@pytest.mark.parametrize("slots_dtype", [torch.int32, torch.int64])
def test_keys_and_values_are_written(slots_dtype: torch.dtype) -> None:
    key, value = torch.randn(4, 3, 32).to(BF16), torch.randn(4, 3, 16).to(BF16)
    caches = two((6, 16, 3, 32), (6, 16, 3, 16))
    expected = copies(caches)
    slots = torch.tensor([3, 95, 16, 40])
    npu_cache.write_kv_cache(key, value, *caches, slots.to(slots_dtype))
    assert not torch.equal(caches[0], expected[0])
    attention.write_kv_cache(key, value, *expected, slots)
    assert all(torch.equal(*pair) for pair in zip(caches, expected, strict=True))


def test_index_keys_are_written() -> None:
    keys, cache, slots = (
        torch.randn(4, 1, 32).to(BF16),
        torch.zeros(6, 16, 1, 32).to(BF16),
        torch.tensor([3, 95, 16, 40]),
    )
    expected = cache.clone()
    dsa.write_index_keys(keys, expected, slots)
    npu_cache.write_index_keys(keys, cache, slots)
    assert torch.equal(cache, expected) and int(cache.count_nonzero()) > 0


@pytest.mark.parametrize(
    ("rank", "rope_dim", "interleaved", "dtype"),
    [(512, 64, True, BF16), (512, 64, False, BF16), (512, 64, True, F32), (24, 8, True, BF16)],
)
def test_latents_and_rope_keys_are_written(rank: int, rope_dim: int, interleaved: bool, dtype: torch.dtype) -> None:
    tokens = 4
    projected, weight = torch.randn(tokens, rank + rope_dim).to(dtype), torch.rand(rank).to(dtype)
    plain, turned = prepared(tokens, rope_dim // 2, dtype)
    caches = torch.zeros(6, 16, 1, rank, dtype=dtype), torch.zeros(6, 16, 1, rope_dim, dtype=dtype)
    expected = copies(caches)
    slots = torch.tensor([3, 95, 16, 40])
    npu_cache.write_latent_cache(projected, weight, 1e-6, *turned, interleaved, *caches, slots)
    mla.write_latent_cache(projected, weight, 1e-6, *plain, interleaved, *expected, slots)
    for cache, wanted in zip(caches, expected, strict=True):
        close(cache, wanted, factor=4)
        assert torch.equal(cache.abs().amax(-1) > 0, wanted.abs().amax(-1) > 0)
    mla.write_latent_cache(projected, weight, 1e-6, *plain, not interleaved, *expected, slots)
    assert far(caches[1], expected[1])


def one_by_one(body, rows: Sequence[torch.Tensor], block_table: torch.Tensor, lens: torch.Tensor, tokens: int, *rest):
    """A plain decode body, which takes one token per request, for the last `tokens` of each."""
    requests = block_table.shape[0]
    results = []
    for token in range(tokens):
        part = [row.unflatten(0, (requests, tokens))[:, token] for row in rows]
        results.append(body(*part, block_table, lens - (tokens - 1 - token), *rest))
    return torch.stack(results, dim=1).flatten(0, 1)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("as_numbers", [False, True])
def test_paged_attention(tokens: int, window: int | None, as_numbers: bool) -> None:
    requests, heads, kv_heads, dim = 3, 6, 2, 32
    query = torch.randn(requests * tokens, heads, dim).to(BF16)
    caches = two((8, 128, kv_heads, dim), (8, 128, kv_heads, dim))
    block_table, lens = tables(requests, 8, 2), torch.tensor([200, 17, 128], dtype=torch.int32)

    def plain(part, table, part_lens):
        return attention.paged_decode_attention(part, *caches, table, part_lens, 0.2, window)

    expected = one_by_one(plain, [query], block_table, lens, tokens)
    lengths = lens.tolist() if as_numbers else lens
    close(npu_attention.paged_decode_attention(query, *caches, block_table, lengths, 0.2, window), expected, factor=2)
    assert far(npu_attention.paged_decode_attention(query, *caches, block_table, lens - 9, 0.2, window), expected)


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("block_size", [16, 128])
def test_latent_attention(tokens: int, block_size: int) -> None:
    requests, heads = 2, 4
    query = two((requests * tokens, heads, 512), (requests * tokens, heads, 64))
    caches = two((20, block_size, 1, 512), (20, block_size, 1, 64))
    block_table, lens = tables(requests, 20, 8), torch.tensor([100, 17], dtype=torch.int32)

    def plain(latent, rotated, table, part_lens):
        return mla.mla_decode_attention(latent, rotated, *caches, table, part_lens, 0.02)

    expected = one_by_one(plain, query, block_table, lens, tokens)
    close(npu_attention.mla_decode_attention(*query, *caches, block_table, lens, 0.02), expected, factor=2)
    assert far(npu_attention.mla_decode_attention(*query, *caches, block_table.flip(0), lens, 0.02), expected)


@pytest.mark.parametrize("tokens", [1, 2])
def test_sparse_attention_selects_and_attends_alike(tokens: int) -> None:
    requests, heads, topk = 2, 4, 24
    query, head_weights = torch.randn(requests * tokens, 8, 128).to(BF16), torch.randn(requests * tokens, 8).to(BF16)
    index_keys = torch.randn(12, 16, 1, 128).to(BF16)
    block_table, lens = tables(requests, 12, 5), torch.tensor([70, 19], dtype=torch.int32)
    selected = npu_dsa.lightning_indexer(query, head_weights.float(), index_keys, block_table, lens, topk)
    latent_query = two((requests * tokens, heads, 512), (requests * tokens, heads, 64))
    caches = two((12, 16, 1, 512), (12, 16, 1, 64))
    for row in range(requests * tokens):
        request = row // tokens
        length = int(lens[request]) - (tokens - 1 - row % tokens)
        arguments = (block_table[request : request + 1], torch.tensor([length], dtype=torch.int32))
        positions = dsa.lightning_indexer(
            query[row : row + 1], head_weights[row : row + 1].float(), index_keys, *arguments, topk
        )
        count = min(topk, length)
        assert sorted(selected[row, 0, :count].tolist()) == positions[0, :count].tolist()
        assert selected[row, 0, count:].tolist() == [-1] * (topk - count)

    def plain(latent, rotated, table, part_lens):
        return dsa.sparse_mla_decode_attention(latent, rotated, *caches, table, part_lens, plain_selected.pop(0), 0.02)

    def plain_selection(part, weights, table, part_lens):
        return dsa.lightning_indexer(part, weights.float(), index_keys, table, part_lens, topk)

    stacked = one_by_one(plain_selection, [query, head_weights], block_table, lens, tokens)
    plain_selected = list(stacked.unflatten(0, (requests, tokens)).transpose(0, 1))
    expected = one_by_one(plain, latent_query, block_table, lens, tokens)
    attended = npu_dsa.sparse_mla_decode_attention(*latent_query, *caches, block_table, lens, selected, 0.02)
    close(attended, expected, factor=2)
    wrong = npu_dsa.sparse_mla_decode_attention(*latent_query, *caches, block_table, lens, selected.flip(0), 0.02)
    assert far(wrong, expected)


GATES = [
    {
        "scoring": "sigmoid",
        "norm_topk_prob": True,
        "scaling": 2.5,
        "num_groups": 4,
        "groups_per_token": 2,
        "group_score": "top2",
    },
    {
        "scoring": "softmax",
        "norm_topk_prob": False,
        "scaling": 16.0,
        "num_groups": 4,
        "groups_per_token": 2,
        "group_score": "max",
    },
    {"scoring": "softmax", "norm_topk_prob": True, "scaling": 1.5},
    {"scoring": "sigmoid", "norm_topk_prob": False, "scaling": 1.5},
]


@pytest.mark.parametrize("settings", GATES, ids=lambda one: f"{one['scoring']}-{one['norm_topk_prob']}")
def test_gate(settings) -> None:
    logits, bias = torch.randn(7, 32), torch.randn(32) if settings["scoring"] == "sigmoid" else None
    weights, ids = npu_moe.gate_topk(logits, 5, **settings, correction_bias=bias)
    expected, expected_ids = moe.gate_topk(logits, 5, **settings, correction_bias=bias)
    assert ids.dtype == torch.int32 and torch.equal(ids.sort(-1).values, expected_ids.sort(-1).values.to(torch.int32))
    close(weights.gather(1, ids.argsort(-1)), expected.gather(1, expected_ids.argsort(-1)), factor=settings["scaling"])
    other = npu_moe.gate_topk(logits, 5, **{**settings, "norm_topk_prob": not settings["norm_topk_prob"]})[0]
    assert far(other, weights)


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_experts(dtype: torch.dtype) -> None:
    tokens, experts, dim, inter = 6, 9, 32, 48
    hidden, weights = torch.randn(tokens, dim).to(dtype), torch.rand(tokens, 3)
    ids = torch.stack([torch.randperm(experts)[:3] for _ in range(tokens)])
    gate_up, down = (torch.randn(experts, *shape).to(dtype) / 6 for shape in ((2 * inter, dim), (dim, inter)))
    packed = gate_up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    expected = moe.routed_experts(hidden, weights, ids, gate_up, down)
    close(npu_moe.routed_experts(hidden, weights, ids.to(torch.int32), *packed), expected, factor=4)
    shifted = (ids + 1) % experts
    assert far(npu_moe.routed_experts(hidden, weights, shifted.to(torch.int32), *packed), expected)


def quantise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Per output channel: weight [..., outputs, inputs] -> int8 [..., inputs, outputs] and scale [..., outputs]."""
    scale = weight.abs().amax(-1) / 127
    return (weight / scale.unsqueeze(-1)).round().to(torch.int8).transpose(-1, -2).contiguous(), scale


def test_quantised_linear() -> None:
    x, weight, bias = torch.randn(5, 64).to(BF16), torch.randn(48, 64), torch.randn(48).to(BF16)
    packed, scale = quantise(weight)
    quantised, x_scale = npu_quant.dynamic_quant(x)
    result = npu_quant.quant_matmul(quantised, packed, scale.to(BF16), x_scale, bias)
    expected = linear.linear(x, weight.to(BF16), bias)
    assert result.dtype == BF16 and float((result - expected).float().abs().mean()) < 0.1  # of about 8
    assert far(npu_quant.quant_matmul(quantised, packed, scale.to(BF16), x_scale.flip(0), bias), expected)


def test_quantised_experts() -> None:
    tokens, experts, dim, inter = 6, 5, 64, 64
    hidden, weights = torch.randn(tokens, dim).to(BF16), torch.rand(tokens, 2)
    ids = torch.stack([torch.randperm(experts)[:2] for _ in range(tokens)])
    gate_up, down = (torch.randn(experts, *shape) / 8 for shape in ((2 * inter, dim), (dim, inter)))
    (packed_up, up_scale), (packed_down, down_scale) = quantise(gate_up), quantise(down)
    arguments = (packed_up, up_scale, packed_down, down_scale.to(BF16))
    result = npu_quant.quantised_experts(hidden, weights, ids.to(torch.int32), *arguments)
    expected = moe.routed_experts(hidden, weights, ids, gate_up.to(BF16), down.to(BF16))
    error = float((result - expected).float().norm() / expected.float().norm())
    assert result.dtype == BF16 and error < 0.03
    shifted = npu_quant.quantised_experts(hidden, weights, ((ids + 1) % experts).to(torch.int32), *arguments)
    assert float((shifted - expected).float().norm() / expected.float().norm()) > 0.5


@pytest.mark.parametrize(
    ("heads", "inputs", "transposed"), [(4, 32, True), (4, 32, False), (3, 20, True), (128, 512, True)]
)
def test_linear_per_head(heads: int, inputs: int, transposed: bool) -> None:
    x, outputs = torch.randn(5, heads, inputs), 48
    weight = torch.randn(heads, inputs, outputs) if transposed else torch.randn(heads, outputs, inputs)
    expected = linear.head_linear(x, weight, transposed)
    close(npu_linear.head_linear(x, weight, transposed), expected, factor=30)
    assert far(npu_linear.head_linear(x.flip(0), weight, transposed), expected)


def test_linear() -> None:
    x, weight, bias = torch.randn(5, 20), torch.randn(7, 20), torch.randn(7)
    assert torch.equal(npu_linear.linear(x, weight, bias), linear.linear(x, weight, bias))


def test_the_fused_prolog_is_the_separate_operations() -> None:
    tokens, heads, size = 3, 2, 6144
    hidden = torch.randn(tokens, size).to(BF16)
    shapes = {
        "query_down": (size, 1536),
        "query_up": (1536, heads * 192),
        "key_up": (heads, 128, 512),
        "latent_down": (size, 576),
    }
    made = {name: (torch.randn(shape) * shape[-2] ** -0.5).to(BF16) for name, shape in shapes.items()}
    norms = {name: (torch.rand(rank) + 0.5).to(BF16) for name, rank in (("query_norm", 1536), ("latent_norm", 512))}
    weights = npu_mla.PrologWeights(**made, **norms)
    plain, (cos, sin) = prepared(tokens, 32, BF16)
    caches = torch.zeros(4, 16, 1, 512, dtype=BF16), torch.zeros(4, 16, 1, 64, dtype=BF16)
    expected = copies(caches)
    slots = torch.tensor([5, 40, 17])
    latent, rotated = npu_mla.mla_prolog(hidden, weights, (1e-6, 1e-5), cos, sin, *caches, slots)
    low_rank = norm.rms_norm(hidden @ weights.query_down, weights.query_norm, 1e-6)
    nope, pe = (low_rank @ weights.query_up).view(tokens, heads, 192).split((128, 64), -1)
    close(latent, linear.head_linear(nope, weights.key_up, True), factor=8)
    close(rotated, rope.rotate(pe, *plain, True), factor=8)
    mla.write_latent_cache(hidden @ weights.latent_down, weights.latent_norm, 1e-5, *plain, True, *expected, slots)
    for cache, wanted in zip(caches, expected, strict=True):
        close(cache, wanted, factor=8)
    assert far(npu_mla.mla_prolog(hidden, weights, (1e-6, 1e-5), sin, cos, *caches, slots)[1], rotated)


@pytest.mark.parametrize("quantised", [False, True])
def test_experts_of_several_ranks_are_those_of_one(references, quantised: bool) -> None:
    ranks, experts, tokens, dim, inter = 2, 8, 3, 1024, 32
    references.worlds["experts"] = references.World(ranks)
    gate_up, down = (torch.randn(experts, *shape).to(BF16) / 20 for shape in ((2 * inter, dim), (dim, inter)))
    hidden, weights = torch.randn(ranks, tokens, dim).to(BF16), torch.rand(ranks, tokens, 3)
    ids = torch.stack([torch.randperm(experts)[:3] for _ in range(ranks * tokens)]).view(ranks, tokens, 3)
    live = torch.tensor([True, True, False])
    results: dict[int, torch.Tensor] = {}

    def rank_of(rank: int) -> None:
        group = npu_dispatch.ExpertGroup("experts", ranks, rank, experts)
        mine = slice(rank * group.local_experts, (rank + 1) * group.local_experts)
        ids_of_rank = ids[rank].to(torch.int32)
        sent = npu_dispatch.dispatch(hidden[rank], ids_of_rank, group, live, quantised)
        assert sent.rows.shape[0] == npu_dispatch.capacity(group, tokens, 3)
        rows = sent.rows
        if quantised:
            assert rows.dtype == torch.int8 and sent.row_scales is not None
            rows = (rows * sent.row_scales.unsqueeze(1)).to(BF16)
        inner = npu_activation.swiglu(
            npu_moe.grouped_matmul(rows, gate_up[mine].transpose(1, 2).contiguous(), sent.loads)
        )
        done = npu_moe.grouped_matmul(inner, down[mine].transpose(1, 2).contiguous(), sent.loads)
        results[rank] = npu_dispatch.combine(done, ids_of_rank, weights[rank], sent, group, live)

    threads = [threading.Thread(target=rank_of, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for rank in range(ranks):
        expected = moe.routed_experts(hidden[rank], weights[rank], ids[rank], gate_up, down)
        close(results[rank][live], expected[live], factor=4 if not quantised else 8)
        assert int(results[rank][~live].count_nonzero()) == 0
        assert far(results[rank][live], expected[live].flip(0))
