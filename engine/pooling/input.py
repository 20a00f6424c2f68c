"""From a prompt that is to be pooled to what the scheduler takes: tokenized, cut, its parameters completed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...models.pooling_config import PoolingConfig
from ...models.tokenizer import Tokenizer
from ...scheduler.pooling_params import TOKEN_TASKS, PoolingParams
from ...scheduler.request import RequestInput
from ...scheduler.sampling_params import SamplingParams, ValidationError
from ..errors import WrongRunnerError
from ..input_processor import MAX_CHARACTERS_PER_TOKEN, InputProcessor, ProcessedRequest

_NO_SAMPLING = SamplingParams(temperature=0.0, max_tokens=None, seed=0)
_OWN_KEYS = ("text_pair", "add_special_tokens", "truncation_side", "prompt_name")


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt as the model will see it, whole or cut."""

    text: str | None
    token_ids: list[int]
    segment_start: int | None  # tokens from here on are of the second of two texts
    cache_salt: str | None


class PoolingInputProcessor(InputProcessor):
    """Checks and completes requests to a pooling model.

    Beside the forms of `InputProcessor` a prompt may be a dict of text with `text_pair`, a second text that the model
    reads behind the first, `add_special_tokens`, `truncation_side` (left, right), and `prompt_name`: which of the
    model's prompts is put before the text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        pooling: PoolingConfig,
        *,
        vocab_size: int,
        max_model_len: int,
        model_name: str = "",
        num_token_types: int = 1,
    ) -> None:
        super().__init__(
            tokenizer, vocab_size=vocab_size, max_model_len=max_model_len, max_logprobs=0, eos_token_id=None
        )
        self.pooling = pooling
        self.model_name = model_name
        self.num_token_types = num_token_types
        self._prompts = dict(pooling.prompts)

    def process(
        self,
        request_id: str,
        prompt: Any,
        params: SamplingParams | PoolingParams,
        *,
        priority: int = 0,
        grammar: str | None = None,
    ) -> ProcessedRequest:
        """Check, tokenize and complete one request; raises `ValidationError`. Nothing here has a `grammar`."""
        if not isinstance(params, PoolingParams):
            raise WrongRunnerError("this model pools prompts into vectors and cannot generate")
        params = self.complete(params)
        return self.admit(request_id, self.tokenize(prompt, params), params, priority=priority)

    def admit(
        self, request_id: str, prompt: TokenizedPrompt, params: PoolingParams, *, priority: int = 0
    ) -> ProcessedRequest:
        """A request of what `tokenize` and `complete` have made; raises `ValidationError`."""
        self._check_priority(priority)
        core_request = RequestInput(
            request_id=self._next_id(),
            prompt_token_ids=prompt.token_ids,
            params=_NO_SAMPLING,
            arrival_time=time.monotonic(),
            priority=priority,
            cache_salt=prompt.cache_salt,
            pooling=params,
            segment_start=prompt.segment_start,
        )
        return ProcessedRequest(request_id, prompt.text, prompt.token_ids, params, time.time(), [core_request])

    def complete(self, params: PoolingParams) -> PoolingParams:
        """The parameters with the model's own task; raises `ValidationError` for what this model cannot do."""
        tasks = self.pooling.tasks
        task = params.task or tasks[0]
        if task not in tasks:
            raise ValidationError(
                f"this model does not support the task; it supports {', '.join(tasks)}", parameter="task", value=task
            )
        params = params.clone(task=task)  # checked against the task now
        if params.dimensions is not None:
            self._check_dimensions(params.dimensions)
        if params.skip_reading_prefix_cache is None:
            params = params.clone(skip_reading_prefix_cache=task in TOKEN_TASKS or self.pooling.needs_all_tokens)
        elif not params.skip_reading_prefix_cache and (task in TOKEN_TASKS or self.pooling.needs_all_tokens):
            raise ValidationError(
                "this pooling needs the states of all tokens, which the prefix cache has not",
                parameter="skip_reading_prefix_cache",
                value=False,
            )
        return params

    def _check_dimensions(self, dimensions: int) -> None:
        """Only models trained for it (Matryoshka representations, arXiv:2205.13147) may be cut."""
        allowed = self.pooling.matryoshka
        if allowed is None:
            raise ValidationError(
                f'Model "{self.model_name}" does not support matryoshka representation, changing output dimensions '
                "will lead to poor results.",
                parameter="dimensions",
                value=dimensions,
            )
        if allowed and dimensions not in allowed:
            raise ValidationError(
                f'Model "{self.model_name}" only supports {list(allowed)} matryoshka dimensions, use other output '
                "dimensions will lead to poor results.",
                parameter="dimensions",
                value=dimensions,
            )
        if dimensions > self.pooling.embedding_size:
            raise ValidationError(
                f"dimensions must be at most {self.pooling.embedding_size}, what the model gives",
                parameter="dimensions",
                value=dimensions,
            )

    def tokenize(self, prompt: Any, params: PoolingParams) -> TokenizedPrompt:
        """Tokens of one prompt, cut as asked for; safe to call from another thread. Raises `ValidationError`."""
        options: dict[str, Any] = {}
        if isinstance(prompt, Mapping):
            options = {key: prompt[key] for key in _OWN_KEYS if prompt.get(key) is not None}
            prompt = {key: value for key, value in prompt.items() if key not in _OWN_KEYS}
        self._check_options(options)
        text, token_ids, cache_salt = self._read_prompt(prompt)
        limit = params.truncate_prompt_tokens
        if limit == -1:
            limit = self.max_model_len
        elif limit is not None and limit > self.max_model_len:
            raise ValidationError(
                f"truncate_prompt_tokens value is greater than max_model_len={self.max_model_len}. Please request a "
                "smaller truncation size.",
                parameter="truncate_prompt_tokens",
                value=limit,
            )
        side = options.get("truncation_side") or "right"
        segment_start: int | None = None
        if token_ids is None:
            assert text is not None
            text = self._prompt_before(params, options) + text
            token_ids, segment_start = self._encode_pair(text, options, limit, side)
        elif options.keys() & {"text_pair", "prompt_name"}:
            raise ValidationError("token ids take no text beside them", parameter="prompt")
        elif limit is not None and len(token_ids) > limit:
            token_ids = token_ids[:limit] if side == "right" else token_ids[len(token_ids) - limit :]
        self._check_pooled_length(len(token_ids))
        return TokenizedPrompt(text, token_ids, segment_start, cache_salt)

    def _check_options(self, options: Mapping[str, Any]) -> None:
        for name in ("text_pair", "prompt_name"):
            if name in options and not isinstance(options[name], str):
                raise ValidationError(f"{name} must be text", parameter=name, value=options[name])
        if options.get("truncation_side", "right") not in ("left", "right"):
            raise ValidationError(
                "truncation_side must be left or right", parameter="truncation_side", value=options["truncation_side"]
            )

    def _prompt_before(self, params: PoolingParams, options: Mapping[str, Any]) -> str:
        """What sentence-transformers would put before the text."""
        name = options.get("prompt_name")
        if name is None:
            return self.pooling.default_prompt if params.task in ("embed", "token_embed") else ""
        if name not in self._prompts:
            raise ValidationError(
                f"prompt_name must be one of the model's prompts ({', '.join(self._prompts) or 'it has none'})",
                parameter="prompt_name",
                value=name,
            )
        return self._prompts[name]

    def _encode_pair(
        self, text: str, options: Mapping[str, Any], limit: int | None, side: str
    ) -> tuple[list[int], int | None]:
        """Token ids, and where the second segment begins if there is one."""
        pair = options.get("text_pair")
        if self.tokenizer is None:
            raise ValidationError(
                "this engine was started without a tokenizer: give the prompt as token ids", parameter="prompt"
            )
        length = len(text) + len(pair or "")
        if length > self.max_model_len * MAX_CHARACTERS_PER_TOKEN:
            raise ValidationError(
                f"This model's maximum context length is {self.max_model_len} tokens. However, your prompt contains "
                f"{length} characters, which cannot fit. Please reduce the length of the input prompt.",
                parameter="input_text",
                value=length,
            )
        try:
            token_ids, types = self.tokenizer.encode_segments(
                text,
                pair,
                add_special_tokens=options.get("add_special_tokens") is not False,
                max_tokens=limit,
                truncation_side=side,
            )
        except ValueError as error:
            raise ValidationError(f"the prompt cannot be tokenized: {error}", parameter="prompt") from error
        if token_ids and max(token_ids) >= self.vocab_size:
            raise ValidationError(
                f"the tokenizer gave token id {max(token_ids)}, but the model has a vocabulary of {self.vocab_size}",
                parameter="prompt",
            )
        return token_ids, _segment_start(types) if self.num_token_types > 1 else None

    def _check_pooled_length(self, count: int) -> None:
        if count == 0:
            raise ValidationError("The decoder prompt cannot be empty", parameter="prompt")
        if count > self.max_model_len:
            raise ValidationError(
                f"This model's maximum context length is {self.max_model_len} tokens. However, your prompt contains "
                f"{count} input tokens. Please reduce the length of the input prompt.",
                parameter="input_tokens",
                value=count,
            )


def _segment_start(types: Sequence[int]) -> int | None:
    """Where the token types change from 0 to 1, or None where they do not."""
    if not any(types):
        return None
    start = list(types).index(1) if 1 in types else len(types)
    if list(types) != [0] * start + [1] * (len(types) - start):
        raise ValidationError("the tokenizer must give the types 0 and then 1 to two texts", parameter="prompt")
    return start
