"""W5 and W6: servers as their users meet them, from the start of the process to the first token, and under load.

    python benchmarks/peers/servers.py MODEL --vllm v-vllm/bin/python --llama-cpp llama.cpp/build/bin --pairs 5
    python benchmarks/peers/servers.py MODEL --load --vllm v-vllm/bin/python --rates 2.5 --concurrency 8

W6 starts every server in turn, `--pairs` times, and asks for one token until it comes; beside it stands the time that a
Python takes to import torch. Peak memory is that of the processes of the server, shared pages counted once (PSS).
W5 (`--load`) starts each server once and runs `omni-engine bench serve` against it, 128 tokens in and 64 out: Poisson
arrivals at each of `--rates` (requests per second), then a closed loop of `--concurrency`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from report import OURS, Spread

READY_SECONDS, POLL_SECONDS = 300.0, 0.02
PROMPT = list(range(100, 132))


def server_commands(options: argparse.Namespace) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Command and environment of every server whose place is given."""
    model, port = str(options.model), str(options.port)
    limits = ["--dtype", "bfloat16", "--max-model-len", "4096", "--max-num-seqs", "32", "--port", port]
    ours = Path(sys.executable).with_name("omni-engine")
    commands = {OURS: ([str(ours), "serve", model, *limits, *options.serve_flag], {"OMP_NUM_THREADS": "2"})}
    if options.vllm:
        command = [options.vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", model, *limits]
        commands["vllm"] = (command, {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1"})
    if options.llama_cpp:
        program = str(Path(options.llama_cpp) / "llama-server")
        command = [program, "-m", f"{model}.gguf", "--port", port, "-t", "2", "-tb", "2", "-np", "8", "-c", "8192"]
        commands["llama.cpp"] = (command, {})
    return commands


def descendants(pid: int) -> list[int]:
    """The process and all that it started and that live."""
    found = [pid]
    for one in found:
        try:
            for task in Path(f"/proc/{one}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
        except OSError:
            continue
    return found


def memory_mb(pid: int) -> float:
    """Proportional set size of the process and its descendants."""
    total = 0
    for one in descendants(pid):
        try:
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def first_token(url: str, alive: subprocess.Popen[bytes]) -> None:
    """Returns when the server has answered with a token; raises RuntimeError if it ends or takes too long."""
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if alive.poll() is not None:
            raise RuntimeError(f"the server ended with status {alive.returncode}; see its log")
        try:
            with urllib.request.urlopen(f"{url}/models", timeout=5) as response:
                name = json.load(response)["data"][0]["id"]
            body = {"model": name, "prompt": PROMPT, "max_tokens": 1, "temperature": 0, "ignore_eos": True}
            request = urllib.request.Request(
                f"{url}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=120) as response:
                json.load(response)
            return
        except (urllib.error.URLError, OSError, KeyError, IndexError):
            time.sleep(POLL_SECONDS)
    raise RuntimeError(f"no token within {READY_SECONDS:.0f} s")


@contextmanager
def running(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The server, ended with all of its processes."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=file, stderr=file, start_new_session=True
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def start_once(command: Sequence[str], environment: Mapping[str, str], url: str, log: Path) -> tuple[float, float]:
    """Seconds from the start of the process to its first token, and the peak of its memory in MB."""
    begin, peak, stopped = time.perf_counter(), [0.0], threading.Event()
    with running(command, environment, log) as process:

        def watch() -> None:
            while not stopped.wait(0.25):
                peak[0] = max(peak[0], memory_mb(process.pid))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            first_token(url, process)
            seconds = time.perf_counter() - begin
            peak[0] = max(peak[0], memory_mb(process.pid))
        finally:
            stopped.set()
            watcher.join()
    return seconds, peak[0]


def measure_starts(options: argparse.Namespace, url: str) -> None:
    commands = server_commands(options)
    seconds: dict[str, list[float]] = {name: [] for name in (*commands, "import torch")}
    peaks: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(options.pairs):
        for name, (command, environment) in commands.items():
            taken, peak = start_once(command, environment, url, options.logs / f"{name}.log")
            seconds[name].append(taken)
            peaks[name].append(peak)
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import torch"], check=True)
        seconds["import torch"].append(time.perf_counter() - begin)
    print("| W6 | start to first token, s | peak memory, MB |\n|---|---|---|")
    for name, taken in seconds.items():
        memory = Spread.of(peaks[name]).text(0) if name in peaks else ""
        print(f"| {name} | {Spread.of(taken).text(2)} | {memory} |")


def measure_load(options: argparse.Namespace, url: str) -> None:
    client = [str(Path(sys.executable).with_name("omni-engine")), "bench", "serve", "--base-url", url[: -len("/v1")]]
    client += ["--random-input-len", "128", "--random-output-len", "64", "--ignore-eos", "--num-prompts", "64"]
    client += ["--extra-body", '{"repetition_penalty": null}', "--skip-tokenizer-init"]
    for name, (command, environment) in server_commands(options).items():
        with running(command, environment, options.logs / f"{name}.log") as process:
            first_token(url, process)
            for traffic in (
                *(["--request-rate", str(rate)] for rate in options.rates),
                ["--max-concurrency", str(options.concurrency)],
            ):
                print(f"\n{name}, {' '.join(traffic)}", flush=True)
                subprocess.run([*client, *traffic], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Starts servers, and measures their start or how they bear load.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--vllm", metavar="PYTHON", help="interpreter of an environment with vllm-cpu")
    parser.add_argument("--llama-cpp", metavar="FOLDER", help="where llama-server is; reads MODEL.gguf")
    parser.add_argument("--load", action="store_true", help="W5 and not W6")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--rates", type=float, nargs="*", default=[], help="requests per second")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--port", type=int, default=8131)
    parser.add_argument("--logs", type=Path, default=Path(tempfile.gettempdir()), help="folder of the servers' logs")
    parser.add_argument("--serve-flag", action="append", default=[], help="further flag of `omni-engine serve`")
    options = parser.parse_args()
    url = f"http://127.0.0.1:{options.port}/v1"
    if options.load:
        measure_load(options, url)
    else:
        measure_starts(options, url)


if __name__ == "__main__":
    main()
