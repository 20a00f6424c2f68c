"""What the config parsers of all families share: sizes, windows, and which keys have no effect or a neutral value."""

from __future__ import annotations

from typing import Any

from .quantization import read_quantization
from .reader import MAX_LAYERS, ConfigReader
from .rope import derived_max_model_len, read_rope

DTYPES = ("float32", "bfloat16", "float16")
ACTIVATIONS = ("silu", "swish")  # two names of one function

# Keys that change nothing about a forward pass here.
INERT = frozenset({
    "architectures", "attention_dropout", "attn_implementation", "auto_map", "aux_loss_alpha", "bad_words_ids",
    "bos_token_id", "chunk_size_feed_forward", "classifier_dropout", "classifier_from_token", "decoder_start_token_id",
    "diversity_penalty", "do_sample", "early_stopping", "embd_pdrop", "ep_size", "exponential_decay_length_penalty",
    "finetuning_task", "hidden_dropout", "id2label", "initializer_range", "is_decoder", "is_matryoshka",
    "is_original_qwen3_reranker", "label2id", "length_penalty", "matryoshka_dimensions", "max_length",
    "max_window_layers", "min_length", "model_max_length", "model_type", "name_or_path", "num_labels",
    "num_return_sequences", "output_attentions", "output_hidden_states", "output_router_logits", "pad_token_id",
    "prefix", "pretraining_tp", "problem_type", "pruned_heads", "quantization_config", "remove_invalid_values",
    "resid_pdrop", "return_dict", "return_dict_in_generate", "rope_parameters", "rope_scaling", "rope_theta",
    "router_aux_loss_coef", "sentence_transformers", "sep_token_id", "seq_aux", "task_specific_params",
    "tokenizer_class", "torchscript", "transformers_version", "typical_p", "unk_token_id", "unsloth_fixed",
    "unsloth_version", "use_cache",
})  # fmt: skip

# Keys that change the computation, with the values (null aside) that leave it as it is implemented.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "alibi": (False,),
    "attention_bias": (False,),
    "attention_chunk_size": (),
    "attention_multiplier": (),
    "attn_logit_softcapping": (0,),
    "attn_temperature_tuning": (False, 0),
    "bias": (False,),
    "clip_qkv": (),
    "dual_chunk_attention_config": (),
    "embedding_multiplier": (1,),
    "embedding_size": (),
    "final_logit_softcapping": (0,),
    "first_k_dense_replace": (0,),
    "global_attn_every_n_layers": (),
    "index_head_dim": (),
    "index_n_heads": (),
    "index_topk": (),
    "interleaved_sliding_window": (),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "kv_lora_rank": (),
    "layer_types": (),
    "llama_4_scaling": (),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "mlp_bias": (False,),
    "moe_intermediate_size": (),
    "n_routed_experts": (0,),
    "n_shared_experts": (0,),
    "no_bias": (True,),
    "no_rope_layer_interval": (0,),
    "no_rope_layers": ([],),
    "num_experts": (0,),
    "num_kv_shared_layers": (0,),
    "num_local_experts": (0,),
    "position_embedding_type": ("rope", "rotary"),
    "qk_layernorm": (False,),
    "qk_norm": (False,),
    "qkv_bias": (False,),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1,),
    "rope_interleave": (False,),
    "rope_interleaved": (False,),
    "scale_depth": (),
    "scale_emb": (1,),
    "shared_expert_intermediate_size": (0,),
    "sliding_window": (),
    "sliding_window_pattern": (),
    "use_bidirectional_attention": (False,),
    "use_mrope": (False,),
    "use_qk_norm": (False,),
    "use_qkv_bias": (False,),
    "use_sliding_window": (False,),
}


def read_sizes(reader: ConfigReader, *, vocab_size: int, max_position: int, kv_heads: int | None) -> dict[str, Any]:
    """Fields of ModelConfig that every decoder has, except attention's. Keyword arguments are the family's defaults;
    `kv_heads` None, or a null in the file: as many as heads."""
    layers = reader.integer("num_hidden_layers", maximum=MAX_LAYERS)
    heads = reader.integer("num_attention_heads")
    if kv_heads is None or "num_key_value_heads" in reader.raw:
        kv_heads = heads
    kv_heads = reader.integer("num_key_value_heads", kv_heads)
    if heads % kv_heads:
        raise reader.error("num_key_value_heads", f"a divisor of num_attention_heads {heads}")
    reader.choice("hidden_act", ACTIVATIONS, "silu")
    reader.choice("hidden_activation", ACTIVATIONS, "silu")
    bos = reader.integers("bos_token_id")
    return {
        "architecture": read_architecture(reader),
        "model_type": reader.string("model_type", ""),
        "vocab_size": reader.integer("vocab_size", vocab_size),
        "hidden_size": reader.integer("hidden_size"),
        "num_layers": layers,
        "intermediate_size": reader.integer("intermediate_size"),
        "rms_norm_eps": reader.number("rms_norm_eps", 1e-6, above=0),
        "max_position_embeddings": reader.integer("max_position_embeddings", max_position),
        "tie_word_embeddings": reader.boolean("tie_word_embeddings", False),
        "dtype": read_dtype(reader),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "quantization": read_quantization(reader.raw),
        "bos_token_id": bos[0] if bos else None,
        "eos_token_ids": reader.integers("eos_token_id"),
    }


def read_architecture(reader: ConfigReader) -> str:
    """The first name in `architectures`."""
    names = reader.strings("architectures")
    if not names:
        raise reader.error("architectures", "a list that names the model's class")
    return names[0]


def read_dtype(reader: ConfigReader) -> str:
    """`dtype`, or its old name torch_dtype; float32 where neither is there."""
    key = "dtype" if reader.get("dtype") is not None else "torch_dtype"
    name = reader.string(key, "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise reader.unsupported(key, f"supported: {', '.join(DTYPES)}")
    return name


def read_head_dim(reader: ConfigReader, default: int | None = None) -> int:
    """head_dim, or `default`, or hidden_size / num_attention_heads."""
    if default is None and reader.get("head_dim") is None:
        hidden, heads = reader.integer("hidden_size"), reader.integer("num_attention_heads")
        if hidden % heads:
            raise reader.error("hidden_size", f"divisible by num_attention_heads {heads} where head_dim is missing")
        default = hidden // heads
    return reader.integer("head_dim", default or 1)


def read_position(reader: ConfigReader, sizes: dict[str, Any], *, dim: int, **kind: bool) -> dict[str, Any]:
    """Fields `rope` and `derived_max_model_len`."""
    max_position = sizes["max_position_embeddings"]
    rope = read_rope(reader, dim=dim, max_position=max_position, **kind)
    return {"rope": rope, "derived_max_model_len": derived_max_model_len(rope, max_position)}


def layer_windows(reader: ConfigReader, num_layers: int, window: int | None, first_sliding: int) -> dict[str, Any]:
    """Field `sliding_windows`: by `layer_types` where there are any, else `window` from layer `first_sliding` on."""
    types = reader.strings("layer_types")
    if types is None:
        slides = [window is not None and layer >= first_sliding for layer in range(num_layers)]
    else:
        if len(types) != num_layers:
            raise reader.error("layer_types", f"a list of num_hidden_layers = {num_layers} names")
        if set(types) - {"full_attention", "sliding_attention"}:
            raise reader.unsupported("layer_types", "supported: full_attention, sliding_attention")
        slides = [kind == "sliding_attention" for kind in types]
        if any(slides) and window is None:
            raise reader.unsupported("layer_types", "sliding_attention needs a sliding_window that is in use")
    return {"sliding_windows": tuple(window if slide else None for slide in slides)}


def finish(reader: ConfigReader) -> None:
    """Refuses what would change the computation, and warns once of keys that nobody knows."""
    reader.require_neutral(NEUTRAL)
    reader.finish(INERT)
