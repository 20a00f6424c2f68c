"""`omni-engine bench serve`: send requests to a running OpenAI server, time the answers, report."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import resource
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import aiohttp
from tqdm import tqdm

from ...scheduler.draft_stats import DraftStats
from .acceptance import read_counters
from .arguments import BenchParser
from .client import Client, ClientOptions, RequestResult
from .datasets import DatasetOptions, make_requests
from .metrics import ServeMetrics, measure
from .prompts import BenchRequest, PromptMaker, Tokens
from .report import RunLabels, error_lines, printed_block, result_object, result_path, save_result
from .serve_arguments import traffic_pattern
from .target import Target, find_target, open_session, sends_text, tokens_of
from .traffic import TrafficPattern, TrafficRun

_RETRY_SECONDS = 1.0
_METRICS_TIMEOUT = aiohttp.ClientTimeout(total=30)
_MOST_FILES = 65536
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")


def run_serve_bench(parser: BenchParser, arguments: argparse.Namespace) -> int:
    """Run the benchmark; returns 0, or 1 if no request at all was completed."""
    if arguments.speculative_config is not None:
        parser.error(
            "speculation is the server's: start `omni-engine serve` with this flag, and what its drafts come to is "
            f"reported here: --speculative-config {arguments.speculative_config}"
        )
    pattern = traffic_pattern(parser, arguments)
    try:
        options = DatasetOptions.of(arguments)
    except ValueError as error:
        parser.error(str(error))
    _raise_file_limit()
    target = asyncio.run(find_target(arguments))
    tokens = tokens_of(arguments, target)
    as_text = sends_text(parser, arguments, options, target)
    maker = PromptMaker(tokens, as_text=as_text, adds_special_tokens=not target.chat)
    requests = make_requests(options, maker)
    _note(f"{len(requests)} prompts as {'text' if as_text else 'token ids'}; tokenizer: {tokens.name}")
    if maker.num_inexact:
        _note(f"{maker.num_inexact} texts could not be adjusted to the wanted number of tokens exactly")
    results, duration, drafts = asyncio.run(_benchmark(arguments, target, pattern, options, requests))
    metrics = measure(
        results,
        duration,
        percentiles=arguments.metric_percentiles,
        goodput=dict(arguments.goodput),
        count_tokens=_token_counter(tokens),
    )
    _report(arguments, metrics, results, _labels(arguments, target, tokens, pattern, len(requests)), drafts)
    return 0 if metrics.completed else 1


async def _benchmark(
    arguments: argparse.Namespace,
    target: Target,
    pattern: TrafficPattern,
    options: DatasetOptions,
    requests: Sequence[BenchRequest],
) -> tuple[list[RequestResult], float, DraftStats | None]:
    sampling = {name: getattr(arguments, name) for name in _SAMPLING if getattr(arguments, name) is not None}
    client_options = ClientOptions(
        url=target.base_url + target.endpoint,
        model=target.served_name,
        chat=target.chat,
        headers=target.headers,
        sampling=sampling,
        ignore_eos=arguments.ignore_eos,
        logprobs=arguments.logprobs,
        extra_body=arguments.extra_body,
    )
    prefix = arguments.request_id_prefix or f"bench-{uuid.uuid4().hex[:8]}-"
    times: Sequence[float] = [request.arrival or 0.0 for request in requests]
    if options.trace is None:
        times = pattern.arrival_times(len(requests), options.generator).tolist()
    async with open_session(arguments, aiohttp.ClientTimeout(total=arguments.request_timeout)) as session:
        client = Client(session, client_options)
        if arguments.ready_check_timeout_sec:
            await _wait_ready(client, requests[0], arguments.ready_check_timeout_sec)

        async def send(requests: Sequence[BenchRequest], times: Sequence[float], name: str, prefix: str) -> Any:
            run = TrafficRun(
                client,
                max_concurrency=arguments.max_concurrency,
                stall_timeout=arguments.stall_timeout,
                request_id_prefix=prefix,
            )
            with tqdm(total=len(requests), desc=name, unit="req", disable=arguments.disable_tqdm) as bar:
                return await run.run(requests, times, bar)

        if arguments.num_warmups:
            warmups = [requests[0]] * arguments.num_warmups
            results, _ = await send(warmups, [0.0] * len(warmups), "Warm-up", f"{prefix}warmup-")
            if lines := error_lines(results):
                _note("warm-up requests failed:\n  " + "\n  ".join(lines))
        before = await _draft_counters(session, target)
        results, duration = await send(requests, times, "Requests", prefix)
        after = await _draft_counters(session, target)
    drafts = None if before is None or after is None else after.since(before)
    return results, duration, drafts if drafts is not None and drafts.num_draft_tokens else None


async def _draft_counters(session: aiohttp.ClientSession, target: Target) -> DraftStats | None:
    """What the server's speculation has come to so far; None where it does not speculate, or tells nothing."""
    with contextlib.suppress(aiohttp.ClientError, asyncio.TimeoutError, ValueError, KeyError):
        url = f"{target.base_url}/metrics"
        async with session.get(url, headers=target.headers, timeout=_METRICS_TIMEOUT) as response:
            if response.status == 200:
                return read_counters(await response.text())
    return None


async def _wait_ready(client: Client, request: BenchRequest, timeout: float) -> None:
    """Send the first request until it succeeds; raises ValueError with the last error once the time is over."""
    deadline = time.monotonic() + timeout
    while True:
        result = RequestResult(prompt_len=request.prompt_len)
        try:
            await asyncio.wait_for(
                client.complete(request, "bench-ready", result), max(deadline - time.monotonic(), _RETRY_SECONDS)
            )
        except asyncio.TimeoutError:
            result.error = "no answer in time"
        if result.success:
            return
        if time.monotonic() >= deadline:
            raise ValueError(f"the server did not complete a first request within {timeout:g} s: {result.error}")
        await asyncio.sleep(min(_RETRY_SECONDS, max(0.0, deadline - time.monotonic())))


def _labels(
    arguments: argparse.Namespace, target: Target, tokens: Tokens, pattern: TrafficPattern, num_prompts: int
) -> RunLabels:
    return RunLabels(
        backend=arguments.backend,
        model_id=target.model_id,
        tokenizer_id=tokens.name,
        num_prompts=num_prompts,
        pattern=pattern,
        max_concurrency=arguments.max_concurrency,
        label=arguments.label,
        metadata=dict(arguments.metadata),
    )


def _report(
    arguments: argparse.Namespace,
    metrics: ServeMetrics,
    results: Sequence[RequestResult],
    run: RunLabels,
    drafts: DraftStats | None,
) -> None:
    shown = arguments.percentile_metrics
    if lines := error_lines(results):
        _note("failed requests:\n  " + "\n  ".join(lines))
    print(printed_block(metrics, run, shown, drafts))
    if arguments.save_result or arguments.append_result:
        path = result_path(run, arguments.result_dir, arguments.result_filename)
        result = result_object(metrics, results, run, shown, drafts, detailed=arguments.save_detailed)
        save_result(path, result, append=arguments.append_result)
        _note(f"saved in {path}")


def _token_counter(tokens: Tokens) -> Callable[[str], int]:
    """Counts the tokens of answers of servers that do not; where that fails, an answer is one token, as in vLLM."""

    def count_tokens(text: str) -> int:
        try:
            return len(tokens.encode(text, add_special_tokens=False))
        except ValueError:
            return 1

    return count_tokens


def _raise_file_limit() -> None:
    """Every open request takes a file descriptor, and the usual limit is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(_MOST_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
