"""One load on a running server by `omni-engine bench serve`, and the table of W5 from many of them."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from report import OURS, Spread

INPUT, OUTPUT = 128, 64
CLOSED, POISSON = "closed loop", "Poisson"
METRICS = ("ttft_p50_ms", "tpot_p50_ms", "ttft_p99_ms", "tpot_p99_to_p50", "requests_per_second")
COMPARED = METRICS[:2]


def apply_load(url: str, model: Path, traffic: Sequence[str], requests: int, seed: int) -> dict[str, float]:
    """Send requests of drawn token ids, streaming and greedy, and return METRICS.

    `traffic` are the flags that say when requests are sent. Every server gets the same ones for a seed, at the same
    times, each over a connection of its own: llama-server closes one that has been idle for some seconds, and a request
    may be on its way then. Raises RuntimeError unless all are answered in full.
    """
    program = str(Path(sys.executable).with_name("omni-engine"))
    command = [program, "bench", "serve", "--base-url", url, "--tokenizer", str(model), "--prompt-format", "token-ids"]
    command += ["--random-input-len", str(INPUT), "--random-output-len", str(OUTPUT), "--num-prompts", str(requests)]
    command += ["--ignore-eos", "--temperature", "0", "--seed", str(seed), "--header", "Connection=close", *traffic]
    command += ["--percentile-metrics", "ttft,tpot", "--metric-percentiles", "50,99", "--save-result", "--disable-tqdm"]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [*command, "--result-dir", folder, "--result-filename", "result.json"], capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"bench serve failed: {(done.stderr or done.stdout).strip()[-1000:]}")
        try:
            return load_metrics(json.loads((Path(folder) / "result.json").read_text()), requests)
        except RuntimeError as error:
            told = [line.strip() for line in done.stderr.splitlines() if " x " in line]  # how often each error came
            raise RuntimeError("; ".join([str(error), *told])) from error


def load_metrics(result: Mapping[str, Any], requests: int) -> dict[str, float]:
    """Of the file of `bench serve`."""
    if result["completed"] != requests or result["total_output_tokens"] != requests * OUTPUT:
        raise RuntimeError(
            f"{requests} requests must be answered with {OUTPUT} tokens each: {result['completed']} answers, "
            f"{result['total_output_tokens']} tokens"
        )
    return {
        "ttft_p50_ms": result["p50_ttft_ms"],
        "tpot_p50_ms": result["p50_tpot_ms"],
        "ttft_p99_ms": result["p99_ttft_ms"],
        "tpot_p99_to_p50": result["p99_tpot_ms"] / result["p50_tpot_ms"],
        "requests_per_second": result["request_throughput"],
    }


def ratios_within_rounds(
    ours: Mapping[str, float], others: Iterable[Mapping[str, float]], lower_is_better: bool = True
) -> list[float]:
    """Ours divided by the best of the others, in every round that all of them have."""
    best = min if lower_is_better else max
    rows = list(others)
    return [ours[name] / best(row[name] for row in rows) for name in ours if all(name in row for row in rows)]


def load_tables(records: Sequence[Mapping[str, Any]]) -> str:
    """A table for each rate and for each set of flags that our server had."""
    kinds: dict[tuple[float, str], list[Mapping[str, Any]]] = {}
    for record in records:
        kinds.setdefault((record["rate"], record["flags"]), []).append(record)
    parts: list[str] = []
    for (rate, flags), kind in kinds.items():
        foreign = max(record["foreign"] for record in kind)
        parts += [
            f"Poisson arrivals at {rate:.2f} requests/s, {INPUT} tokens in, {OUTPUT} out; flags of our server: "
            f"{flags or 'none'}. Most that other processes took: {foreign:.1%}",
            load_table(kind),
        ]
    return "\n\n".join(parts)


def load_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Medians and extremes over rounds, and what share of a peer's time ours is; below 1 it is ahead."""
    values: dict[tuple[str, str, str], dict[str, float]] = {}
    for record in records:
        for metric in METRICS:
            key = (record["traffic"], record["engine"], metric)
            values.setdefault(key, {})[record["round"]] = record[metric]
    engines = list(dict.fromkeys(record["engine"] for record in records))
    peers = [engine for engine in engines if engine != OURS]
    lines = [
        "| W5 | server | TTFT p50, ms | TPOT p50, ms | TTFT p99, ms | TPOT p99/p50 | requests/s | n | "
        "TTFT, ours / theirs | TPOT, ours / theirs |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]

    def shares(traffic: str, against: Sequence[str]) -> str:
        cells = []
        for metric in COMPARED:
            ours = values.get((traffic, OURS, metric), {})
            found = ratios_within_rounds(ours, [values.get((traffic, each, metric), {}) for each in against])
            cells.append(Spread.of(found).text(2) if found else "")
        return " | ".join(cells)

    for traffic in (POISSON, CLOSED):
        for engine in engines:
            taken = [values.get((traffic, engine, metric)) for metric in METRICS]
            if not all(taken):
                continue
            spreads = [Spread.of(list(each.values())) for each in taken if each]
            cells = [spread.text(digits) for spread, digits in zip(spreads, (1, 2, 0, 2, 2), strict=True)]
            against = shares(traffic, [engine]) if engine != OURS else " | "
            lines.append(f"| {traffic} | {engine} | {' | '.join(cells)} | {spreads[0].count} | {against} |")
        if len({each for kind, each, _ in values if kind == traffic} - {OURS}) > 1:
            lines.append(f"| {traffic} | best of the peers | | | | | | | {shares(traffic, peers)} |")
    return "\n".join(lines)
