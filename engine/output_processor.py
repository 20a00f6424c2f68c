"""From the scheduler's `RequestUpdate`s to the caller's `RequestOutput`s: text, stop strings, logprobs, n."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ..models.detokenizer import IncrementalDetokenizer
from ..models.stop_strings import StopStringMatcher
from ..models.tokenizer import Tokenizer
from ..scheduler.plan import TokenLogprobs
from ..scheduler.pooling_params import PoolingParams
from ..scheduler.request import RequestUpdate
from ..scheduler.sampling_params import RequestOutputKind, SamplingParams
from .errors import RequestFailedError, RequestRejectedError
from .input_processor import ProcessedRequest
from .outputs import CompletionOutput, Logprob, RequestOutput, RequestStats
from .pooling.outputs import PoolingOutput, PoolingRequestOutput
from .pooling.state import PoolingState


@dataclass(slots=True)
class _Sequence:
    """One of the n completions of a request, as far as it has come."""

    index: int
    core_id: str
    detokenizer: IncrementalDetokenizer | None
    matcher: StopStringMatcher | None
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_draft_tokens: int = 0  # as the scheduler has told so far
    num_accepted_tokens: int = 0
    # What the last output has told already, for DELTA.
    told_tokens: int = 0
    told_text: int = 0
    told_finish: bool = False

    @property
    def has_news(self) -> bool:
        return len(self.token_ids) > self.told_tokens or (self.finish_reason is not None and not self.told_finish)


class RequestState:
    """All that is known of one request between its arrival and its last output."""

    def __init__(self, request: ProcessedRequest, tokenizer: Tokenizer | None) -> None:
        assert isinstance(request.params, SamplingParams)
        self.request = request
        self.params = request.params
        self.tokenizer = tokenizer
        self.stats = RequestStats(arrival_time=request.arrival_time)
        self.num_cached_tokens: int | None = None
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        self.told_prompt_logprobs = False
        if self.params.prompt_logprobs is not None:
            self.prompt_logprobs = [None]
        self._matcher: StopStringMatcher | None = None
        if self.params.stop_strings:
            self._matcher = StopStringMatcher(self.params.stop_strings, self.params.include_stop_str_in_output)
        self.sequences = [self._sequence(index, core.request_id) for index, core in enumerate(request.core_requests)]

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def key(self) -> str:
        """Unique in this engine, unlike the caller's request id."""
        return self.request.key

    @property
    def finished(self) -> bool:
        return all(sequence.finish_reason is not None for sequence in self.sequences)

    @property
    def unfinished_core_ids(self) -> list[str]:
        return [sequence.core_id for sequence in self.sequences if sequence.finish_reason is None]

    def _sequence(self, index: int, core_id: str) -> _Sequence:
        params = self.params
        detokenizer = matcher = None
        if self.tokenizer is not None and params.detokenize:
            detokenizer = IncrementalDetokenizer(
                self.tokenizer, self.request.prompt_token_ids, skip_special_tokens=params.skip_special_tokens
            )
            if self._matcher is not None:
                matcher = self._matcher.fresh()
        sequence = _Sequence(index, core_id, detokenizer, matcher)
        if params.logprobs is not None:
            sequence.logprobs, sequence.cumulative_logprob = [], 0.0
        return sequence

    def apply(self, sequence: _Sequence, update: RequestUpdate) -> bool:
        """Take in one update; True if a stop string ended the sequence, so that the core must abort it."""
        if update.prompt_logprobs and self.prompt_logprobs is not None:
            self.prompt_logprobs += [self._logprob_entry(item) for item in update.prompt_logprobs]
        if update.num_cached_tokens is not None and self.num_cached_tokens is None:
            self.num_cached_tokens = update.num_cached_tokens
        if update.new_token_ids:
            self._note_times(update)
        if update.num_draft_tokens:
            self.stats.num_draft_tokens += update.num_draft_tokens - sequence.num_draft_tokens
            self.stats.num_accepted_tokens += update.num_accepted_tokens - sequence.num_accepted_tokens
            sequence.num_draft_tokens, sequence.num_accepted_tokens = (
                update.num_draft_tokens,
                update.num_accepted_tokens,
            )
        stopped = self._append_tokens(sequence, update)
        if not stopped and update.finish_reason is not None:
            sequence.finish_reason, sequence.stop_reason = update.finish_reason, update.stop_reason
            self._flush_text(sequence)
        return stopped

    def _note_times(self, update: RequestUpdate) -> None:
        now = time.monotonic()
        if not self.stats.first_token_ts:
            self.stats.first_token_ts = now
            self.stats.queued_ts, self.stats.scheduled_ts = update.queued_time, update.scheduled_time
        self.stats.last_token_ts = now
        self.stats.num_generation_tokens += len(update.new_token_ids)
        self.stats.num_preemptions = max(self.stats.num_preemptions, update.num_preemptions)

    def _append_tokens(self, sequence: _Sequence, update: RequestUpdate) -> bool:
        token_ids = update.new_token_ids
        # The text of the token that ended the sequence is dropped, unless the caller wants stops included.
        hidden = (
            len(token_ids) - 1
            if update.finish_reason == "stop" and not self.params.include_stop_str_in_output
            else len(token_ids)
        )
        for position, token_id in enumerate(token_ids):
            sequence.token_ids.append(token_id)
            if sequence.logprobs is not None and update.logprobs is not None:
                item = update.logprobs[position]
                sequence.logprobs.append(self._logprob_entry(item))
                sequence.cumulative_logprob = (sequence.cumulative_logprob or 0.0) + item.logprobs[0]
            if sequence.detokenizer is None or position >= hidden:
                continue
            if self._add_text(sequence, sequence.detokenizer.push((token_id,))):
                return True
        return False

    def _add_text(self, sequence: _Sequence, text: str) -> bool:
        """Text that has become final; True if it completes a stop string, which ends the sequence."""
        if sequence.matcher is None:
            sequence.text += text
            return False
        may_stop = len(sequence.token_ids) > self.params.min_tokens
        emitted, matched = sequence.matcher.push(text, may_stop=may_stop)
        sequence.text += emitted
        if matched is None:
            return False
        sequence.finish_reason, sequence.stop_reason = "stop", matched
        return True

    def _flush_text(self, sequence: _Sequence) -> None:
        """Text held back as an unfinished character or a possible stop string, once no more can come."""
        if sequence.detokenizer is None:
            return
        stopped = self._add_text(sequence, sequence.detokenizer.finish())
        if sequence.matcher is not None and not stopped:
            sequence.text += sequence.matcher.flush()

    def _logprob_entry(self, item: TokenLogprobs) -> dict[int, Logprob]:
        """The token itself first, with its rank, then the top ones, ranked from 1."""
        entry: dict[int, Logprob] = {}
        for place, (token_id, logprob) in enumerate(zip(item.token_ids, item.logprobs, strict=True)):
            if token_id in entry:
                continue
            text = self.tokenizer.token_string(token_id) if self.tokenizer is not None else None
            entry[token_id] = Logprob(logprob, item.rank if place == 0 else place, text)
        return entry

    def output(self) -> RequestOutput | None:
        """What is to be told now, by the request's output kind; None if nothing."""
        kind = self.params.output_kind
        finished = self.finished
        if kind == RequestOutputKind.FINAL_ONLY and not finished:
            return None
        delta = kind == RequestOutputKind.DELTA
        sequences = [sequence for sequence in self.sequences if sequence.has_news or not delta]
        if not any(sequence.has_news for sequence in sequences):
            return None
        prompt_logprobs = None if delta and self.told_prompt_logprobs else self.prompt_logprobs
        self.told_prompt_logprobs = True
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.request.prompt,
            prompt_token_ids=self.request.prompt_token_ids,
            prompt_logprobs=prompt_logprobs,
            outputs=[self._completion(sequence, delta) for sequence in sequences],
            finished=finished,
            metrics=self.stats,
            num_cached_tokens=self.num_cached_tokens,
        )

    def _completion(self, sequence: _Sequence, delta: bool) -> CompletionOutput:
        first_token, first_char = (sequence.told_tokens, sequence.told_text) if delta else (0, 0)
        sequence.told_tokens, sequence.told_text = len(sequence.token_ids), len(sequence.text)
        sequence.told_finish = sequence.finish_reason is not None
        return CompletionOutput(
            index=sequence.index,
            text=sequence.text[first_char:],
            token_ids=sequence.token_ids[first_token:],
            cumulative_logprob=sequence.cumulative_logprob,
            logprobs=None if sequence.logprobs is None else sequence.logprobs[first_token:],
            finish_reason=sequence.finish_reason,
            stop_reason=sequence.stop_reason,
        )


AnyState = RequestState | PoolingState
AnyOutput = RequestOutput | PoolingRequestOutput[PoolingOutput]


def new_state(request: ProcessedRequest, tokenizer: Tokenizer | None) -> AnyState:
    """The state of a request that has just come, by what it asks for."""
    pools = isinstance(request.params, PoolingParams)
    return PoolingState(request) if pools else RequestState(request, tokenizer)


class OutputProcessor:
    """Keeps the state of every request in flight, by its key, and turns updates into outputs."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer
        self.requests: dict[str, AnyState] = {}
        self._by_core_id: dict[str, tuple[Any, Any]] = {}  # a state and one of its own sequences

    def add(self, state: AnyState) -> None:
        self.requests[state.key] = state
        for sequence in state.sequences:
            self._by_core_id[sequence.core_id] = (state, sequence)

    def remove(self, key: str) -> list[str]:
        """Forget a request; returns the core ids that are still being computed and so must be aborted."""
        state = self.requests.pop(key, None)
        if state is None:
            return []
        for sequence in state.sequences:
            self._by_core_id.pop(sequence.core_id, None)
        return state.unfinished_core_ids

    def unfinished_core_ids(self, request_ids: str | Iterable[str]) -> list[str]:
        """Core ids behind callers' request ids, of what is still being computed; unknown ids are ignored."""
        wanted = {request_ids} if isinstance(request_ids, str) else set(request_ids)
        states = [state for state in self.requests.values() if state.request_id in wanted]
        return [core_id for state in states for core_id in state.unfinished_core_ids]

    def process(self, updates: Iterable[RequestUpdate]) -> ProcessedUpdates:
        """Take in what the core says. Updates of requests forgotten meanwhile are passed over."""
        touched: dict[str, AnyState] = {}
        result = ProcessedUpdates([], [], [])
        for update in updates:
            found = self._by_core_id.get(update.request_id)
            if found is None:
                continue
            state, sequence = found
            if update.finish_reason == "error" or (update.finish_reason == "abort" and isinstance(state, PoolingState)):
                result.failures.append((state, _failure(update)))
                result.core_ids_to_abort.extend(i for i in self.remove(state.key) if i != update.request_id)
                touched.pop(state.key, None)
                continue
            result.num_new_tokens += len(update.new_token_ids)
            if update.pooled is not None or (update.new_token_ids and not state.stats.first_token_ts):
                result.num_prompt_tokens += len(state.request.prompt_token_ids)
            if state.apply(sequence, update):
                result.core_ids_to_abort.append(sequence.core_id)
            touched[state.key] = state
            if sequence.finish_reason is not None:
                del self._by_core_id[sequence.core_id]
        for state in touched.values():
            output = state.output()
            if output is not None:
                result.outputs.append((state, output))
            if state.finished:
                self.requests.pop(state.key, None)
        return result


@dataclass(slots=True)
class ProcessedUpdates:
    """What a batch of updates comes to. Aborts are for sequences that a stop string ended. Prompt tokens are counted
    with the first token of their request."""

    outputs: list[tuple[AnyState, AnyOutput]]
    failures: list[tuple[AnyState, Exception]]
    core_ids_to_abort: list[str]
    num_prompt_tokens: int = 0
    num_new_tokens: int = 0


def _failure(update: RequestUpdate) -> Exception:
    if update.finish_reason == "abort":
        return RequestRejectedError("the request was aborted before it was computed; send it again")
    message = update.error or "the engine gave no reason"
    if update.error_kind == "queue_full":
        return RequestRejectedError(message)
    if update.error_kind == "invalid":
        return ValueError(message)
    return RequestFailedError(message)
