"""The floor of a step against numbers worked out by hand for published shapes, and against the models' parameters."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from omni_engine.engine.floor import (
    MachineRates,
    StepCost,
    decode_cost,
    draft_model_cost,
    expected_experts,
    floor_seconds,
    prediction_cost,
    prefill_cost,
)
from omni_engine.models.config_parser import parse_config
from omni_engine.models.layers.mtp import MultiTokenPredictor
from omni_engine.models.layers.placement import Placement
from omni_engine.models.parallel import ParallelLayout
from omni_engine.models.registry import resolve

LLAMA_160M = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_size": 768,
    "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 12,
    "max_position_embeddings": 8192, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024,
    "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
    "head_dim": 128, "max_position_embeddings": 40960, "tie_word_embeddings": True, "dtype": "bfloat16",
}  # fmt: skip
DEEPSEEK_TINY = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 32000, "hidden_size": 512,
    "intermediate_size": 1536, "moe_intermediate_size": 256, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 8, "n_shared_experts": 1, "n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 4,
    "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": True, "first_k_dense_replace": 1,
    "kv_lora_rank": 128, "q_lora_rank": 256, "qk_rope_head_dim": 32, "qk_nope_head_dim": 64, "v_head_dim": 64,
    "max_position_embeddings": 8192, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
SPARSE_TINY = {
    **DEEPSEEK_TINY, "architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32", "index_n_heads": 4,
    "index_head_dim": 64, "index_topk": 32,
}  # fmt: skip
PREDICTING_TINY = {**DEEPSEEK_TINY, "num_nextn_predict_layers": 1}
QWEN3_MOE_TINY = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 32000, "hidden_size": 512,
    "intermediate_size": 1536, "moe_intermediate_size": 256, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64, "num_experts": 16, "num_experts_per_tok": 4, "norm_topk_prob": True,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "max_position_embeddings": 8192, "tie_word_embeddings": False,
    "dtype": "bfloat16",
}  # fmt: skip
RATES = MachineRates(32e9, 437e9, "bfloat16", "a CPU", 2)


def parameter_bytes(config, dtype=torch.bfloat16):
    """(all parameters but the embedding, the embedding), of the model that a checkpoint's config builds."""
    model = resolve(config.architecture).load_class()(
        config, ParallelLayout(), dtype=dtype, device=torch.device("meta")
    )
    own = 0 if config.tie_word_embeddings else model.embedding.weight.nbytes
    return sum(tensor.nbytes for tensor in model.parameters()) - own, own


@pytest.mark.parametrize(
    ("raw", "weight_bytes", "kv_bytes_per_token"),
    [(LLAMA_160M, 276e6, 36864), (QWEN3_06B, 1192e6, 114688), (DEEPSEEK_TINY, 144e6, 2560)],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else None,
)
def test_bytes_of_published_shapes(raw, weight_bytes, kv_bytes_per_token):
    config = parse_config(raw)
    cost = decode_cost(config, 32, 64)
    assert cost.weight_bytes == pytest.approx(weight_bytes, rel=0.005)
    # 64 stored tokens read and one written, by each of 32 requests
    assert cost.kv_bytes == 32 * 65 * kv_bytes_per_token


@pytest.mark.parametrize(
    "raw", [LLAMA_160M, QWEN3_06B, DEEPSEEK_TINY, SPARSE_TINY, QWEN3_MOE_TINY], ids=lambda raw: raw["model_type"]
)
def test_a_step_that_hits_every_expert_reads_every_parameter_but_the_embedding_once(raw):
    config = parse_config(raw)
    read, embedding = parameter_bytes(config)
    cost = decode_cost(config, 4096, 64)  # of 16 experts none is left out
    assert cost.weight_bytes == pytest.approx(read, rel=1e-12)
    assert cost.other_bytes == (4096 * config.hidden_size * 2 if embedding else 0)


@pytest.mark.parametrize(
    "overrides",
    [
        {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},  # biases of the query, key and value
        {"attention_bias": True, "mlp_bias": True},
        {"num_key_value_heads": 3, "dtype": "float32"},
    ],
    ids=["qkv bias", "all biases", "grouped, float32"],
)
def test_biases_and_norms_are_read_too(overrides):
    config = parse_config({**LLAMA_160M, **overrides})
    read, _ = parameter_bytes(config, getattr(torch, config.dtype))
    assert decode_cost(config, 1, 0).weight_bytes == read


@pytest.mark.parametrize("q_lora_rank", [256, None])
def test_latent_attention_with_and_without_a_low_rank_query(q_lora_rank):
    config = parse_config(
        {**DEEPSEEK_TINY, "q_lora_rank": q_lora_rank, "n_routed_experts": None, "attention_bias": True}
    )
    assert decode_cost(config, 1, 0).weight_bytes == parameter_bytes(config)[0]


def test_the_weights_of_another_type_than_the_checkpoints():
    config = parse_config(LLAMA_160M)
    half, full = decode_cost(config, 1, 100), decode_cost(config, 1, 100, dtype="float32", kv_dtype="bfloat16")
    assert full.weight_bytes == 2 * half.weight_bytes
    assert full.kv_bytes == half.kv_bytes


def test_flops_of_a_dense_decode_step_by_hand():
    config = parse_config(LLAMA_160M)
    layer = 4 * 768 * 768 + 3 * 768 * 3072
    attention = 12 * 4 * 768 * 65  # scores and sums over 64 stored tokens and the new one, in 12 layers
    expected = 2 * (12 * layer + 32000 * 768) + attention
    assert decode_cost(config, 1, 64).flops == expected
    assert decode_cost(config, 8, 64).flops == 8 * expected
    assert 2 * (12 * layer + 32000 * 768) == pytest.approx(276e6, rel=0.01)


def test_flops_of_a_latent_decode_step_are_those_of_absorbed_attention():
    config = parse_config(DEEPSEEK_TINY)
    projections = 512 * (256 + 160) + 256 * 8 * 96 + 8 * 64 * 512 + 8 * 128 * 128
    scores = 2 * 8 * 65 * (128 + 32 + 128)  # latent and rope key, then the weighted sum of latents
    expert, dense, router = 3 * 512 * 256, 3 * 512 * 1536, 16 * 512
    experts = 5 * expert + router  # four routed and a shared one
    expected = 8 * (2 * projections + scores) + 2 * dense + 7 * 2 * experts + 2 * 32000 * 512
    assert decode_cost(config, 1, 64).flops == expected


def test_long_prompts_are_cheaper_with_expanded_latents():
    config = parse_config({**DEEPSEEK_TINY, "n_routed_experts": None, "num_hidden_layers": 1})
    count = 1000
    projections = 512 * (256 + 160) + 256 * 8 * 96 + 8 * 64 * 512 + 8 * 128 * 128
    scores = 2 * 8 * (64 + 32 + 64) * count * (count + 1) // 2
    expected = 2 * count * (projections + 3 * 512 * 1536) + scores + 2 * 32000 * 512
    assert prefill_cost(config, count).flops == expected


def test_expected_experts():
    assert expected_experts(16, 4, 1) == 4
    assert expected_experts(16, 4, 2) == pytest.approx(7)  # 4 + 4 * 12/16
    assert expected_experts(256, 8, 100000) == pytest.approx(256)
    assert expected_experts(8, 8, 1) == 8


def test_routed_experts_are_read_by_expectation():
    config = parse_config(DEEPSEEK_TINY)
    one, two = decode_cost(config, 1, 0), decode_cost(config, 2, 0)
    assert two.weight_bytes - one.weight_bytes == pytest.approx(7 * 3 * 3 * 512 * 256 * 2)


def test_drafts_share_the_stored_tokens_of_their_request():
    config = parse_config(LLAMA_160M)
    plain, drafted = decode_cost(config, 4, 64), decode_cost(config, 4, 64, 3)
    assert drafted.kv_bytes - plain.kv_bytes == 4 * 2 * 36864  # two more written
    assert drafted.weight_bytes == plain.weight_bytes
    attention = 12 * 4 * 768
    assert drafted.flops == 3 * plain.flops + 4 * attention * (1 + 2)  # a later token attends to those before it


def predictor_bytes(config):
    """The parameters of a config's prediction layer, embedding and head, which it shares, left out."""
    layout, device = ParallelLayout(), torch.device("meta")
    model = resolve(config.architecture).load_class()(config, layout, dtype=torch.bfloat16, device=device)
    predictor = MultiTokenPredictor(model, Placement(layout, torch.bfloat16, device, model.ops))
    shared = {id(parameter) for parameter in model.parameters()}
    return sum(tensor.nbytes for tensor in predictor.parameters() if id(tensor) not in shared)


@pytest.mark.parametrize(
    "overrides",
    [{}, {"n_routed_experts": None}, {"tie_word_embeddings": True}, {"attention_bias": True, "q_lora_rank": None},
     {k: SPARSE_TINY[k] for k in ("architectures", "model_type", "index_n_heads", "index_head_dim", "index_topk")}],
    ids=["routed", "dense", "tied", "biases", "sparse"],
)  # fmt: skip
def test_each_draft_reads_the_prediction_layer_and_the_head_once(overrides):
    config = parse_config({**PREDICTING_TINY, **overrides})
    head = 32000 * 512 * 2
    pass_ = predictor_bytes(config) + head
    for num_drafts in (1, 2, 4):  # of 16 experts none is left out by so many requests
        cost = prediction_cost(config, 4096, 64, num_drafts)
        assert cost.weight_bytes == pytest.approx(num_drafts * pass_, rel=1e-12)
        rows = 4096 * (1 + num_drafts + num_drafts - 1)
        assert cost.other_bytes == (0 if config.tie_word_embeddings else rows * 512 * 2)


def test_the_prediction_layer_stores_what_the_step_computed_and_reads_what_it_stored():
    config = parse_config(PREDICTING_TINY)
    token = 160 * 2  # a latent and a rope key
    assert prediction_cost(config, 3, 100, 1).kv_bytes == 3 * (100 + 2) * token
    # three drafts: all four tokens of the step, then the first two drafts, behind 2 that were accepted on average
    expected = (100 + 4) + (103 + 1) + (104 + 1)
    assert prediction_cost(config, 3, 100, 3, 2.0).kv_bytes == 3 * expected * token
    decoding = decode_cost(config, 3, 100, 4)
    assert decoding.kv_bytes == 3 * 104 * 8 * token  # of the decoder's own layers alone
    both = decoding + prediction_cost(config, 3, 100, 3, 2.0)
    assert both.kv_bytes == 3 * (104 * 8 + expected) * token
    assert both.bytes == both.weight_bytes + both.kv_bytes + both.other_bytes


def test_flops_of_drafting_by_hand():
    config = parse_config({**PREDICTING_TINY, "n_routed_experts": None})
    projections = 512 * (256 + 160) + 256 * 8 * 96 + 8 * 64 * 512 + 8 * 128 * 128
    layer = 2 * (2 * 512 * 512 + projections + 3 * 512 * 1536)  # with what joins state and token
    head = 2 * 32000 * 512

    def attention(pairs):
        return 2 * 8 * pairs * (128 + 32 + 128)

    first = 3 * layer + attention(101 + 102 + 103) + head  # the three tokens of the step, one of them with logits
    assert prediction_cost(config, 1, 100, 2).flops == first + layer + attention(102) + head
    assert prediction_cost(config, 5, 100, 1).flops == 5 * (2 * layer + attention(101 + 102) + head)


def test_a_draft_model_begins_with_two_tokens_and_reads_all_its_weights_for_each_draft():
    config = parse_config(LLAMA_160M)
    read, _ = parameter_bytes(config)
    cost = draft_model_cost(config, 2, 64, 3)
    assert cost.weight_bytes == 3 * read
    assert cost.kv_bytes == 2 * 36864 * ((64 + 2) + (66 + 1) + (67 + 1))
    alone = decode_cost(config, 2, 64)
    head, attention = 2 * 32000 * 768, 12 * 4 * 768
    # two tokens of which one has logits, then one and one, each attending to one more
    more = 2 * (-head + attention * (1 + 2 + 3))
    assert cost.flops == 4 * alone.flops + more


def test_a_sliding_window_bounds_what_is_read_and_computed():
    raw = {**LLAMA_160M, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 11}
    windowed, full = parse_config(raw), parse_config({**raw, "sliding_window": None})
    assert decode_cost(windowed, 1, 64).kv_bytes == (10 + 1) * 36864
    assert decode_cost(windowed, 1, 10) == decode_cost(full, 1, 10)  # the new token is the window's eleventh
    difference = decode_cost(full, 1, 64).flops - decode_cost(windowed, 1, 64).flops
    assert difference == 12 * 4 * 768 * (65 - 11)


@pytest.mark.parametrize(("cached", "count"), [(0, 5), (0, 11), (0, 30), (4, 20), (50, 9)])
def test_pairs_of_a_windowed_prompt_are_those_of_its_mask(cached, count):
    raw = {**LLAMA_160M, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 11}
    config = parse_config(raw)
    pairs = sum(min(position + 1, 11) for position in range(cached, cached + count))
    without = replace(config, num_layers=0, sliding_windows=())
    layer = 4 * 768 * 768 + 3 * 768 * 3072
    expected = prefill_cost(without, count, num_cached=cached).flops + 12 * (2 * count * layer + 4 * 768 * pairs)
    assert prefill_cost(config, count, num_cached=cached).flops == expected


def test_sparse_attention_reads_what_it_selects_and_all_of_the_indexers_keys():
    dense, sparse = parse_config(DEEPSEEK_TINY), parse_config(SPARSE_TINY)
    latent, index_key = 8 * 160 * 2, 8 * 64 * 2  # bytes per token
    assert decode_cost(sparse, 3, 1000).kv_bytes == 3 * ((31 + 1) * latent + (1000 + 1) * index_key)
    projections = 64 * (512 + 256 * 4) + 4 * 512
    absorbed, scores = 2 * 8 * (128 + 32 + 128), 2 * 4 * 65
    added = 8 * (2 * projections + 1001 * scores - (1001 - 32) * absorbed)
    assert decode_cost(sparse, 3, 1000).flops - decode_cost(dense, 3, 1000).flops == 3 * added


def test_below_its_selection_sparse_attention_stores_indexer_keys_and_reads_none():
    dense, sparse = parse_config(DEEPSEEK_TINY), parse_config(SPARSE_TINY)
    assert decode_cost(sparse, 1, 31).kv_bytes == decode_cost(dense, 1, 31).kv_bytes + 8 * 64 * 2
    assert decode_cost(sparse, 1, 31).flops == decode_cost(dense, 1, 31).flops + 8 * 2 * 512 * 64
    assert decode_cost(sparse, 1, 31).weight_bytes < decode_cost(sparse, 1, 32).weight_bytes


def test_a_prompt_needs_the_logits_of_its_last_token_only():
    config = parse_config({**LLAMA_160M, "num_hidden_layers": 1})
    layer = 4 * 768 * 768 + 3 * 768 * 3072
    expected = 2 * 2 * 100 * layer + 2 * 4 * 768 * 5050 + 2 * 2 * 32000 * 768
    assert prefill_cost(config, 100, 2).flops == expected


def test_cached_prompt_tokens_are_read_and_not_computed():
    config = parse_config(LLAMA_160M)
    cost = prefill_cost(config, 32, num_cached=512)
    assert cost.kv_bytes == 544 * 36864
    assert cost.flops < 0.2 * prefill_cost(config, 544).flops


def test_the_published_bounds_of_a_small_llama():
    config = parse_config(LLAMA_160M)
    one, many = floor_seconds(decode_cost(config, 1, 64), RATES), floor_seconds(decode_cost(config, 32, 64), RATES)
    assert (one.bound, many.bound) == ("memory", "compute")
    assert one.seconds * 1e3 == pytest.approx(8.7, abs=0.05)
    assert many.seconds * 1e3 == pytest.approx(20.4, abs=0.1)
    assert many.memory_seconds * 1e3 == pytest.approx(11.0, abs=0.1)


def test_a_floor_is_the_larger_of_memory_and_compute_and_communication_on_top():
    rates = MachineRates(100.0, 1000.0, "float32", "a CPU", 1)
    memory = floor_seconds(StepCost(100, 60, 40, 1000, communication_seconds=0.5), rates)
    assert (memory.seconds, memory.bound, memory.memory_seconds, memory.compute_seconds) == (2.5, "memory", 2, 1)
    compute = floor_seconds(StepCost(100, 0, 0, 4000), rates)
    assert (compute.seconds, compute.bound) == (4, "compute")
    assert compute.share(8) == 0.5


def test_the_floor_needs_no_torch():
    code = "import sys, omni_engine.engine.floor; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
