"""W5 and W6: servers as their users meet them, under load, and from the start of the process to the first token.

    python benchmarks/peers/servers.py MODEL --vllm v-vllm/bin/python --llama-cpp llama.cpp/build/bin --pairs 5
    python benchmarks/peers/servers.py --pairs 5  # the bundled demo model
    python benchmarks/peers/servers.py MODEL --load --vllm v-vllm/bin/python --llama-cpp llama.cpp/build/bin --pairs 5

W6 starts every server in turn, `--pairs` times, asks for one token until it comes, and then keeps 8 streams busy, until
they are as fast as they will be; beside it stands the time that a Python takes to import torch. Peak memory is that of
the processes of the server until the first token, shared pages counted once (PSS), in a start of its own. Ours starts
twice, with its graphs cached and with none; those are compiled meanwhile, and it is not watched until then.

W5 (`--load`) first finds each server's capacity, the requests per second of a closed loop of `--concurrency`. Then a
round starts every server in turn, warms it, and measures it twice: under Poisson arrivals at 70 % of the lowest
capacity, and in the closed loop. Samples are added to `servers.jsonl` beside the checkpoint, so a comparison may be
made in pieces (give `--rate`, so that they are of one rate), and `--pairs 0` prints the table of what is there. Our
graphs are compiled before, where the cache has none.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from checkpoints import SHAPES, write_checkpoint
from compare import busy_seconds, own_seconds
from llama_cpp import NAME as LLAMA_CPP
from llama_cpp import find_program, make_gguf
from report import OURS
from server_load import CLOSED, POISSON, apply_load, load_tables
from server_process import first_token, running, tree_seconds
from server_start import Start, measure_start, start_table, time_of_import

from omni_engine.engine.config import DEMO_MODEL

HOST = "127.0.0.1"
LOAD_SHARE = 0.7  # of the capacity of the slowest server
WARMUP_SEED = 1_000_000
WITHOUT_GRAPHS = f"{OURS}, no graphs cached"


def server_commands(options: argparse.Namespace) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Command and environment of every server whose place is given."""
    model, port = str(options.model), str(options.port)
    limits = ["--dtype", "bfloat16", "--max-num-seqs", "32"]
    if options.model != DEMO_MODEL:  # made for fewer
        limits += ["--max-model-len", "4096"]
    ours = Path(sys.executable).with_name("omni-engine")
    flags = [*limits, "--host", HOST, "--port", port]
    commands = {OURS: ([str(ours), "serve", model, *flags, *options.serve_flag], {"OMP_NUM_THREADS": "2"})}
    if options.vllm:
        command = [options.vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *flags]
        commands["vllm"] = (command, {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1"})
    if options.llama_cpp:
        try:
            make_gguf(options.model)
            program = find_program(options.llama_cpp, "llama-server")
            # Under load as many places as the others have; for the start, what a user of one model would give it.
            places = ["-np", "32", "-c", "32768"] if options.load else ["-np", "8", "-c", "8192"]
            command = [program, "-m", f"{model}.gguf", "--host", HOST, "--port", port, "-t", "2", "-tb", "2", *places]
            commands[LLAMA_CPP] = (command, {})
        except RuntimeError as error:
            _tell_not_run(LLAMA_CPP, error)
    return commands


def _tell_not_run(name: str, error: Exception) -> None:
    print(f"not run: {name}: {error}", file=sys.stderr, flush=True)


def compile_graphs(command: tuple[list[str], dict[str, str]]) -> None:
    """Those of our server's command, where the cache has none."""
    ours, environment = command
    place = ours.index("--host")
    compiling = [ours[0], "compile", *ours[2:place], *ours[place + 4 :]]
    if subprocess.run(compiling, env={**os.environ, **environment}, stdout=subprocess.DEVNULL).returncode:
        print(f"{OURS} runs without its graphs, for the reason above", file=sys.stderr, flush=True)


def measure_starts(options: argparse.Namespace, url: str) -> None:
    """All servers in turn, `--pairs` times; one that fails is left out from then on."""
    commands = server_commands(options)
    if options.pairs:
        compile_graphs(commands[OURS])
    commands = {OURS: commands[OURS], WITHOUT_GRAPHS: commands[OURS], **commands}
    starts: dict[str, list[Start]] = {name: [] for name in commands}
    imports: list[float] = []
    for _ in range(options.pairs):
        for name, (command, environment) in list(commands.items()):
            try:
                with tempfile.TemporaryDirectory() as folder:
                    cached = name != WITHOUT_GRAPHS
                    flags = [] if cached else ["--compilation-config", json.dumps({"cache_dir": folder})]
                    log = options.logs / f"{name}.log"
                    start = measure_start([*command, *flags], environment, url, log, watched=cached)
            except (RuntimeError, OSError) as error:
                _tell_not_run(name, error)
                del commands[name]
                continue
            starts[name].append(start)
            print(f"{name}: {start}", flush=True)
        imports.append(time_of_import(sys.executable))
    print(start_table(starts, imports))


def load_server(
    options: argparse.Namespace,
    url: str,
    name: str,
    command: tuple[list[str], dict[str, str]],
    rate: float | None,
    seed: int,
) -> Iterator[dict[str, Any]]:
    """Start and warm the server, then a record of each load: the closed loop, and after it the arrivals at `rate`."""
    closed = ["--max-concurrency", str(options.concurrency)]
    loads = [(CLOSED, closed)]
    if rate is not None:
        loads.append((POISSON, ["--request-rate", str(rate)]))
    base = url.removesuffix("/v1")
    with running(*command, options.logs / f"{name}.log") as process:
        first_token(url, process)
        apply_load(base, options.model, closed, 2 * options.concurrency, WARMUP_SEED + seed)
        for number, (traffic, flags) in enumerate(loads):
            busy, own, begin = busy_seconds(), tree_seconds(process.pid) + own_seconds(os.getpid()), time.monotonic()
            metrics = apply_load(base, options.model, flags, options.requests, 2 * seed + number)
            passed = (time.monotonic() - begin) * (os.cpu_count() or 1)
            taken = busy_seconds() - busy - (tree_seconds(process.pid) + own_seconds(os.getpid()) - own)
            yield {"traffic": traffic, "foreign": round(max(taken, 0.0) / passed, 3), **metrics}


def measure_load(options: argparse.Namespace, url: str) -> None:
    samples = options.model.parent / "servers.jsonl"
    commands = server_commands(options) if options.pairs else {}
    if commands:
        compile_graphs(commands[OURS])
    rate, run, capacities = options.rate, time.strftime("%Y-%m-%dT%H:%M:%S"), {}
    for number in range(-1 if rate is None else 0, options.pairs):
        if number == 0 and rate is None:
            if not capacities:
                raise SystemExit("no server bore the closed loop that finds the rate; give one with --rate: none")
            rate = LOAD_SHARE * min(capacities.values())
            print(f"Poisson arrivals at {rate:.3f} requests/s", flush=True)
        for name in list(commands) if number % 2 == 0 else list(commands)[::-1]:
            try:
                at_rate = rate if number >= 0 else None
                for record in load_server(options, url, name, commands[name], at_rate, seed=number + 1):
                    print(json.dumps({"engine": name, **record}), flush=True)
                    if number < 0:
                        capacities[name] = record["requests_per_second"]
                        continue
                    labels = {"model": options.model.name, "engine": name, "round": f"{run}/{number}", "rate": rate,
                              "flags": " ".join(options.serve_flag)}  # fmt: skip
                    with samples.open("a") as file:
                        file.write(json.dumps({**labels, **record}) + "\n")
            except (RuntimeError, OSError) as error:
                _tell_not_run(name, error)
                del commands[name]
    records = [json.loads(line) for line in samples.read_text().splitlines()] if samples.exists() else []
    print(load_tables([record for record in records if record["model"] == options.model.name]))


def main() -> None:
    parser = argparse.ArgumentParser(description="Starts servers, and measures their start or how they bear load.")
    parser.add_argument("model", type=Path, nargs="?", help="checkpoint; none: the bundled demo, for W6 alone")
    parser.add_argument("--vllm", metavar="PYTHON", help="interpreter of an environment with vllm-cpu")
    parser.add_argument("--llama-cpp", metavar="FOLDER", help="where llama-server is; reads MODEL.gguf")
    parser.add_argument("--load", action="store_true", help="W5 and not W6")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--rate", type=float, help="W5: requests per second, instead of finding the capacity first")
    parser.add_argument("--concurrency", type=int, default=8, help="W5: of the closed loop (8)")
    parser.add_argument("--requests", type=int, default=64, help="W5: of each load (64)")
    parser.add_argument("--port", type=int, default=8131)
    parser.add_argument("--logs", type=Path, default=Path(tempfile.gettempdir()), help="folder of the servers' logs")
    parser.add_argument("--serve-flag", action="append", default=[], help="further flag of `omni-engine serve`")
    options = parser.parse_args()
    if options.model is None:
        if options.load or options.llama_cpp:
            parser.error("give a MODEL: what is made for --load and --llama-cpp is written beside it")
        options.model = DEMO_MODEL
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is ended too
    if options.model.name in SHAPES:
        write_checkpoint(options.model.parent, options.model.name)
    url = f"http://{HOST}:{options.port}/v1"
    if options.load:
        measure_load(options, url)
    else:
        measure_starts(options, url)


if __name__ == "__main__":
    main()
