"""`omni-engine bench serve`: send requests to a running OpenAI server, time the answers, report."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import os
import resource
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp
from tqdm import tqdm

from ...models.checkpoint import resolve_model
from ...models.tokenizer import load_tokenizer
from ..arguments import parse_json_object
from .arguments import (
    BenchParser,
    count,
    key_value,
    non_negative_float,
    positive_float,
    positive_int,
)
from .client import Client, ClientOptions, RequestResult
from .datasets import DatasetOptions, add_dataset_arguments, make_requests
from .metrics import GOODPUT_METRICS, METRICS, ServeMetrics, measure
from .prompts import BenchRequest, LocalTokens, PromptMaker, ServerTokens, Tokens
from .report import RunLabels, error_lines, printed_block, result_object, result_path, save_result
from .traffic import TrafficPattern, TrafficRun

_RETRY_SECONDS = 1.0
_MODELS_TIMEOUT_SECONDS = 30.0
_MOST_FILES = 65536
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")
_TAKES_TOKEN_IDS = ("vllm", "omni-engine")  # what such servers say they are, as owners of their models


def serve_bench_parser() -> BenchParser:
    parser = BenchParser("bench serve", "", "Send requests to a running OpenAI server and time the answers.")
    add = parser.add_argument_group("server").add_argument
    add("--backend", choices=("openai", "openai-chat", "vllm"), default="openai",
        help="completions, or chat completions; vllm is another name of openai (default: openai)")  # fmt: skip
    add("--base-url", help="the server, as http://host:port (default: from --host and --port)")
    add("--host", default="127.0.0.1", help="default: 127.0.0.1")
    add("--port", type=int, default=8000, help="default: 8000")
    add("--endpoint", help="path (default: /v1/completions, or /v1/chat/completions for openai-chat)")
    add("--header", type=key_value, nargs="*", default=[], metavar="KEY=VALUE", help="headers of every request; "
        "OPENAI_API_KEY of the environment is sent as the API key")  # fmt: skip
    add("--insecure", action="store_true", help="accept any TLS certificate")
    add("--model", help="model, also for its tokenizer (default: the server's first)")
    add("--served-model-name", help="what the server calls the model, if not --model")
    add("--tokenizer", help="folder or cached model id of the tokenizer (default: the model's, else the server's)")
    add("--skip-tokenizer-init", action="store_true", help="load no tokenizer: use the server's /tokenize")
    add("--prompt-format", choices=("auto", "token-ids", "text"), default="auto",
        help="how made-up prompts are sent. auto: token ids, of exactly the wanted number, to the completions of "
        "omni-engine and vLLM; else text of as many tokens by the tokenizer")  # fmt: skip
    add_dataset_arguments(parser, default="random")
    _add_traffic_arguments(parser)
    _add_request_arguments(parser)
    _add_report_arguments(parser)
    return parser


def _add_traffic_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("traffic").add_argument
    add("--seed", type=int, default=0, help="seeds prompts, lengths and arrivals (default: 0)")
    add("--request-rate", type=positive_float, default=float("inf"),
        help="requests per second; inf: all at once (default: inf)")  # fmt: skip
    add("--burstiness", type=positive_float, default=1.0,
        help="shape of the gamma distribution of the gaps: 1 is Poisson, less is burstier (default: 1)")  # fmt: skip
    add("--max-concurrency", type=positive_int, help="most requests open at once; others wait here (default: no limit)")
    add("--ramp-up-strategy", choices=("linear", "exponential"), help="let the rate grow from start to end")
    add("--ramp-up-start-rps", type=positive_float, help="requests per second at the start")
    add("--ramp-up-end-rps", type=positive_float, help="requests per second at the end")
    add("--num-warmups", type=count, default=0, help="times that the first request is sent before (default: 0)")
    add("--ready-check-timeout-sec", type=non_negative_float, default=0.0,
        help="wait so long until the server answers the first request; 0: do not try (default: 0)")  # fmt: skip
    add("--request-timeout", type=positive_float, default=6 * 3600.0,
        help="seconds after which a request has failed (default: 21600)")  # fmt: skip
    add("--stall-timeout", type=positive_float, default=600.0,
        help="give up once no open request has received anything for so many seconds (default: 600)")  # fmt: skip


def _add_request_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("requests (what is not given is left to the server)").add_argument
    add("--ignore-eos", action="store_true", help="go on after the end-of-text token, for exact output lengths")
    add("--logprobs", type=count, help="logprobs per token")
    add("--temperature", type=float)
    add("--top-p", type=float)
    add("--top-k", type=int)
    add("--min-p", type=float)
    add("--frequency-penalty", type=float)
    add("--presence-penalty", type=float)
    add("--repetition-penalty", type=float, help="default: 1")
    add("--extra-body", type=parse_json_object, default={}, metavar="JSON",
        help="more fields of the body; null takes one out")  # fmt: skip
    add("--request-id-prefix", help="request ids are this and a number (default: bench- and random digits)")


def _add_report_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("report").add_argument
    add("--goodput", nargs="+", type=_objective, default=[], metavar="METRIC:MS",
        help="count requests within these times: ttft, tpot, e2el in milliseconds, as ttft:500 e2el:3000")  # fmt: skip
    add("--percentile-metrics", type=_metric_names, default=("ttft", "tpot", "itl"), metavar="A,B",
        help="metrics with statistics, of ttft, tpot, itl, e2el (default: ttft,tpot,itl)")  # fmt: skip
    add("--metric-percentiles", type=_percentiles, default=(99.0,), metavar="P,Q", help="percentiles (default: 99)")
    add("--save-result", action="store_true", help="save the result as a JSON file")
    add("--save-detailed", action="store_true", help="with lengths, times, texts and errors of every request")
    add("--append-result", action="store_true", help="add the result to the file as a further line")
    add("--result-dir", help="folder of the file (default: the current one)")
    add("--result-filename", help="name of the file (default: LABEL-RATEqps-MODEL-DATE.json)")
    add("--label", help="first part of the file's name (default: the backend)")
    add("--metadata", type=key_value, nargs="*", default=[], metavar="KEY=VALUE", help="more keys of the result")
    add("--disable-tqdm", action="store_true", help="show no progress bar")


def run_serve_bench(parser: BenchParser, arguments: argparse.Namespace) -> int:
    """Run the benchmark; returns 0, or 1 if no request at all was completed."""
    pattern = _pattern(parser, arguments)
    try:
        options = DatasetOptions.of(arguments)
    except ValueError as error:
        parser.error(str(error))
    _raise_file_limit()
    target = asyncio.run(_find_target(arguments))
    tokens = _tokens(arguments, target)
    as_text = _sends_text(parser, arguments, options, target)
    maker = PromptMaker(tokens, as_text=as_text, adds_special_tokens=not target.chat)
    requests = make_requests(options, maker)
    _note(f"{len(requests)} prompts as {'text' if as_text else 'token ids'}; tokenizer: {tokens.name}")
    if maker.num_inexact:
        _note(f"{maker.num_inexact} texts could not be adjusted to the wanted number of tokens exactly")
    results, duration = asyncio.run(_benchmark(arguments, target, pattern, options, requests))
    metrics = measure(
        results,
        duration,
        percentiles=arguments.metric_percentiles,
        goodput=dict(arguments.goodput),
        count_tokens=lambda text: len(tokens.encode(text, add_special_tokens=False)),
    )
    _report(arguments, metrics, results, _labels(arguments, target, tokens, pattern, len(requests)))
    return 0 if metrics.completed else 1


@dataclasses.dataclass(frozen=True)
class _Target:
    """The server and the model that are measured."""

    base_url: str
    endpoint: str
    chat: bool
    headers: dict[str, str]
    model_id: str
    served_name: str
    root: str | None  # where the server says that the model comes from
    owner: str | None  # whom it names as the owner of its models


async def _find_target(arguments: argparse.Namespace) -> _Target:
    """Ask the server for its models, within the time of the ready check if there is one."""
    base_url = (arguments.base_url or f"http://{_bracketed(arguments.host)}:{arguments.port}").rstrip("/")
    chat = arguments.backend == "openai-chat"
    headers = {}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    headers.update(arguments.header)
    card: Mapping[str, Any] = {}
    try:
        cards = await _models(arguments, base_url, headers)
        wanted = arguments.served_model_name or arguments.model
        card = next((each for each in cards if wanted in (None, each.get("id"))), cards[0] if cards else {})
    except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError) as error:
        if arguments.model is None:
            raise ValueError(
                f"the server does not tell its models, name one with --model ({error}): {base_url}"
            ) from error
    model_id = arguments.model or card.get("id")
    if not model_id:
        raise ValueError(f"the server has no models, name one with --model: {base_url}")
    return _Target(
        base_url=base_url,
        endpoint=arguments.endpoint or ("/v1/chat/completions" if chat else "/v1/completions"),
        chat=chat,
        headers=headers,
        model_id=model_id,
        served_name=arguments.served_model_name or model_id,
        root=card.get("root"),
        owner=card.get("owned_by"),
    )


async def _models(arguments: argparse.Namespace, base_url: str, headers: Mapping[str, str]) -> list[Mapping[str, Any]]:
    """The cards of GET /v1/models; a server that cannot be reached yet is tried again as long as may be waited."""
    deadline = time.monotonic() + arguments.ready_check_timeout_sec
    timeout = aiohttp.ClientTimeout(total=max(_MODELS_TIMEOUT_SECONDS, arguments.ready_check_timeout_sec))
    async with _session(arguments, timeout) as session:
        while True:
            try:
                async with session.get(f"{base_url}/v1/models", headers=headers) as response:
                    response.raise_for_status()
                    answer = await response.json(content_type=None)
                    if not isinstance(answer, dict) or not isinstance(answer.get("data"), list):
                        raise ValueError("the answer to /v1/models is not a list of models")
                    return answer["data"]
            except (aiohttp.ClientError, asyncio.TimeoutError):
                if time.monotonic() >= deadline:
                    raise
                await asyncio.sleep(_RETRY_SECONDS)


def _session(arguments: argparse.Namespace, timeout: aiohttp.ClientTimeout) -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(limit=0, ssl=not arguments.insecure)
    return aiohttp.ClientSession(connector=connector, timeout=timeout)


def _tokens(arguments: argparse.Namespace, target: _Target) -> Tokens:
    """The tokenizer that was named, else the model's if it is here, else the server's own."""
    server = (target.base_url, target.served_name, target.headers)
    if arguments.skip_tokenizer_init:
        return ServerTokens(*server)
    if arguments.tokenizer is not None:
        return LocalTokens(load_tokenizer(resolve_model(arguments.tokenizer)), arguments.tokenizer)
    for name in (target.model_id, target.root):
        if name:
            try:
                return LocalTokens(load_tokenizer(resolve_model(name)), name)
            except (OSError, ValueError):
                continue
    return ServerTokens(*server)


def _sends_text(parser: BenchParser, arguments: argparse.Namespace, options: DatasetOptions, target: _Target) -> bool:
    wanted = arguments.prompt_format
    if wanted == "token-ids" and (target.chat or options.text_only):
        parser.error("only made-up prompts for completions can be token ids: --prompt-format token-ids")
    if wanted != "auto":
        return wanted == "text"
    return target.chat or options.text_only or target.owner not in _TAKES_TOKEN_IDS


async def _benchmark(
    arguments: argparse.Namespace,
    target: _Target,
    pattern: TrafficPattern,
    options: DatasetOptions,
    requests: Sequence[BenchRequest],
) -> tuple[list[RequestResult], float]:
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
    async with _session(arguments, aiohttp.ClientTimeout(total=arguments.request_timeout)) as session:
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
        return await send(requests, times, "Requests", prefix)


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


def _pattern(parser: BenchParser, arguments: argparse.Namespace) -> TrafficPattern:
    """The traffic that the flags ask for, once they are known to go together."""
    start, end = arguments.ramp_up_start_rps, arguments.ramp_up_end_rps
    infinite = float("inf")
    if arguments.trace is not None and (arguments.request_rate != infinite or arguments.ramp_up_strategy):
        parser.error("a trace brings its own arrival times; scale them with --trace-time-scale: --trace")
    if arguments.ramp_up_strategy is None:
        if start is not None or end is not None:
            parser.error("--ramp-up-start-rps and --ramp-up-end-rps need --ramp-up-strategy: linear or exponential")
        return TrafficPattern(arguments.request_rate, arguments.burstiness)
    if arguments.request_rate != infinite:
        parser.error(f"leave out --request-rate when the rate ramps up: {arguments.request_rate}")
    if start is None or end is None or not start < end < infinite:
        parser.error(f"--ramp-up-start-rps must be under --ramp-up-end-rps, and both be given: {start}, {end}")
    return TrafficPattern(infinite, arguments.burstiness, arguments.ramp_up_strategy, start, end)


def _labels(
    arguments: argparse.Namespace, target: _Target, tokens: Tokens, pattern: TrafficPattern, num_prompts: int
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
    arguments: argparse.Namespace, metrics: ServeMetrics, results: Sequence[RequestResult], run: RunLabels
) -> None:
    shown = arguments.percentile_metrics
    if lines := error_lines(results):
        _note("failed requests:\n  " + "\n  ".join(lines))
    print(printed_block(metrics, run, shown))
    if arguments.save_result or arguments.append_result:
        path = result_path(run, arguments.result_dir, arguments.result_filename)
        result = result_object(metrics, results, run, shown, detailed=arguments.save_detailed)
        save_result(path, result, append=arguments.append_result)
        _note(f"saved in {path}")


def _objective(text: str) -> tuple[str, float]:
    name, _, limit = text.partition(":")
    if name not in GOODPUT_METRICS:
        raise argparse.ArgumentTypeError(f"the metric must be one of {', '.join(GOODPUT_METRICS)}: {text}")
    return name, non_negative_float(limit)


def _metric_names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    for name in names:
        if name not in METRICS:
            raise argparse.ArgumentTypeError(f"metrics are {', '.join(METRICS)}: {name}")
    return names


def _percentiles(text: str) -> tuple[float, ...]:
    values = tuple(non_negative_float(part) for part in text.split(","))
    if max(values) > 100:
        raise argparse.ArgumentTypeError(f"a percentile is at most 100: {max(values):g}")
    return values


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _raise_file_limit() -> None:
    """Every open request takes a file descriptor, and the usual limit is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(_MOST_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
