"""Reads rotary position settings in both spellings: rope_theta + rope_scaling, and transformers 5's rope_parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import RopeConfig
from .reader import ConfigReader

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")
ROPE_KEYS = frozenset({"rope_theta", "rope_scaling", "rope_parameters"})
DEFAULT_THETA = 10_000.0  # transformers' default for all families here
COMMON_KEYS = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
FACTOR_KEYS = COMMON_KEYS | {"factor", "original_max_position_embeddings"}
KEYS_OF_KIND = {
    "default": FACTOR_KEYS,
    "linear": FACTOR_KEYS,
    "dynamic": FACTOR_KEYS,
    "llama3": FACTOR_KEYS | {"low_freq_factor", "high_freq_factor"},
    "yarn": FACTOR_KEYS
    | {"beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate", "finetuned"},
}


def read_rope(reader: ConfigReader, *, dim: int, max_position: int, interleaved: bool = False) -> RopeConfig:
    """The rope settings of a model that rotates `dim` elements per head.

    Defaults as in transformers: theta 10000, beta_fast 32, beta_slow 1; yarn's factor is
    max_position / original_max_position_embeddings where it is missing, and the original length is max_position.
    """
    if dim % 2:
        raise ValueError(f"{reader.where}: the number of rotated elements per head must be even: {dim}")
    reader.require_neutral({"partial_rotary_factor": (1,), "rotary_pct": (1,), "rotary_dim": (dim, -1)})
    where, settings = _merged(reader)
    nested = ConfigReader(settings, f"{where} in {reader.where}")
    nested.require_neutral({"partial_rotary_factor": (1,)})
    kind = _kind(nested)
    for key in sorted(settings.keys() - KEYS_OF_KIND[kind]):
        if settings[key] is not None:
            raise nested.unsupported(key, f"keys that rope type {kind} takes: {', '.join(sorted(KEYS_OF_KIND[kind]))}")
    theta = nested.optional_number("rope_theta", above=0)
    top_theta = reader.number("rope_theta", DEFAULT_THETA, above=0)
    theta = top_theta if theta is None else theta
    if kind == "default":
        return RopeConfig(theta=theta, dim=dim, factor=1.0, original_max_position=max_position, interleaved=interleaved)
    if kind in ("linear", "dynamic"):
        # both stretch what max_position_embeddings says, whatever else is written down (transformers does the same)
        return RopeConfig(
            theta=theta,
            dim=dim,
            kind=kind,
            factor=_factor(nested),
            original_max_position=max_position,
            interleaved=interleaved,
        )
    original = reader.optional_integer("original_max_position_embeddings", None)  # some write it at the top
    original = original or nested.integer("original_max_position_embeddings", max_position)
    if kind == "llama3":
        low, high = nested.number("low_freq_factor", above=0), nested.number("high_freq_factor", above=0)
        if high <= low:
            raise nested.error("high_freq_factor", f"greater than low_freq_factor {low:g}")
        return RopeConfig(
            theta=theta,
            dim=dim,
            kind=kind,
            factor=_factor(nested),
            original_max_position=original,
            low_freq_factor=low,
            high_freq_factor=high,
            interleaved=interleaved,
        )
    return RopeConfig(
        theta=theta,
        dim=dim,
        kind=kind,
        factor=_factor(nested, default=max_position / original),
        original_max_position=original,
        beta_fast=nested.optional_number("beta_fast", above=0) or 32.0,
        beta_slow=nested.optional_number("beta_slow", above=0) or 1.0,
        attention_factor=nested.optional_number("attention_factor", above=0),
        mscale=nested.optional_number("mscale") or None,  # 0 says the same as null
        mscale_all_dim=nested.optional_number("mscale_all_dim") or None,
        truncate=nested.boolean("truncate", True),
        interleaved=interleaved,
    )


def derived_max_model_len(rope: RopeConfig, max_position: int) -> int:
    """Longest sequence the model is made for, as vLLM derives it.

    linear and dynamic stretch max_position_embeddings by the factor; yarn stretches the original length; llama3's
    max_position_embeddings is the stretched length already.
    """
    if rope.kind in ("linear", "dynamic"):
        return int(max_position * rope.factor)
    if rope.kind == "yarn":
        return int(rope.original_max_position * rope.factor)
    return max_position


def override_rope(raw: Mapping[str, Any], overrides: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`raw` and `overrides` with all rope settings of both moved into the override's rope_parameters.

    An override that names a kind (type, rope_type), or is null, starts from nothing but the file's theta; one that
    changes single values keeps the rest of the file's. What is no object is left for the parser to refuse.
    """
    old, new = _settings(raw), _settings(overrides)
    spelled = [overrides[key] for key in ("rope_scaling", "rope_parameters") if key in overrides]
    if "type" in new or "rope_type" in new or (spelled and not any(spelled)):
        old = {key: value for key, value in old.items() if key == "rope_theta"}
    file = {key: value for key, value in raw.items() if key not in ROPE_KEYS}
    change = {key: value for key, value in overrides.items() if key not in ROPE_KEYS}
    wrong = next((value for value in spelled if value is not None and not isinstance(value, Mapping)), None)
    return file, {**change, "rope_parameters": old | new if wrong is None else wrong}


def _settings(raw: Mapping[str, Any]) -> dict[str, Any]:
    """All rope settings of one object: the top-level theta, then rope_parameters, then rope_scaling on top."""
    settings = {} if raw.get("rope_theta") is None else {"rope_theta": raw["rope_theta"]}
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(raw.get(key), Mapping):
            settings |= raw[key]
    return settings


def _merged(reader: ConfigReader) -> tuple[str, dict[str, Any]]:
    """rope_parameters overlaid with rope_scaling, as transformers reads a file that has both."""
    parameters, scaling = reader.object("rope_parameters"), reader.object("rope_scaling")
    for name, settings in (("rope_parameters", parameters), ("rope_scaling", scaling)):
        for key, value in (settings or {}).items():
            if isinstance(value, Mapping):
                raise ValueError(
                    f"{reader.where}: rope settings per kind of layer are not implemented, {name} must hold one kind: "
                    f"{key}"
                )
    merged = dict(parameters or {})
    if scaling:
        if "type" in scaling or "rope_type" in scaling:
            merged.pop("type", None)
            merged.pop("rope_type", None)
        merged |= scaling
    return ("rope_scaling" if scaling else "rope_parameters"), merged


def _kind(settings: ConfigReader) -> str:
    """rope_type, or its old name type; both, when they agree."""
    if not settings.raw:
        return "default"
    names = {key: settings.choice(key, KINDS) for key in ("rope_type", "type") if settings.get(key) is not None}
    if len(set(names.values())) > 1:
        raise settings.error("type", f"equal to rope_type ({names['rope_type']})")
    if not names and settings.get("factor") is not None:
        raise settings.error("rope_type", f"one of {', '.join(KINDS)} where there is a factor")
    return next(iter(names.values()), "default")


def _factor(settings: ConfigReader, default: float | None = None) -> float:
    factor = settings.number("factor") if default is None else settings.number("factor", default)
    if factor < 1:
        raise settings.error("factor", "at least 1")
    return factor
