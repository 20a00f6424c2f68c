"""One sequence: `RequestInput` as it arrives, `Request` as the scheduler keeps it, `RequestUpdate` as it is told."""

from __future__ import annotations

from enum import IntEnum

import msgspec

from ..kvcache.manager import RequestBlocks
from .plan import TokenLogprobs
from .pooling_params import Pooled, PoolingParams
from .sampling_params import SamplingParams


class RequestInput(msgspec.Struct, frozen=True):
    """A request as the scheduler receives it: checked, tokenized, its seed and max_tokens set. n is 1 here."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    eos_token_ids: list[int] = []
    bad_words_token_ids: list[list[int]] = []
    arrival_time: float = 0.0  # seconds, time.monotonic() (comparable between processes of one host)
    priority: int = 0  # lower is sooner; used under the "priority" policy only
    cache_salt: str | None = None  # requests share prefix blocks only with requests of the same salt
    grammar: str | None = None  # of `params.structured_outputs`, checked, in the grammar library's format
    pooling: PoolingParams | None = None  # it ends when its prompt is computed and pooled; params are not looked at
    segment_start: int | None = None  # tokens from here on are of the second segment (token type 1)


class RequestStatus(IntEnum):
    WAITING = 0
    RUNNING = 1
    PREEMPTED = 2  # waiting again, its blocks freed
    FINISHED = 3


class RequestUpdate(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):  # in no cycle
    """What one step changed for one request: the scheduler's word to whoever answers the caller."""

    request_id: str
    new_token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None  # one per new token, when asked for
    prompt_logprobs: list[TokenLogprobs] | None = None  # the prompt positions newly reported, in order, from 1 on
    finish_reason: str | None = None  # stop | length | abort | error
    stop_reason: int | None = None  # the stop_token_ids entry that was hit; None for EOS
    error: str | None = None  # with finish_reason error: what happened, for the caller
    error_kind: str | None = None  # queue_full (answer 503) | invalid (400) | internal (500)
    num_cached_tokens: int | None = None  # prompt tokens from the prefix cache; told with the first token
    num_preemptions: int = 0
    queued_time: float = 0.0  # told with the first token, monotonic seconds: when it came to the scheduler
    scheduled_time: float = 0.0  # likewise: when it was first scheduled
    num_draft_tokens: int = 0  # drafts that were verified for the request so far
    num_accepted_tokens: int = 0  # those of them that became its tokens
    pooled: Pooled | None = None  # of a request that is pooled, with its finish_reason


class Request:
    """Tokens, status and counters of one sequence. Owned by the scheduler alone."""

    __slots__ = (
        "blocks", "end_token_ids", "length_limit", "num_accepted_tokens", "num_ahead", "num_cached_tokens",
        "num_computed", "num_draft_tokens", "num_preemptions", "num_prompt_logprobs", "num_prompt_tokens", "num_unread",
        "order", "pools", "queued_time", "row", "scheduled_time", "source", "status", "token_ids",
    )  # fmt: skip

    def __init__(
        self,
        source: RequestInput,
        order: tuple[int, int],
        max_model_len: int,
        blocks: RequestBlocks,
        queued_time: float,
    ) -> None:
        params = source.params
        self.source = source
        self.pools = source.pooling is not None
        self.order = order  # (priority, sequence of arrival): smaller goes first; unique
        self.status = RequestStatus.WAITING
        self.token_ids: list[int] = list(source.prompt_token_ids)  # prompt, then what was generated
        self.num_prompt_tokens = len(self.token_ids)
        self.num_computed = 0  # tokens whose KV is stored, or will be by the steps in flight
        self.blocks = blocks
        self.row = -1  # place in the runner's persistent batch while running
        self.length_limit = length_limit(source, max_model_len)
        self.end_token_ids = frozenset(params.stop_token_ids or ()).union(
            () if params.ignore_eos else source.eos_token_ids
        )
        self.num_unread = 0  # tokens that the steps in flight certainly sample, not in token_ids yet
        self.num_ahead = 0  # tokens that they may sample on top of these: the drafts they verify
        self.num_draft_tokens = 0  # drafts verified so far
        self.num_accepted_tokens = 0  # of these, accepted
        self.num_cached_tokens = 0  # prompt tokens found in the prefix cache when first scheduled
        self.num_preemptions = 0
        self.num_prompt_logprobs = 0  # reported so far: prompt positions 1 to this one
        self.queued_time = queued_time
        self.scheduled_time = 0.0

    @property
    def request_id(self) -> str:
        return self.source.request_id

    @property
    def params(self) -> SamplingParams:
        return self.source.params

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def reads_prefix_cache(self) -> bool:
        """A prompt position found in the cache has no logits, so prompt logprobs must all be reported first."""
        if self.source.pooling is not None:
            return not self.source.pooling.skip_reading_prefix_cache
        if self.params.prompt_logprobs is None:
            return not self.params.skip_reading_prefix_cache
        return self.num_prompt_logprobs >= self.num_prompt_tokens - 1

    def stops_at(self, token_id: int) -> tuple[str, int | None] | None:
        """(finish_reason, stop_reason) if the sequence ends with `token_id`, the last of its tokens, else None."""
        if token_id in self.end_token_ids and self.num_output_tokens >= self.params.min_tokens:
            is_eos = token_id in self.source.eos_token_ids and not self.params.ignore_eos
            return "stop", None if is_eos else token_id
        if len(self.token_ids) >= self.length_limit:
            return "length", None
        return None


def length_limit(source: RequestInput, max_model_len: int) -> int:
    """Tokens, prompt and output together, at which this sequence ends at the latest."""
    if source.pooling is not None:
        return len(source.prompt_token_ids)
    max_tokens = source.params.max_tokens
    if max_tokens is None:
        return max_model_len
    return min(len(source.prompt_token_ids) + max_tokens, max_model_len)
