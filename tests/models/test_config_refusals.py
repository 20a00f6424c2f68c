"""What parse_config refuses, by key and value."""

from __future__ import annotations

from typing import Any

import pytest

from omni_engine.models.config_parser import parse_config

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "vocab_size": 100,
}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "sliding_window": None}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"]}
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"]}
QWEN3_MOE = LLAMA | {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 8, "num_experts_per_tok": 2}
DEEPSEEK = LLAMA | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
}
DEEPSEEK_V32 = DEEPSEEK | {"architectures": ["DeepseekV32ForCausalLM"], "index_topk": 64}
GLM = DEEPSEEK_V32 | {"architectures": ["GlmMoeDsaForCausalLM"]}
DEEPSEEK_V2 = DEEPSEEK | {"architectures": ["DeepseekV2ForCausalLM"], "topk_method": "group_limited_greedy"}


def yarn(**fields: Any) -> dict[str, Any]:
    return {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, **fields}}


# (config, what is changed, words the message must hold)
WRONG_TYPES: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    (LLAMA, {"hidden_size": "64"}, ["hidden_size", "integer", "'64'"]),
    (LLAMA, {"hidden_size": 64.0}, ["hidden_size", "integer", "64.0"]),
    (LLAMA, {"hidden_size": True}, ["hidden_size", "integer", "True"]),
    (LLAMA, {"hidden_size": -1}, ["hidden_size", "integer", "-1"]),
    (LLAMA, {"hidden_size": None}, ["hidden_size", "missing", "None"]),
    (LLAMA, {"num_hidden_layers": 0}, ["num_hidden_layers", "0"]),
    (LLAMA, {"num_hidden_layers": 10**9}, ["num_hidden_layers", "4096"]),
    (LLAMA, {"vocab_size": 2**40}, ["vocab_size"]),
    (LLAMA, {"rms_norm_eps": "1e-5"}, ["rms_norm_eps", "number", "'1e-5'"]),
    (LLAMA, {"rms_norm_eps": float("nan")}, ["rms_norm_eps", "finite", "nan"]),
    (LLAMA, {"rms_norm_eps": 0}, ["rms_norm_eps", "greater than 0"]),
    (LLAMA, {"attention_bias": "no"}, ["attention_bias", "true or false", "'no'"]),
    (LLAMA, {"tie_word_embeddings": 1}, ["tie_word_embeddings", "true or false"]),
    (LLAMA, {"eos_token_id": ["a"]}, ["eos_token_id", "list of integers"]),
    (LLAMA, {"eos_token_id": -5}, ["eos_token_id", "-5"]),
    (LLAMA, {"rope_theta": "big"}, ["rope_theta", "'big'"]),
    (LLAMA, {"rope_theta": 0}, ["rope_theta", "0"]),
    (LLAMA, {"rope_scaling": [1]}, ["rope_scaling", "object", "[1]"]),
    (LLAMA, {"architectures": "LlamaForCausalLM"}, ["architectures", "list"]),
    (LLAMA, {"architectures": []}, ["architectures"]),
    (LLAMA, {"architectures": None}, ["architectures", "None"]),
    (LLAMA, {"dtype": "int8"}, ["dtype", "float32, bfloat16, float16", "'int8'"]),
    (LLAMA, {"torch_dtype": 16}, ["torch_dtype", "string", "16"]),
    (LLAMA, {"head_dim": 15}, ["even", "15"]),
    (LLAMA, {"num_key_value_heads": 3}, ["num_key_value_heads", "divisor", "4", "3"]),
    (LLAMA, {"num_attention_heads": 7, "num_key_value_heads": 7}, ["hidden_size", "divisible", "7"]),
    (QWEN2, {"layer_types": ["full_attention"]}, ["layer_types", "num_hidden_layers = 2"]),
    (QWEN2, {"layer_types": "full"}, ["layer_types", "list of strings"]),
    (QWEN3_MOE, {"num_experts_per_tok": 9}, ["num_experts_per_tok", "8", "9"]),
    (QWEN3_MOE, {"num_local_experts": 4}, ["num_local_experts", "equal", "4"]),
    (DEEPSEEK, {"n_group": 3}, ["n_group", "divisor", "16", "3"]),
    (DEEPSEEK, {"topk_group": 5}, ["topk_group", "at most n_group 4", "5"]),
    (DEEPSEEK, {"n_group": 16, "topk_group": 8}, ["n_group", "two of the 16", "16"]),
    (DEEPSEEK, {"topk_group": 1, "num_experts_per_tok": 5}, ["topk_group", "num_experts_per_tok 5"]),
    (DEEPSEEK, {"num_experts_per_tok": 17}, ["num_experts_per_tok", "17"]),
    (DEEPSEEK_V2, {"num_experts_per_tok": None}, ["num_experts_per_tok", "None"]),
    (DEEPSEEK, {"q_lora_rank": 0}, ["q_lora_rank", "0"]),
    (DEEPSEEK_V32, {"index_topk": 0}, ["index_topk", "0"]),
    (DEEPSEEK_V32, {"index_n_heads": "8"}, ["index_n_heads", "integer", "'8'"]),
    (DEEPSEEK_V32, {"index_head_dim": 32}, ["index_head_dim", "qk_rope_head_dim 64", "32"]),
    (DEEPSEEK_V32, {"mlp_layer_types": ["sparse"]}, ["mlp_layer_types", "num_hidden_layers"]),
]
NOT_IMPLEMENTED: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    (LLAMA, {"hidden_act": "gelu"}, ["hidden_act", "silu", "'gelu'"]),
    (LLAMA, {"rope_scaling": {"type": "longrope", "factor": 2}}, ["type", "yarn", "'longrope'"]),
    (LLAMA, {"rope_scaling": {"rope_type": "su"}}, ["rope_type", "'su'"]),
    (LLAMA, {"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, ["'mrope'"]),
    (LLAMA, {"rope_scaling": {"type": "default", "mrope_section": [1]}}, ["mrope_section", "[1]"]),
    (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 2, "alpha": 1000}}, ["alpha", "1000"]),
    (LLAMA, {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2}}, ["type", "'linear'"]),
    (LLAMA, {"rope_scaling": {"type": "linear"}}, ["factor", "missing"]),
    (LLAMA, {"rope_scaling": {"factor": 2}}, ["rope_type"]),
    (LLAMA, {"rope_scaling": {"type": "linear", "factor": 0.5}}, ["factor", "at least 1", "0.5"]),
    (LLAMA, {"rope_scaling": {"rope_type": "llama3", "factor": 2}}, ["low_freq_factor", "missing"]),
    (
        LLAMA,
        {"rope_scaling": {"rope_type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 4}},
        ["high_freq_factor", "greater than low_freq_factor"],
    ),
    (LLAMA, yarn(beta_fast="x"), ["beta_fast", "'x'"]),
    (LLAMA, yarn(partial_rotary_factor=0.5), ["partial_rotary_factor", "0.5"]),
    (LLAMA, {"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
    (LLAMA, {"rope_parameters": {"full_attention": {"rope_theta": 1}}}, ["rope_parameters", "full_attention"]),
    (LLAMA, {"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping", "50.0"]),
    (LLAMA, {"final_logit_softcapping": 30.0}, ["final_logit_softcapping", "30.0"]),
    (LLAMA, {"alibi": True}, ["alibi", "True"]),
    (LLAMA, {"use_qk_norm": True}, ["use_qk_norm", "True"]),
    (LLAMA, {"sliding_window": 100}, ["sliding_window", "100"]),
    (LLAMA, {"layer_types": ["sliding_attention"] * 2}, ["layer_types", "sliding"]),
    (LLAMA, {"num_local_experts": 8}, ["num_local_experts", "8"]),
    (LLAMA, {"kv_lora_rank": 8}, ["kv_lora_rank", "8"]),
    (LLAMA, {"qkv_bias": True}, ["qkv_bias", "True"]),
    (LLAMA, {"residual_multiplier": 0.22}, ["residual_multiplier", "0.22"]),
    (MISTRAL, {"attention_bias": True}, ["attention_bias", "True"]),
    (MISTRAL, {"sliding_window": 0}, ["sliding_window", "0"]),
    (QWEN2, {"attention_bias": False}, ["attention_bias", "False"]),
    (QWEN2, {"layer_types": ["full_attention", "linear_attention"]}, ["layer_types", "linear_attention"]),
    (QWEN2, {"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types", "sliding_window"]),
    (QWEN2, {"mlp_bias": True}, ["mlp_bias", "True"]),
    (QWEN2, {"dual_chunk_attention_config": {"chunk_size": 1}}, ["dual_chunk_attention_config"]),
    (QWEN3, {"sliding_window_pattern": 4}, ["sliding_window_pattern", "4"]),
    (QWEN3_MOE, {"shared_expert_intermediate_size": 32}, ["shared_expert_intermediate_size", "32"]),
    (DEEPSEEK, {"scoring_func": "softmax"}, ["scoring_func", "sigmoid", "'softmax'"]),
    (DEEPSEEK, {"topk_method": "greedy"}, ["topk_method", "noaux_tc", "'greedy'"]),
    (DEEPSEEK, {"index_topk": 2048}, ["index_topk", "2048"]),
    (DEEPSEEK, {"mlp_bias": True}, ["mlp_bias", "True"]),
    (DEEPSEEK_V32, {"q_lora_rank": None}, ["q_lora_rank", "indexer", "None"]),
    (GLM, {"q_lora_rank": None}, ["q_lora_rank", "indexer", "None"]),
    (DEEPSEEK_V32, {"rope_interleave": False}, ["rope_interleave", "False"]),
    (DEEPSEEK_V32, {"layer_types": ["full_attention"]}, ["layer_types", "indexed_attention"]),
    (DEEPSEEK_V32, {"sliding_window": 8}, ["sliding_window", "8"]),
    (GLM, {"indexer_types": ["shared", "full"]}, ["indexer_types", "the first one full"]),
    (GLM, {"indexer_types": ["full"]}, ["indexer_types", "2 layers"]),
    (GLM, {"indexer_types": ["full", "half"]}, ["indexer_types", "half"]),
    (GLM, {"index_topk_freq": 4, "index_skip_topk_offset": 0}, ["index_skip_topk_offset", "the first one full"]),
    (GLM, {"index_topk_pattern": "FSSS"}, ["index_topk_pattern", "FSSS"]),
    (GLM, {"index_topk_pattern": "FX"}, ["index_topk_pattern", "FX"]),
    (DEEPSEEK_V2, {"scoring_func": "sigmoid"}, ["scoring_func", "softmax", "'sigmoid'"]),
    (DEEPSEEK_V2, {"topk_method": "noaux_tc"}, ["topk_method", "greedy", "'noaux_tc'"]),
    (DEEPSEEK_V2, {"norm_topk_prob": True}, ["norm_topk_prob", "True"]),
    (LLAMA, {"text_config": {"hidden_size": 8}}, ["text_config", "multimodal"]),
    (LLAMA, {"vision_config": {"hidden_size": 8}}, ["vision_config", "multimodal"]),
]


@pytest.mark.parametrize(
    ("base", "change", "words"),
    WRONG_TYPES + NOT_IMPLEMENTED,
    ids=lambda value: ",".join(value) if isinstance(value, dict) and len(value) < 3 else "",
)
def test_refused_by_key_and_value(base: dict[str, Any], change: dict[str, Any], words: list[str]) -> None:
    parse_config(base)  # the control: without the change it is read
    with pytest.raises(ValueError) as caught:
        parse_config(base | change)
    message = str(caught.value)
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize(
    ("base", "change"),
    [
        (LLAMA, {"final_logit_softcapping": None, "alibi": False, "logits_scaling": 1.0, "pretraining_tp": 4}),
        (LLAMA, {"partial_rotary_factor": 1.0, "hidden_act": "swish", "sliding_window": 512}),
        (LLAMA, {"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 1}}),
        (LLAMA, {"quantization_config": None, "text_config": None, "dtype": "torch.bfloat16"}),
        (QWEN2, {"attention_bias": True}),
        (QWEN3, {"use_qk_norm": True}),
        (DEEPSEEK, {"ep_size": 8, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}),
        (DEEPSEEK_V2, {"norm_topk_prob": False, "scoring_func": "softmax"}),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) and len(value) < 5 else "",
)
def test_neutral_values_are_accepted(base: dict[str, Any], change: dict[str, Any]) -> None:
    parse_config(base | change)


def test_an_unsupported_architecture_is_named_with_the_supported_ones() -> None:
    with pytest.raises(ValueError, match=r"DeepseekV3ForCausalLM, .*LlamaForCausalLM.*: BertForQuestionAnswering$"):
        parse_config(LLAMA | {"architectures": ["BertForQuestionAnswering"]})


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"quantization_config": {"config_groups": {}}}, "compressed-tensors"),
        ({"compression_config": {"format": "pack"}}, "compressed-tensors"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4"),
        ({"quantization_config": {"quant_method": "fbgemm_fp8"}}, "fbgemm_fp8"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
        ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}, "modelopt"),
        ({"quantization_config": {"quant_algo": "NVFP4"}}, "modelopt"),
        ({"quantization_config": {"quant_method": "fp8"}}, "one scale per tensor"),
        ({"quantize": "w8a8_dynamic"}, "msModelSlim"),
        ({"quantization_config": {"something": 1}}, "without a name"),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [8, 8], "fmt": "e5m2"}},
            "e5m2",
        ),
        (
            {
                "quantization_config": {
                    "quant_method": "fp8",
                    "weight_block_size": [8, 8],
                    "activation_scheme": "static",
                }
            },
            "static",
        ),
    ],
)
def test_other_quantizations_are_refused_by_name_with_what_is_supported(change: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match="weight_block_size") as caught:
        parse_config(LLAMA | change)
    assert name in str(caught.value)


@pytest.mark.parametrize("block", [[128], [128, 0], [128, "128"], 128, [True, 8]])
def test_a_wrong_block_size_is_named(block: Any) -> None:
    with pytest.raises(ValueError, match="weight_block_size must be a list of two positive integers"):
        parse_config(LLAMA | {"quantization_config": {"quant_method": "fp8", "weight_block_size": block}})
