"""What each NPU function lowers to, node by node, with the sizes of the models that it is for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from omni_engine.ops.npu import (
    activation,
    attention,
    cache,
    dispatch,
    dsa,
    linear,
    mla,
    moe,
    norm,
    quant,
    rope,
    weights,
)

BF16, F32, I8, I32, I64 = torch.bfloat16, torch.float32, torch.int8, torch.int32, torch.int64
REQUESTS, BLOCKS, BLOCK_SIZE, WIDTH = 4, 64, 128, 32
LATENTS, ROPE_KEYS = (BLOCKS, BLOCK_SIZE, 1, 512), (BLOCKS, BLOCK_SIZE, 1, 64)
KEYS, INDEX_KEYS = (BLOCKS, BLOCK_SIZE, 8, 128), (BLOCKS, BLOCK_SIZE, 1, 128)
TABLE, LENS, SLOTS = ((REQUESTS, WIDTH), I32), ((REQUESTS,), I32), ((REQUESTS,), I64)
ANGLES, ROPE_ANGLES, PLAIN_ANGLES = (REQUESTS, 128), (REQUESTS, 64), ((REQUESTS, 64), F32)
GROUP = dispatch.ExpertGroup("experts", 64, 3, 256)
# What stands for the optional lists that a grouped product is not given.
ABSENT = {"Fill": 5, "Cast": 5}

Argument = tuple[tuple[int, ...], torch.dtype] | tuple[int, ...]


def rms_norm(hidden: Tensor, weight: Tensor) -> Tensor:
    return norm.rms_norm(hidden, weight, 1e-6)


def add_rms_norm(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    return norm.add_rms_norm(*tensors, epsilon=1e-6)


def add_rms_norm_dynamic_quant(*tensors: Tensor) -> tuple[Tensor, ...]:
    return norm.add_rms_norm_dynamic_quant(*tensors, epsilon=1e-6)


def angles(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return rope.rotary_angles(cos, sin, BF16)


def rotate_halves(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return rope.rotate(heads, cos, sin, False)


def rotate_pairs(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return rope.rotate(heads, cos, sin, True)


def write_latents(projected: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, *rest: Tensor) -> None:
    cache.write_latent_cache(projected, weight, 1e-6, cos, sin, True, *rest)


def write_latents_one_by_one(projected: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, *rest: Tensor) -> None:
    cache.write_latent_cache(projected, weight, 1e-6, cos, sin, False, *rest)


def paged_attention(*tensors: Tensor) -> Tensor:
    return attention.paged_decode_attention(*tensors, scale=0.1)


def windowed_attention(*tensors: Tensor) -> Tensor:
    return attention.paged_decode_attention(*tensors, scale=0.1, window=500)


def latent_attention(*tensors: Tensor) -> Tensor:
    return attention.mla_decode_attention(*tensors, scale=0.1)


def indexer(*tensors: Tensor) -> Tensor:
    return dsa.lightning_indexer(*tensors, topk=2048)


def sparse_attention(*tensors: Tensor) -> Tensor:
    return dsa.sparse_mla_decode_attention(*tensors, scale=0.1)


def prolog(hidden: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    return mla.mla_prolog(hidden, mla.PrologWeights(*rest[:6]), (1e-6, 1e-6), *rest[6:])


def deepseek_gate(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return moe.gate_topk(
        logits, 8, scoring="sigmoid", norm_topk_prob=True, scaling=2.5, num_groups=8, groups_per_token=4,
        group_score="top2", correction_bias=bias,
    )  # fmt: skip


def qwen_gate(logits: Tensor) -> tuple[Tensor, Tensor]:
    return moe.gate_topk(logits, 8, scoring="softmax", norm_topk_prob=True)


def latent_to_query(x: Tensor, weight: Tensor) -> Tensor:
    return linear.head_linear(x, weight, True)


def parallel_experts(hidden: Tensor, ids: Tensor, weights_: Tensor, live: Tensor, *experts: Tensor) -> Tensor:
    up, up_scale, down, down_scale = experts
    sent = dispatch.dispatch(hidden, ids, GROUP, live, quantised=True)
    assert sent.row_scales is not None
    products = moe.grouped_matmul(sent.rows, up, sent.loads, output_dtype=I32)
    inner, scale = quant.dequant_swiglu_quant(products, up_scale, sent.row_scales, sent.loads)
    done = moe.grouped_matmul(inner, down, sent.loads, scale=down_scale, row_scale=scale, output_dtype=BF16)
    return dispatch.combine(done, ids, weights_, sent, GROUP, live)


def case(
    function: Callable[..., Any],
    arguments: Sequence[Argument],
    work: dict[str, int],
    mutated: Sequence[tuple[int, ...]] = (),
    name: str = "",
) -> Any:
    """`work`: how many nodes of each type. `mutated`: the shapes of the inputs written in place, in order."""
    return pytest.param(function, arguments, work, list(mutated), id=name or function.__name__)


def times(factor: int, work: dict[str, int]) -> dict[str, int]:
    return {name: count * factor for name, count in work.items()}


def plus(*parts: dict[str, int]) -> dict[str, int]:
    names = {name for part in parts for name in part}
    return {name: sum(part.get(name, 0) for part in parts) for name in names}


def attended(tokens: int) -> list[Argument]:
    return [(REQUESTS * tokens, 32, 128), KEYS, KEYS, TABLE, LENS]


def attended_latents(tokens: int) -> list[Argument]:
    return [(REQUESTS * tokens, 64, 512), (REQUESTS * tokens, 64, 64), LATENTS, ROPE_KEYS, TABLE, LENS]


def indexed(tokens: int) -> list[Argument]:
    return [(REQUESTS * tokens, 64, 128), ((REQUESTS * tokens, 64), F32), INDEX_KEYS, TABLE, LENS]


LATENT_WRITE = [(REQUESTS, 576), (512,), ROPE_ANGLES, ROPE_ANGLES, LATENTS, ROPE_KEYS, SLOTS]
EXPERTS = [(REQUESTS, 2048), ((REQUESTS, 8), F32), ((REQUESTS, 8), I32), (16, 2048, 1536), (16, 768, 2048)]
INT8_EXPERTS = [((4, 7168, 4096), I8), ((4, 4096), F32), ((4, 2048, 7168), I8), (4, 7168)]
WINDOW = {"Range": 2, "Cast": 3, "Reshape": 6, "Add": 1, "GreaterEqual": 1, "Sub": 1, "Less": 1, "LogicalOr": 1}
CASES = [
    case(rms_norm, [(4, 7168), (7168,)], {"RmsNorm": 1}),
    case(add_rms_norm, [(4, 7168), (4, 7168), (7168,)], {"AddRmsNorm": 1}),
    case(add_rms_norm_dynamic_quant, [(4, 7168), (4, 7168), (7168,)], {"AddRmsNormDynamicQuant": 1}),
    case(activation.swiglu, [(4, 4096)], {"SwiGlu": 1}),
    case(angles, [PLAIN_ANGLES, PLAIN_ANGLES], {"ConcatV2": 2, "Cast": 2}),
    case(
        rotate_halves, [(4, 8, 128), ANGLES, ANGLES],
        {"Unsqueeze": 1, "Reshape": 2, "RotaryMul": 1, "Squeeze": 1},
    ),
    case(
        rotate_pairs, [(4, 64, 64), ROPE_ANGLES, ROPE_ANGLES],
        {"Unsqueeze": 1, "Reshape": 2, "InterleaveRope": 1, "Squeeze": 1},
    ),
    case(cache.write_kv_cache, [(4, 8, 128), (4, 8, 128), KEYS, KEYS, SLOTS], {"ScatterPaKvCache": 1}, [KEYS, KEYS]),
    case(
        cache.write_index_keys, [(4, 1, 128), INDEX_KEYS, SLOTS],
        {"FloorDiv": 1, "FloorMod": 1, "Pack": 1, "ScatterNdUpdate": 1}, [INDEX_KEYS],
    ),
    case(
        write_latents, LATENT_WRITE, {"Reshape": 3, "KvRmsNormRopeCache": 1}, [LATENTS, ROPE_KEYS],
    ),
    case(
        write_latents_one_by_one, LATENT_WRITE,
        {"SplitV": 1, "Identity": 1, "RmsNorm": 1, "Unsqueeze": 3, "Reshape": 2, "RotaryMul": 1,
                          "Squeeze": 1, "ScatterPaKvCache": 1},
        [LATENTS, ROPE_KEYS],
    ),
    case(paged_attention, attended(1), {"Cast": 1, "Reshape": 4, "FusedInferAttentionScore": 1}),
    case(paged_attention, attended(3), {"Cast": 1, "Reshape": 4, "FusedInferAttentionScore": 1}, name="attention-3"),
    case(windowed_attention, attended(1), plus(WINDOW, {"FusedInferAttentionScore": 1})),
    case(windowed_attention, attended(2), plus(WINDOW, {"FusedInferAttentionScore": 1}), name="windowed-2"),
    case(latent_attention, attended_latents(1), {"Cast": 1, "Reshape": 5, "FusedInferAttentionScore": 1}),
    case(latent_attention, attended_latents(2), {"Cast": 1, "Reshape": 5, "FusedInferAttentionScore": 1}, name="mla-2"),
    case(indexer, indexed(1), {"Cast": 2, "Range": 1, "LightningIndexer": 1}),
    case(indexer, indexed(2), {"Cast": 2, "Range": 1, "LightningIndexer": 1}, name="indexer-2"),
    case(
        sparse_attention, [*attended_latents(2), ((REQUESTS * 2, 1, 2048), I32)],
        {"Cast": 1, "Range": 1, "SparseFlashAttention": 1},
    ),
    case(
        prolog,
        [(4, 7168), (7168, 1536), (1536, 32 * 192), (32, 128, 512), (7168, 576), (1536,), (512,), ROPE_ANGLES,
         ROPE_ANGLES, LATENTS, ROPE_KEYS, SLOTS],
        {"MlaPrologV3": 1}, [LATENTS, ROPE_KEYS],
    ),
    case(deepseek_gate, [((4, 256), F32), ((256,), F32)], {"MoeGatingTopK": 1}),
    case(
        qwen_gate, [((4, 128), F32)], {"MoeGatingTopK": 1, "ReduceSum": 1, "Add": 1, "RealDiv": 1, "Mul": 1, "Cast": 1},
    ),
    case(
        moe.routed_experts, EXPERTS,
        plus(times(2, ABSENT), {"MoeInitRoutingV3": 1, "GroupedMatmul": 2, "SwiGlu": 1, "Cast": 1,
                                "MoeFinalizeRoutingV2": 1}),
    ),
    case(
        quant.quantised_experts, [(4, 7168), ((4, 8), F32), ((4, 8), I32), *INT8_EXPERTS],
        {"MoeInitRoutingV3": 1, "GroupedMatmul": 2, "DequantSwigluQuant": 1, "Fill": 9, "Cast": 10,
         "MoeFinalizeRoutingV2": 1},
    ),
    case(
        parallel_experts,
        [(32, 7168), ((32, 8), I32), ((32, 8), F32), ((32,), torch.bool), *INT8_EXPERTS],
        {"MoeDistributeDispatchV2": 1, "GroupedMatmul": 2, "DequantSwigluQuant": 1, "Fill": 9, "Cast": 9,
         "MoeDistributeCombineV2": 1},
    ),
    case(quant.dynamic_quant, [(4, 7168)], {"DynamicQuant": 1}),
    case(
        quant.quant_matmul, [((4, 7168), I8), ((7168, 1536), I8), (1536,), ((4,), F32)], {"QuantBatchMatmulV3": 1},
    ),
    case(
        cache.put_rows, [(96, 192), ((32,), I64), (32, 192)],
        {"Reshape": 1, "BroadcastTo": 1, "ScatterElements": 1}, [(96, 192)],
    ),
    case(linear.linear, [(4, 7168), (1536, 7168)], {"MatMul": 1}),
    case(latent_to_query, [(4, 64, 128), (64, 128, 512)], {"TransposeBatchMatMul": 1}),
    case(latent_to_query, [(4, 128, 512), (128, 512, 128)], {"Transpose": 2, "BatchMatMul": 1}, name="too-many-heads"),
]  # fmt: skip


def tensors(arguments: list[Any]) -> list[Tensor]:
    made = []
    for argument in arguments:
        shape, dtype = argument if isinstance(argument[0], tuple) else (argument, BF16)
        made.append(torch.zeros(shape, dtype=dtype, device="npu:0"))
    return made


@pytest.mark.parametrize(("function", "arguments", "work", "mutated"), CASES)
def test_an_op_lowers_to_its_nodes(graphs, function, arguments, work, mutated) -> None:
    graph = graphs.lower(function, *tensors(arguments))
    assert dict(graph.work) == work
    assert graph.mutated == mutated
    assert graph.copied_inputs == [] and {node.type for node in graph.copies} <= {"Identity"}


def test_every_graph_of_a_step_is_the_first(graphs) -> None:
    first, second = tensors(attended(1)), tensors(attended(1))
    second[-1] += 7
    assert len(graphs.lower_all(paged_attention, first, second)) == 1


def test_attention_is_told_where_its_tokens_stand(graphs) -> None:
    one, several = (graphs.lower(latent_attention, *tensors(attended_latents(tokens))) for tokens in (1, 3))
    nodes = [graph.only("FusedInferAttentionScore") for graph in (one, several)]
    assert [node.attributes["sparse_mode"] for node in nodes] == [0, 3]
    assert [node.attributes["input_layout"] for node in nodes] == ["BSND", "BSND"]
    assert [node.attributes["num_heads"] for node in nodes] == [64, 64]
    masks = [[one.shape for one in graph.inputs.values() if one.shape == (2048, 2048)] for graph in (one, several)]
    assert masks == [[], [(2048, 2048)]]


def test_packed_weights_reach_the_graph_in_tiles(graphs) -> None:
    up = weights.pack_experts(torch.zeros(4, 1536, 2048, dtype=BF16, device="npu:0"))
    down = weights.pack_experts(torch.zeros(4, 2048, 768, dtype=BF16, device="npu:0"))
    assert up.shape == (4, 2048, 1536) and down.shape == (4, 768, 2048)
    graph = graphs.lower(moe.routed_experts, *tensors(EXPERTS[:3]), up, down)
    formats = {one.shape: one.format for one in graph.inputs.values()}
    assert formats[tuple(up.shape)] == formats[tuple(down.shape)] == weights.NZ
    assert formats[(REQUESTS, 2048)] != weights.NZ
    packed = weights.pack_quantised(torch.zeros(1536, 7168, dtype=I8, device="npu:0"))
    graph = graphs.lower(quant.quant_matmul, *tensors([((4, 7168), I8)]), packed, *tensors([(1536,), ((4,), F32)]))
    assert graph.inputs["arg1_1"].shape == (7168, 1536) and graph.inputs["arg1_1"].format == weights.NZ


def test_a_contract_holds_while_a_graph_is_traced(graphs) -> None:
    with pytest.raises(Exception, match="npu_rms_norm needs weight of shape"):
        graphs.lower(rms_norm, *tensors([(4, 7168), (3584,)]))
