"""Speculative decoding as it is asked for, in vLLM's spelling: read and checked, torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...models.checkpoint import Checkpoint
from ...models.config import ModelConfig

METHODS = ("mtp", "ngram", "draft_model")
# vLLM's older names of multi-token prediction, one for each family; whether a model has such a layer is checked later
_MTP_NAMES = (
    "deepseek_mtp", "ernie_mtp", "exaone_moe_mtp", "glm4_moe_lite_mtp", "glm4_moe_mtp", "glm_ocr_mtp",
    "longcat_flash_mtp", "mimo_mtp", "nemotron_h_mtp", "pangu_ultra_moe_mtp", "qwen3_5_mtp", "qwen3_next_mtp",
    "step3p5_mtp",
)  # fmt: skip
_KEYS = (
    "method", "num_speculative_tokens", "model", "revision", "prompt_lookup_max", "prompt_lookup_min", "adaptive_depth",
    "draft_tensor_parallel_size",
)  # fmt: skip
MAX_DRAFTS = 16
MAX_LOOKUP = 64  # each token of a match is a pass over all tokens, in every step


@dataclass(frozen=True)
class SpeculationChoice:
    """What the arguments say, before any checkpoint is read."""

    method: str  # one of METHODS
    num_drafts: int  # most tokens drafted at once
    depths: tuple[int, ...]  # how many a step may verify, ascending; graphs are made for each
    model: str | None = None  # of the method draft_model: its checkpoint
    revision: str | None = None
    min_n: int = 0  # ngram: shortest and longest match
    max_n: int = 0

    @property
    def remembers(self) -> bool:
        """Whether steps without drafts are a choice, and not just the last ones of a request: then the drafter of `mtp`
        has a window."""
        return self.method == "mtp" and 0 in self.depths


@dataclass(frozen=True)
class Speculation:
    """The choice, and what it needs beside the model itself."""

    choice: SpeculationChoice
    draft_checkpoint: Checkpoint | None = None
    draft_model: ModelConfig | None = None


def choose_speculation(config: Mapping[str, Any] | None) -> SpeculationChoice | None:
    """Read `speculative_config`; None where it is empty, ValueError with what to change.

    Names and defaults are those of vLLM's SpeculativeConfig, but that mtp drafts one token where no number is given, as
    the checkpoints have one layer for it. `adaptive_depth` (true) lets each step verify all drafts, half of them or
    none, by what has paid so far; false: all of them, always.
    """
    if not config:
        return None
    unknown = [key for key in config if key not in _KEYS]
    if unknown:
        raise ValueError(f"speculative_config supports {', '.join(_KEYS)}; not supported: {', '.join(unknown)}")
    method, model = config.get("method"), config.get("model")
    if method is None and model is not None:
        method = "ngram" if model in ("ngram", "[ngram]") else "draft_model"
    if method in _MTP_NAMES:
        method = "mtp"
    if method not in METHODS:
        raise ValueError(f"speculative_config.method must be one of {', '.join(METHODS)}: {method}")
    if _integer(config, "draft_tensor_parallel_size", 1) != 1:
        raise ValueError(
            f"speculative_config.draft_tensor_parallel_size must be 1: {config['draft_tensor_parallel_size']}"
        )
    num_drafts = _integer(config, "num_speculative_tokens", 1 if method == "mtp" else None)
    if num_drafts > MAX_DRAFTS:
        raise ValueError(f"speculative_config.num_speculative_tokens must be at most {MAX_DRAFTS}: {num_drafts}")
    adaptive = config.get("adaptive_depth")
    adaptive = True if adaptive is None else adaptive
    if not isinstance(adaptive, bool):
        raise ValueError(f"speculative_config.adaptive_depth must be true or false: {adaptive}")
    if method == "draft_model":
        if not isinstance(model, str) or not model:
            raise ValueError(f"speculative_config.model must name the checkpoint of the draft model: {model}")
    elif model is not None and not (method == "ngram" and model in ("ngram", "[ngram]")):
        raise ValueError(f"speculative_config.model is for the method draft_model only: {model}")
    revision = config.get("revision")
    if revision is not None and (method != "draft_model" or not isinstance(revision, str)):
        raise ValueError(
            f"speculative_config.revision must be a branch, tag or commit of the draft model, and method "
            f"draft_model: {revision}"
        )
    longest, shortest = config.get("prompt_lookup_max"), config.get("prompt_lookup_min")
    if method != "ngram" and (longest is not None or shortest is not None):
        raise ValueError("speculative_config.prompt_lookup_max and prompt_lookup_min are for ngram only: " + method)
    min_n = max_n = 0
    if method == "ngram":
        # vLLM's rule: one of the two stands for both, without either the match is five tokens long
        max_n = _integer(config, "prompt_lookup_max", 5 if shortest is None else _integer(config, "prompt_lookup_min"))
        min_n = _integer(config, "prompt_lookup_min", max_n)
        if max_n > MAX_LOOKUP:
            raise ValueError(f"speculative_config.prompt_lookup_max must be at most {MAX_LOOKUP}: {max_n}")
        if min_n > max_n:
            raise ValueError(
                f"speculative_config.prompt_lookup_min must not be above prompt_lookup_max={max_n}: {min_n}"
            )
    depths = tuple(sorted({0, (num_drafts + 1) // 2, num_drafts})) if adaptive else (num_drafts,)
    model = model if method == "draft_model" else None
    return SpeculationChoice(method, num_drafts, depths, model, revision, min_n, max_n)


def with_shorthands(
    config: Mapping[str, Any] | None, *, method: str | None, model: str | None, num_drafts: int | None
) -> dict[str, Any]:
    """`speculative_config` with what `spec_method`, `spec_model` and `spec_tokens` say; ValueError where it says
    something else already."""
    joined = dict(config or {})
    for flag, key, value in (
        ("spec_method", "method", method), ("spec_model", "model", model),
        ("spec_tokens", "num_speculative_tokens", num_drafts),
    ):  # fmt: skip
        if value is None:
            continue
        if joined.get(key, value) != value:
            raise ValueError(
                f"{flag} and speculative_config.{key} must not differ; give one: {value} and {joined[key]}"
            )
        joined[key] = value
    return joined


def _integer(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        if default is None:
            raise ValueError(f"speculative_config.{key} must be given, a positive integer: None")
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"speculative_config.{key} must be a positive integer: {value}")
    return value


def check_draft_model(model: ModelConfig, draft: ModelConfig) -> None:
    """ValueError unless both speak of the same tokens."""
    if draft.vocab_size != model.vocab_size:
        raise ValueError(
            f"the draft model must have the vocabulary of the model it drafts for, {model.vocab_size} tokens: "
            f"{draft.vocab_size}"
        )
