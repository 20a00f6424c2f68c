"""Compares omni-engine with other engines on this machine, in alternation: the table of docs/benchmarks.md.

    python benchmarks/peers/compare.py FOLDER --vllm v-vllm/bin/python --openvino v-ov/bin/python \\
        --llama-cpp llama.cpp/build/bin --models llama-160m --work W1 W2b1 W2b8 W2b32 W3 W4 --pairs 5

FOLDER holds checkpoints (made where they are missing) and `samples.jsonl`, to which every sample is added: a comparison
may be made in pieces, and `--pairs 0` prints the table of what is there. A peer whose environment is not given is
reported as not run.

All engines of a model stay loaded, each in a process of its own, stopped while another one is measured. A round takes
one sample of each, in an order that is reversed from round to round; the ratios are those within a round. A sample
during which other processes took more than 6 % of the processors is taken again, twice at most.

Before omni-engine is measured, its tokens are checked (check.py), once for each state of its code; if they are wrong,
it is reported as not run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from bounds import Rates
from check import BOUNDS, check
from checkpoints import SHAPES, export_for_openvino, write_checkpoint
from llama_cpp import NAME as LLAMA_CPP
from llama_cpp import BatchedBench
from report import OURS, markdown
from running import Worker
from workloads import WORKLOADS

from omni_engine.engine.graphs.key import installed_versions

HERE = Path(__file__).parent
MOST_FOREIGN, RETRIES = 0.06, 2
KV_GIB = "2"
_TICKS = os.sysconf("SC_CLK_TCK")
_RATES_PROGRAM = """
import json, torch
from omni_engine.engine.machine_rates import measure_machine_rates
torch.set_num_threads(2)
rates = measure_machine_rates(torch.device("cpu"), "bfloat16")
print(json.dumps({"bytes_per_second": rates.bytes_per_second, "flops_per_second": rates.flops_per_second}))
"""


def busy_seconds() -> float:
    """Processor time of the whole machine so far, without what was idle or waiting."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    return (sum(fields[:3]) + sum(fields[5:8])) / _TICKS


def own_seconds(pid: int) -> float:
    """Processor time of one process so far, with that of the children it has waited for."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return sum(int(field) for field in fields[11:15]) / _TICKS


def guarded(take: Callable[[int], dict[str, Any]], pid: int) -> dict[str, Any]:
    """A sample with `foreign`, the share of the processors that others took meanwhile; taken again if it is large."""
    sample: dict[str, Any] = {}
    for attempt in range(RETRIES + 1):
        busy, own, begin = busy_seconds(), own_seconds(pid), time.monotonic()
        sample = take(attempt)
        passed = (time.monotonic() - begin) * (os.cpu_count() or 1)
        taken = busy_seconds() - busy - (own_seconds(pid) - own)
        sample["foreign"] = round(max(taken, 0.0) / passed, 3)
        if sample["foreign"] <= MOST_FOREIGN:
            break
    return sample


def ensure_checked(options: argparse.Namespace, model: Path, samples: Path) -> None:
    """Check omni-engine's tokens, unless `samples` says that this code has passed with this model. Raises RuntimeError
    if they are wrong."""
    versions = {**installed_versions(), "extra": options.extra}
    passed = [json.loads(line) for line in samples.read_text().splitlines()] if samples.exists() else []
    for dtype in BOUNDS:
        mark = {"model": model.name, "checked": dtype, "versions": versions}
        if any({key: record.get(key) for key in mark} == mark for record in passed):
            continue
        result = check(model, dtype, json.loads(options.extra))
        print(f"{model.name} {result.text()}", file=sys.stderr, flush=True)
        if not result.passed:
            raise RuntimeError(f"its tokens are wrong: {result.text()}")
        with samples.open("a") as file:
            file.write(json.dumps({**mark, **asdict(result), "round": f"{options.run}/0"}) + "\n")


def start_engines(options: argparse.Namespace, model: Path, samples: Path) -> list[Worker | BatchedBench]:
    """Every engine whose environment is given, and which runs this model."""
    vllm = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": KV_GIB, "VLLM_CPU_OMP_THREADS_BIND": "0-1"}
    wanted: list[tuple[str, str | None, str, dict[str, str]]] = [
        (OURS, sys.executable, OURS, {}),
        ("vllm", options.vllm, "vllm", vllm),
        ("openvino", options.openvino, "openvino", {}),
    ]
    if "deepseek" in model.name:  # latent attention, or keys and values expanded in its cache
        wanted.insert(2, ("vllm-expanded", options.vllm, "vllm", {**vllm, "VLLM_MLA_DISABLE": "1"}))
    engines: list[Worker | BatchedBench] = []
    for name, python, engine, environment in wanted:
        if python is None or name in options.without:
            continue
        extra = options.extra if name == OURS else "{}"
        try:
            if name == OURS:
                ensure_checked(options, model, samples)
            if engine == "openvino":
                export_for_openvino(model, python)
            engines.append(Worker.start(name, python, engine, model, environment, extra))
        except (RuntimeError, OSError) as error:
            _tell_not_run(name, model, error)
    if options.llama_cpp and LLAMA_CPP not in options.without:
        try:
            engines.append(BatchedBench.start(options.llama_cpp, model))
        except (RuntimeError, OSError) as error:
            _tell_not_run(LLAMA_CPP, model, error)
    return engines


def _tell_not_run(name: str, model: Path, error: Exception) -> None:
    print(f"not run: {name} with {model.name}: {error}", file=sys.stderr, flush=True)


def compare_model(
    options: argparse.Namespace,
    model: Path,
    samples: Path,
    deadline: float,
    add: Callable[..., None],
    add_rates: Callable[[], None],
) -> None:
    """Of every workload the machine's rates, which count as they are at best, then all rounds, as long as there is
    time."""
    engines = start_engines(options, model, samples)
    if options.pause:
        print(f"loaded; to go on: kill -CONT {os.getpid()}", flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)
        deadline = time.monotonic() + options.minutes * 60
    try:
        for workload in options.work:
            add_rates()
            for engine in [engine for engine in engines if engine.runs(workload)]:
                _try(engines, engine, model, partial(engine.sample, workload, 0))  # new shapes may be slower
            for number in range(options.pairs):
                if time.monotonic() > deadline:
                    return
                round_id = f"{options.run}/{number}"
                in_turn = [engine for engine in engines if engine.runs(workload)]
                for engine in in_turn if number % 2 == 0 else in_turn[::-1]:
                    seed = 1 + number * (RETRIES + 1) + options.seed * 1000
                    take = partial(_sample, engine, workload, seed)
                    sample = _try(engines, engine, model, partial(guarded, take, engine.pid))
                    if sample is not None:
                        add(model.name, workload, engine.name, engine.version, round_id, sample)
    finally:
        for engine in engines:
            engine.end()


def _sample(engine: Worker | BatchedBench, workload: str, seed: int, attempt: int) -> dict[str, Any]:
    return engine.sample(workload, seed + attempt)


def _try(
    engines: list[Worker | BatchedBench],
    engine: Worker | BatchedBench,
    model: Path,
    sample: Callable[[], dict[str, Any]],
) -> dict[str, Any] | None:
    """The sample, or None of an engine that fails: it is ended, and the others go on without it."""
    try:
        return sample()
    except (RuntimeError, OSError) as error:
        _tell_not_run(engine.name, model, error)
        engine.end()
        engines.remove(engine)
        return None


def measured_rates() -> Rates:
    """Of two threads, by a process of its own, so that this one holds no torch."""
    done = subprocess.run([sys.executable, "-c", _RATES_PROGRAM], check=True, capture_output=True, text=True)
    return Rates(**json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description="Compares omni-engine with other engines, pair by pair.")
    parser.add_argument("folder", type=Path, help="checkpoints and samples.jsonl")
    parser.add_argument("--vllm", metavar="PYTHON", help="interpreter of an environment with vllm-cpu")
    parser.add_argument("--openvino", metavar="PYTHON", help="of one with openvino-genai and optimum-intel")
    parser.add_argument(
        "--llama-cpp", metavar="FOLDER", help="where its programs are; MODEL.gguf is made by the package gguf"
    )
    parser.add_argument("--without", nargs="*", default=[], help="engines to leave out")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="MODEL")
    parser.add_argument("--work", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), metavar="W")
    parser.add_argument("--pairs", type=int, default=5, help="rounds per workload; 0: only print the table")
    parser.add_argument("--minutes", type=float, default=600.0, help="begin no further round after so long")
    parser.add_argument("--pause", action="store_true", help="stop when a model's engines are loaded, until SIGCONT")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--extra", default="{}", help="JSON: further arguments of omni-engine")
    parser.add_argument("--run", default=time.strftime("%Y-%m-%dT%H:%M:%S"), help="name of this run in the samples")
    parser.add_argument("--only-run", nargs="*", help="print the table of these runs only")
    parser.add_argument("--bw", type=float, default=32.0, help="GB/s of the bound")
    parser.add_argument("--gemm", type=float, default=437.0, help="GFLOP/s of the bound")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    samples = options.folder / "samples.jsonl"

    def add(model: str, workload: str, engine: str, version: str, round_id: str, sample: dict[str, Any]) -> None:
        record = {"model": model, "workload": workload, "engine": engine, "version": version, "round": round_id}
        with samples.open("a") as file:
            file.write(json.dumps({**record, **sample}) + "\n")
        print(f"{model} {workload} {engine} {sample['value']:.2f} (others {sample['foreign']:.1%})", flush=True)

    if options.pairs:
        deadline = time.monotonic() + options.minutes * 60

        def add_rates() -> None:
            rates = {"rates": vars(measured_rates()), "round": f"{options.run}/0"}
            with samples.open("a") as file:
                file.write(json.dumps(rates) + "\n")

        for name in options.models:
            compare_model(options, write_checkpoint(options.folder, name), samples, deadline, add, add_rates)
    records = [json.loads(line) for line in samples.read_text().splitlines()] if samples.exists() else []
    if options.only_run:
        records = [record for record in records if record["round"].rsplit("/", 1)[0] in options.only_run]
    configs = {name: json.loads((options.folder / name / "config.json").read_text()) for name in options.models}
    print(f"\n{platform.platform()}, {os.cpu_count()} processors")
    print(markdown(records, configs, options.work, Rates(options.bw * 1e9, options.gemm * 1e9)))


if __name__ == "__main__":
    main()
