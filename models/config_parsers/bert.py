"""Reads config.json of the BERT, RoBERTa and XLM-RoBERTa families of encoders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import EncoderConfig, ModelConfig, RopeConfig
from .common import INERT, NEUTRAL, read_architecture, read_dtype, read_head_dim
from .quantization import refusal
from .reader import MAX_LAYERS, ConfigReader

_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
_INERT = INERT | {
    "attention_probs_dropout_prob", "classifier_activation", "cross_attention_hidden_size", "directionality",
    "eos_token_id", "gradient_checkpointing", "hidden_dropout_prob", "output_past", "pooler_fc_size",
    "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head", "pooler_type",
    "sbert_ce_default_activation_function", "tie_word_embeddings",
}  # fmt: skip


def parse_bert(raw: Mapping[str, Any]) -> ModelConfig:
    """Positions begin at 0. Defaults: transformers' BertConfig."""
    reader = ConfigReader(raw)
    return _parse(reader, vocab_size=reader.integer("vocab_size", 30_522), first_position=0)


def parse_roberta(raw: Mapping[str, Any]) -> ModelConfig:
    """RoBERTa and XLM-RoBERTa: positions begin behind the padding id. Defaults: transformers' RobertaConfig, but for
    the vocabulary, whose default differs between the two."""
    reader = ConfigReader(raw)
    first_position = reader.integer("pad_token_id", 1, minimum=0) + 1
    return _parse(reader, vocab_size=reader.integer("vocab_size"), first_position=first_position)


def _parse(reader: ConfigReader, *, vocab_size: int, first_position: int) -> ModelConfig:
    if reader.raw.get("quantization_config"):
        raise refusal("of this encoder", "quantization_config", reader.raw["quantization_config"])
    heads = reader.integer("num_attention_heads", 12)
    reader.choice("position_embedding_type", ("absolute",), "absolute")
    activation = reader.choice("hidden_act", tuple(_ACTIVATIONS), "gelu")
    max_position = reader.integer("max_position_embeddings", 512)
    if first_position >= max_position:
        raise reader.error("max_position_embeddings", f"more than the first position {first_position}")
    config = ModelConfig(
        architecture=read_architecture(reader),
        model_type=reader.string("model_type", ""),
        vocab_size=vocab_size,
        hidden_size=reader.integer("hidden_size", 768),
        num_layers=reader.integer("num_hidden_layers", 12, maximum=MAX_LAYERS),
        intermediate_size=reader.integer("intermediate_size", 3072),
        rms_norm_eps=0.0,
        max_position_embeddings=max_position,
        tie_word_embeddings=True,
        dtype=read_dtype(reader),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=read_head_dim(reader),
        rope=RopeConfig(theta=1.0, dim=0),
        encoder=EncoderConfig(
            layer_norm_eps=reader.number("layer_norm_eps", 1e-12, above=0),
            activation=_ACTIVATIONS[activation],
            num_token_types=reader.integer("type_vocab_size", 2),
            first_position=first_position,
        ),
        derived_max_model_len=max_position - first_position,
    )
    reader.require_neutral({**NEUTRAL, "is_decoder": (False,)})
    reader.finish(_INERT)
    return config
