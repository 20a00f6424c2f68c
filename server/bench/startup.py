"""`omni-engine bench startup`: how long an engine takes to start, each time in a fresh process.

There is no compile cache yet, so a cold start differs from a warm one only by what the page cache of the operating
system holds: the cold ones come first and find it as it is.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from typing import Any

import numpy as np
from tqdm import trange

from ...engine.config import EngineArgs
from ..arguments import add_engine_arguments, engine_args
from ..serve_arguments import take_model_argument
from .arguments import BenchParser, count, positive_int, write_json
from .latency import PERCENTAGES

_CHILD = f"from {__name__} import start_engine; start_engine()"
_MEANING = (
    "Time how long an engine takes to start, from the start of its process until it can serve. Each run is a fresh "
    "process. Cold runs come first and find the page cache as it is; nothing is compiled yet, so warm ones differ only "
    "by that, and all compilation times are 0."
)


def startup_parser() -> BenchParser:
    parser = BenchParser("bench startup", "MODEL", _MEANING)
    parser.add_argument("model_argument", metavar="MODEL", nargs="?", help="checkpoint directory or model id")
    add = parser.add_argument_group("benchmark").add_argument
    add("--num-iters-cold", type=positive_int, default=3, help="cold starts (default: 3)")
    add("--num-iters-warmup", type=count, default=1, help="starts between them, not reported (default: 1)")
    add("--num-iters-warm", type=positive_int, default=3, help="warm starts (default: 3)")
    add("--output-json", metavar="FILE", help="save the result as JSON")
    add("--disable-tqdm", action="store_true", help="show no progress bar")
    add_engine_arguments(parser)
    return parser


def run_startup(parser: BenchParser, arguments: argparse.Namespace) -> int:
    """Run the benchmark; prints and saves what vLLM's does."""
    take_model_argument(parser, arguments)
    args = engine_args(arguments)

    def starts(name: str, number: int) -> list[float]:
        return [time_start(args) for _ in trange(number, desc=name, disable=arguments.disable_tqdm)]

    cold = starts("Cold startup iterations", arguments.num_iters_cold)
    starts("Warmup iterations", arguments.num_iters_warmup)
    warm = starts("Warm startup iterations", arguments.num_iters_warm)
    print("=" * 60)
    print("STARTUP TIME BENCHMARK RESULTS")
    print("=" * 60)
    result = {**phase_result("cold", cold), **phase_result("warm", warm)}
    for phase in ("cold", "warm"):
        _print_phase(phase, result)
    print("=" * 60)
    if arguments.output_json is not None:
        write_json(arguments.output_json, result)
    return 0


def phase_result(phase: str, seconds: list[float]) -> dict[str, Any]:
    """The JSON keys of cold or warm starts. Compilation takes no time, since nothing is compiled."""
    result: dict[str, Any] = {}
    for name, values in (("startup", seconds), ("compilation", [0.0] * len(seconds))):
        percentiles = np.percentile(values, PERCENTAGES).tolist()
        result[f"avg_{phase}_{name}_time"] = float(np.mean(values))
        result[f"{phase}_{name}_times"] = values
        result[f"{phase}_{name}_percentiles"] = dict(zip(PERCENTAGES, percentiles, strict=True))
    return result


def _print_phase(phase: str, result: dict[str, Any]) -> None:
    names = ("startup", "compilation")
    print(f"\n{phase.upper()} STARTUP:")
    for name in names:
        print(f"Avg {name} time: {result[f'avg_{phase}_{name}_time']:.2f} seconds")
    for name in names:
        print(f"{name.capitalize()} time percentiles:")
        for percentage, seconds in result[f"{phase}_{name}_percentiles"].items():
            print(f"  {percentage}%: {seconds:.2f} seconds")


def time_start(args: EngineArgs) -> float:
    """Seconds from the start of a process until its engine is loaded; raises RuntimeError with what it said."""
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", _CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert process.stdin is not None and process.stdout is not None
        with process.stdin as pipe:
            pipe.write(json.dumps(dataclasses.asdict(args)).encode())
        answer = process.stdout.readline()
        seconds = time.perf_counter() - begin
        if not answer:
            process.wait()
    finally:
        process.kill()
        process.wait()
    said = json.loads(answer) if answer else {"error": f"the process ended with status {process.returncode}"}
    if "error" in said:
        raise RuntimeError(f"the engine did not start: {said['error']}")
    return seconds


def start_engine() -> None:
    """The measured process: read the arguments, load the engine, say so in one line of JSON."""
    fields = json.load(sys.stdin)
    try:
        from ...engine.engine import Engine  # brings torch

        Engine(args=EngineArgs(**fields))
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
        return
    print(json.dumps({"ready": True}), flush=True)
