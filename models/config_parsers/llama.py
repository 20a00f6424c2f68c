"""Reads config.json of the Llama and Mistral families."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig
from .common import finish, layer_windows, read_head_dim, read_position, read_sizes
from .reader import ConfigReader


def parse_llama(raw: Mapping[str, Any]) -> ModelConfig:
    """attention_bias is the bias of q, k, v and o alike. Defaults: transformers' LlamaConfig."""
    reader = ConfigReader(raw)
    sizes = read_sizes(reader, vocab_size=32_000, max_position=2048, kv_heads=None)
    head_dim = read_head_dim(reader)
    _ignore_wide_window(reader, sizes["max_position_embeddings"])
    bias = reader.boolean("attention_bias", False)
    config = ModelConfig(
        **sizes,
        **read_position(reader, sizes, dim=head_dim),
        **layer_windows(reader, sizes["num_layers"], None, 0),
        head_dim=head_dim,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=reader.boolean("mlp_bias", False),
    )
    finish(reader)
    return config


def parse_mistral(raw: Mapping[str, Any]) -> ModelConfig:
    """Every layer sees the last sliding_window tokens; null: all tokens. Defaults: transformers' MistralConfig."""
    reader = ConfigReader(raw)
    sizes = read_sizes(reader, vocab_size=32_000, max_position=131_072, kv_heads=8)
    head_dim = read_head_dim(reader)
    window = reader.optional_integer("sliding_window", 4096)
    config = ModelConfig(
        **sizes,
        **read_position(reader, sizes, dim=head_dim),
        **layer_windows(reader, sizes["num_layers"], window, 0),
        head_dim=head_dim,
    )
    finish(reader)
    return config


def _ignore_wide_window(reader: ConfigReader, max_position: int) -> None:
    """Llama has no window; one that covers every position does no harm, any other is refused with the neutral keys."""
    window = reader.raw.get("sliding_window")
    if isinstance(window, int) and window >= max_position:
        reader.get("sliding_window")
