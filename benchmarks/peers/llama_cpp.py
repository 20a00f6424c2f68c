"""Samples of llama.cpp by its own llama-batched-bench, in a fresh process each, over `MODEL.gguf`."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from workloads import WORKLOADS

LLAMA_CPP_WORK = ("W1", "W2b1", "W2b8", "W2b32", "W3")  # its shared prompts are another workload than W4


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
    return {"value": metric_of(rows[0], workload), "version": "of llama-batched-bench"}


def metric_of(row: dict[str, Any], workload: str) -> float:
    """The workload's metric of one line of the program: t_pp and t_tg are seconds of all prompts and of all steps."""
    wanted = WORKLOADS[workload]
    if wanted.metric == "tpot_ms":
        return row["t_tg"] / row["tg"] * 1e3
    if wanted.metric == "ttft_ms":
        return row["t_pp"] * 1e3
    return wanted.requests * wanted.output / (row["t_pp"] + row["t_tg"])
