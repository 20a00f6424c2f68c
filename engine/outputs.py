"""What callers receive: `RequestOutput` and the `CompletionOutput`s in it, with vLLM's field names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class Logprob(NamedTuple):
    """Log probability of one token; `rank` counts from 1 over the vocabulary."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(slots=True)
class RequestStats:
    """Times and counts of one request: `arrival_time` is wall-clock seconds, the `_ts` values are monotonic seconds;
    what is counted is of its n sequences together, but for the preemptions, which are the most of any."""

    arrival_time: float = 0.0
    queued_ts: float = 0.0
    scheduled_ts: float = 0.0
    first_token_ts: float = 0.0
    last_token_ts: float = 0.0
    num_generation_tokens: int = 0
    num_preemptions: int = 0
    num_draft_tokens: int = 0  # of speculation: tokens that were drafted for it and verified
    num_accepted_tokens: int = 0  # those of them that became its tokens

    @property
    def first_token_latency(self) -> float:
        return self.first_token_ts - self.queued_ts if self.first_token_ts else 0.0


@dataclass(slots=True)
class CompletionOutput:
    """One of the n sequences of a request. Under DELTA, text, token_ids and logprobs hold only what is new."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None  # stop | length | abort
    stop_reason: int | str | None = None  # the stop string or stop token id that was hit; None for EOS
    lora_request: None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """The state of one request, or under DELTA what has been added since the last output."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestStats | None = field(default=None, repr=False)
    num_cached_tokens: int | None = None
    lora_request: None = None
