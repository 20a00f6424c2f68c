"""What is wanted of a prompt that is pooled, not continued: `PoolingParams`, with vLLM's names."""

from __future__ import annotations

from typing import Any

import msgspec

from .sampling_params import ValidationError

POOLING_TASKS = ("embed", "classify", "token_embed", "token_classify")
TOKEN_TASKS = ("token_embed", "token_classify")  # a vector for each token
_TASK_PARAMETERS = {
    "embed": ("dimensions", "use_activation"),
    "token_embed": ("dimensions", "use_activation"),
    "classify": ("use_activation",),
    "token_classify": ("use_activation",),
}


class PoolingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """Parameters of one request to a pooling model.

    `use_activation`: normalise an embedding, or turn a classifier's logits into probabilities; None: as the model's
    files say. `dimensions`: keep only so many of an embedding's first elements, for models made for it.
    `truncate_prompt_tokens`: cut a longer prompt to so many tokens, -1: to what the model takes. Validated when
    built; a wrong value raises `ValidationError` that names the parameter.
    """

    task: str | None = None  # one of POOLING_TASKS; None: the call's or the model's own
    dimensions: int | None = None
    use_activation: bool | None = None
    truncate_prompt_tokens: int | None = None
    skip_reading_prefix_cache: bool | None = None  # None: read it where the pooling needs the last token only

    def __post_init__(self) -> None:
        if self.task is not None and self.task not in POOLING_TASKS:
            _refuse(f"task must be one of {', '.join(POOLING_TASKS)}", "task", self.task)
        for name, least in (("dimensions", 1), ("truncate_prompt_tokens", -1)):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                _refuse(f"{name} must be an integer", name, value)
            if value < least:
                _refuse(f"{name} must be at least {least}", name, value)
        for name in ("use_activation", "skip_reading_prefix_cache"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, bool):
                _refuse(f"{name} must be true or false", name, value)
        for name in ("dimensions", "use_activation"):
            if self.task is not None and getattr(self, name) is not None and name not in _TASK_PARAMETERS[self.task]:
                _refuse(f"the task {self.task} takes no {name}", name, getattr(self, name))

    def clone(self, **changes: Any) -> PoolingParams:
        """A copy, with `changes` applied and checked."""
        return msgspec.structs.replace(self, **changes)


def _refuse(message: str, parameter: str, value: object) -> None:
    raise ValidationError(message, parameter=parameter, value=value)


class Pooled(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What one prompt came to: float32 in the machine's byte order, row after row."""

    shape: list[int]  # [elements], or [tokens, elements] of a task that gives each token a vector
    data: bytes
