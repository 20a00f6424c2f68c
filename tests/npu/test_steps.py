"""A whole decode step through the NPU's ops, with reference kernels on the CPU, against the plain one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from omni_engine.engine.config import EngineArgs, EngineConfig
from omni_engine.engine.graph_runner import GraphKey, GraphRunner

QWEN3_MOE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 128, "intermediate_size": 256,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32, "num_hidden_layers": 2, "vocab_size": 512,
    "max_position_embeddings": 1024, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
    "norm_topk_prob": True, "torch_dtype": "bfloat16",
}  # fmt: skip
DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": 128,
    "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 2,
    "first_k_dense_replace": 1, "kv_lora_rank": 512, "q_lora_rank": 96, "qk_nope_head_dim": 32, "qk_rope_head_dim": 64,
    "v_head_dim": 48, "n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2,
    "n_shared_experts": 1, "moe_intermediate_size": 64, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "vocab_size": 512, "max_position_embeddings": 1024,
    "num_nextn_predict_layers": 0, "torch_dtype": "bfloat16",
}  # fmt: skip
BLOCK_SIZE, BLOCKS, REQUESTS = 128, 6, 3


def step(config: EngineConfig, packed: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The logits of three requests with 5, 130 and 200 tokens stored, and the caches behind the step."""
    from omni_engine.engine.build import cache_spec, load_models
    from omni_engine.engine.row_state import RowTable
    from omni_engine.kvcache.tensors import allocate_kv_tensors
    from omni_engine.models.npu_weights import pack_for_npu
    from omni_engine.ops.table import npu_table

    device = torch.device("cpu")
    models = load_models(config, device)
    if packed:
        pack_for_npu(models.decoder)
        models.bind(npu_table())
    caches = allocate_kv_tensors(cache_spec(config), BLOCKS, BLOCK_SIZE, device)
    generator = torch.Generator().manual_seed(1)
    for part in (part for cache in caches for part in cache):
        part.copy_(torch.randn(part.shape, generator=generator))
    state = RowTable(REQUESTS, 2, device).state
    state.last_token[:REQUESTS] = torch.tensor([7, 70, 500])
    state.position[:REQUESTS] = torch.tensor([5, 130, 200])
    state.block_table[:REQUESTS] = torch.tensor([[1, 0], [2, 3], [4, 5]], dtype=torch.int32)
    runner = GraphRunner(models.decoder, state, caches)
    runner.allocate((REQUESTS,))
    key = GraphKey(REQUESTS, 1, "split")
    inputs = runner.inputs(key)
    inputs.rows.copy_(torch.arange(REQUESTS))
    with torch.inference_mode():
        logits = runner.program(key)(*inputs)
    return logits, [part for cache in caches for part in cache]


@pytest.mark.parametrize("raw", [QWEN3_MOE, DEEPSEEK_V3], ids=lambda raw: raw["model_type"])
def test_a_step_through_the_npus_ops_is_the_plain_step(references, raw: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = EngineConfig.from_args(EngineArgs(model=str(tmp_path), load_format="dummy", skip_tokenizer_init=True))
    expected, expected_caches = step(config, packed=False)
    logits, caches = step(config, packed=True)
    error = float((logits - expected).norm() / expected.norm())
    assert error < 0.03, error
    for cache, wanted in zip(caches, expected_caches, strict=True):
        assert float((cache - wanted).float().norm() / wanted.float().norm()) < 0.03
    shifted = float((logits - expected.roll(1, 0)).norm() / expected.norm())
    assert shifted > 0.3, shifted  # what is not equal is far
