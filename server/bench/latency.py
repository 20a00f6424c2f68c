"""`omni-engine bench latency`: the time one batch of equal requests takes in an embedded engine."""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
from tqdm import trange

from ...scheduler.sampling_params import SamplingParams
from ..arguments import add_engine_arguments, engine_args
from ..serve_arguments import take_model_argument
from .acceptance import acceptance_fields, acceptance_lines
from .arguments import BenchParser, count, positive_int, write_json

PERCENTAGES = (10, 25, 50, 75, 90, 99)


def latency_parser() -> BenchParser:
    parser = BenchParser("bench latency", "MODEL", "Time one batch of equal requests, again and again.")
    parser.add_argument("model_argument", metavar="MODEL", nargs="?", help="checkpoint directory or model id")
    add = parser.add_argument_group("benchmark").add_argument
    add("--input-len", type=positive_int, default=32, help="prompt tokens (default: 32)")
    add("--output-len", type=positive_int, default=128, help="tokens to generate (default: 128)")
    add("--batch-size", type=positive_int, default=8, help="requests in the batch (default: 8)")
    add("--n", type=positive_int, default=1, help="sequences per request (default: 1)")
    add("--num-iters-warmup", type=count, default=10, help="batches that are not timed (default: 10)")
    add("--num-iters", type=positive_int, default=30, help="batches that are timed (default: 30)")
    add("--disable-detokenize", action="store_true", help="leave the turning of tokens into text out")
    add("--output-json", metavar="FILE", help="save the result as JSON")
    add("--disable-tqdm", action="store_true", help="show no progress bar")
    add_engine_arguments(parser)
    # The batches are alike: with it, all but the first would find their prompts in the cache.
    parser.set_defaults(enable_prefix_caching=False)
    return parser


def run_latency(parser: BenchParser, arguments: argparse.Namespace) -> int:
    """Run the benchmark; prints and saves what vLLM's does."""
    take_model_argument(parser, arguments)
    args = engine_args(arguments)
    from ...engine.engine import Engine  # brings torch

    engine = Engine(args=args)
    input_len, output_len = arguments.input_len, arguments.output_len
    if input_len + output_len > engine.max_model_len:
        raise ValueError(
            f"--input-len and --output-len are {input_len} + {output_len} tokens, more than the model's "
            f"{engine.max_model_len}; lower one of them"
        )
    vocab_size = engine.config.model.vocab_size
    token_ids = np.random.default_rng(args.seed % 2**63).integers(vocab_size, size=(arguments.batch_size, input_len))
    prompts: list[Any] = [{"prompt_token_ids": ids} for ids in token_ids.tolist()]
    params = SamplingParams(
        n=arguments.n, ignore_eos=True, max_tokens=output_len, detokenize=not arguments.disable_detokenize
    )
    latencies = []
    for _ in trange(arguments.num_iters_warmup, desc="Warmup iterations", disable=arguments.disable_tqdm):
        engine.generate(prompts, params)
    before = engine.stats().drafts
    for _ in trange(arguments.num_iters, desc="Bench iterations", disable=arguments.disable_tqdm):
        start = time.perf_counter()
        engine.generate(prompts, params)
        latencies.append(time.perf_counter() - start)
    drafts = engine.stats().drafts
    drafts = None if drafts is None else drafts.since(before)
    result = latency_result(args.model, latencies) | acceptance_fields(drafts)
    print(f"Avg latency: {result['avg_latency']} seconds")
    for percentage, seconds in result["percentiles"].items():
        print(f"{percentage}% percentile latency: {seconds} seconds")
    for line in acceptance_lines(drafts):
        print(line)
    if arguments.output_json is not None:
        write_json(arguments.output_json, result)
    return 0


def latency_result(model: str, latencies: list[float]) -> dict[str, Any]:
    """The result as JSON data; seconds."""
    percentiles = np.percentile(latencies, PERCENTAGES).tolist()
    return {
        "model_id": model,
        "avg_latency": float(np.mean(latencies)),
        "latencies": latencies,
        "percentiles": dict(zip(PERCENTAGES, percentiles, strict=True)),
    }
