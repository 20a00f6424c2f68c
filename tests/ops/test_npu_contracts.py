"""The NPU functions refuse what their operators are not documented for. Needs no torch-npu: checks come first."""

from __future__ import annotations

import subprocess
import sys
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
    library,
    linear,
    mla,
    moe,
    norm,
    quant,
    rope,
    weights,
)

BF16, F16, F32, I8, I32, I64 = torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.int32, torch.int64
BOOL = torch.bool


def of(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def strided(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """A tensor of this shape with room between its last elements."""
    return torch.empty((*shape[:-1], 2 * shape[-1]), dtype=dtype, device="meta")[..., ::2]


LATENTS, ROPE_KEYS, SLOTS = of(64, 128, 1, 512), of(64, 128, 1, 64), of(4, dtype=I64)
ANGLES, TABLE, LENS = of(4, 64), of(4, 8, dtype=I32), of(4, dtype=I32)
KEYS = of(64, 128, 8, 128)
GROUP = dispatch.ExpertGroup("experts", 16, 3, 256)
SENT = dispatch.Dispatched(
    of(1024, 7168), None, of(16, dtype=I64), of(1024 * 128, dtype=I32), of(256, dtype=I32), of(1, dtype=I32)
)
PAGED = {
    "query": of(4, 32, 128), "key_cache": KEYS, "value_cache": KEYS, "block_table": TABLE, "context_lens": LENS,
    "scale": 0.1,
}  # fmt: skip
LATENT = {
    "query_latent": of(4, 64, 512), "query_rope": of(4, 64, 64), "latent_cache": LATENTS, "rope_key_cache": ROPE_KEYS,
    "block_table": TABLE, "context_lens": LENS, "scale": 0.1,
}  # fmt: skip
PROLOG = {
    "query_down": of(7168, 1536), "query_up": of(1536, 32 * 192), "key_up": of(32, 128, 512),
    "latent_down": of(7168, 576), "query_norm": of(1536), "latent_norm": of(512),
}  # fmt: skip


def prolog(**changes: Any) -> mla.PrologWeights:
    return mla.PrologWeights(**{**PROLOG, **changes})


# Per function: arguments that it takes, and changes of one of them that it refuses, with the words of the refusal.
CONTRACTS: list[tuple[Any, dict[str, Any], list[tuple[str, Any, str]]]] = [
    (
        norm.rms_norm,
        {"hidden": of(4, 7168), "weight": of(7168), "epsilon": 1e-6},
        [
            ("hidden", of(7168), "hidden of rank 2 to 8: 1"),
            ("hidden", of(4, 7168, dtype=torch.float64), "hidden of dtype"),
            ("weight", of(7168, dtype=F32), "weight of the dtype of hidden"),
            ("weight", of(3584), r"weight of shape \[7168\]"),
            ("weight", of(1, 7168), r"weight of shape \[7168\]"),
        ],
    ),
    (
        norm.add_rms_norm,
        {"hidden": of(4, 7168), "residual": of(4, 7168), "weight": of(7168), "epsilon": 1e-6},
        [
            ("hidden", of(4, 7168, dtype=I8), "hidden of dtype"),
            ("residual", of(1, 7168), r"residual of shape \[4, 7168\]"),
            ("residual", of(4, 7168, dtype=F32), "residual of the dtype of hidden"),
            ("weight", of(7168, dtype=F16), "weight of the dtype of hidden"),
            ("weight", of(4, 7168), "weight of shape"),
        ],
    ),
    (
        norm.add_rms_norm_dynamic_quant,
        {"hidden": of(4, 7168), "residual": of(4, 7168), "weight": of(7168), "epsilon": 1e-6},
        [
            ("hidden", of(4, 7168, dtype=F32), "hidden of dtype bfloat16 or float16"),
            ("hidden", of(7168), "rank 2 to 8"),
            ("weight", of(7168, dtype=F32), "weight of the dtype"),
            ("residual", of(3, 7168), "residual of shape"),
        ],
    ),
    (
        activation.swiglu,
        {"gate_up": of(4, 4096)},
        [
            ("gate_up", of(4, 4095), "multiple of 2: 4095"),
            ("gate_up", of(4, 4096, dtype=I32), "gate_up of dtype"),
            ("gate_up", of(*[1] * 8, 2), "rank 1 to 8: 9"),
        ],
    ),
    (
        rope.rotate,
        {"heads": of(4, 8, 128), "cos": of(4, 128), "sin": of(4, 128), "interleaved": False},
        [
            ("heads", of(4, 8, 126), "the last size of cos from 2 to 126: 128"),
            ("cos", of(1, 128), "cos of shape"),
            ("sin", of(4, 64), "sin of shape"),
            ("cos", of(4, 128, dtype=F32), "cos of the dtype of heads"),
            ("heads", of(4, 1000, 128), "the number of heads from 1 to 999: 1000"),
            ("heads", of(4, 8, 128, dtype=torch.float64), "heads of dtype"),
        ],
    ),
    (
        rope.rotary_mul,
        {"heads": of(4, 8, 128), "cos": of(4, 128), "sin": of(4, 128)},
        [
            ("heads", of(4, 8, 896), "dim from 2 to 895: 896"),
            ("cos", of(4, 128, dtype=F32), "cos of the dtype of heads"),
            ("sin", of(4, 64), "sin of shape"),
        ],
    ),
    (
        rope.interleave_rope,
        {"heads": of(4, 8, 64), "cos": of(4, 64), "sin": of(4, 64)},
        [
            ("heads", of(4, 8, 128), r"heads of shape \[4, 8, 64\]"),
            ("heads", of(4, 8, 64, dtype=F32), "heads of dtype"),
            ("cos", of(4, 64, dtype=F16), "cos of the dtype of heads"),
            ("sin", of(4, 32), "sin of shape"),
        ],
    ),
    (
        cache.write_kv_cache,
        {"key": of(4, 8, 128), "value": of(4, 8, 128), "key_cache": KEYS, "value_cache": KEYS, "slots": SLOTS},
        [
            ("key", of(4, 1024), "key of shape"),
            ("key", of(4, 8, 128, dtype=torch.float64), "key of dtype"),
            ("value", of(4, 4, 128), r"value of shape \[4, 8, any\]"),
            ("value", of(4, 8, 128, dtype=F16), "value of the dtype of key"),
            ("key_cache", of(64, 128, 8, 64), r"key_cache of shape \[any, any, 8, 128\]"),
            ("key_cache", strided(64, 128, 8, 128), "key_cache to be contiguous"),
            ("value_cache", of(32, 128, 8, 128), r"value_cache of shape \[64, 128, 8, 128\]"),
            ("value_cache", of(64, 128, 8, 128, dtype=F32), "value_cache of the dtype of key"),
            ("value_cache", of(128, 64, 8, 128).transpose(0, 1), "value_cache to be contiguous"),
            ("slots", of(5, dtype=I64), r"slots of shape \[4\]"),
            ("slots", of(4, dtype=F32), "slots of dtype int32 or int64"),
        ],
    ),
    (
        cache.write_index_keys,
        {"keys": of(4, 1, 128), "index_key_cache": of(64, 128, 1, 128), "slots": SLOTS},
        [
            ("keys", of(4, 128), "keys of shape"),
            ("keys", of(4, 2, 128), "keys of shape"),
            ("index_key_cache", of(64, 128, 1, 64), "index_key_cache of shape"),
            ("index_key_cache", of(64, 128, 1, 128, dtype=F32), "index_key_cache of the dtype of keys"),
            ("index_key_cache", strided(64, 128, 1, 128), "index_key_cache to be contiguous"),
            ("slots", of(4, dtype=I32), "slots of dtype int64"),
        ],
    ),
    (
        cache.fused_latent_write,
        {
            "latent_and_key": of(4, 576), "norm_weight": of(512), "epsilon": 1e-6, "cos": ANGLES, "sin": ANGLES,
            "latent_cache": LATENTS, "rope_key_cache": ROPE_KEYS, "slots": SLOTS,
        },
        [
            ("latent_and_key", of(4, 320), r"latent_and_key of shape \[4, 576\]"),
            ("latent_and_key", of(4, 576, dtype=F32), "latent_and_key of dtype bfloat16 or float16"),
            ("norm_weight", of(512, dtype=F32), "norm_weight of the dtype"),
            ("norm_weight", of(256), "norm_weight of shape"),
            ("cos", of(4, 32), "cos of shape"),
            ("sin", of(3, 64), "sin of shape"),
            ("sin", of(4, 64, dtype=F32), "sin of the dtype of latent_and_key"),
            ("latent_cache", of(64, 128, 512), "latent_cache of shape"),
            ("latent_cache", of(64, 128, 1, 512, dtype=F16), "rope_key_cache of the dtype of latent_cache"),
            ("latent_cache", strided(64, 128, 1, 512), "latent_cache to be contiguous"),
            ("rope_key_cache", of(32, 128, 1, 64), "rope_key_cache of shape"),
            ("rope_key_cache", strided(64, 128, 1, 64), "rope_key_cache to be contiguous"),
            ("slots", of(4, dtype=I32), "slots of dtype int64"),
        ],
    ),
    (
        attention.paged_decode_attention,
        PAGED,
        [
            ("query", of(4, 4096), "query of shape"),
            ("query", of(4, 32, 128, dtype=F32), "query of dtype bfloat16 or float16"),
            ("query", of(6, 32, 128), "multiple of 4: 6"),
            ("query", of(68, 32, 128), "tokens per request from 1 to 16: 17"),
            ("query", of(4, 30, 128), "multiple of 8: 30"),
            ("query", of(4, 520, 128), "the number of heads from 1 to 256"),
            ("query", of(4, 32, 64), "key_cache of shape"),
            ("key_cache", of(64, 128, 8, 128, dtype=F16), "key_cache of the dtype of query"),
            ("key_cache", strided(64, 128, 8, 128), "key_cache to be contiguous"),
            ("value_cache", of(64, 128, 8, 64), "value_cache of shape"),
            ("block_table", of(4, 8, dtype=I64), "block_table of dtype int32"),
            ("block_table", of(32, dtype=I32), "block_table of shape"),
            ("context_lens", of(3, dtype=I32), "context_lens of shape"),
            ("context_lens", of(4, dtype=F32), "context_lens of dtype int32 or int64"),
            ("context_lens", (5, 6, 7), "4 context_lens: 3"),
            ("window", 0, "window from 1"),
        ],
    ),
    (
        attention.mla_decode_attention,
        LATENT,
        [
            ("query_latent", of(4, 64, 256), "query_latent of shape"),
            ("query_latent", of(4, 64, 512, dtype=F32), "query_latent of dtype"),
            ("query_latent", of(4, 48, 512), "query_rope of shape"),
            ("query_rope", of(4, 64, 32), "query_rope of shape"),
            ("query_rope", of(4, 64, 64, dtype=F16), "query_rope of the dtype"),
            ("latent_cache", of(64, 64, 1, 512), "rope_key_cache of shape"),
            ("latent_cache", of(64, 128, 1, 512, dtype=F16), "the dtype of"),
            ("block_table", of(4, 8, dtype=I64), "block_table of dtype int32"),
            ("context_lens", of(4, dtype=F32), "context_lens of dtype"),
        ],
    ),
    (
        dsa.lightning_indexer,
        {
            "query": of(4, 64, 128), "head_weights": of(4, 64, dtype=F32), "index_key_cache": of(64, 128, 1, 128),
            "block_table": TABLE, "context_lens": LENS, "topk": 2048,
        },
        [
            ("query", of(4, 64, 64), "query of shape"),
            ("query", of(4, 65, 128), "the number of heads from 1 to 64: 65"),
            ("query", of(4, 64, 128, dtype=F32), "query of dtype"),
            ("query", of(6, 64, 128), "multiple of 4: 6"),
            ("head_weights", of(4, 32, dtype=F32), "head_weights of shape"),
            ("head_weights", of(4, 64, dtype=F16), "head_weights of dtype float32 or bfloat16"),
            ("index_key_cache", of(64, 128, 2, 128), "index_key_cache of shape"),
            ("index_key_cache", of(64, 128, 1, 128, dtype=F16), "index_key_cache of the dtype of query"),
            ("index_key_cache", strided(64, 128, 1, 128), "index_key_cache to be contiguous"),
            ("index_key_cache", of(64, 24, 1, 128), "block_size to be a multiple of 16: 24"),
            ("index_key_cache", of(64, 2048, 1, 128), "block_size from 16 to 1024"),
            ("block_table", of(4, 8, dtype=I64), "block_table of dtype int32"),
            ("context_lens", of(4, dtype=I64), "context_lens of dtype int32"),
            ("topk", 0, "topk from 1 to 2048"),
            ("topk", 2049, "topk from 1 to 2048"),
        ],
    ),
    (
        dsa.sparse_mla_decode_attention,
        {**LATENT, "selected": of(4, 1, 2048, dtype=I32)},
        [
            ("query_latent", of(4, 64, 256), "query_latent of shape"),
            ("query_rope", of(4, 64, 64, dtype=F16), "query_rope of the dtype"),
            ("latent_cache", of(64, 128, 1, 512, dtype=F16), "the dtype of"),
            ("latent_cache", strided(64, 128, 1, 512), "latent_cache to be contiguous"),
            ("context_lens", of(4, dtype=I64), "context_lens of dtype int32"),
            ("selected", of(4, 2048, dtype=I32), "selected of shape"),
            ("selected", of(4, 1, 2048, dtype=I64), "selected of dtype int32"),
        ],
    ),
    (
        mla.mla_prolog,
        {
            "hidden": of(4, 7168), "weights": prolog(), "epsilons": (1e-6, 1e-6), "cos": ANGLES, "sin": ANGLES,
            "latent_cache": LATENTS, "rope_key_cache": ROPE_KEYS, "slots": SLOTS,
        },
        [
            ("hidden", of(4, 5120), "the hidden size among 6144, 7168, 7680: 5120"),
            ("hidden", of(4, 7168, dtype=F16), "hidden of dtype bfloat16"),
            ("weights", prolog(key_up=of(48, 128, 512)), "the number of heads among"),
            ("weights", prolog(key_up=of(32, 192, 512)), "key_up of shape"),
            ("weights", prolog(query_down=of(7168, 768)), "query_down of shape"),
            ("weights", prolog(query_up=of(1536, 32 * 128)), "query_up of shape"),
            ("weights", prolog(latent_down=of(7168, 512)), "latent_down of shape"),
            ("weights", prolog(query_norm=of(1536, dtype=F32)), "query_norm of dtype bfloat16"),
            ("cos", of(4, 32), "cos of shape"),
            ("cos", of(4, 64, dtype=F32), "cos of dtype bfloat16"),
            ("slots", of(4, dtype=I32), "slots of dtype int64"),
        ],
    ),
    (
        moe.gate_topk,
        {
            "logits": of(4, 256, dtype=F32), "experts_per_token": 8, "scoring": "sigmoid", "norm_topk_prob": True,
            "num_groups": 8, "groups_per_token": 4, "group_score": "top2", "correction_bias": of(256, dtype=F32),
        },
        [
            ("logits", of(4, 256, dtype=I32), "logits of dtype"),
            ("logits", of(4, 255, dtype=F32), "experts to be a multiple of 8 groups: 255"),
            ("logits", of(4, 16, dtype=F32), "more than 2 experts per group: 2"),
            ("logits", of(4, 4096, dtype=F32), "padded to 32 from 1 to 2048: 4096"),
            ("experts_per_token", 129, "experts_per_token from 1 to 128: 129"),
            ("scoring", "relu", "scoring among softmax, sigmoid: relu"),
            ("group_score", "sum", "group_score among"),
            ("groups_per_token", 9, "groups_per_token from 1 to 8: 9"),
            ("correction_bias", of(256), "correction_bias of the dtype of logits"),
            ("correction_bias", of(128, dtype=F32), "correction_bias of shape"),
        ],
    ),
    (
        moe.routed_experts,
        {
            "hidden": of(4, 2048), "weights": of(4, 8, dtype=F32), "expert_ids": of(4, 8, dtype=I32),
            "gate_up": of(16, 2048, 1536), "down": of(16, 768, 2048),
        },
        [
            ("hidden", of(2048), "hidden of shape"),
            ("gate_up", of(16, 1536, 2048), "gate_up of shape"),
            ("gate_up", of(16, 2048, 1535), "an even last size of gate_up: 1535"),
            ("down", of(16, 2048, 768), r"down of shape \[16, 768, 2048\]"),
            ("expert_ids", of(4, 8, dtype=I64), "expert_ids of dtype int32"),
            ("expert_ids", of(3, 8, dtype=I32), "expert_ids of shape"),
        ],
    ),
    (
        moe.grouped_matmul,
        {"rows": of(32, 2048), "weight": of(16, 2048, 1536), "loads": of(16, dtype=I64)},
        [
            ("rows", of(32, 2048, dtype=F16), "weight of the dtype of rows"),
            ("weight", of(16, 1024, 1536), "weight of shape"),
            ("weight", of(16, 1536, 2048).transpose(1, 2), "weight to be contiguous"),
            ("weight", of(16, 2048, 65536), "outputs from 1 to 65535: 65536"),
            ("weight", of(1, 2048, 1536), "experts from 2"),
            ("loads", of(16, dtype=I32), "loads of dtype int64"),
            ("loads", of(15, dtype=I64), "loads of shape"),
            ("scale", of(16, 1536), "scales with int8 rows only"),
            ("output_dtype", I32, "output_dtype None or"),
        ],
    ),
    (
        moe.grouped_matmul,
        {
            "rows": of(32, 2048, dtype=I8), "weight": of(16, 2048, 1536, dtype=I8), "loads": of(16, dtype=I64),
            "scale": of(16, 1536), "row_scale": of(32, dtype=F32), "output_dtype": BF16,
        },
        [
            ("scale", None, "scale and row_scale for"),
            ("scale", of(16, 1536, dtype=F32), "scale of dtype bfloat16"),
            ("scale", of(1536), "scale of shape"),
            ("row_scale", of(32), "row_scale of dtype float32"),
            ("row_scale", of(31, dtype=F32), "row_scale of shape"),
            ("output_dtype", F32, "output_dtype of int8 rows among"),
            ("output_dtype", I32, "no scales where the output is int32"),
        ],
    ),
    (
        moe.finalize_routing,
        {"rows": of(32, 2048), "weights": of(4, 8, dtype=F32), "row_of": of(32, dtype=I32)},
        [
            ("rows", of(31, 2048), r"rows of shape \[32, any\]"),
            ("rows", of(32, 2048, dtype=I8), "rows of dtype"),
            ("weights", of(4, 8, dtype=F16), "weights of dtype float32 or bfloat16"),
            ("row_of", of(32, dtype=I64), "row_of of dtype int32"),
        ],
    ),
    (
        dispatch.dispatch,
        {
            "hidden": of(8, 7168), "expert_ids": of(8, 8, dtype=I32), "group": GROUP, "live": of(8, dtype=BOOL),
        },
        [
            ("hidden", of(8, 7168, dtype=F32), "hidden of dtype"),
            ("hidden", of(8, 512), "dim from 1024 to 8192: 512"),
            ("hidden", of(513, 7168), "tokens from 1 to 512: 513"),
            ("expert_ids", of(8, 8, dtype=I64), "expert_ids of dtype int32"),
            ("expert_ids", of(8, 17, dtype=I32), "experts per token from 1 to 16: 17"),
            ("live", of(8, dtype=I32), "live of dtype bool"),
            ("live", of(7, dtype=BOOL), "live of shape"),
            ("group", dispatch.ExpertGroup("experts", 1, 0, 256), "ranks from 2 to 768: 1"),
            ("group", dispatch.ExpertGroup("experts", 16, 16, 256), "the rank from 0 to 15: 16"),
            ("group", dispatch.ExpertGroup("experts", 16, 0, 250), "experts to be a multiple of 16 ranks: 250"),
            ("group", dispatch.ExpertGroup("", 16, 0, 256), "the length of the group's name from 1 to 127: 0"),
            ("group", dispatch.ExpertGroup("experts", 16, 0, 1040), "experts from 1 to 1024: 1040"),
        ],
    ),
    (
        dispatch.combine,
        {
            "rows": of(1024, 7168), "expert_ids": of(8, 8, dtype=I32), "weights": of(8, 8, dtype=F32),
            "dispatched": SENT, "group": GROUP,
        },
        [
            ("rows", of(512, 7168), r"rows of shape \[1024, any\]"),
            ("rows", of(1024, 7168, dtype=I8), "rows of dtype"),
            ("weights", of(8, 8), "weights of dtype float32"),
            ("expert_ids", of(4, 8, dtype=I32), r"rows of shape \[512, any\]"),
        ],
    ),
    (
        linear.linear,
        {"x": of(4, 7168), "weight": of(1536, 7168)},
        [
            ("x", of(4, 3584), "weight of shape"),
            ("x", of(4, 7168, dtype=I8), "x of dtype"),
            ("weight", of(1536, 7168, dtype=F32), "weight of the dtype of x"),
        ],
    ),
    (
        linear.transpose_batchmatmul,
        {"x": of(4, 64, 128), "weight": of(64, 128, 512)},
        [
            ("x", of(4, 64, 100), "weight of shape"),
            ("x", of(4, 32, 128), "weight of shape"),
            ("weight", of(64, 128, 500), "outputs modulo 16 from 0 to 0: 4"),
            ("weight", of(64, 128, 512, dtype=F16), "weight of the dtype of x"),
        ],
    ),
    (
        quant.dynamic_quant,
        {"x": of(4, 7168)},
        [("x", of(7168), "rank 2 to 8"), ("x", of(4, 7168, dtype=F32), "x of dtype bfloat16 or float16")],
    ),
    (
        quant.quant_matmul,
        {
            "x": of(4, 7168, dtype=I8), "weight": of(7168, 1536, dtype=I8), "weight_scale": of(1536),
            "x_scale": of(4, dtype=F32), "bias": of(1536),
        },
        [
            ("x", of(4, 7168), "x of dtype int8"),
            ("x", of(1, 4, 7168, dtype=I8), "x of shape"),
            ("weight", of(3584, 1536, dtype=I8), "weight of shape"),
            ("weight", of(7168, 65536, dtype=I8), "outputs from 1 to 65535: 65536"),
            ("weight_scale", of(1536, dtype=F16), "weight_scale of dtype float32 or bfloat16"),
            ("weight_scale", of(1), "weight_scale of shape"),
            ("x_scale", of(4), "x_scale of dtype float32"),
            ("x_scale", of(4, 1, dtype=F32), "x_scale of shape"),
            ("bias", of(1536, dtype=F16), "bias of dtype"),
            ("output_dtype", F32, "output_dtype among"),
            ("output_dtype", F16, "weight_scale of dtype float32: torch.bfloat16"),
        ],
    ),
    (
        quant.dequant_swiglu_quant,
        {
            "x": of(32, 4096, dtype=I32), "weight_scale": of(16, 4096, dtype=F32), "x_scale": of(32, dtype=F32),
            "loads": of(16, dtype=I64),
        },
        [
            ("x", of(32, 4096), "x of dtype int32"),
            ("x", of(32, 4160, dtype=I32), "multiple of 128: 4160"),
            ("x", of(32, 21120, dtype=I32), "the last size of x from 128 to 20992: 21120"),
            ("weight_scale", of(16, 4096), "weight_scale of dtype float32"),
            ("weight_scale", of(15, 4096, dtype=F32), "weight_scale of shape"),
            ("x_scale", of(31, dtype=F32), "x_scale of shape"),
            ("loads", of(16, dtype=I32), "loads of dtype int64"),
        ],
    ),
    (
        weights.to_nz,
        {"weight": of(1536, 7168)},
        [
            ("weight", of(7168), "weight of rank 2 to 3"),
            ("weight", of(1536, 7168, dtype=F32), "weight of dtype"),
            ("weight", of(1530, 7168), "rows to be a multiple of 16: 1530"),
            ("weight", of(1536, 7160), "columns to be a multiple of 16: 7160"),
            ("weight", of(1536, 7152, dtype=I8), "columns to be a multiple of 32: 7152"),
        ],
    ),
]  # fmt: skip
REFUSALS = [
    pytest.param(function, {**arguments, name: value}, words, id=f"{function.__name__}-{name}-{number}")
    for function, arguments, changes in CONTRACTS
    for number, (name, value, words) in enumerate(changes)
]


@pytest.mark.parametrize(("function", "arguments", "words"), REFUSALS)
def test_what_is_not_documented_is_refused(function, arguments, words) -> None:
    with pytest.raises(ValueError, match=f"^(npu_\\w+|rotate|MatMul) needs .*{words}"):
        function(**arguments)


@pytest.mark.parametrize(("function", "arguments", "changes"), CONTRACTS, ids=lambda one: getattr(one, "__name__", ""))
def test_what_is_documented_passes_the_checks(function, arguments, changes) -> None:
    try:
        function(**arguments)
    except AttributeError as reached:  # the operator itself, which only torch-npu has
        assert "npu" in str(reached) or "air" in str(reached)


def caches(*shape: int) -> dict[str, Tensor]:
    return {"key_cache": of(*shape), "value_cache": of(*shape)}


def latent_caches(blocks: int, block_size: int) -> dict[str, Tensor]:
    return {"latent_cache": of(blocks, block_size, 1, 512), "rope_key_cache": of(blocks, block_size, 1, 64)}


SIZES = [
    (attention.paged_decode_attention, {**PAGED, **changes}, words)
    for changes, words in [
        (caches(64, 600, 8, 128), "block_size to be a multiple of 16: 600"),
        (caches(64, 528, 8, 128), "block_size from 16 to 512: 528"),
        (caches(2**14, 128, 8, 128), "key_cache of less than 2\\*\\*31 elements"),
        ({"query": of(4, 32, 120), **caches(64, 128, 8, 120)}, "dim to be a multiple of 16: 120"),
        ({"query": of(4, 32, 528), **caches(64, 128, 8, 528)}, "dim from 16 to 512: 528"),
        (caches(64, 128, 0, 128), "the number of heads over kv_heads"),
        ({"query": of(4, 128, 128), **caches(64, 128, 1, 128)}, "heads per kv head from 1 to 64: 128"),
        ({"query": of(4, 256, 512), **caches(64, 128, 128, 512)}, "kv_heads \\* dim from 1 to 65535: 65536"),
        (
            {"query": of(8, 32, 128), **caches(64, 16, 8, 128)},
            "block_size with several tokens per request to be a multiple of 128: 16",
        ),
        ({"query": of(8, 256, 256), **caches(64, 128, 4, 256)}, "heads \\* dim from 1 to 65534: 65536"),
    ]
] + [
    (attention.mla_decode_attention, {**LATENT, **changes}, words)
    for changes, words in [
        ({"query_latent": of(4, 48, 512), "query_rope": of(4, 48, 64)}, "the number of heads among .*128: 48"),
        (latent_caches(64, 64), "block_size among 16, 128: 64"),
        (latent_caches(2**15, 128), "latent_cache of less than 2\\*\\*31 elements"),
    ]
]


@pytest.mark.parametrize(("function", "arguments", "words"), SIZES)
def test_attention_has_its_sizes(function, arguments, words) -> None:
    with pytest.raises(ValueError, match=f"^npu_\\w+ needs {words}"):
        function(**arguments)


def test_the_mask_of_several_tokens_is_made_before_a_graph() -> None:
    with pytest.raises(ValueError, match=r"call ops\.npu\.library\.load first: meta"):
        library.causal_mask(torch.device("meta"))


def test_the_package_needs_no_torch_npu() -> None:
    program = (
        "import sys, omni_engine.ops.npu as npu, pkgutil, importlib\n"
        "for module in pkgutil.iter_modules(npu.__path__): importlib.import_module(f'{npu.__name__}.{module.name}')\n"
        "sys.exit(any(name in sys.modules for name in ('torch_npu', 'torchair')))"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == 0


def test_a_missing_torch_npu_says_what_to_install() -> None:
    if importlib_has("torch_npu"):
        pytest.skip("torch-npu is installed")
    with pytest.raises(ImportError, match="the NPU backend needs torch-npu"):
        library.load(torch.device("cpu"))


def importlib_has(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None
