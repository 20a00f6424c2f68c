"""Reads a checkpoint's config.json into the typed `ModelConfig`, by the parser its architecture is registered with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .config import ModelConfig
from .config_parsers.common import read_architecture
from .config_parsers.reader import ConfigReader, shown
from .config_parsers.rope import ROPE_KEYS, override_rope
from .registry import resolve

MULTIMODAL_KEYS = ("text_config", "language_config", "llm_config", "vision_config", "audio_config", "thinker_config")


def parse_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The typed form of config.json (with any overrides merged in already).

    Absent keys get the defaults of the family's transformers class. Raises ValueError naming key, value and what is
    expected for a wrong type, a missing key, an unsupported architecture or quantization, and for a key that asks for a
    computation that is not implemented. Keys that nobody knows are logged, once per call.
    """
    for key in MULTIMODAL_KEYS:
        if raw.get(key):
            raise ValueError(
                f"config.json: {key} belongs to a multimodal model, and only text models are supported: "
                f"{shown(raw[key])}"
            )
    architecture = read_architecture(ConfigReader(raw))
    config = resolve(architecture).load_config_parser()(raw)
    if not isinstance(config, ModelConfig):
        raise TypeError(f"the config parser of {architecture} must return a ModelConfig: {type(config).__name__}")
    # a parser that another architecture shares may name its own
    return replace(config, architecture=architecture)


def merge_overrides(raw: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`raw` with `overrides` (--hf-overrides) merged in: objects key by key, everything else replaced.

    Rope settings have two spellings; an override in one of them holds for a file in the other (`override_rope`).
    """
    if overrides.keys() & ROPE_KEYS:
        raw, overrides = override_rope(raw, overrides)
    return _merged(raw, overrides)


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(old)
    for key, value in new.items():
        below = merged.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            value = _merged(below, value)
        merged[key] = value
    return merged
