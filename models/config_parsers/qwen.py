"""Reads config.json of the Qwen2, Qwen3 and Qwen3-MoE families."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import ModelConfig, MoEConfig
from .common import finish, layer_windows, read_head_dim, read_position, read_sizes
from .reader import ConfigReader

VOCAB_SIZE = 151_936
MAX_POSITION = 32_768


def parse_qwen2(raw: Mapping[str, Any]) -> ModelConfig:
    """q, k and v always have a bias, o never. Defaults: transformers' Qwen2Config."""
    reader = ConfigReader(raw)
    sizes = read_sizes(reader, vocab_size=VOCAB_SIZE, max_position=MAX_POSITION, kv_heads=32)
    head_dim = read_head_dim(reader)
    reader.require_neutral({"attention_bias": (True,), "qkv_bias": (True,)})
    config = ModelConfig(
        **sizes,
        **read_position(reader, sizes, dim=head_dim),
        **layer_windows(reader, sizes["num_layers"], *_window(reader)),
        head_dim=head_dim,
        qkv_bias=True,
    )
    finish(reader)
    return config


def parse_qwen3(raw: Mapping[str, Any]) -> ModelConfig:
    """q and k are normalised per head before rope; attention_bias covers q, k, v and o. Defaults: Qwen3Config."""
    reader = ConfigReader(raw)
    sizes = read_sizes(reader, vocab_size=VOCAB_SIZE, max_position=MAX_POSITION, kv_heads=32)
    head_dim = read_head_dim(reader, default=128)
    bias = reader.boolean("attention_bias", False)
    reader.require_neutral({"use_qk_norm": (True,), "qk_norm": (True,)})
    config = ModelConfig(
        **sizes,
        **read_position(reader, sizes, dim=head_dim),
        **layer_windows(reader, sizes["num_layers"], *_window(reader)),
        head_dim=head_dim,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=True,
    )
    finish(reader)
    return config


def parse_qwen3_moe(raw: Mapping[str, Any]) -> ModelConfig:
    """Qwen3 with routed experts in the layers that decoder_sparse_step and mlp_only_layers leave. Defaults:
    Qwen3MoeConfig, whose head_dim is hidden_size / heads; a window, where in use, holds for every layer."""
    reader = ConfigReader(raw)
    sizes = read_sizes(reader, vocab_size=VOCAB_SIZE, max_position=MAX_POSITION, kv_heads=4)
    head_dim = read_head_dim(reader)
    bias = reader.boolean("attention_bias", False)
    reader.require_neutral({"use_qk_norm": (True,), "qk_norm": (True,)})
    config = ModelConfig(
        **sizes,
        **read_position(reader, sizes, dim=head_dim),
        **layer_windows(reader, sizes["num_layers"], _window(reader)[0], 0),
        head_dim=head_dim,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=True,
        moe=_experts(reader, sizes["num_layers"]),
    )
    finish(reader)
    return config


def _window(reader: ConfigReader) -> tuple[int | None, int]:
    """(window, first layer it holds for): only with use_sliding_window, the layers before max_window_layers see all."""
    window = reader.optional_integer("sliding_window", 4096)
    first = reader.integer("max_window_layers", 28, minimum=0)
    return (window if reader.boolean("use_sliding_window", False) else None), first


def _experts(reader: ConfigReader, num_layers: int) -> MoEConfig | None:
    # transformers 5 saves num_experts under the name num_local_experts
    key = "num_local_experts" if reader.get("num_experts") is None else "num_experts"
    num_experts = reader.integer(key, 128, minimum=0)
    other = reader.raw.get("num_local_experts")
    reader.get("num_local_experts")
    if other is not None and other != num_experts:
        raise reader.error("num_local_experts", f"equal to num_experts {num_experts} where both are there")
    step = reader.integer("decoder_sparse_step", 1)
    dense = frozenset(reader.integers("mlp_only_layers"))
    layers = frozenset(layer for layer in range(num_layers) if layer not in dense and (layer + 1) % step == 0)
    intermediate = reader.integer("moe_intermediate_size", 768)
    per_token = reader.integer("num_experts_per_tok", 8)
    norm_topk_prob = reader.boolean("norm_topk_prob", False)
    if not layers or not num_experts:
        return None
    if per_token > num_experts:
        raise reader.error("num_experts_per_tok", f"at most {key} {num_experts}")
    return MoEConfig(
        num_experts=num_experts,
        experts_per_token=per_token,
        intermediate_size=intermediate,
        scoring="softmax",
        norm_topk_prob=norm_topk_prob,
        layers=layers,
    )
