"""Times decode steps over batch sizes and over context lengths, beside the bound of the machine as it is in that run.

    python benchmarks/scaling.py --output scaling.svg [--batch-sizes 1 8 256] [--contexts 128 32768] [--rounds 3]

A llama-160m of random weights whose positions reach the longest context. Its contexts are made up and not computed
(`engine/graphs/decode_loop.py`). A point is a batch size at the first of `--contexts`, or a context at batch 1 and 8;
those whose keys and values would take more than half of the free memory are left out, and told. Every round takes all
points, and the next one turns their order around. A time per token is that of the engine's own overlapped steps; the
host's is what a step takes beside its graph. `--output` gets the picture, and the file beside it that ends in .json
every figure.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from omni_engine.engine.config import EngineArgs, EngineConfig
from omni_engine.engine.core import EngineCore
from omni_engine.engine.graphs.decode_loop import DecodeLoop, TimedGraphs
from omni_engine.engine.graphs.startup import build_kernels
from omni_engine.engine.machine_rates import measure_machine_rates
from omni_engine.engine.startup import available_bytes
from omni_engine.server.bench.plot import HEIGHT, WIDTH, Line, line_plot

sys.path.insert(0, str(Path(__file__).parent / "peers"))  # whose modules find each other like that
from bounds import Rates, Shape, decode_seconds
from checkpoints import SHAPES

MODEL = "llama-160m"
BLOCK_SIZE = 16
CONTEXT_BATCHES = (1, 8)
WARMUP_STEPS, SPARE_STEPS = 4, 4
FREE_SHARE = 0.5
SAMPLER = "greedy"


@dataclass
class Point:
    """A batch size and a number of stored tokens, what every round took there, and the bound."""

    batch: int
    context: int
    bound_ms: float = 0.0
    token_ms: list[float] = field(default_factory=list)
    host_us: list[float] = field(default_factory=list)

    def num_blocks(self, steps: int) -> int:
        return self.batch * -(-(self.context + steps) // BLOCK_SIZE)


def wanted_points(batch_sizes: Sequence[int], contexts: Sequence[int]) -> list[Point]:
    """Both series, without what is in both twice."""
    pairs = [(batch, contexts[0]) for batch in batch_sizes]
    pairs += [(batch, context) for batch in CONTEXT_BATCHES for context in contexts]
    return [Point(*pair) for pair in dict.fromkeys(pairs)]


def model_config(longest: int) -> dict[str, Any]:
    kind, theta, shape = SHAPES[MODEL]
    changes = {"max_position_embeddings": longest, "rope_theta": theta, "rms_norm_eps": 1e-6, "dtype": "bfloat16"}
    return {"architectures": ["LlamaForCausalLM"], "model_type": kind, **shape, **changes}


def load_core(folder: Path, config: dict[str, Any], points: Sequence[Point], num_blocks: int) -> EngineCore:
    """The engine with all graphs that the points need."""
    (folder / "config.json").write_text(json.dumps(config))
    sizes = sorted({point.batch for point in points})
    args = EngineArgs(
        str(folder), load_format="dummy", device="cpu", skip_tokenizer_init=True, block_size=BLOCK_SIZE,
        max_model_len=config["max_position_embeddings"], max_num_seqs=sizes[-1],
        max_num_batched_tokens=max(2048, sizes[-1]), num_gpu_blocks_override=num_blocks,
        cudagraph_capture_sizes=sizes,
    )  # fmt: skip
    build_kernels()  # else the first steps would be of plain torch
    core = EngineCore.load(EngineConfig.from_args(args))
    graphs = core.runner.graphs
    keys = [graphs.key_for(size, SAMPLER) for size in sizes]
    with tqdm(total=len(keys), desc="Graphs", unit="graph") as bar:
        while missing := [key for key in keys if key is not None and not graphs.is_ready(key)]:
            bar.update(len(keys) - len(missing) - bar.n)
            assert graphs.backend is not None, "gears are asked for, so there is a backend"
            graphs.backend.demand(missing[0])
            if graphs.wait(1.0) and any(not graphs.is_ready(key) for key in missing):
                raise RuntimeError(f"graphs could not be made, the log says why: {', '.join(map(str, missing))}")
        bar.update(len(keys) - bar.n)
    graphs.close()
    return core


def measure(core: EngineCore, timed: TimedGraphs, point: Point, steps: int) -> None:
    """One round of one point."""
    loop = DecodeLoop(
        core, timed, num_requests=point.batch, context_len=point.context, max_steps=loop_steps(steps), sampler=SAMPLER
    )
    for _ in range(WARMUP_STEPS):
        loop.step()
    times = [loop.step() for _ in range(steps)]
    point.host_us.append(statistics.median(step.total - step.replay for step in times) * 1e6)
    point.token_ms.append(loop.engine_step_seconds(steps) * 1e3)


def loop_steps(steps: int) -> int:
    return WARMUP_STEPS + 2 * steps + SPARE_STEPS


def table(points: Sequence[Point]) -> str:
    lines = ["| batch | context | ms per token (extremes) | bound, ms | % of bound | host, µs per step |"]
    lines.append("|---|---|---|---|---|---|")
    for point in points:
        token, host = statistics.median(point.token_ms), statistics.median(point.host_us)
        extremes = f"{min(point.token_ms):.2f} to {max(point.token_ms):.2f}"
        lines.append(
            f"| {point.batch} | {point.context} | {token:.2f} ({extremes}) | {point.bound_ms:.2f} | "
            f"{point.bound_ms / token:.0%} | {host:.0f} |"
        )
    return "\n".join(lines)


def picture(points: Sequence[Point], first_context: int) -> str:
    """Two panels of one SVG file: over the batch size, and over the context."""

    def lines(series: Sequence[Point], over: str, suffix: str) -> list[Line]:
        at = [(getattr(point, over), point) for point in series]
        return [
            Line(f"token{suffix}", [(x, statistics.median(point.token_ms)) for x, point in at]),
            Line(f"host{suffix}", [(x, statistics.median(point.host_us) / 1e3) for x, point in at]),
            Line(f"bound{suffix}", [(x, point.bound_ms) for x, point in at], is_bound=True),
        ]

    over_batch = [point for point in points if point.context == first_context]
    left = line_plot(f"{first_context} tokens stored", "requests per step", "ms", lines(over_batch, "batch", ""))
    of_contexts = [
        line
        for batch in CONTEXT_BATCHES
        for line in lines([point for point in points if point.batch == batch], "context", f" {batch}")
        if line.points
    ]
    names = " and ".join(map(str, CONTEXT_BATCHES))
    right = line_plot(f"batch {names}", "tokens stored per request", "ms", of_contexts)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * WIDTH}" height="{HEIGHT}">'
    return f'{head}\n{left}<g transform="translate({WIDTH} 0)">\n{right}</g>\n</svg>\n'


def main() -> None:
    parser = argparse.ArgumentParser(description="Times decode steps over batch sizes and context lengths.")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.svg")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 256])
    parser.add_argument("--contexts", type=int, nargs="+", default=[2**power for power in range(7, 16)])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, default=16, help="of a point in a round, timed in each of the two ways (16)"
    )
    options = parser.parse_args()
    if options.output.suffix != ".svg":
        parser.error(f"the picture is SVG; end the name in .svg: {options.output}")
    steps = loop_steps(options.steps)
    config = model_config(max(options.contexts) + steps + 2)
    shape = Shape.of(config)
    block_bytes = shape.cache_bytes_per_token * BLOCK_SIZE
    room = int(available_bytes(torch.device("cpu"), FREE_SHARE) / block_bytes)
    points = wanted_points(options.batch_sizes, options.contexts)
    for point in [point for point in points if point.num_blocks(steps + 2) >= room]:
        gib = point.num_blocks(steps + 2) * block_bytes / 2**30
        print(f"left out for want of memory: batch {point.batch}, context {point.context}, {gib:.1f} GiB")
        points.remove(point)
    if not points:
        parser.error(f"free memory for the keys and values of no point: {options.batch_sizes}, {options.contexts}")
    rates = measure_machine_rates(torch.device("cpu"), "bfloat16")
    of_run = Rates(rates.bytes_per_second, rates.flops_per_second)
    with tempfile.TemporaryDirectory() as folder:
        core = load_core(Path(folder), config, points, max(point.num_blocks(steps + 2) for point in points) + 1)
        timed = TimedGraphs(core.runner.graphs)
        for point in points:
            mean = point.context + WARMUP_STEPS + options.steps * 1.5  # of the engine's own steps
            point.bound_ms = decode_seconds(shape, point.batch, mean, of_run) * 1e3
        with tqdm(total=options.rounds * len(points), desc="Points", unit="point") as bar:
            for number in range(options.rounds):
                for point in points if number % 2 == 0 else points[::-1]:
                    bar.set_postfix_str(f"batch {point.batch}, context {point.context}")
                    measure(core, timed, point, options.steps)
                    bar.update()
        core.close()
    print(f"\n{rates.device}, {rates.num_threads} threads, torch {torch.__version__}; measured in this run:", end=" ")
    print(f"{rates.bytes_per_second / 1e9:.1f} GB/s, {rates.flops_per_second / 1e9:.0f} GFLOP/s\n")
    print(table(points))
    result = {"machine": dataclasses.asdict(rates), "model": config, "rounds": options.rounds, "steps": options.steps}
    result["points"] = [dataclasses.asdict(point) for point in points]
    options.output.with_suffix(".json").write_text(json.dumps(result, indent=1))
    options.output.write_text(picture(points, options.contexts[0]), encoding="utf-8")


if __name__ == "__main__":
    main()
