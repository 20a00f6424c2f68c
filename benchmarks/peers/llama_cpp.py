"""Samples of llama.cpp by its own llama-batched-bench, in a fresh process each, over `MODEL.gguf`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workloads import WORKLOADS

NAME = "llama.cpp"
LLAMA_CPP_WORK = ("W1", "W2b1", "W2b8", "W2b32", "W3")  # its shared prompts are another workload than W4


@dataclass(frozen=True)
class BatchedBench:
    """The program, as if it were the worker of an engine; there is nothing to load, and nothing to end."""

    program: str
    model: Path
    version: str
    name: str = NAME

    @classmethod
    def start(cls, folder: str, model: Path) -> BatchedBench:
        """With the program of this folder. Raises RuntimeError if it is not there, or there is no MODEL.gguf to be."""
        program = find_program(folder, "llama-batched-bench")
        make_gguf(model)
        return cls(program, model, program_version(find_program(folder, "llama-server")))

    @property
    def pid(self) -> int:
        """Of the process whose children the program's processes are."""
        return os.getpid()

    def runs(self, workload: str) -> bool:
        return workload in LLAMA_CPP_WORK

    def sample(self, workload: str, seed: int) -> dict[str, Any]:
        """The program draws its own tokens, so the seed is of no use."""
        return sample_llama_cpp(self.program, self.model, workload)

    def end(self) -> None:
        pass


def find_program(folder: str, name: str) -> str:
    """Path of one of llama.cpp's programs."""
    program = shutil.which(name, path=folder)
    if program is None:
        raise RuntimeError(f"--llama-cpp must be the folder of llama-batched-bench and llama-server: {folder}")
    return program


def program_version(server: str) -> str:
    """What llama-server says of its version, in one line."""
    said = subprocess.run([server, "--version"], capture_output=True, text=True)
    lines = [line for line in (said.stderr + said.stdout).splitlines() if line.startswith("version")]
    return lines[0].removeprefix("version").strip(" :") if lines else "unknown"


def make_gguf(model: Path) -> None:
    """MODEL.gguf, if it is missing, by a process of its own: it takes torch, which nothing else here needs. Raises
    RuntimeError with what that process said, as where the package gguf is not installed."""
    command = [sys.executable, str(Path(__file__).with_name("gguf_export.py")), str(model)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1])


def sample_llama_cpp(program: str, model: Path, workload: str) -> dict[str, Any]:
    """One sample, as the engines' workers give it. Raises RuntimeError with what the program printed if it fails."""
    wanted = WORKLOADS[workload]
    output = wanted.output - 1 if wanted.metric == "tpot_ms" else wanted.output
    length = wanted.requests * (wanted.own + wanted.output)
    command = [program, "-m", f"{model}.gguf", "-t", "2", "-tb", "2", "-c", str(max(length, 512)), "-b", "2048"]
    command += ["-ub", "512", "-npp", str(wanted.own), "-ntg", str(output), "-npl", str(wanted.requests)]
    done = subprocess.run([*command, "--output-format", "jsonl"], capture_output=True, text=True)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or len(rows) != 1:
        raise RuntimeError(f"llama-batched-bench failed: {(done.stderr or done.stdout)[-2000:]}")
    return {"value": metric_of(rows[0], workload)}


def metric_of(row: dict[str, Any], workload: str) -> float:
    """The workload's metric of one line of the program: t_pp and t_tg are seconds of all prompts and of all steps."""
    wanted = WORKLOADS[workload]
    if wanted.metric == "tpot_ms":
        return row["t_tg"] / row["tg"] * 1e3
    if wanted.metric == "ttft_ms":
        return row["t_pp"] * 1e3
    return wanted.requests * wanted.output / (row["t_pp"] + row["t_tg"])
