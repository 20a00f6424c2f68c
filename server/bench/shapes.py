"""Models that are a config alone: `SHAPES`, for benchmarks of random weights."""

from __future__ import annotations

from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    # DeepSeek-V3's kind of layers, all of them dense, at the size of a small Llama: latent attention over 12 layers of
    # width 768, and one layer for multi-token prediction. 157 million parameters, and 10 in the prediction layer.
    "160m": {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 32000,
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "num_key_value_heads": 12, "q_lora_rank": 384, "kv_lora_rank": 256, "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32, "v_head_dim": 64, "n_routed_experts": None, "num_nextn_predict_layers": 1,
        "max_position_embeddings": 4096, "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
        "bos_token_id": 0, "eos_token_id": 1, "dtype": "bfloat16",
    },
}  # fmt: skip
