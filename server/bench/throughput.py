"""`omni-engine bench throughput`: many prompts at once through an engine in this process, or in its own."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from ...engine.async_engine import AsyncEngine
from ...engine.config import EngineArgs
from ...engine.outputs import RequestOutput
from ...models.tokenizer import Tokenizer
from ...scheduler.draft_stats import DraftStats
from ...scheduler.sampling_params import RequestOutputKind, SamplingParams
from ..arguments import add_engine_arguments, engine_args
from ..serve_arguments import take_model_argument
from .acceptance import acceptance_fields, acceptance_lines
from .arguments import BenchParser, count, positive_int, write_json
from .datasets import DatasetOptions, add_dataset_arguments, make_requests
from .prompts import BenchRequest, IdsOnly, LocalTokens, PromptMaker

# What was generated, the seconds it took, and what drafts came to where there were any.
Measured = tuple[list[RequestOutput], float, DraftStats | None]
MakeRequests = Callable[[Tokenizer | None, int, int], Sequence[BenchRequest]]


def throughput_parser() -> BenchParser:
    parser = BenchParser("bench throughput", "MODEL", "Complete many prompts at once, as fast as the engine can.")
    parser.add_argument("model_argument", metavar="MODEL", nargs="?", help="checkpoint directory or model id")
    add = parser.add_argument_group("benchmark").add_argument
    add("--backend", choices=("vllm",), default="vllm", help="vllm stands for this engine")
    add("--n", type=positive_int, default=1, help="sequences per prompt (default: 1)")
    add("--num-warmups", type=count, default=0, help="prompts completed before, unmeasured (default: 0)")
    add("--async-engine", action="store_true", help="run the engine's core in a process of its own, as serve does")
    add("--disable-detokenize", action="store_true", help="leave the turning of tokens into text out")
    add("--output-json", metavar="FILE", help="save the result as JSON")
    add("--disable-tqdm", action="store_true", help="show no progress bar")
    add_dataset_arguments(parser, default="sharegpt")
    add_engine_arguments(parser)
    return parser


def run_throughput(parser: BenchParser, arguments: argparse.Namespace) -> int:
    """Run the benchmark; prints and saves what vLLM's does. Arrival times of a trace are left out."""
    take_model_argument(parser, arguments)
    args = engine_args(arguments)
    if arguments.dataset_name == "sharegpt" and arguments.dataset_path is None:
        arguments.dataset_name = "random"  # as vLLM does
    try:
        options = DatasetOptions.of(arguments)
    except ValueError as error:
        parser.error(str(error))

    def make(tokenizer: Tokenizer | None, vocab_size: int, max_model_len: int) -> Sequence[BenchRequest]:
        tokens = IdsOnly(vocab_size) if tokenizer is None else LocalTokens(tokenizer, args.model, vocab_size)
        requests = make_requests(options, PromptMaker(tokens, as_text=options.text_only))
        _check_lengths(requests, max_model_len)
        return requests

    run = _run_async if arguments.async_engine else _run_embedded
    outputs, elapsed, drafts = run(args, arguments, make)
    result = throughput_result(args.model, outputs, elapsed) | acceptance_fields(drafts)
    num_prompt = sum(len(output.prompt_token_ids) for output in outputs)
    num_output = result["total_num_tokens"] - num_prompt
    print(
        f"Throughput: {result['requests_per_second']:.2f} requests/s, "
        f"{result['tokens_per_second']:.2f} total tokens/s, {num_output / elapsed:.2f} output tokens/s"
    )
    print(f"Total num prompt tokens:  {num_prompt}")
    print(f"Total num output tokens:  {num_output}")
    for line in acceptance_lines(drafts):
        print(line)
    if arguments.output_json is not None:
        write_json(arguments.output_json, result)
    return 0


def throughput_result(model: str, outputs: Sequence[RequestOutput], elapsed: float) -> dict[str, Any]:
    """The result as JSON data; tokens are those of the prompts and the generated ones, time in seconds."""
    num_tokens = sum(
        len(output.prompt_token_ids) + sum(len(completion.token_ids) for completion in output.outputs)
        for output in outputs
    )
    return {
        "model_id": model,
        "elapsed_time": elapsed,
        "num_requests": len(outputs),
        "total_num_tokens": num_tokens,
        "requests_per_second": len(outputs) / elapsed,
        "tokens_per_second": num_tokens / elapsed,
    }


def _run_embedded(args: EngineArgs, arguments: argparse.Namespace, make: MakeRequests) -> Measured:
    from ...engine.engine import Engine  # brings torch

    engine = Engine(args=args)
    requests = make(engine.tokenizer, engine.config.model.vocab_size, engine.max_model_len)
    prompts = [_prompt(request) for request in requests]
    params = [_params(request, arguments) for request in requests]
    num_warmups = min(arguments.num_warmups, len(prompts))
    if num_warmups:
        engine.generate(prompts[:num_warmups], params[:num_warmups])
    before = engine.stats().drafts
    start = time.perf_counter()
    outputs = engine.generate(prompts, params, use_tqdm=not arguments.disable_tqdm)
    seconds = time.perf_counter() - start
    drafts = engine.stats().drafts
    return outputs, seconds, None if drafts is None else drafts.since(before)


def _run_async(args: EngineArgs, arguments: argparse.Namespace, make: MakeRequests) -> Measured:
    async def run() -> Measured:
        engine = AsyncEngine.from_engine_args(args)
        try:
            await engine.wait_ready()
            requests = make(engine.tokenizer, engine.model_config.vocab_size, engine.max_model_len)
            if arguments.num_warmups:
                await _complete_all(engine, requests[: arguments.num_warmups], arguments, "warmup", None)
            before = (await engine.stats()).get("drafts")
            start = time.perf_counter()
            with tqdm(
                total=len(requests), desc="Processed prompts", unit="prompt", disable=arguments.disable_tqdm
            ) as bar:
                outputs = await _complete_all(engine, requests, arguments, "bench", bar)
            seconds = time.perf_counter() - start
            drafts = (await engine.stats()).get("drafts")
            return outputs, seconds, None if drafts is None else drafts.since(before)
        finally:
            await engine.shutdown()

    return asyncio.run(run())


async def _complete_all(
    engine: AsyncEngine,
    requests: Sequence[BenchRequest],
    arguments: argparse.Namespace,
    name: str,
    bar: tqdm[Any] | None,
) -> list[RequestOutput]:
    async def complete(index: int, request: BenchRequest) -> RequestOutput:
        final = None
        async for output in engine.generate(_prompt(request), _params(request, arguments), f"{name}-{index}"):
            final = output
        assert final is not None  # a request has at least its last output
        if bar is not None:
            bar.update()
        return final

    return await asyncio.gather(*(complete(index, request) for index, request in enumerate(requests)))


def _prompt(request: BenchRequest) -> Any:
    ids = request.prompt
    return {"prompt_token_ids": ids.tolist()} if isinstance(ids, np.ndarray) else ids


def _params(request: BenchRequest, arguments: argparse.Namespace) -> SamplingParams:
    return SamplingParams(
        n=arguments.n,
        ignore_eos=True,
        max_tokens=request.output_len,
        detokenize=not arguments.disable_detokenize,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _check_lengths(requests: Sequence[BenchRequest], max_model_len: int) -> None:
    longest = max(requests, key=lambda request: request.prompt_len + request.output_len)
    if longest.prompt_len + longest.output_len > max_model_len:
        raise ValueError(
            f"the longest request has {longest.prompt_len} prompt and {longest.output_len} output tokens, more than "
            f"the model's {max_model_len}; lower --input-len, --output-len or --trace-length-scale"
        )
