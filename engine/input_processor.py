"""From what a caller gives to what the scheduler takes: prompts checked and tokenized, parameters completed."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import index as as_index
from typing import Any

from ..models.tokenizer import Tokenizer
from ..scheduler.pooling_params import PoolingParams
from ..scheduler.request import RequestInput
from ..scheduler.sampling_params import INT64_MAX, INT64_MIN, SamplingParams, ValidationError, is_text
from .errors import WrongRunnerError
from .inputs import PromptType

MAX_BAD_WORD_TOKENS = 1024
# No tokenizer yields fewer than one token for this many characters of text, so longer prompts need no tokenizing
# to be known as too long.
MAX_CHARACTERS_PER_TOKEN = 256


@dataclass(frozen=True)
class ProcessedRequest:
    """A checked request: what callers are told about it, and one `RequestInput` for each of its n sequences."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams | PoolingParams
    arrival_time: float  # wall-clock seconds
    core_requests: list[RequestInput]

    @property
    def key(self) -> str:
        """Unique in this engine, even if a caller uses a request id twice."""
        return self.core_requests[0].request_id


class InputProcessor:
    """Checks and completes requests for one model. `extra_eos_token_ids` come from generation_config.json."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        *,
        vocab_size: int,
        max_model_len: int,
        max_logprobs: int,
        eos_token_id: int | None,
        extra_eos_token_ids: Sequence[int] = (),
        seed: int = 0,
    ) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.max_logprobs = max_logprobs
        self.eos_token_id = eos_token_id
        self.extra_eos_token_ids = [token for token in extra_eos_token_ids if token != eos_token_id]
        self._seeds = random.Random(seed)
        self._num_requests = 0

    def process(
        self,
        request_id: str,
        prompt: PromptType,
        params: SamplingParams | PoolingParams,
        *,
        priority: int = 0,
        grammar: str | None = None,
    ) -> ProcessedRequest:
        """Check, tokenize and complete one request; raises `ValidationError`. `grammar` is what its
        `structured_outputs` have been compiled to."""
        if not isinstance(params, SamplingParams):
            raise WrongRunnerError("this model generates; pooling its prompts needs --runner pooling")
        text, token_ids, cache_salt = self._read_prompt(prompt)
        self._check_priority(priority)
        params.check_vocabulary(self.vocab_size, self.max_logprobs)
        if token_ids is None:
            assert text is not None
            token_ids = self.encode(text)
        token_ids = self._truncate(token_ids, params.truncate_prompt_tokens)
        self._check_length(len(token_ids))
        if self.tokenizer is None and (params.stop_strings or params.bad_words):
            name = "stop" if params.stop_strings else "bad_words"
            raise ValidationError(f"{name} needs a tokenizer, but this engine was started without one", parameter=name)
        self._check_thinking(params)
        params = self._complete(params, len(token_ids))
        bad_words = self._bad_word_ids(params.bad_words or [])
        self._check_choice(params, bad_words)
        now = time.monotonic()
        core_id = self._next_id()
        core_requests = [
            RequestInput(
                request_id=f"{core_id}-{index}",
                prompt_token_ids=token_ids,
                params=params if params.n == 1 else _child_params(params, index),
                eos_token_ids=[] if self.eos_token_id is None else [self.eos_token_id],
                bad_words_token_ids=bad_words,
                arrival_time=now,
                priority=priority,
                cache_salt=cache_salt,
                grammar=grammar,
            )
            for index in range(params.n)
        ]
        return ProcessedRequest(request_id, text, token_ids, params, time.time(), core_requests)

    def _check_priority(self, priority: int) -> None:
        if isinstance(priority, bool) or not isinstance(priority, int) or not INT64_MIN <= priority <= INT64_MAX:
            raise ValidationError("priority must be a 64-bit integer", parameter="priority", value=priority)

    def _next_id(self) -> str:
        """A request id that no other request of this engine has."""
        self._num_requests += 1
        return str(self._num_requests)

    def _read_prompt(self, prompt: Any) -> tuple[str | None, list[int] | None, str | None]:
        """Text or ids (or both), and the cache salt."""
        cache_salt = None
        text: Any = prompt
        token_ids: Any = None
        if isinstance(prompt, Mapping):
            unknown = set(prompt) - {"prompt", "prompt_token_ids", "cache_salt"}
            if unknown:
                raise ValidationError(
                    f"this engine takes prompts with prompt, prompt_token_ids and cache_salt, not "
                    f"{', '.join(sorted(map(str, unknown)))}",
                    parameter="prompt",
                )
            text, token_ids, cache_salt = (prompt.get(key) for key in ("prompt", "prompt_token_ids", "cache_salt"))
            if cache_salt is not None and not is_text(cache_salt):
                raise ValidationError("cache_salt must be a valid string", parameter="cache_salt", value=cache_salt)
        elif not isinstance(prompt, str) and isinstance(prompt, Sequence):
            text, token_ids = None, prompt
        if token_ids is not None:
            token_ids = self._check_token_ids(token_ids)
        elif not isinstance(text, str):
            raise ValidationError(
                f"a prompt is text, a list of token ids, or a dict of prompt or prompt_token_ids, not "
                f"{type(prompt).__name__}",
                parameter="prompt",
            )
        return text, token_ids, cache_salt

    def _check_token_ids(self, token_ids: Any) -> list[int]:
        if isinstance(token_ids, (str, bytes)) or not isinstance(token_ids, Sequence):
            raise ValidationError("prompt_token_ids must be a list of integers", parameter="prompt")
        try:
            # operator.index takes what is an integer, numpy's included, and nothing that only looks like one.
            checked = [as_index(token_id) for token_id in token_ids]
        except TypeError as error:
            raise ValidationError(f"prompt token ids must be integers: {error}", parameter="prompt") from error
        if checked:
            if min(checked) < 0:
                raise ValidationError(f"Token id {min(checked)} is out of vocabulary", parameter="prompt")
            if max(checked) >= self.vocab_size:
                raise ValidationError(f"Token id {max(checked)} is out of vocabulary", parameter="prompt")
        return checked

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text that could fit the model; safe to call from another thread."""
        if self.tokenizer is None:
            raise ValidationError(
                "this engine was started without a tokenizer: give the prompt as token ids", parameter="prompt"
            )
        limit = self.max_model_len * MAX_CHARACTERS_PER_TOKEN
        if len(text) > limit:
            raise ValidationError(
                f"This model's maximum context length is {self.max_model_len} tokens. However, your prompt contains "
                f"{len(text)} characters, which cannot fit. Please reduce the length of the input prompt.",
                parameter="input_text",
                value=len(text),
            )
        try:
            token_ids = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except ValueError as error:
            raise ValidationError(f"the prompt cannot be tokenized: {error}", parameter="prompt") from error
        if token_ids and max(token_ids) >= self.vocab_size:
            raise ValidationError(
                f"the tokenizer gave token id {max(token_ids)}, but the model has a vocabulary of {self.vocab_size}",
                parameter="prompt",
            )
        return token_ids

    def _truncate(self, token_ids: list[int], limit: int | None) -> list[int]:
        """The last `limit` tokens, or the first if the tokenizer truncates on the right; -1: what fits the model."""
        if limit is None:
            return token_ids
        if limit == -1:
            limit = self.max_model_len - 1
        if limit > self.max_model_len:
            raise ValidationError(
                f"truncate_prompt_tokens value is greater than max_model_len={self.max_model_len}. Please request a "
                "smaller truncation size.",
                parameter="truncate_prompt_tokens",
                value=limit,
            )
        if len(token_ids) <= limit:
            return token_ids
        if self.tokenizer is not None and self.tokenizer.truncation_side == "right":
            return token_ids[:limit]
        return token_ids[len(token_ids) - limit :]

    def _check_length(self, count: int) -> None:
        if count == 0:
            raise ValidationError("The decoder prompt cannot be empty", parameter="prompt")
        if count > self.max_model_len:
            raise ValidationError(
                f"This model's maximum context length is {self.max_model_len} tokens. However, your prompt contains "
                f"{count} input tokens, which exceeds this limit even without any output tokens. Please reduce the "
                "length of the input prompt.",
                parameter="input_tokens",
                value=count,
            )
        if count == self.max_model_len:
            raise ValidationError(
                f"This model's maximum context length is {self.max_model_len} tokens. Your prompt contains {count} "
                "input tokens, which leaves no room for output. Please reduce the length of the input prompt.",
                parameter="input_tokens",
                value=count,
            )

    def _complete(self, params: SamplingParams, prompt_length: int) -> SamplingParams:
        room = self.max_model_len - prompt_length
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        seed = self._seeds.randint(0, INT64_MAX) if params.seed is None else params.seed
        stop_token_ids = list(params.stop_token_ids or [])
        if not params.ignore_eos:
            stop_token_ids += [token for token in self.extra_eos_token_ids if token not in stop_token_ids]
        return params.clone(
            max_tokens=max_tokens,
            min_tokens=min(params.min_tokens, max_tokens),
            seed=seed,
            stop_token_ids=stop_token_ids,
        )

    def _check_thinking(self, params: SamplingParams) -> None:
        """Refuse a thinking budget where nobody knows what a thought is."""
        if params.thinking_token_budget is not None and params.reasoning is None:
            raise ValidationError(
                "thinking_token_budget needs to know where reasoning ends: start the server with --reasoning-parser, "
                "or set reasoning",
                parameter="thinking_token_budget",
                value=params.thinking_token_budget,
            )
        span = params.reasoning
        if span is None:
            return
        if self.tokenizer is None:
            raise ValidationError("reasoning needs a tokenizer, but this engine was started without one",
                                  parameter="reasoning")  # fmt: skip
        if not span.ends or not all(map(is_text, (*span.ends, *span.starts, *span.barred))) or "" in span.ends:
            raise ValidationError("reasoning.ends must hold texts, none empty", parameter="reasoning", value=span.ends)

    def _check_choice(self, params: SamplingParams, bad_words: list[list[int]]) -> None:
        """Refuse allowed_token_ids of which other parameters leave nothing."""
        if params.allowed_token_ids is None:
            return
        left = set(params.allowed_token_ids) - {words[0] for words in bad_words if len(words) == 1}
        if params.min_tokens > 0:
            left -= {*(params.stop_token_ids or ()), self.eos_token_id}
        if not left:
            raise ValidationError(
                "bad_words, or min_tokens, which masks the ids that end a sequence, leave none of allowed_token_ids",
                parameter="allowed_token_ids",
                value=params.allowed_token_ids,
            )

    def _bad_word_ids(self, bad_words: list[str]) -> list[list[int]]:
        """Each word's token ids, and those it has after a space where they are as many but begin differently."""
        sequences: list[list[int]] = []
        for word in bad_words:
            assert self.tokenizer is not None
            plain = self.tokenizer.encode(word.lstrip(), add_special_tokens=False)
            spaced = self.tokenizer.encode(" " + word.lstrip(), add_special_tokens=False)
            if plain:
                sequences.append(plain)
            if spaced and (not plain or (spaced[0] != plain[0] and len(spaced) == len(plain))):
                sequences.append(spaced)
        total = sum(map(len, sequences))
        if total > MAX_BAD_WORD_TOKENS:
            raise ValidationError(
                f"bad_words may hold at most {MAX_BAD_WORD_TOKENS} tokens in all, got {total}.",
                parameter="bad_words",
                value=total,
            )
        return sequences


def _child_params(params: SamplingParams, index: int) -> SamplingParams:
    """Parameters of sequence `index` of n: its own seed; the prompt's logprobs are told by the first one only."""
    assert params.seed is not None
    seed = (params.seed + index + 2**63) % 2**64 - 2**63  # seed + i, wrapped to a signed 64-bit integer
    if index and params.prompt_logprobs is not None:
        return params.clone(n=1, seed=seed, prompt_logprobs=None, skip_reading_prefix_cache=None)
    return params.clone(n=1, seed=seed)
