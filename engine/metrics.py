"""Prometheus metrics of one engine under vLLM's names, fed with what goes into the core and what comes out of it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from ..scheduler.draft_stats import DraftStats
from ..scheduler.request import RequestInput, RequestUpdate
from ..scheduler.scheduler import SchedulerStats
from .config import EngineArgs
from .messages import CoreInfo

ENGINE_INDEX = "0"
REJECTION_REASONS = ("queue_full", "grammars_busy")
FINISHED_REASONS = ("stop", "length", "abort", "error")
# Bucket bounds are vLLM's, so that its dashboards and alerts keep their meaning. Seconds:
FIRST_TOKEN_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
REQUEST_BUCKETS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
# Counts:
ITERATION_TOKENS_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
SEQUENCES_BUCKETS = (1, 2, 5, 10, 20)
PREEMPTIONS_BUCKETS = (1, 2, 3, 4, 5, 10, 20)


@dataclass(slots=True)
class _Request:
    """What the n sequences of one request have in common."""

    core_ids: list[str]
    num_unfinished: int
    most_tokens: int = 0  # of the longest sequence that was not aborted


@dataclass(slots=True)
class _Sequence:
    """One sequence on its way; times are monotonic seconds, comparable between front and core."""

    request: _Request
    num_prompt_tokens: int
    max_tokens: int | None
    arrival_time: float
    queued_time: float = 0.0
    scheduled_time: float = 0.0
    first_token_time: float = 0.0
    last_token_time: float = 0.0
    num_tokens: int = 0  # generated
    num_cached_tokens: int = 0  # of the prompt
    num_preemptions: int = 0


class EngineMetrics:
    """Counts by sequence: a request of n sequences counts n times, but for the metrics that are about n.

    The prompt of a sequence counts when it gets its first token, cached part included. So N requests of P prompt and G
    output tokens come to exactly N·P prompt tokens, N first tokens, N·(G−1) intervals between tokens, and N·(P+G)
    tokens over all steps. A sequence that was aborted counts in request_success and in no histogram over requests.

    `num_drafts` is the most tokens that are drafted at once; without speculation, 0, there are no metrics about drafts.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        model_name: str,
        max_model_len: int,
        cache_config: Mapping[str, Any],
        num_drafts: int = 0,
    ) -> None:
        self._sequences: dict[str, _Sequence] = {}
        self._seen: dict[str, int] = {}  # the scheduler's counters as of its last snapshot
        self._seen_drafts: DraftStats | None = None
        make = _Maker(registry, {"model_name": model_name, "engine": ENGINE_INDEX})
        self._running = make.gauge("num_requests_running", "Requests in the batch.")
        self._waiting = make.gauge("num_requests_waiting", "Requests that wait to be scheduled.")
        by_reason = make.gauges("num_requests_waiting_by_reason", "Waiting requests by reason.", "reason")
        # Nothing defers a request here: all that wait do so for room.
        self._waiting_for_capacity, _ = by_reason("capacity"), by_reason("deferred")
        self._cache_usage = make.gauge("kv_cache_usage_perc", "Share of the KV blocks in use, 0 to 1.")
        adapters = {"max_lora": "0", "waiting_lora_adapters": "", "running_lora_adapters": ""}
        make.info("lora_requests_info", "LoRA adapters in use; this engine serves none.", adapters)
        make.info("cache_config_info", "The KV cache.", {name: str(value) for name, value in cache_config.items()})

        self._prompt_tokens = make.counter("prompt_tokens", "Prompt tokens processed.")
        self._generation_tokens = make.counter("generation_tokens", "Tokens generated.")
        self._cached_tokens = make.counter("prompt_tokens_cached", "Prompt tokens found in the prefix cache.")
        by_source = make.counters("prompt_tokens_by_source", "Prompt tokens by where they came from.", "source")
        self._computed_source, self._cached_source = by_source("local_compute"), by_source("local_cache_hit")
        cached_by_source = make.counters(
            "prompt_tokens_cached_by_source", "Cached prompt tokens by where they were cached.", "source"
        )
        self._cached_by_local = cached_by_source("local_cache_hit")
        finished = make.counters("request_success", "Finished requests by reason.", "finished_reason")
        self._finished = {reason: finished(reason) for reason in FINISHED_REASONS}
        self._counters = {
            name: make.counter(name, text)
            for name, text in (
                ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache."),
                ("prefix_cache_hits", "Prompt tokens found in the prefix cache, by lookups."),
                ("num_preemptions", "Requests that had to give up their KV blocks and start over."),
            )
        }
        # Dashboards divide by these; there is no cache behind the KV cache, and none of media, so they stay at 0.
        for name, text in (
            ("external_prefix_cache_queries", "Prompt tokens looked up in other caches of KV; there are none."),
            ("external_prefix_cache_hits", "Prompt tokens found in other caches of KV; there are none."),
            ("mm_cache_queries", "Media looked up in a cache of media; there is none."),
            ("mm_cache_hits", "Media found in a cache of media; there is none."),
        ):
            make.counter(name, text)
        self._drafts = _DraftMetrics(make, num_drafts) if num_drafts else None
        rejections = Counter(
            "vllm:admission_rejections", "Requests refused (503) because too many waited.", ("model_name", "reason"),
            registry=registry,
        )  # fmt: skip
        self._rejections = {reason: rejections.labels(model_name, reason) for reason in REJECTION_REASONS}

        tokens = token_buckets(max_model_len)
        seconds = REQUEST_BUCKETS
        histogram = make.histogram
        self._first_token = histogram("time_to_first_token_seconds", "Arrival to first token.", FIRST_TOKEN_BUCKETS)
        self._between_tokens = histogram("inter_token_latency_seconds", "Between two tokens.", TOKEN_BUCKETS)
        self._per_token = histogram(
            "request_time_per_output_token_seconds", "Mean time per token after the first.", TOKEN_BUCKETS
        )
        self._end_to_end = histogram("e2e_request_latency_seconds", "Arrival to last token.", seconds)
        self._queue_time = histogram("request_queue_time_seconds", "Waiting to be scheduled.", seconds)
        self._inference_time = histogram("request_inference_time_seconds", "Scheduled to last token.", seconds)
        self._prefill_time = histogram("request_prefill_time_seconds", "Scheduled to first token.", seconds)
        self._decode_time = histogram("request_decode_time_seconds", "First token to last token.", seconds)
        self._request_prompt = histogram("request_prompt_tokens", "Prompt tokens of a request.", tokens)
        self._request_generated = histogram("request_generation_tokens", "Tokens generated for a request.", tokens)
        self._request_most = histogram(
            "request_max_num_generation_tokens", "Tokens of the longest of a request's n sequences.", tokens
        )
        self._request_max_tokens = histogram("request_params_max_tokens", "max_tokens of a request.", tokens)
        self._request_computed = histogram(
            "request_prefill_kv_computed_tokens", "Prompt tokens of a request that were not cached.", tokens
        )
        self._request_n = histogram("request_params_n", "n of a request.", SEQUENCES_BUCKETS)
        self._request_preemptions = histogram(
            "request_num_preemptions", "Times that a request was preempted.", PREEMPTIONS_BUCKETS
        )
        self._step_tokens = histogram(
            "iteration_tokens_total", "Prompt and generated tokens of a step.", ITERATION_TOKENS_BUCKETS
        )

    def add(self, core_requests: Iterable[RequestInput]) -> None:
        """A request, as its n sequences, goes to the core."""
        sources = list(core_requests)
        request = _Request([source.request_id for source in sources], len(sources))
        for source in sources:
            self._sequences[source.request_id] = _Sequence(
                request, len(source.prompt_token_ids), source.params.max_tokens, source.arrival_time
            )

    def take(self, updates: Iterable[RequestUpdate], stats: SchedulerStats) -> None:
        """One step, or an abort, of the core."""
        now = time.monotonic()
        num_prompt_tokens = num_new_tokens = 0
        for update in updates:
            sequence = self._sequences.get(update.request_id)
            if sequence is None:
                continue  # ended before, by a stop string or by its caller
            if update.new_token_ids:
                if not sequence.num_tokens:
                    num_prompt_tokens += sequence.num_prompt_tokens
                num_new_tokens += len(update.new_token_ids)
                self._take_tokens(sequence, update, now)
            elif update.pooled is not None:
                num_prompt_tokens += sequence.num_prompt_tokens
                self._take_pooled(sequence, update, now)
            if update.error_kind == "queue_full":
                self._rejections["queue_full"].inc()
            if update.finish_reason == "error":
                # The request has failed as a whole; those of its sequences that still run are aborted.
                for core_id in sequence.request.core_ids:
                    self.end(core_id, "error")
            elif update.finish_reason is not None:
                self.end(update.request_id, update.finish_reason)
        if num_new_tokens or num_prompt_tokens:
            self._prompt_tokens.inc(num_prompt_tokens)
            self._generation_tokens.inc(num_new_tokens)
            self._step_tokens.observe(num_prompt_tokens + num_new_tokens)
        self._take_stats(stats)

    def end(self, core_id: str, reason: str) -> None:
        """A sequence has ended: by the core's word, by a stop string, or because its caller left. Once is enough."""
        sequence = self._sequences.pop(core_id, None)
        if sequence is None:
            return
        self._finished[reason].inc()
        request = sequence.request
        request.num_unfinished -= 1
        if reason in ("stop", "length"):
            request.most_tokens = max(request.most_tokens, sequence.num_tokens)
            self._observe(sequence)
        if not request.num_unfinished and request.most_tokens:
            self._request_n.observe(len(request.core_ids))
            self._request_most.observe(request.most_tokens)

    def rejected_by_grammars(self) -> None:
        """A request was refused because too many new grammars were being checked."""
        self._rejections["grammars_busy"].inc()

    def core_lost(self) -> None:
        """Nothing runs or waits any more; whatever did has failed. A new core counts from 0."""
        self._seen.clear()
        self._seen_drafts = None
        for core_id in list(self._sequences):
            self.end(core_id, "error")
        for gauge in (self._running, self._waiting, self._waiting_for_capacity, self._cache_usage):
            gauge.set(0)

    def _take_tokens(self, sequence: _Sequence, update: RequestUpdate, now: float) -> None:
        count = len(update.new_token_ids)
        if not sequence.num_tokens:
            self._take_prompt(sequence, update, now)
            self._first_token.observe(now - sequence.arrival_time)
            sequence.num_tokens = 1
            count -= 1
        # Tokens that come together share the time since the last ones.
        for _ in range(count):
            self._between_tokens.observe((now - sequence.last_token_time) / count)
        sequence.num_tokens += count
        sequence.last_token_time = now
        sequence.num_preemptions = update.num_preemptions

    def _take_prompt(self, sequence: _Sequence, update: RequestUpdate, now: float) -> None:
        """The prompt has been computed."""
        sequence.queued_time, sequence.scheduled_time = update.queued_time, update.scheduled_time
        sequence.num_cached_tokens = update.num_cached_tokens or 0
        sequence.first_token_time = sequence.last_token_time = now
        self._cached_tokens.inc(sequence.num_cached_tokens)
        self._cached_source.inc(sequence.num_cached_tokens)
        self._cached_by_local.inc(sequence.num_cached_tokens)
        self._computed_source.inc(sequence.num_prompt_tokens - sequence.num_cached_tokens)

    def _take_pooled(self, sequence: _Sequence, update: RequestUpdate, now: float) -> None:
        """A prompt has been pooled: it generates nothing, so it counts in no metric of first or later tokens."""
        self._take_prompt(sequence, update, now)
        sequence.num_preemptions = update.num_preemptions

    def _take_stats(self, stats: SchedulerStats) -> None:
        self._running.set(stats.num_running)
        self._waiting.set(stats.num_waiting)
        self._waiting_for_capacity.set(stats.num_waiting)
        self._cache_usage.set(stats.kv_cache_usage)
        for name, counter in self._counters.items():
            value: int = getattr(stats, name)
            counter.inc(value - self._seen.get(name, 0))
            self._seen[name] = value
        if self._drafts is not None and stats.drafts is not None:
            self._drafts.count(stats.drafts.since(self._seen_drafts))
            self._seen_drafts = stats.drafts

    def _observe(self, sequence: _Sequence) -> None:
        """The histograms over finished requests."""
        num_tokens = sequence.num_tokens
        first, last = sequence.first_token_time, sequence.last_token_time
        self._end_to_end.observe(last - sequence.arrival_time)
        self._queue_time.observe(sequence.scheduled_time - sequence.queued_time)
        self._inference_time.observe(last - sequence.scheduled_time)
        self._prefill_time.observe(first - sequence.scheduled_time)
        self._decode_time.observe(last - first)
        if num_tokens > 1:
            self._per_token.observe((last - first) / (num_tokens - 1))
        self._request_prompt.observe(sequence.num_prompt_tokens)
        self._request_computed.observe(sequence.num_prompt_tokens - sequence.num_cached_tokens)
        self._request_generated.observe(num_tokens)
        self._request_preemptions.observe(sequence.num_preemptions)
        if sequence.max_tokens is not None:
            self._request_max_tokens.observe(sequence.max_tokens)


class _DraftMetrics:
    """The counters of speculation."""

    def __init__(self, make: _Maker, num_drafts: int) -> None:
        self._drafts = make.counter("spec_decode_num_drafts", "Drafted continuations that were verified.")
        self._tokens = make.counter("spec_decode_num_draft_tokens", "Tokens that were drafted and verified.")
        self._accepted = make.counter("spec_decode_num_accepted_tokens", "Drafted tokens that were accepted.")
        at_position = make.counters(
            "spec_decode_num_accepted_tokens_per_pos", "Accepted tokens by place in their continuation.", "position"
        )
        self._positions = [at_position(str(position)) for position in range(num_drafts)]

    def count(self, new: DraftStats) -> None:
        self._drafts.inc(new.num_drafts)
        self._tokens.inc(new.num_draft_tokens)
        self._accepted.inc(new.num_accepted_tokens)
        for counter, accepted in zip(self._positions, new.num_accepted_per_position, strict=True):
            counter.inc(accepted)


class _Maker:
    """Makes metrics with vLLM's prefix that carry `labels`."""

    def __init__(self, registry: CollectorRegistry, labels: dict[str, str]) -> None:
        self.registry = registry
        self.labels = labels

    def gauge(self, name: str, text: str) -> Any:
        return Gauge(f"vllm:{name}", text, tuple(self.labels), registry=self.registry).labels(**self.labels)

    def gauges(self, name: str, text: str, label: str) -> Any:
        family = Gauge(f"vllm:{name}", text, (*self.labels, label), registry=self.registry)
        return lambda value: family.labels(**self.labels, **{label: value})

    def info(self, name: str, text: str, labels: dict[str, str]) -> None:
        """A gauge that is always 1; what it tells stands in its labels."""
        labels = {**self.labels, **labels}
        Gauge(f"vllm:{name}", text, tuple(labels), registry=self.registry).labels(**labels).set(1)

    def counter(self, name: str, text: str) -> Any:
        return Counter(f"vllm:{name}", text, tuple(self.labels), registry=self.registry).labels(**self.labels)

    def counters(self, name: str, text: str, label: str) -> Any:
        family = Counter(f"vllm:{name}", text, (*self.labels, label), registry=self.registry)
        return lambda value: family.labels(**self.labels, **{label: value})

    def histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Any:
        family = Histogram(f"vllm:{name}", text, tuple(self.labels), buckets=buckets, registry=self.registry)
        return family.labels(**self.labels)


def token_buckets(max_model_len: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50, … up to `max_model_len`."""
    bounds: list[int] = []
    power = 1
    while power <= max_model_len:
        bounds += [step * power for step in (1, 2, 5) if step * power <= max_model_len]
        power *= 10
    return tuple(bounds)


def cache_config(args: EngineArgs, info: CoreInfo) -> dict[str, Any]:
    """What the metric about the KV cache tells, by vLLM's names."""
    num_tokens = info.num_blocks * info.block_size
    return {
        "block_size": info.block_size,
        "num_gpu_blocks": info.num_blocks,
        "num_gpu_blocks_override": args.num_gpu_blocks_override,
        "gpu_memory_utilization": args.gpu_memory_utilization,
        "kv_cache_memory_bytes": args.kv_cache_memory_bytes,
        "kv_cache_size_tokens": num_tokens,
        "kv_cache_max_concurrency": round(num_tokens / info.max_model_len, 2),
        "enable_prefix_caching": args.enable_prefix_caching,
    }
