"""How the tokens of one request are chosen: `SamplingParams` and its validation.

Field names, defaults, limits and messages follow vLLM 0.32, so that code written for it runs unchanged.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any

import msgspec

from .structured_outputs import ReasoningSpan, StructuredOutputsParams


def _read_max_num_sequences() -> int:
    """Under vLLM's name for the same limit; raises ValueError."""
    text = os.environ.get("VLLM_MAX_N_SEQUENCES", "").strip() or "16384"
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"VLLM_MAX_N_SEQUENCES must be a whole number, 1 or more: {text}")
    return int(text)


MAX_NUM_SEQUENCES = _read_max_num_sequences()
MAX_BAD_WORDS = 128
# Of all stop strings, and of all bad words, together: both are prepared where other requests wait.
MAX_STOP_CHARACTERS = 8192
MAX_TOLD = 10  # wrong entries that an error message names
MAX_BAD_WORD_CHARACTERS = 16384
MIN_TEMPERATURE = 1e-2  # a smaller positive temperature is raised to this: logits / T must stay finite
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 1e-6, 1e6  # logits must stay finite in float32
GREEDY_TEMPERATURE = 1e-5  # below this, sampling is greedy
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1


class ValidationError(ValueError):
    """A value that a caller can correct. `parameter` names it, `value` is what was given."""

    def __init__(self, message: str, *, parameter: str | None = None, value: Any = None) -> None:
        super().__init__(message)
        self.message = message
        self.parameter = parameter
        self.value = value

    def __str__(self) -> str:
        if self.parameter is None:
            return self.message
        return f"{self.message} (parameter={self.parameter}, value={_short(self.value)})"


def is_text(value: Any) -> bool:
    """Whether `value` is a string that can be written as UTF-8, which one with lone surrogates cannot."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _short(value: Any, limit: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."


class RequestOutputKind(IntEnum):
    """What each `RequestOutput` of a request carries."""

    CUMULATIVE = 0  # everything so far
    DELTA = 1  # only what is new
    FINAL_ONLY = 2  # one output, when the request has finished


class SamplingParams(msgspec.Struct, kw_only=True, omit_defaults=True, dict=False):
    """Sampling parameters of one request.

    Validated when built; a wrong value raises `ValidationError` (a `ValueError`) that names the parameter.
    A temperature under 1e-5 means greedy and resets top_p, top_k and min_p.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    skip_reading_prefix_cache: bool | None = None
    structured_outputs: StructuredOutputsParams | None = None
    thinking_token_budget: int | None = None  # most tokens of reasoning, then it is ended; None or -1: no limit
    reasoning: ReasoningSpan | None = None  # the answer begins with reasoning; a server's reasoning parser says so

    def __post_init__(self) -> None:
        self._check_types()
        if self.seed == -1:
            self.seed = None
        if self.thinking_token_budget == -1:
            self.thinking_token_budget = None
        if 0 < self.temperature < MIN_TEMPERATURE and self.temperature >= GREEDY_TEMPERATURE:
            self.temperature = MIN_TEMPERATURE
        self.stop = [self.stop] if isinstance(self.stop, str) else list(self.stop or [])
        self.stop_token_ids = list(dict.fromkeys(self.stop_token_ids or []))
        self.bad_words = list(self.bad_words or [])
        if self.logprobs is True:
            self.logprobs = 1
        if self.prompt_logprobs is True:
            self.prompt_logprobs = 1
        if self.skip_reading_prefix_cache is None:
            # Prompt logprobs need the logits of every prompt position, so nothing may come from the cache.
            self.skip_reading_prefix_cache = self.prompt_logprobs is not None
        self._check_values()
        if self.is_greedy:
            self.top_p, self.top_k, self.min_p = 1.0, 0, 0.0
            _require(self.n == 1, "n must be 1 when using greedy sampling", "n", self.n)

    @classmethod
    def from_optional(cls, **fields: Any) -> SamplingParams:
        """Build from fields that may be None, meaning the default."""
        known: dict[str, Any] = {
            name: value for name, value in fields.items() if value is not None or name in _NONE_HAS_MEANING
        }
        return cls(**known)

    def clone(self, **changes: Any) -> SamplingParams:
        """A copy, with `changes` applied and checked."""
        return msgspec.structs.replace(self, **changes)

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def all_stop_token_ids(self) -> set[int]:
        return set(self.stop_token_ids or ())

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def is_constrained(self) -> bool:
        """Whether each token is chosen from a mask that the host makes of the tokens before it."""
        return self.structured_outputs is not None or (
            self.thinking_token_budget is not None and self.reasoning is not None
        )

    @property
    def has_penalties(self) -> bool:
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1

    def check_vocabulary(self, vocab_size: int, max_logprobs: int) -> None:
        """Check what depends on the model: token ids in [0, vocab_size), logprob counts within `max_logprobs`."""
        limit = vocab_size if max_logprobs == -1 else max_logprobs
        for name, kind in (("logprobs", "sample"), ("prompt_logprobs", "prompt")):
            count = getattr(self, name)
            wanted = vocab_size if count == -1 else count
            if wanted is not None and wanted > limit:
                raise ValidationError(
                    f"Requested {kind} logprobs of {wanted}, which is greater than max allowed: {limit}",
                    parameter=name,
                    value=count,
                )
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            for token_id in getattr(self, name) or ():
                if not 0 <= token_id < vocab_size:
                    raise ValidationError(
                        f"{name} contains token id {token_id}, which is out of the vocabulary of {vocab_size}",
                        parameter=name,
                        value=token_id,
                    )

    def _check_types(self) -> None:
        for name in _INT_FIELDS:
            value = getattr(self, name)
            if name in ("logprobs", "prompt_logprobs") and value is True:
                continue
            optional = name in _OPTIONAL_INTS and value is None
            if not optional and (isinstance(value, bool) or not isinstance(value, int)):
                raise ValidationError(f"{name} must be an integer, got {_short(value)}.", parameter=name, value=value)
            if value is not None and not INT64_MIN <= value <= INT64_MAX:
                raise ValidationError(f"{name} must be a signed 64-bit integer, got {_short(value)}.", parameter=name,
                                      value=value)  # fmt: skip
        for name in _BOOL_FIELDS:
            value = getattr(self, name)
            if not isinstance(value, bool) and not (name == "skip_reading_prefix_cache" and value is None):
                raise ValidationError(
                    f"{name} must be true or false, got {_short(value)}.", parameter=name, value=value
                )
        if not isinstance(self.output_kind, RequestOutputKind):
            if self.output_kind not in (0, 1, 2):
                raise ValidationError(
                    "output_kind must be a RequestOutputKind", parameter="output_kind", value=self.output_kind
                )
            self.output_kind = RequestOutputKind(self.output_kind)
        for name in _FLOAT_FIELDS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValidationError(f"{name} must be a number, got {_short(value)}.", parameter=name, value=value)
            if not _is_finite(value):
                raise ValidationError(f"{name} must be finite, got {_short(value)}.", parameter=name, value=value)
        if isinstance(self.stop, str):
            _check_list("stop", [self.stop], str)
        else:
            _check_list("stop", self.stop, str)
        _check_list("stop_token_ids", self.stop_token_ids, int)
        _check_list("bad_words", self.bad_words, str)
        _check_list("allowed_token_ids", self.allowed_token_ids, int)
        if isinstance(self.structured_outputs, Mapping):
            self.structured_outputs = _structured_outputs(self.structured_outputs)
        for name, kind in (("structured_outputs", StructuredOutputsParams), ("reasoning", ReasoningSpan)):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise ValidationError(f"{name} must be {kind.__name__}, got {_short(value)}.", parameter=name,
                                      value=value)  # fmt: skip
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise ValidationError("logit_bias must be a dict of token id to bias", parameter="logit_bias")
            self.logit_bias = _parse_logit_bias(self.logit_bias)

    def _check_values(self) -> None:
        _require(self.n >= 1, f"n must be at least 1, got {self.n}.", "n", self.n)
        _require(self.n <= MAX_NUM_SEQUENCES, f"n must be at most {MAX_NUM_SEQUENCES}, got {self.n}.", "n", self.n)
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _require(-2 <= value <= 2, f"{name} must be in [-2, 2], got {value}.", name, value)
        value = self.repetition_penalty
        _require(value > 0, f"repetition_penalty must be greater than zero, got {value}.", "repetition_penalty", value)
        _require(
            MIN_REPETITION_PENALTY <= value <= MAX_REPETITION_PENALTY,
            f"repetition_penalty must be in [{MIN_REPETITION_PENALTY}, {MAX_REPETITION_PENALTY}], got {value}.",
            "repetition_penalty",
            value,
        )
        value = self.temperature
        _require(value >= 0, f"temperature must be non-negative, got {value}.", "temperature", value)
        _require(value <= 2, f"temperature must be in [0, 2], got {value}.", "temperature", value)
        _require(0 < self.top_p <= 1, f"top_p must be in (0, 1], got {self.top_p}.", "top_p", self.top_p)
        _require(self.top_k >= -1, f"top_k must be 0 (disable), or at least 1, got {self.top_k}.", "top_k", self.top_k)
        _require(0 <= self.min_p <= 1, f"min_p must be in [0, 1], got {self.min_p}.", "min_p", self.min_p)
        if self.max_tokens is not None:
            _require(
                self.max_tokens >= 1, f"max_tokens must be at least 1, got {self.max_tokens}.", "max_tokens",
                self.max_tokens,
            )  # fmt: skip
        _require(
            self.min_tokens >= 0, f"min_tokens must be greater than or equal to 0, got {self.min_tokens}.",
            "min_tokens", self.min_tokens,
        )  # fmt: skip
        if self.max_tokens is not None:
            _require(
                self.min_tokens <= self.max_tokens,
                f"min_tokens must be less than or equal to max_tokens={self.max_tokens}, got {self.min_tokens}.",
                "min_tokens",
                self.min_tokens,
            )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _require(value >= -1, f"{name} must be non-negative or -1, got {value}.", name, value)
        if self.truncate_prompt_tokens is not None:
            value = self.truncate_prompt_tokens
            _require(
                value >= -1, f"truncate_prompt_tokens must be at least -1, got {value}.", "truncate_prompt_tokens",
                value,
            )  # fmt: skip
        for name, texts, limit in (
            ("stop", self.stop_strings, MAX_STOP_CHARACTERS),
            ("bad_words", self.bad_words or [], MAX_BAD_WORD_CHARACTERS),
        ):
            length = sum(map(len, texts))
            if length > limit:
                raise ValidationError(
                    f"{name} may hold at most {limit} characters in all, got {length}.", parameter=name, value=length
                )
        _require("" not in self.stop_strings, "stop cannot contain an empty string.", "stop", self.stop)
        if self.stop_strings and not self.detokenize:
            raise ValidationError(
                "stop strings are only supported when detokenize is True. Set detokenize=True to use stop.",
                parameter="stop",
                value=self.stop,
            )
        bad_words = self.bad_words or []
        _require("" not in bad_words, "bad_words cannot contain an empty string.", "bad_words", bad_words)
        _require(
            len(bad_words) <= MAX_BAD_WORDS,
            f"bad_words may hold at most {MAX_BAD_WORDS} entries, got {len(bad_words)}.",
            "bad_words",
            len(bad_words),
        )
        if self.thinking_token_budget is not None:
            value = self.thinking_token_budget
            _require(value >= 0, f"thinking_token_budget must be at least 0, or -1 for none, got {value}.",
                     "thinking_token_budget", value)  # fmt: skip
        if self.allowed_token_ids is not None:
            _require(len(self.allowed_token_ids) > 0, "allowed_token_ids must not be empty.", "allowed_token_ids", [])


_NONE_HAS_MEANING = frozenset({"max_tokens", "seed", "logprobs", "prompt_logprobs"})
_INT_FIELDS = (
    "n", "top_k", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs", "truncate_prompt_tokens",
    "thinking_token_budget",
)  # fmt: skip
_OPTIONAL_INTS = frozenset(
    {"seed", "max_tokens", "logprobs", "prompt_logprobs", "truncate_prompt_tokens", "thinking_token_budget"}
)
_BOOL_FIELDS = (
    "include_stop_str_in_output", "ignore_eos", "detokenize", "skip_special_tokens", "spaces_between_special_tokens",
    "skip_reading_prefix_cache",
)  # fmt: skip
_FLOAT_FIELDS = (
    "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "min_p",
)  # fmt: skip


def _require(holds: bool, message: str, parameter: str, value: Any) -> None:
    if not holds:
        raise ValidationError(message, parameter=parameter, value=value)


def _check_list(name: str, values: Any, item_type: type) -> None:
    if values is None:
        return
    kind = "strings" if item_type is str else "integers"
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ValidationError(f"{name} must be a list of {kind}, got {_short(values)}.", parameter=name, value=values)
    for value in values:
        fits = is_text(value) if item_type is str else isinstance(value, int) and not isinstance(value, bool)
        if not fits:
            raise ValidationError(
                f"{name} must contain only valid {kind}, got {_short(value)}.", parameter=name, value=value
            )


def _structured_outputs(fields: Mapping[str, Any]) -> StructuredOutputsParams:
    unknown = set(fields) - set(StructuredOutputsParams.__struct_fields__)
    if unknown:
        raise ValidationError(
            f"structured_outputs has no fields {', '.join(sorted(map(str, unknown)))}", parameter="structured_outputs"
        )
    try:
        return StructuredOutputsParams(**fields)
    except ValueError as error:
        raise ValidationError(str(error), parameter="structured_outputs") from error


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def _parse_logit_bias(bias: Mapping[Any, Any]) -> dict[int, float]:
    """Token ids, which JSON writes as strings, to biases clamped to [-100, 100]. All wrong ones are told together."""
    parsed: dict[int, float] = {}
    wrong = []
    for token, value in bias.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and _is_finite(value)
        try:
            token_id = int(token) if isinstance(token, (str, int)) else None
        except ValueError:
            token_id = None
        if token_id is None or not is_number:
            wrong.append(token)
        else:
            parsed[token_id] = min(100.0, max(-100.0, float(value)))
    if wrong:
        told = ", ".join(f"{_short(token)}: {_short(bias[token])}" for token in wrong[:MAX_TOLD])
        raise ValidationError(
            f"logit_bias maps token ids to finite numbers, got {told}", parameter="logit_bias", value=wrong[0]
        )
    return parsed
