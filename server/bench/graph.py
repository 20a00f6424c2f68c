"""`omni-engine bench graph`: decode steps at each batch size, compiled and eager, against the floor of the machine."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ...engine.config import EngineConfig
from ...engine.floor import StepCost, decode_cost, draft_model_cost, floor_seconds, prediction_cost
from ...engine.graphs.decode_loop import SAMPLING, DecodeLoop, StepTimes, TimedGraphs
from ...engine.speculation.config import choose_speculation
from ..arguments import add_engine_arguments, engine_args
from ..serve_arguments import take_model_argument
from .arguments import BenchParser, batch_sizes, count, fixed_depth, positive_int, write_json
from .graph_report import GearTimes, graph_plot, graph_result, graph_tables, sum_reports

BLOCK_SIZE = 16
# Steps of a loop beside those that are timed one by one: as many again as the engine makes them, and a few at its ends.
SPARE_STEPS = 8
POLL_SECONDS = 0.1


def graph_parser() -> BenchParser:
    parser = BenchParser("bench graph", "MODEL", "Time decode steps, compiled and eager, against the machine's floor.")
    parser.add_argument("model_argument", metavar="MODEL", nargs="?", help="checkpoint directory or model id")
    add = parser.add_argument_group("benchmark").add_argument
    add("--batch-sizes", type=batch_sizes, default=(1, 8, 32, 128), help="requests per step (default: 1,8,32,128)")
    add("--context-len", type=positive_int, default=1024, help="tokens stored before the first step (default: 1024)")
    add("--num-steps", type=positive_int, default=30, help="steps of each kind that are timed (default: 30)")
    add("--num-steps-warmup", type=count, default=5, help="steps of each kind before them (default: 5)")
    add("--sampler", choices=tuple(SAMPLING), default="greedy",
        help="what the graph ends in: the likeliest token, a draw, or logits for top-k and top-p (greedy)")  # fmt: skip
    add("--num-layers", type=positive_int,
        help="build this many layers only, so that one layer of a large model can be timed at its width; "
        "implies --load-format dummy")  # fmt: skip
    add("--cold", action="store_true",
        help="compile the graphs anew, in a folder that is removed afterwards, and time eager steps meanwhile; "
        "C++ kernels are taken from the usual cache folder")  # fmt: skip
    add("--output-json", metavar="FILE", help="save the result as JSON")
    add("--plot", metavar="FILE.svg", help="draw the time per step over the batch size, with the floor")
    add("--disable-tqdm", action="store_true", help="show no progress bar")
    add_engine_arguments(parser)
    return parser


def run_graph(parser: BenchParser, arguments: argparse.Namespace) -> int:
    """Run the benchmark; prints tables, and saves JSON and a plot if asked to."""
    take_model_argument(parser, arguments)
    if arguments.plot is not None and Path(arguments.plot).suffix != ".svg":
        parser.error(
            f"--plot draws SVG, which every browser shows and converts; end the name in .svg: {arguments.plot}"
        )
    if arguments.num_layers is not None:
        if getattr(arguments, "load_format", "dummy") != "dummy":
            parser.error(f"--num-layers needs --load-format dummy, a checkpoint has all: {arguments.load_format}")
        arguments.load_format = "dummy"
    with contextlib.ExitStack() as stack:
        folder = None
        if arguments.cold:
            # What was killed in the middle of a build may still be writing.
            temporary = tempfile.TemporaryDirectory(prefix="omni-engine-cold-", ignore_cleanup_errors=True)
            folder = stack.enter_context(temporary)
        config = bench_config(arguments, folder)
        result = _measure(config, arguments, stack)
    print(graph_tables(result))
    if arguments.output_json is not None:
        write_json(arguments.output_json, result)
    if arguments.plot is not None:
        Path(arguments.plot).write_text(graph_plot(result), encoding="utf-8")
    return 0


def _measure(config: EngineConfig, arguments: argparse.Namespace, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Load the engine, wait for its graphs, time its steps: the result as JSON data. `stack` closes what was opened."""
    import torch

    from ...engine.core import EngineCore
    from ...engine.graphs.config import choose_graphs, resolve_graphs
    from ...engine.graphs.decode_step import DRAFT
    from ...engine.graphs.startup import build_kernels
    from ...engine.machine_rates import measure_machine_rates
    from ...engine.startup import resolve_device

    device = resolve_device(config.args.device)
    chosen = resolve_graphs(choose_graphs(config.args), device.type, config.max_num_seqs(device.type))
    if arguments.cold and (chosen.backend != "inductor" or not chosen.gears):
        backend = chosen.backend if chosen.gears else "none"
        raise ValueError(f"--cold is for graphs that are compiled, by the backend inductor; drop it for: {backend}")
    if device.type == "cpu":
        build_kernels()  # else the first steps would be of plain torch
    core = EngineCore.load(config)
    stack.callback(core.close)
    graphs = core.runner.graphs
    stack.callback(graphs.close)
    synchronize: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    num_drafts = 0 if config.speculation is None else config.speculation.choice.num_drafts
    keys = {size: graphs.key_for(size, arguments.sampler, num_drafts) for size in arguments.batch_sizes}
    # Behind a graph that ends at its logits stands one that drafts.
    has_second = num_drafts > 0 and arguments.sampler == "split"
    second = {size: graphs.key_for(size, DRAFT, num_drafts) if has_second else None for size in keys}
    timed = TimedGraphs(graphs)

    def make_loop(size: int) -> DecodeLoop:
        return DecodeLoop(
            core, timed, num_requests=size, context_len=arguments.context_len, max_steps=loop_steps(arguments),
            sampler=arguments.sampler, enable_prefix_caching=config.args.enable_prefix_caching,
            synchronize=synchronize,
        )  # fmt: skip

    compiling = _steps_until_compiled(timed, keys, make_loop, arguments, second.values())
    rates = measure_machine_rates(device, config.dtype)
    results: list[dict[str, Any]] = []
    total = len(keys) * (arguments.num_steps_warmup + 2 * arguments.num_steps)
    with tqdm(total=total, unit="step", disable=arguments.disable_tqdm) as bar:
        for size, key in keys.items():
            bar.set_description(f"Batch size {size}")
            of_step = [each for each in (key, second[size]) if each is not None]
            has_graph = key is not None and all(map(graphs.is_ready, of_step))
            times, context_len = _time_gear(make_loop(size), timed, arguments, has_graph, bar)
            times = dataclasses.replace(times, compiling=compiling[size])
            cost = step_cost(config, size, context_len, times.tokens_per_step)
            report = sum_reports([graphs.reports[each] for each in of_step]) if has_graph else None
            results.append(graph_result(size, report, times, cost, floor_seconds(cost, rates)))
    speculation = config.speculation
    return {
        "model_id": config.args.model,
        "num_layers": config.model.num_layers,
        "dtype": config.dtype,
        "backend": graphs.backend.name if graphs.backend is not None else "none",
        "sampler": arguments.sampler,
        **({} if speculation is None else {"method": speculation.choice.method, "num_drafts": num_drafts}),
        "context_len": arguments.context_len,
        "num_steps": arguments.num_steps,
        "machine": dataclasses.asdict(rates),
        "results": results,
    }


def bench_config(arguments: argparse.Namespace, graph_folder: str | None = None) -> EngineConfig:
    """The engine of the flags, made for these steps where they leave it open: gears, rows, lengths, KV blocks. With
    `graph_folder` the compiled graphs, and nothing else of the cache, are there."""
    args = engine_args(arguments)
    changes: dict[str, Any] = {}
    if arguments.num_layers is not None:
        changes["hf_overrides"] = {**args.hf_overrides, "num_hidden_layers": arguments.num_layers}
        args = dataclasses.replace(args, **changes)
    if graph_folder is not None:
        args = dataclasses.replace(args, compilation_config={**args.compilation_config, "cache_dir": graph_folder})
    args = dataclasses.replace(args, speculative_config=fixed_depth(args.speculative_config or {}))
    choice = choose_speculation(args.speculative_config)
    tokens_per_step = 1 if choice is None else 1 + choice.num_drafts
    length = arguments.context_len + loop_steps(arguments) * tokens_per_step + 2
    block_size = args.block_size or BLOCK_SIZE
    largest = max(arguments.batch_sizes)
    longest = EngineConfig.from_args(args).model.derived_max_model_len
    if length > longest:
        raise ValueError(
            f"--context-len and --num-steps take {length} tokens, more than the model's {longest}; lower one of them"
        )
    if args.max_num_seqs is not None and args.max_num_seqs < largest:
        raise ValueError(f"--batch-sizes must not be above --max-num-seqs={args.max_num_seqs}: {largest}")
    defaults: dict[str, Any] = {
        "max_model_len": length,
        "max_num_seqs": largest,
        "max_num_batched_tokens": max(2048, largest * tokens_per_step),
        "block_size": block_size,
        "cudagraph_capture_sizes": list(arguments.batch_sizes),
    }
    if args.kv_cache_memory_bytes is None:
        defaults["num_gpu_blocks_override"] = largest * -(-length // block_size) + 1
    changes = {name: value for name, value in defaults.items() if getattr(args, name) is None}
    return EngineConfig.from_args(dataclasses.replace(args, **changes))


def loop_steps(arguments: argparse.Namespace) -> int:
    """Most steps that a request of the benchmark decodes in."""
    return 2 * (arguments.num_steps_warmup + arguments.num_steps) + arguments.num_steps + SPARE_STEPS


def step_cost(config: EngineConfig, num_requests: int, context_len: float, tokens_per_step: float) -> StepCost:
    """What a step moves and computes, drafting included; `tokens_per_step` is what it brings a request on average."""
    speculation = config.speculation
    if speculation is None:
        return decode_cost(config.model, num_requests, context_len, dtype=config.dtype)
    num_drafts = speculation.choice.num_drafts
    cost = decode_cost(config.model, num_requests, context_len, 1 + num_drafts, dtype=config.dtype)
    drafting = (num_requests, context_len, num_drafts, tokens_per_step - 1)
    if speculation.choice.method == "mtp":
        return cost + prediction_cost(config.model, *drafting, dtype=config.dtype)
    if speculation.draft_model is not None:
        return cost + draft_model_cost(speculation.draft_model, *drafting, dtype=config.dtype)
    return cost  # prompt lookup reads a few tokens


def _steps_until_compiled(
    timed: TimedGraphs,
    keys: Mapping[int, Any],
    make_loop: Callable[[int], DecodeLoop],
    arguments: argparse.Namespace,
    second: Iterable[Any] = (),
) -> dict[int, list[StepTimes]]:
    """Wait until the graphs of `keys` and of `second` are there, or until no more come, then stop the background, as it
    would be timed.

    Returns, by batch size, the eager steps that were made while graphs were being compiled: in turns, each of a new
    loop, so that every batch size has steps beside every graph. After each turn comes a pause of the same length, as on
    a machine whose cores are all busy with steps a process of the lowest priority gets nearly nothing done.
    """
    graphs = timed.graphs
    steps: dict[int, list[StepTimes]] = {size: [] for size in keys}
    wanted = list(dict.fromkeys(key for key in (*keys.values(), *second) if key is not None))
    turns = itertools.cycle(keys)
    timed.bypassed = True
    with tqdm(total=len(wanted), desc="Graphs", unit="graph", mininterval=1, disable=arguments.disable_tqdm) as bar:

        def is_waiting() -> bool:
            missing = [key for key in wanted if not graphs.is_ready(key)]
            bar.update(len(wanted) - len(missing) - bar.n)
            if graphs.backend is None or not missing or graphs.wait(0):
                return False
            graphs.backend.demand(missing[0])
            return True

        pause_until = 0.0
        while is_waiting():
            # not compiling: loading what the cache has
            if getattr(graphs.backend, "current", None) is None or time.perf_counter() < pause_until:
                time.sleep(POLL_SECONDS)
                continue
            start = time.perf_counter()
            size = next(turns)
            loop = make_loop(size)
            for index in range(arguments.num_steps_warmup + arguments.num_steps):
                if not is_waiting():
                    break
                times = loop.step()
                if index >= arguments.num_steps_warmup:
                    steps[size].append(times)
            pause_until = 2 * time.perf_counter() - start
    graphs.close()
    return steps


def _time_gear(
    loop: DecodeLoop, timed: TimedGraphs, arguments: argparse.Namespace, has_graph: bool, bar: Any
) -> tuple[GearTimes, float]:
    """The times of one batch size, and the number of stored tokens that they are for, on average."""
    eager: list[StepTimes] = []
    graph: list[StepTimes] = []
    first = 0.0
    for index in range(arguments.num_steps_warmup + arguments.num_steps):
        if index == arguments.num_steps_warmup:
            first = loop.context_len
            eager.clear()
            graph.clear()
        # In turn, so that whatever else the machine does falls on both.
        timed.bypassed = True
        eager.append(loop.step())
        if has_graph:
            timed.bypassed = False
            graph.append(loop.step())
        bar.update()
    growth = (loop.context_len - first) / (len(eager) + len(graph))
    context_len = (first + loop.context_len - growth) / 2
    timed.bypassed = not has_graph
    engine_seconds = loop.engine_step_seconds(arguments.num_steps)
    bar.update(arguments.num_steps)
    return GearTimes(eager, graph, engine_seconds, num_drafts=loop.num_drafts, tokens_per_step=growth), context_len
