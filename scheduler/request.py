"""One sequence: `RequestInput` as it arrives, `Request` as the scheduler keeps it, `RequestUpdate` as it is told."""

from __future__ import annotations

from enum import IntEnum

import msgspec

from .plan import TokenLogprobs
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


class RequestStatus(IntEnum):
    WAITING = 0
    RUNNING = 1
    PREEMPTED = 2  # waiting again, its blocks freed
    FINISHED = 3


class RequestUpdate(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one step changed for one request: the scheduler's word to whoever answers the caller."""

    request_id: str
    new_token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None  # one per new token, when asked for
    prompt_logprobs: list[TokenLogprobs] | None = None  # the prompt positions newly reported, in order, from 1 on
    finish_reason: str | None = None  # stop | length | abort | error
    stop_reason: int | None = None  # the stop_token_ids entry that was hit; None for EOS
    error: str | None = None  # with finish_reason error: what happened, for the caller
    error_kind: str | None = None  # queue_full (answer 503) | invalid (400) | internal (500)
    num_cached_tokens: int | None = None  # prompt tokens taken from the prefix cache; told once, at first schedule
    num_preemptions: int = 0
    queued_time: float = 0.0  # monotonic seconds, told once with the first token: arrival in the scheduler,
    scheduled_time: float = 0.0  # first scheduled


class Request:
    """Tokens, status and counters of one sequence. Owned by the scheduler alone."""

    __slots__ = (
        "block_hashes", "block_ids", "num_cached_tokens", "num_computed", "num_preemptions", "num_prompt_logprobs",
        "num_published_blocks", "queued_time", "row", "scheduled_time", "sequence", "source",
        "status", "token_ids",
    )  # fmt: skip

    def __init__(self, source: RequestInput, sequence: int, queued_time: float) -> None:
        self.source = source
        self.sequence = sequence  # order of arrival; FCFS and ties of priority follow it
        self.status = RequestStatus.WAITING
        self.token_ids: list[int] = list(source.prompt_token_ids)  # prompt, then what was generated
        self.num_computed = 0  # tokens whose KV is stored (or will be, by the steps in flight)
        self.block_ids: list[int] = []
        self.block_hashes: list[bytes] = []  # hash chain over full hash units of token_ids
        self.num_published_blocks = 0
        self.row = -1  # place in the runner's persistent batch while running
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.num_prompt_logprobs = 0  # prompt positions already reported
        self.queued_time = queued_time
        self.scheduled_time = 0.0

    @property
    def request_id(self) -> str:
        return self.source.request_id

    @property
    def params(self) -> SamplingParams:
        return self.source.params

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.source.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.source.prompt_token_ids)

    @property
    def is_finished(self) -> bool:
        return self.status == RequestStatus.FINISHED
