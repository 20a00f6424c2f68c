"""Reads a checkpoint's config.json into the typed `ModelConfig`, by the parser its architecture is registered with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config import ModelConfig
from .config_parsers.common import read_architecture
from .config_parsers.reader import ConfigReader, shown
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
    return config


def merge_overrides(raw: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`raw` with `overrides` (--hf-overrides) merged in: objects key by key, everything else replaced."""
    merged = dict(raw)
    for key, value in overrides.items():
        old = merged.get(key)
        both_objects = isinstance(value, Mapping) and isinstance(old, Mapping)
        merged[key] = merge_overrides(old, value) if both_objects else value
    return merged
