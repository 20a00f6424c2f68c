"""How `bench serve` tells its figures: the printed block, the JSON object, and the file it is saved in.

Labels and keys are vLLM's, letter for letter: scripts search for them.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from ...scheduler.draft_stats import DraftStats
from .acceptance import acceptance_fields, acceptance_lines
from .client import RequestResult
from .metrics import ServeMetrics
from .traffic import TrafficPattern

_TITLES = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}
_WIDTH = 50
_MOST_ERRORS = 10
_DETAILS = ("input_lens", "output_lens", "start_times", "ttfts", "itls", "generated_texts", "errors")


@dataclass(frozen=True)
class RunLabels:
    """What a run was, beside its figures."""

    backend: str
    model_id: str
    tokenizer_id: str
    num_prompts: int
    pattern: TrafficPattern
    max_concurrency: int | None = None
    label: str | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    date: datetime = field(default_factory=datetime.now)


def printed_block(metrics: ServeMetrics, run: RunLabels, shown: Sequence[str], drafts: DraftStats | None = None) -> str:
    """The block of figures; `shown` are the metrics with statistics, `drafts` what speculation came to meanwhile."""
    lines = [" Serving Benchmark Result ".center(_WIDTH, "=")]
    lines.append(_line("Successful requests:", metrics.completed))
    lines.append(_line("Failed requests:", metrics.failed))
    if run.max_concurrency is not None:
        lines.append(_line("Maximum request concurrency:", run.max_concurrency))
    if run.pattern.request_rate != float("inf"):
        lines.append(_line("Request rate configured (RPS):", float(run.pattern.request_rate)))
    lines.append(_line("Benchmark duration (s):", metrics.duration))
    lines.append(_line("Total input tokens:", metrics.total_input))
    lines.append(_line("Total generated tokens:", metrics.total_output))
    lines.append(_line("Request throughput (req/s):", metrics.request_throughput))
    if metrics.request_goodput is not None:
        lines.append(_line("Request goodput (req/s):", metrics.request_goodput))
    lines.append(_line("Output token throughput (tok/s):", metrics.output_throughput))
    lines.append(_line("Peak output token throughput (tok/s):", metrics.max_output_tokens_per_s))
    lines.append(_line("Peak concurrent requests:", float(metrics.max_concurrent_requests)))
    lines.append(_line("Total token throughput (tok/s):", metrics.total_token_throughput))
    for name, title in _TITLES.items():
        if name in shown:
            distribution = metrics.distributions[name]
            lines.append(title.center(_WIDTH, "-"))
            lines.append(_line(f"Mean {name.upper()} (ms):", distribution.mean))
            lines.append(_line(f"Median {name.upper()} (ms):", distribution.median))
            lines += [
                _line(f"P{percentile:g} {name.upper()} (ms):", value)
                for percentile, value in distribution.percentiles.items()
            ]
    lines += acceptance_lines(drafts)
    lines.append("=" * _WIDTH)
    return "\n".join(lines)


def _line(label: str, value: float) -> str:
    return f"{label:<40} {value:<10.2f}" if isinstance(value, float) else f"{label:<40} {value:<10}"


def result_object(
    metrics: ServeMetrics,
    results: Sequence[RequestResult],
    run: RunLabels,
    shown: Sequence[str],
    drafts: DraftStats | None = None,
    *,
    detailed: bool,
) -> dict[str, Any]:
    """The result as JSON data. Lists have an entry per request, failed ones too; times are in seconds unless `_ms`."""
    pattern = run.pattern
    rate = pattern.request_rate
    result: dict[str, Any] = {
        "date": run.date.strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": run.backend,
        "backend": run.backend,
        "label": run.label,
        "model_id": run.model_id,
        "tokenizer_id": run.tokenizer_id,
        "num_prompts": run.num_prompts,
        **run.metadata,
        "request_rate": "inf" if rate == float("inf") else rate,
        "burstiness": "inf" if pattern.burstiness == float("inf") else pattern.burstiness,
        "max_concurrency": run.max_concurrency,
    }
    if pattern.ramp_up_strategy is not None:
        result["ramp_up_strategy"] = pattern.ramp_up_strategy
        result["ramp_up_start_rps"] = pattern.ramp_up_start_rps
        result["ramp_up_end_rps"] = pattern.ramp_up_end_rps
    result |= {
        "duration": metrics.duration,
        "completed": metrics.completed,
        "failed": metrics.failed,
        "total_input_tokens": metrics.total_input,
        "total_output_tokens": metrics.total_output,
        "request_throughput": metrics.request_throughput,
        "request_goodput": metrics.request_goodput,
        "output_throughput": metrics.output_throughput,
        "total_token_throughput": metrics.total_token_throughput,
        "input_lens": [each.prompt_len for each in results],
        "output_lens": metrics.output_lens,
        "ttfts": [each.ttft for each in results],
        "itls": [each.itl for each in results],
        "latencies": [each.latency for each in results],
        "start_times": [each.start_time for each in results],
        "queue_times": [each.queue_time for each in results],
        "generated_texts": [each.generated_text for each in results],
        "errors": [each.error for each in results],
        "max_output_tokens_per_s": metrics.max_output_tokens_per_s,
        "max_concurrent_requests": metrics.max_concurrent_requests,
        "rtfx": 0.0,  # of audio, which no request has
        **acceptance_fields(drafts),
    }
    for name in _TITLES:
        if name in shown:
            distribution = metrics.distributions[name]
            result[f"mean_{name}_ms"] = distribution.mean
            result[f"median_{name}_ms"] = distribution.median
            result[f"std_{name}_ms"] = distribution.std
            result |= {f"p{percentile:g}_{name}_ms": value for percentile, value in distribution.percentiles.items()}
    if not detailed:
        for name in _DETAILS:
            del result[name]
    return result


def result_path(run: RunLabels, directory: str | None = None, name: str | None = None) -> Path:
    """Where a result is saved: vLLM's name for it, unless it is given one."""
    if name is None:
        pattern = run.pattern
        rate = f"{pattern.request_rate}qps"
        if pattern.ramp_up_strategy is not None:
            start, end = pattern.ramp_up_start_rps, pattern.ramp_up_end_rps
            rate = f"ramp-up-{pattern.ramp_up_strategy}-{start:g}qps-{end:g}qps"
        limit = "" if run.max_concurrency is None else f"-concurrency{run.max_concurrency}"
        model = run.model_id.rstrip("/").split("/")[-1]
        name = f"{run.label or run.backend}-{rate}{limit}-{model}-{run.date:%Y%m%d-%H%M%S}.json"
    return Path(directory or ".") / name


def save_result(path: Path, result: dict[str, Any], *, append: bool) -> None:
    """Write the result as one line of JSON, behind what the file holds if `append`; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a" if append else "w", encoding="utf-8") as file:
        # Other files written this way may lack their last line's end.
        if append and file.tell() and not _ends_line(path):
            file.write("\n")
        file.write(json.dumps(result) + "\n")


def _ends_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def error_lines(results: Sequence[RequestResult]) -> list[str]:
    """The errors of failed requests, the commonest first, each with how often it came."""
    errors = Counter(result.error for result in results if not result.success)
    return [f"{times} x {error}" for error, times in errors.most_common(_MOST_ERRORS)]
