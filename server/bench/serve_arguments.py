"""The flags of `omni-engine bench serve`."""

from __future__ import annotations

import argparse

from ..arguments import parse_json_object
from .arguments import BenchParser, count, key_value, non_negative_float, positive_float, positive_int
from .datasets import add_dataset_arguments
from .metrics import GOODPUT_METRICS, METRICS
from .traffic import TrafficPattern


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
    add("--tokenizer-mode", choices=("auto",), default="auto", help="how to read the tokenizer")
    add("--trust-remote-code", action="store_true", help="for compatibility: code of a tokenizer is never run")
    add("--prompt-format", choices=("auto", "token-ids", "text"), default="auto",
        help="how made-up prompts are sent. auto: token ids, of exactly the wanted number, to the completions of "
        "omni-engine and vLLM; else text of as many tokens by the tokenizer")  # fmt: skip
    add("--speculative-config", help=argparse.SUPPRESS)  # known so that its place can be told
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


def traffic_pattern(parser: BenchParser, arguments: argparse.Namespace) -> TrafficPattern:
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
