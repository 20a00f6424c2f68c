"""Each NPU op on small tensors, with what the plain body makes of the same: what `omni-engine doctor --npu` compares.

The tensors are random and the same on every machine. Bounds are relative errors in the norm of a whole result: a
bfloat16 number is within 2**-9 of what it stands for, and a result has a few roundings.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import activation as plain_activation
from .. import attention as plain_attention
from .. import dsa as plain_dsa
from .. import linear as plain_linear
from .. import mla as plain_mla
from .. import moe as plain_moe
from .. import norm as plain_norm
from .. import rope as plain_rope
from . import activation, attention, cache, dsa, linear, mla, moe, norm, quant, rope, weights

BF16, F32, I8, I32, I64 = torch.bfloat16, torch.float32, torch.int8, torch.int32, torch.int64
BF16_BOUND, INT8_BOUND, EXACT = 0.01, 0.03, 0.0
EPSILON, SCALE = 1e-6, 0.1
BLOCK_SIZE = 128

Results = Tensor | tuple[Tensor, ...] | None


@dataclass(frozen=True)
class OpCase:
    """One call: what goes in, and what must come out, all on the host."""

    inputs: tuple[Tensor, ...]
    run: Callable[..., Results]  # takes the inputs, on the device
    expected: tuple[Tensor, ...]  # the results, then the inputs that are mutated
    mutates: tuple[int, ...] = ()  # which inputs
    bound: float = BF16_BOUND
    run_eager: Callable[..., Results] | None = None  # where a call outside of a graph is another
    pack: Callable[..., tuple[Tensor, ...]] | None = None  # the inputs into the op's layouts, once, on the device
    read: Callable[..., tuple[Tensor, ...]] | None = None  # the results, on the host, as they can be compared

    def prepare(self, device: torch.device, in_graph: bool) -> tuple[Callable[..., Results], tuple[Tensor, ...]]:
        """What to call, and with what."""
        inputs = tuple(tensor.to(device, copy=True) for tensor in self.inputs)
        if self.pack is not None:
            inputs = self.pack(*inputs)
        return self.run if in_graph or self.run_eager is None else self.run_eager, inputs

    def error(self, results: Results, inputs: tuple[Tensor, ...]) -> float:
        """How far from what is expected a call's results, and its inputs afterwards, are: as `difference`."""
        found = () if results is None else (results,) if isinstance(results, Tensor) else results
        on_host = tuple(tensor.cpu() for tensor in found)
        if self.read is not None:
            on_host = self.read(*on_host)
        return difference((*on_host, *(inputs[index].cpu() for index in self.mutates)), self.expected)


@dataclass(frozen=True)
class OpCheck:
    """`name` begins with the name of torch-npu's operator."""

    group: str
    name: str
    make: Callable[[], OpCase]


def difference(results: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative error of a result: of floats in the norm, of integers the share that is not equal; inf where
    numbers, shapes or dtypes do not fit. NaN counts as wrong."""
    if len(results) != len(expected):
        return float("inf")
    worst = 0.0
    for result, wanted in zip(results, expected, strict=True):
        if result.shape != wanted.shape or result.dtype != wanted.dtype:
            return float("inf")
        if wanted.dtype.is_floating_point:
            error = float((result.double() - wanted.double()).norm() / wanted.double().norm())
        else:
            error = float((result != wanted).double().mean())
        worst = max(worst, error if error == error else float("inf"))
    return worst


def _seed(name: str) -> None:
    torch.manual_seed(zlib.crc32(name.encode()))


def _normal(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(BF16)


def _angles(tokens: int, pairs: int) -> tuple[Tensor, Tensor]:
    turned = torch.rand(tokens, pairs) * 6.28
    return turned.cos(), turned.sin()


def _tables(requests: int, blocks: int, width: int) -> Tensor:
    """Distinct blocks for each request, none of them block 0."""
    return (torch.randperm(blocks - 1)[: requests * width] + 1).view(requests, width).to(I32)


def _wide(*tensors: Tensor) -> list[Tensor]:
    """For a reference with no rounding of its own."""
    return [tensor.float() for tensor in tensors]


# --- norms, activations, rotation ---


def _rms_norm() -> OpCase:
    hidden, weight = _normal(5, 256), _normal(256)
    return OpCase(
        (hidden, weight),
        lambda *given: norm.rms_norm(*given, epsilon=EPSILON),
        (plain_norm.rms_norm(hidden, weight, EPSILON),),
    )


def _add_rms_norm() -> OpCase:
    inputs = (_normal(5, 256), _normal(5, 256), _normal(256))
    return OpCase(
        inputs, lambda *given: norm.add_rms_norm(*given, epsilon=EPSILON), plain_norm.add_rms_norm(*inputs, EPSILON)
    )


def _swiglu() -> OpCase:
    gate_up = _normal(5, 512)
    return OpCase((gate_up,), activation.swiglu, (plain_activation.swiglu(gate_up),))


def _rotation(dim: int, interleaved: bool) -> OpCase:
    heads, plain = _normal(5, 8, dim), _angles(5, dim // 2)
    turned = rope.rotary_angles(*plain, BF16)
    expected = plain_rope.rotate(heads, *plain, interleaved)
    return OpCase((heads, *turned), lambda *given: rope.rotate(*given, interleaved=interleaved), (expected,))


# --- caches ---


def _write_kv() -> OpCase:
    caches, slots = (_normal(4, 16, 2, 128), _normal(4, 16, 2, 128)), torch.tensor([3, 63, 16, 40])
    written = caches[0].clone(), caches[1].clone()
    key, value = _normal(4, 2, 128), _normal(4, 2, 128)
    plain_attention.write_kv_cache(key, value, *written, slots)
    return OpCase((key, value, *caches, slots), cache.write_kv_cache, written, (2, 3), EXACT)


def _write_index_keys() -> OpCase:
    keys, stored, slots = _normal(4, 1, 128), _normal(4, 16, 1, 128), torch.tensor([3, 63, 16, 40])
    written = stored.clone()
    plain_dsa.write_index_keys(keys, written, slots)
    return OpCase((keys, stored, slots), cache.write_index_keys, (written,), (1,), EXACT)


def _write_latents() -> OpCase:
    projected, weight, plain = _normal(4, 576), _normal(512), _angles(4, 32)
    caches, slots = (_normal(4, 16, 1, 512), _normal(4, 16, 1, 64)), torch.tensor([3, 63, 16, 40])
    written = caches[0].clone(), caches[1].clone()
    plain_mla.write_latent_cache(projected, weight, EPSILON, *plain, True, *written, slots)

    def run(projected: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, *rest: Tensor) -> None:
        cache.fused_latent_write(projected, weight, EPSILON, cos, sin, *rest)

    inputs = (projected, weight, *rope.rotary_angles(*plain, BF16), *caches, slots)
    return OpCase(inputs, run, written, (4, 5))


def _prolog() -> OpCase:
    tokens, heads, size = 2, 2, 6144
    hidden, plain = _normal(tokens, size), _angles(tokens, 32)
    shapes = ((size, 1536), (1536, heads * 192), (heads, 128, 512), (size, 576))
    down, up, key_up, latent_down = (_normal(*shape, scale=shape[-2] ** -0.5) for shape in shapes)
    packed = mla.PrologWeights(down, up, key_up, latent_down, _normal(1536), _normal(512))
    caches, slots = (_normal(4, 16, 1, 512), _normal(4, 16, 1, 64)), torch.tensor([5, 40])
    written = caches[0].clone(), caches[1].clone()
    low_rank = plain_norm.rms_norm(hidden @ packed.query_down, packed.query_norm, EPSILON)
    nope, pe = (low_rank @ packed.query_up).view(tokens, heads, 192).split((128, 64), -1)
    expected = plain_linear.head_linear(nope, packed.key_up, True), plain_rope.rotate(pe, *plain, True)
    plain_mla.write_latent_cache(
        hidden @ packed.latent_down, packed.latent_norm, EPSILON, *plain, True, *written, slots
    )

    def run(hidden: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return mla.mla_prolog(hidden, mla.PrologWeights(*rest[:6]), (EPSILON, EPSILON), *rest[6:])

    def pack(hidden: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        down, up, key_up, latent_down, *others = rest
        return (hidden, weights.to_nz(down), weights.to_nz(up), key_up, weights.to_nz(latent_down), *others)

    inputs = (hidden, *vars(packed).values(), *rope.rotary_angles(*plain, BF16), *caches, slots)
    return OpCase(inputs, run, (*expected, *written), (9, 10), pack=pack)


# --- attention ---


def _paged_attention(window: int | None) -> OpCase:
    query, caches = _normal(3, 8, 128), (_normal(8, BLOCK_SIZE, 2, 128), _normal(8, BLOCK_SIZE, 2, 128))
    table, lens = _tables(3, 8, 2), torch.tensor([200, 17, 128], dtype=I32)
    expected = plain_attention.paged_decode_attention(
        *_wide(query, *caches), block_table=table, context_lens=lens, scale=SCALE, window=window
    ).to(BF16)

    def run(*given: Tensor) -> Tensor:
        return attention.paged_decode_attention(*given, scale=SCALE, window=window)

    def run_eager(query: Tensor, keys: Tensor, values: Tensor, table: Tensor, lens: Tensor) -> Tensor:
        return attention.paged_decode_attention(query, keys, values, table, lens.tolist(), SCALE, window)

    return OpCase((query, *caches, table, lens), run, (expected,), run_eager=run_eager)


def _latent_attention(tokens: int) -> OpCase:
    """Of the last `tokens` of each of two requests."""
    requests, heads = 2, 8
    query = _normal(requests * tokens, heads, 512), _normal(requests * tokens, heads, 64)
    caches = _normal(6, BLOCK_SIZE, 1, 512), _normal(6, BLOCK_SIZE, 1, 64)
    table, lens = _tables(requests, 6, 2), torch.tensor([200, 17], dtype=I32)
    table_of, lens_of = plain_attention.per_token(table, lens, requests * tokens, BLOCK_SIZE)
    expected = plain_mla.mla_decode_attention(
        *_wide(*query, *caches), block_table=table_of, context_lens=lens_of, scale=SCALE
    ).to(BF16)

    def run(*given: Tensor) -> Tensor:
        return attention.mla_decode_attention(*given, scale=SCALE)

    def run_eager(*given: Tensor) -> Tensor:
        *tensors, lens = given
        return attention.mla_decode_attention(*tensors, context_lens=lens.tolist(), scale=SCALE)

    return OpCase((*query, *caches, table, lens), run, (expected,), run_eager=run_eager)


def _indexer() -> OpCase:
    requests, heads, topk = 2, 16, 64
    query, keys = _normal(requests, heads, 128), _normal(6, BLOCK_SIZE, 1, 128)
    head_weights = _normal(requests, heads).float()
    table, lens = _tables(requests, 6, 2), torch.tensor([200, 97], dtype=I32)
    expected = plain_dsa.lightning_indexer(query, head_weights, keys, table, lens, topk).to(I32)

    def run(*given: Tensor) -> Tensor:
        return dsa.lightning_indexer(*given, topk=topk)

    def read(selected: Tensor) -> tuple[Tensor]:
        return (torch.zeros(requests, 2 * BLOCK_SIZE, dtype=torch.bool).scatter(1, selected.squeeze(1).long(), True),)

    chosen = torch.zeros(requests, 2 * BLOCK_SIZE, dtype=torch.bool).scatter(1, expected.long(), True)
    # At the edge of the selection two scores may lie within a rounding of each other.
    return OpCase((query, head_weights, keys, table, lens), run, (chosen,), bound=0.02, read=read)


def _sparse_attention() -> OpCase:
    requests, heads, topk = 2, 8, 64
    query = _normal(requests, heads, 512), _normal(requests, heads, 64)
    caches = _normal(6, BLOCK_SIZE, 1, 512), _normal(6, BLOCK_SIZE, 1, 64)
    table, lens = _tables(requests, 6, 2), torch.tensor([200, 97], dtype=I32)
    selected = torch.stack([torch.randperm(int(length))[:topk].sort().values for length in lens])
    expected = plain_dsa.sparse_mla_decode_attention(
        *_wide(*query, *caches), block_table=table, context_lens=lens, selected=selected, scale=SCALE
    ).to(BF16)

    def run(*given: Tensor) -> Tensor:
        return dsa.sparse_mla_decode_attention(*given, scale=SCALE)

    return OpCase((*query, *caches, table, lens, selected.to(I32).unsqueeze(1)), run, (expected,))


# --- products and experts ---


def _linear() -> OpCase:
    x, weight = _normal(4, 256), _normal(128, 256)
    return OpCase((x, weight), linear.linear, (plain_linear.linear(x, weight),))


def _linear_in_tiles() -> OpCase:
    x, weight = _normal(4, 256), _normal(128, 256)
    return OpCase(
        (x, weight), linear.linear, (plain_linear.linear(x, weight),), pack=lambda x, weight: (x, weights.to_nz(weight))
    )


def _head_linear() -> OpCase:
    x, weight = _normal(4, 8, 128), _normal(8, 128, 512, scale=0.1)
    expected = plain_linear.head_linear(x, weight, True)
    return OpCase((x, weight), linear.transpose_batchmatmul, (expected,))


def _gate(**settings: Any) -> OpCase:
    logits = torch.randn(6, 64)
    bias = torch.randn(64) * 0.1 if settings["scoring"] == "sigmoid" else None
    expected, ids = _by_expert(*plain_moe.gate_topk(logits, 6, **settings, correction_bias=bias))

    def run(logits: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return moe.gate_topk(logits, 6, **settings, correction_bias=bias)

    inputs = (logits,) if bias is None else (logits, bias)
    return OpCase(inputs, run, (expected, ids.to(I32)), bound=1e-4, read=_by_expert)


def _by_expert(chosen: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and ids of each token in order of id: no other order is promised."""
    ids, order = ids.sort(-1)
    return chosen.gather(1, order), ids


def _sigmoid_gate() -> OpCase:
    return _gate(
        scoring="sigmoid", norm_topk_prob=True, scaling=2.5, num_groups=8, groups_per_token=4, group_score="top2"
    )


def _softmax_gate() -> OpCase:
    return _gate(scoring="softmax", norm_topk_prob=True)


def _chosen(tokens: int, experts: int, count: int) -> tuple[Tensor, Tensor]:
    ids = torch.stack([torch.randperm(experts)[:count] for _ in range(tokens)])
    return torch.rand(tokens, count), ids


def _experts() -> OpCase:
    tokens, experts, dim, inter = 6, 8, 128, 64
    hidden, (chosen, ids) = _normal(tokens, dim), _chosen(tokens, experts, 3)
    gate_up, down = _normal(experts, 2 * inter, dim, scale=dim**-0.5), _normal(experts, dim, inter, scale=inter**-0.5)
    expected = plain_moe.routed_experts(hidden, chosen, ids, gate_up, down)

    def pack(hidden: Tensor, chosen: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor) -> tuple[Tensor, ...]:
        return hidden, chosen, ids, weights.pack_experts(gate_up), weights.pack_experts(down)

    return OpCase((hidden, chosen, ids.to(I32), gate_up, down), moe.routed_experts, (expected,), pack=pack)


# --- int8 ---


def _quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float [..., outputs, inputs] -> int8 of the same shape, and a scale per output channel, float32."""
    scale = weight.abs().amax(-1) / 127
    return (weight / scale.unsqueeze(-1)).round().to(I8), scale


def _dynamic_quant() -> OpCase:
    x = _normal(5, 256)
    return OpCase((x,), quant.dynamic_quant, (x.float(),), bound=INT8_BOUND, read=_restored)


def _norm_and_quant() -> OpCase:
    inputs = (_normal(5, 256), _normal(5, 256), _normal(256))
    normalised, total = plain_norm.add_rms_norm(*inputs, EPSILON)

    def run(*given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return norm.add_rms_norm_dynamic_quant(*given, epsilon=EPSILON)

    return OpCase(inputs, run, (normalised.float(), total), bound=INT8_BOUND, read=_restored)


def _restored(quantised: Tensor, scale: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """What int8 numbers and their scales stand for: that can be compared, and a last bit may differ."""
    assert quantised.dtype == I8
    return quantised.float() * scale.unsqueeze(-1), *others


def _quant_matmul() -> OpCase:
    x, x_scale = _quantised(torch.randn(4, 256))
    weight, scale = _quantised(torch.randn(128, 256))
    expected = (x.double() @ weight.double().T * x_scale.double().unsqueeze(1) * scale.double()).to(BF16)

    def pack(x: Tensor, weight: Tensor, *scales: Tensor) -> tuple[Tensor, ...]:
        return x, weights.pack_quantised(weight), *scales

    return OpCase((x, weight, scale, x_scale), quant.quant_matmul, (expected,), pack=pack)


def _swiglu_between_products() -> OpCase:
    rows, experts, inter = 12, 3, 64
    sums = torch.randint(-20000, 20000, (rows, 2 * inter), dtype=I32)
    scales, row_scale, loads = torch.rand(experts, 2 * inter) * 1e-2, torch.rand(rows) * 1e-2, torch.tensor([5, 0, 7])
    expert_of = torch.arange(experts).repeat_interleave(loads)
    gate, up = (sums.double() * scales[expert_of].double() * row_scale.double().unsqueeze(1)).chunk(2, -1)
    expected = (gate * torch.sigmoid(gate) * up).float()
    return OpCase(
        (sums, scales, row_scale, loads), quant.dequant_swiglu_quant, (expected,), bound=INT8_BOUND, read=_restored
    )


def _quantised_experts() -> OpCase:
    tokens, experts, dim, inter = 6, 8, 128, 64
    hidden, (chosen, ids) = _normal(tokens, dim), _chosen(tokens, experts, 3)
    gate_up, up_scale = _quantised(torch.randn(experts, 2 * inter, dim) * dim**-0.5)
    down, down_scale = _quantised(torch.randn(experts, dim, inter) * inter**-0.5)
    whole = [(part.float() * scale.unsqueeze(-1)).to(BF16) for part, scale in ((gate_up, up_scale), (down, down_scale))]
    expected = plain_moe.routed_experts(hidden, chosen, ids, *whole)

    def pack(hidden: Tensor, chosen: Tensor, ids: Tensor, up: Tensor, up_scale: Tensor, down: Tensor, scale: Tensor):
        return hidden, chosen, ids, weights.pack_experts(up), up_scale, weights.pack_experts(down), scale

    inputs = (hidden, chosen, ids.to(I32), gate_up, up_scale, down, down_scale.to(BF16))
    return OpCase(inputs, quant.quantised_experts, (expected,), bound=INT8_BOUND, pack=pack)


OP_GROUPS = {
    "norms and rotation": (
        ("npu_rms_norm", _rms_norm),
        ("npu_add_rms_norm", _add_rms_norm),
        ("npu_swiglu", _swiglu),
        ("npu_rotary_mul", lambda: _rotation(128, False)),
        ("npu_interleave_rope", lambda: _rotation(64, True)),
    ),
    "cache writes": (
        ("npu_scatter_pa_kv_cache", _write_kv),
        ("npu_scatter_nd_update_", _write_index_keys),
        ("npu_kv_rmsnorm_rope_cache_v2", _write_latents),
        ("npu_mla_prolog_v3", _prolog),
    ),
    "attention": (
        ("npu_fused_infer_attention_score_v2", lambda: _paged_attention(None)),
        ("npu_fused_infer_attention_score_v2 with a window", lambda: _paged_attention(50)),
        ("npu_fused_infer_attention_score_v2 of latents", lambda: _latent_attention(1)),
        ("npu_fused_infer_attention_score_v2 of latents, 2 tokens each", lambda: _latent_attention(2)),
    ),
    "sparse attention": (
        ("npu_lightning_indexer", _indexer),
        ("npu_sparse_flash_attention", _sparse_attention),
    ),
    "products and experts": (
        ("MatMul", _linear),
        ("MatMul with npu_format_cast to NZ", _linear_in_tiles),
        ("npu_transpose_batchmatmul", _head_linear),
        ("npu_moe_gating_top_k by sigmoid", _sigmoid_gate),
        ("npu_moe_gating_top_k by softmax", _softmax_gate),
        ("npu_moe_init_routing_v2, npu_grouped_matmul, npu_moe_finalize_routing", _experts),
    ),
    "int8": (
        ("npu_dynamic_quant", _dynamic_quant),
        ("npu_add_rms_norm_dynamic_quant", _norm_and_quant),
        ("npu_quant_matmul", _quant_matmul),
        ("npu_dequant_swiglu_quant", _swiglu_between_products),
        ("npu_grouped_matmul of int8", _quantised_experts),
    ),
}  # fmt: skip


def op_checks() -> list[OpCheck]:
    """Every check, in order of group."""

    def seeded(name: str, make: Callable[[], OpCase]) -> Callable[[], OpCase]:
        def case() -> OpCase:
            _seed(name)
            return make()

        return case

    return [OpCheck(group, name, seeded(name, make)) for group, checks in OP_GROUPS.items() for name, make in checks]
