"""`omni-engine bench speculative`: depths of speculation against none, in one process, round by round."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from ...engine.config import DEMO_MODEL, EngineArgs, EngineConfig
from ...engine.speculation.config import with_shorthands
from ...models.tokenizer import load_tokenizer
from ...scheduler.request import RequestInput
from ...scheduler.sampling_params import SamplingParams
from ..arguments import add_engine_arguments, engine_args
from ..serve_arguments import take_model_argument
from .arguments import BenchParser, batch_sizes, count, non_negative_float, positive_int, write_json
from .batch_run import BatchRun, run_batch
from .shapes import SHAPES
from .speculative_report import EngineRuns, engine_figures, speculative_tables

if TYPE_CHECKING:  # it brings torch
    from ...engine.core import EngineCore

HELD_OUT_TEXT = DEMO_MODEL / "held_out.txt"  # that the demo models were not trained on
BLOCK_SIZE = 16
FEWEST_ROUNDS = 5
POLL_SECONDS = 0.1
_MEANING = (
    "Complete the same prompts without speculation and with each number of drafts, in one process and in rotating "
    "order. Before anything is timed the graphs that the steps need are waited for, and the background is stopped; "
    "if one cannot be made, the run ends (--no-require-graph: its steps run eager, and are counted)."
)


def speculative_parser() -> BenchParser:
    parser = BenchParser("bench speculative", "MODEL", _MEANING)
    parser.add_argument("model_argument", metavar="MODEL", nargs="?", help="checkpoint directory or model id")
    add = parser.add_argument_group("benchmark").add_argument
    add("--shape", choices=tuple(SHAPES), help="random weights of this built-in shape, and no MODEL")
    add("--depths", type=batch_sizes, default=(1, 2, 3), help="numbers of drafts, an engine for each (default: 1,2,3)")
    add("--adaptive", action="store_true", help="one engine more, whose steps choose among no drafts and the most")
    add("--batch-sizes", type=batch_sizes, default=(1, 8, 32), help="requests at once (default: 1,8,32)")
    add("--temperature", type=temperatures, default=(0.0,), metavar="T,U",
        help="0: the likeliest token; each of several is a run of its own (default: 0)")  # fmt: skip
    add("--rounds", type=rounds, default=FEWEST_ROUNDS, help=f"timed rounds, at least {FEWEST_ROUNDS} (the default)")
    add("--warmup", type=count, default=2, help="rounds before them, in which depths are tried (default: 2)")
    add("--dataset", metavar="FILE",
        help="text that prompts are cut from, or random for drawn tokens (default: for the demo models a text they "
        "have not seen, else random)")  # fmt: skip
    add("--input-len", type=positive_int, default=64, help="prompt tokens (default: 64)")
    add("--output-len", type=positive_int, default=128, help="tokens to generate (default: 128)")
    add("--synthetic-acceptance", type=acceptance_rates, default=(), metavar="P,Q,R",
        help="SYNTHETIC: accept the first draft in a share P of the steps, the first two in a share Q, and so on, by "
        "lot; for weights whose drafts are worth nothing")  # fmt: skip
    add("--output-json", metavar="FILE", help="save the result as JSON")
    add("--disable-tqdm", action="store_true", help="show no progress bar")
    add_engine_arguments(parser)
    # The same prompts come to each engine once per round, and must be computed each time.
    parser.set_defaults(enable_prefix_caching=False, require_graph=True)
    return parser


def rounds(text: str) -> int:
    value = positive_int(text)
    if value < FEWEST_ROUNDS:
        raise argparse.ArgumentTypeError(f"a median of fewer than {FEWEST_ROUNDS} rounds says little: {text}")
    return value


def temperatures(text: str) -> tuple[float, ...]:
    """Numbers with commas between them."""
    return tuple(dict.fromkeys(non_negative_float(part) for part in text.split(",")))


def acceptance_rates(text: str) -> tuple[float, ...]:
    """Shares with commas between them, each at most the one before."""
    values = tuple(non_negative_float(part) for part in text.split(","))
    if not all(0 < value < 1 for value in values) or list(values) != sorted(values, reverse=True):
        raise argparse.ArgumentTypeError(f"shares must be between 0 and 1, each at most the one before: {text}")
    return values


@dataclass(frozen=True)
class Contender:
    """An engine of the comparison."""

    name: str
    config: EngineConfig

    @property
    def depths(self) -> tuple[int, ...]:
        return (0,) if self.config.speculation is None else self.config.speculation.choice.depths


def run_speculative(parser: BenchParser, arguments: argparse.Namespace) -> int:
    """Run the benchmark; prints tables and saves JSON."""
    take_model_argument(parser, arguments)
    rates, most = arguments.synthetic_acceptance, max(arguments.depths)
    if rates and len(rates) < most:
        parser.error(f"--synthetic-acceptance needs a share for each of {most} drafts: {','.join(map(str, rates))}")
    speculation = _take_speculation(arguments)
    for key, flag in (("num_speculative_tokens", "--depths"), ("adaptive_depth", "--adaptive")):
        if key in speculation:
            parser.error(f"leave out {key} of --speculative-config, it comes from {flag}: {speculation[key]}")
    with contextlib.ExitStack() as stack:
        if arguments.shape is not None:
            if hasattr(arguments, "model"):
                parser.error(f"--shape is a model of its own, leave out MODEL: {arguments.model}")
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="omni-engine-shape-"))
            (Path(folder) / "config.json").write_text(json.dumps(SHAPES[arguments.shape]))
            arguments.model, arguments.load_format, arguments.skip_tokenizer_init = folder, "dummy", True
        is_required, arguments.require_graph = arguments.require_graph, False  # of those graphs that steps need
        contenders = make_contenders(arguments, engine_args(arguments), speculation)
        result = _measure(contenders, arguments, is_required, stack)
    print(speculative_tables(result))
    if arguments.output_json is not None:
        write_json(arguments.output_json, result)
    return 0


def _take_speculation(arguments: argparse.Namespace) -> dict[str, Any]:
    """The speculative_config of the flags, which are taken out: it need not be complete, and is of some engines."""
    flags = vars(arguments)
    given = {name: flags.pop(name, None) for name in ("speculative_config", "spec_method", "spec_model", "spec_tokens")}
    config = with_shorthands(
        given["speculative_config"],
        method=given["spec_method"],
        model=given["spec_model"],
        num_drafts=given["spec_tokens"],
    )
    return config or {"method": "mtp"}


def make_contenders(arguments: argparse.Namespace, args: EngineArgs, speculation: Mapping[str, Any]) -> list[Contender]:
    """The engines, first the one without speculation. Where flags leave it open, graphs, rows, lengths and KV blocks
    are those that the batches need; ValueError for a model that is too short or cannot draft."""
    length = arguments.input_len + arguments.output_len
    most, largest = max(arguments.depths), max(arguments.batch_sizes)
    longest = EngineConfig.from_args(args).model.derived_max_model_len
    if length > longest:
        raise ValueError(
            f"--input-len and --output-len are {arguments.input_len} + {arguments.output_len} tokens, more than the "
            f"model's {longest}; lower one of them"
        )
    if args.max_num_seqs is not None and args.max_num_seqs < largest:
        raise ValueError(f"--batch-sizes must not be above --max-num-seqs={args.max_num_seqs}: {largest}")
    block_size = args.block_size or BLOCK_SIZE
    defaults: dict[str, Any] = {
        "max_model_len": length,
        "max_num_seqs": largest,
        "max_num_batched_tokens": max(2048, largest * (1 + most)),
        "block_size": block_size,
        "cudagraph_capture_sizes": list(arguments.batch_sizes),
    }
    if args.kv_cache_memory_bytes is None:
        defaults["num_gpu_blocks_override"] = largest * -(-length // block_size) + 1
    args = dataclasses.replace(args, **{name: value for name, value in defaults.items() if getattr(args, name) is None})

    def drafting(depth: int, *, is_adaptive: bool) -> dict[str, Any]:
        return {**speculation, "num_speculative_tokens": depth, "adaptive_depth": is_adaptive}

    variants = [("none", {}), *((f"k={depth}", drafting(depth, is_adaptive=False)) for depth in arguments.depths)]
    if arguments.adaptive:
        variants.append((f"adaptive to {most}", drafting(most, is_adaptive=True)))
    return [
        Contender(name, EngineConfig.from_args(dataclasses.replace(args, speculative_config=config)))
        for name, config in variants
    ]


def _measure(
    contenders: Sequence[Contender], arguments: argparse.Namespace, is_required: bool, stack: contextlib.ExitStack
) -> dict[str, Any]:
    """Load the engines, wait for their graphs, run the rounds: the result as JSON data. `stack` closes what was
    opened."""
    import torch

    from ...engine.core import EngineCore
    from ...engine.graphs.startup import build_kernels
    from ...engine.startup import resolve_device

    config, rates = contenders[0].config, arguments.synthetic_acceptance
    dataset, make_prompt = prompt_source(arguments, config)
    device = resolve_device(config.args.device)
    if device.type == "cpu":
        build_kernels()  # else the first steps would be of plain torch
    cores: list[EngineCore] = []
    for contender in contenders:
        core = EngineCore.load(contender.config, acceptance_rates=rates or None if contender.depths != (0,) else None)
        stack.callback(core.close)
        wait_for_graphs(core, contender, arguments, is_required)
        cores.append(core)
    results = []
    num_runs = (arguments.warmup + arguments.rounds) * len(cores)
    total = num_runs * len(arguments.batch_sizes) * len(arguments.temperature)
    with tqdm(total=total, unit="batch", disable=arguments.disable_tqdm) as bar:
        for temperature in arguments.temperature:
            for size in arguments.batch_sizes:
                bar.set_description(f"{'SYNTHETIC, ' if rates else ''}temperature {temperature:g}, batch size {size}")
                entries = [EngineRuns(contender.name, contender.depths) for contender in contenders]
                _run_rounds(cores, entries, arguments, size, temperature, make_prompt, bar)
                figures = [engine_figures(each, entries[0], is_synthetic=bool(rates)) for each in entries]
                results.append({"batch_size": size, "temperature": temperature, "engines": figures})
    speculation, backend = contenders[1].config.speculation, cores[0].runner.graphs.backend
    assert speculation is not None
    return {
        "model_id": arguments.shape or config.args.model,
        "dtype": config.dtype,
        "device": str(device),
        "num_threads": torch.get_num_threads() if device.type == "cpu" else 0,
        "backend": "none" if backend is None else backend.name,
        "method": speculation.choice.method,
        "acceptance": "SYNTHETIC" if rates else "measured",
        "synthetic_acceptance": list(rates) or None,
        "dataset": dataset,
        "input_len": arguments.input_len,
        "output_len": arguments.output_len,
        "rounds": arguments.rounds,
        "warmup": arguments.warmup,
        "results": results,
    }


def prompt_source(
    arguments: argparse.Namespace, config: EngineConfig
) -> tuple[str, Callable[[np.random.Generator], list[int]]]:
    """Where prompts come from, in words, and what makes one. Raises OSError, or ValueError for a text that is too short
    or cannot be tokenized."""
    name, length = arguments.dataset, arguments.input_len
    if name is None and Path(config.args.model).resolve().parent == DEMO_MODEL.resolve().parent:
        name = str(HELD_OUT_TEXT)
    if name in (None, "random"):
        return "drawn at random", lambda generator: generator.integers(config.model.vocab_size, size=length).tolist()
    if config.tokenizer_path is None:
        raise ValueError(f"prompts of a text need a tokenizer; leave out --skip-tokenizer-init, or take random: {name}")
    tokenizer = load_tokenizer(config.tokenizer_path)
    first = tokenizer.encode("", add_special_tokens=True)  # what every text begins with
    token_ids = tokenizer.encode(Path(name).read_text(encoding="utf-8"), add_special_tokens=False)
    cut = length - len(first)
    if not 0 < cut <= len(token_ids):
        raise ValueError(
            f"--input-len must be above the {len(first)} tokens that every text begins with, and at most "
            f"{len(first) + len(token_ids)}, for {Path(name).name} has no more: {length}"
        )

    def make(generator: np.random.Generator) -> list[int]:
        start = int(generator.integers(len(token_ids) - cut + 1))
        return first + token_ids[start : start + cut]

    return f"cut from {Path(name).name}", make


def wait_for_graphs(core: EngineCore, contender: Contender, arguments: argparse.Namespace, is_required: bool) -> None:
    """Wait for the graphs that the engine's steps need, then stop its background, as it would be timed. Raises
    ValueError if they are required and not all there."""
    from ...engine.graphs.config import choose_graphs

    graphs = core.runner.graphs
    parts = dict.fromkeys("gumbel" if temperature else "greedy" for temperature in arguments.temperature)
    shapes = [(size, part, depth) for part in parts for depth in contender.depths for size in arguments.batch_sizes]
    keys = {shape: graphs.key_for(*shape) for shape in shapes}
    with tqdm(desc=f"Graphs, {contender.name}", unit="graph", disable=arguments.disable_tqdm) as bar:
        bar.total = len(keys)
        while True:
            missing = [key for key in keys.values() if key is not None and not graphs.is_ready(key)]
            bar.update(len(keys) - len(missing) - bar.n)
            if graphs.backend is None or not missing or graphs.wait(0):
                break
            for key in missing:
                graphs.backend.demand(key)
            time.sleep(POLL_SECONDS)
    graphs.close()
    lacking = [size for (size, *_), key in keys.items() if key is None or not graphs.is_ready(key)]
    if lacking and is_required and choose_graphs(contender.config.args).enabled:
        raise ValueError(
            f"{len(lacking)} of the {len(keys)} graphs that the steps of the engine {contender.name!r} need are not "
            "there (the log says why), so its steps would run eager; remedy that, or time eager steps with "
            f"--no-require-graph: batch sizes {', '.join(map(str, dict.fromkeys(lacking)))}"
        )


def _run_rounds(
    cores: Sequence[EngineCore],
    entries: Sequence[EngineRuns],
    arguments: argparse.Namespace,
    size: int,
    temperature: float,
    make_prompt: Callable[[np.random.Generator], list[int]],
    bar: Any,
) -> None:
    """Fill in the runs of all engines: in every round the same requests for each of them, in an order that rotates."""
    seed = getattr(arguments, "seed", 0) % 2**63
    before: list[tuple[Any, ...]] = []
    for index in range(arguments.warmup + arguments.rounds):
        if index == arguments.warmup:
            before = [_counters(core) for core in cores]
        generator = np.random.default_rng([seed, size, index])
        prompts = [make_prompt(generator) for _ in range(size)]
        requests = [
            RequestInput(
                f"{index}-{number}",
                prompt,
                SamplingParams(
                    temperature=temperature,
                    max_tokens=arguments.output_len,
                    ignore_eos=True,
                    seed=index * size + number,
                ),
            )
            for number, prompt in enumerate(prompts)
        ]
        runs: dict[int, BatchRun] = {}
        for place in range(len(cores)):
            which = (place + index) % len(cores)
            runs[which] = run_batch(cores[which], requests)
            bar.update()
        if index >= arguments.warmup:
            for which, entry in enumerate(entries):
                entry.runs.append(runs[which])
    for core, entry, (drafts, replayed, num_eager) in zip(cores, entries, before, strict=True):
        after = _counters(core)
        entry.drafts = None if after[0] is None else after[0].since(drafts)
        entry.num_eager = after[2] - num_eager
        for key, number in (after[1] - replayed).items():
            if key.sampler in ("greedy", "gumbel"):
                depth = key.tokens_per_request - 1
                entry.num_replayed[depth] = entry.num_replayed.get(depth, 0) + number


def _counters(core: EngineCore) -> tuple[Any, ...]:
    """Drafts, steps by graph and eager steps so far."""
    graphs = core.runner.graphs
    return core.stats().drafts, graphs.num_replayed.copy(), graphs.num_eager
