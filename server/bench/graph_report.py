"""What `bench graph` shows of the times it took: JSON data, tables, and a plot with the floor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...engine.floor import Floor, StepCost
from ...engine.graphs.decode_loop import StepTimes
from .plot import Line, line_plot

_HOST_ROWS = {
    "schedule": "schedule", "step_input": "StepInput", "launch": "launch", "device": "device",
    "step_output": "StepOutput", "update": "update",
}  # fmt: skip


@dataclass(frozen=True)
class GearTimes:
    """The timed steps of one batch size. Without a graph `graph` is empty, and the engine's steps are eager."""

    eager: Sequence[StepTimes]
    graph: Sequence[StepTimes]
    engine_seconds: float  # per step, with the next one launched before the last one is read
    compiling: Sequence[StepTimes] = ()  # eager steps while graphs were being compiled
    num_drafts: int = 0  # that each step verifies for a request, and drafts
    tokens_per_step: float = 1.0  # that a timed step brought a request on average


def sum_reports(reports: Sequence[Any]) -> Any:
    """The `CaptureReport` of a step that is one graph, or two."""
    first, *rest = reports
    for report in rest:
        first = replace(
            first,
            from_cache=first.from_cache and report.from_cache,
            compile_seconds=first.compile_seconds + report.compile_seconds,
            seconds=max(first.seconds, report.seconds),  # both counted from the same start
            num_bytes=first.num_bytes + report.num_bytes,
        )
    return first


def graph_result(
    num_requests: int, report: Any | None, times: GearTimes, cost: StepCost, floor: Floor
) -> dict[str, Any]:
    """JSON data of one batch size; `report` is its graph's `CaptureReport`. Rates and shares are of the graph's steps,
    eager ones where there is none; shares are 1 at the floor."""
    steps = times.graph or times.eager
    seconds = float(np.median([step.total for step in steps]))
    replay = float(np.median([step.replay for step in steps]))
    host = {name: float(np.median([getattr(step, name) for step in steps])) * 1e6 for name in _HOST_ROWS}
    speculation: dict[str, Any] = {}
    if times.num_drafts:
        brought = times.tokens_per_step
        speculation = {
            "tokens_per_step": brought,
            "ms_per_token": seconds / brought * 1e3,
            "host_us_per_token": {name: value / brought for name, value in host.items()},
        }
    return {
        "batch_size": num_requests,
        **speculation,
        "graph": None if report is None else {
            "from_cache": report.from_cache,
            "compile_seconds": report.compile_seconds,
            "ready_seconds": report.seconds,
            "artefact_bytes": report.num_bytes,
        },
        "eager_ms": _spread(times.eager),
        "graph_ms": _spread(times.graph) if times.graph else None,
        "eager_while_compiling_ms": _spread(times.compiling) if times.compiling else None,
        "replay_ms": replay * 1e3,
        "engine_ms": times.engine_seconds * 1e3,
        "host_us": host,
        "weight_bytes": cost.weight_bytes,
        "kv_bytes": cost.kv_bytes,
        "other_bytes": cost.other_bytes,
        "flops": cost.flops,
        "gb_per_second": cost.bytes / seconds / 1e9,
        "gflop_per_second": cost.flops / seconds / 1e9,
        "floor_ms": floor.seconds * 1e3,
        "floor_bound": floor.bound,
        "share_of_floor": floor.share(seconds),
        "replay_share_of_floor": floor.share(replay),
        "engine_share_of_floor": floor.share(times.engine_seconds),
        "tokens_per_second": num_requests * times.tokens_per_step / times.engine_seconds,
    }  # fmt: skip


def _spread(steps: Sequence[StepTimes]) -> dict[str, float]:
    """Of whole steps, in milliseconds, and how many they are."""
    names = {"median": 50, "p10": 10, "p90": 90, "p99": 99, "max": 100}
    values = np.percentile([step.total for step in steps], list(names.values())) * 1e3
    return {**{name: float(value) for name, value in zip(names, values, strict=True)}, "num_steps": len(steps)}


def graph_tables(result: dict[str, Any]) -> str:
    """The whole result as text."""
    machine, rows = result["machine"], result["results"]
    threads = f", {machine['num_threads']} threads" if machine["num_threads"] else ""
    lines = [
        f"Model: {result['model_id']}, {result['num_layers']} layers, {result['dtype']}",
        f"Graphs: {result['backend']}, sampler {result['sampler']}; {result['context_len']} tokens stored before the "
        f"first of {result['num_steps']} steps of each kind, eager and graph in turn",
        *_speculation_line(result),
        f"Machine: {machine['device']}{threads}: reads {machine['bytes_per_second'] / 1e9:.1f} GB/s, "
        f"multiplies {machine['flops_per_second'] / 1e9:,.0f} GFLOP/s ({machine['dtype']}), measured now",
        "",
        *table_lines([_step_row(row) for row in rows]),
        "",
        *table_lines([_cost_row(row) for row in rows]),
        "",
        "Microseconds per step, medians; on a CPU the launch is the computation"
        + (", and StepInput includes choosing the tokens" if result["sampler"] == "split" else ""),
        *table_lines([{"batch": str(row["batch_size"])} | _host_row(row["host_us"]) for row in rows]),
    ]
    if "num_drafts" in result:
        lines += ["", "The same for each token that a step brought a request"]
        lines += table_lines([{"batch": str(row["batch_size"])} | _host_row(row["host_us_per_token"]) for row in rows])
    lines += ["", _compiling_line(result), *table_lines([_compiling_row(row) for row in rows])]
    if any(row["graph"] for row in rows):
        lines += ["", *table_lines([_graph_row(row) for row in rows if row["graph"]])]
    return "\n".join(lines)


def _speculation_line(result: dict[str, Any]) -> list[str]:
    if "num_drafts" not in result:
        return []
    count = result["num_drafts"]
    return [
        f"Speculation: {result['method']}; each step computes {1 + count} tokens of a request, {count} of them drafts, "
        f"and drafts {count} more, which the floor counts too"
    ]


def _step_row(row: dict[str, Any]) -> dict[str, str]:
    def spread(times: dict[str, float] | None) -> str:
        return "-" if times is None else f"{times['median']:.3f} ({times['p10']:.3f}..{times['p90']:.3f})"

    cells = {
        "batch": str(row["batch_size"]),
        "eager ms (p10..p90)": spread(row["eager_ms"]),
        "graph ms (p10..p90)": spread(row["graph_ms"]),
        "replay ms": f"{row['replay_ms']:.3f}",
        "floor ms": f"{row['floor_ms']:.3f} {row['floor_bound']}",
        "% of floor": f"{100 * row['share_of_floor']:.1f}",
        "replay %": f"{100 * row['replay_share_of_floor']:.1f}",
        "engine ms": f"{row['engine_ms']:.3f}",
        "tokens/s": f"{row['tokens_per_second']:,.1f}",
    }
    if "tokens_per_step" in row:
        cells["tokens/step"] = f"{row['tokens_per_step']:.2f}"
        cells["ms/token"] = f"{row['ms_per_token']:.3f}"
    return cells


def _cost_row(row: dict[str, Any]) -> dict[str, str]:
    return {
        "batch": str(row["batch_size"]),
        "weights MB": f"{row['weight_bytes'] / 1e6:,.1f}",
        "KV MB": f"{row['kv_bytes'] / 1e6:,.2f}",
        "MFLOP": f"{row['flops'] / 1e6:,.1f}",
        "GB/s": f"{row['gb_per_second']:,.1f}",
        "GFLOP/s": f"{row['gflop_per_second']:,.1f}",
    }


def _host_row(microseconds: dict[str, float]) -> dict[str, str]:
    return {label: f"{microseconds[name]:,.1f}" for name, label in _HOST_ROWS.items()}


def _compiling_line(result: dict[str, Any]) -> str:
    rows = result["results"]
    if any(row["eager_while_compiling_ms"] for row in rows):
        return "Eager steps, alone, and while a process of the lowest priority compiled the missing graphs"
    graphs = [row["graph"] for row in rows if row["graph"]]
    if result["backend"] != "inductor":
        reason = f"in the background nothing is compiled for these graphs: {result['backend']}"
    elif all(graph["from_cache"] for graph in graphs):
        reason = "nothing had to be compiled, all graphs were in the cache (--cold compiles them anew)"
    else:
        reason = "the graphs were there before the first step could be made"
    return f"Eager steps, alone; none while compiling: {reason if graphs else 'there are no graphs'}"


def _compiling_row(row: dict[str, Any]) -> dict[str, str]:
    cells = {"batch": str(row["batch_size"])}
    for when, times in (("alone", row["eager_ms"]), ("compiling", row["eager_while_compiling_ms"])):
        cells[f"steps {when}"] = "-" if times is None else str(times["num_steps"])
        for name in ("median", "p99", "max"):
            cells[f"{name} ms {when}"] = "-" if times is None else f"{times[name]:.3f}"
    return cells


def _graph_row(row: dict[str, Any]) -> dict[str, str]:
    graph = row["graph"]
    cold = f"{graph['compile_seconds']:.1f}" if graph["compile_seconds"] else "-"
    if graph["from_cache"]:
        cold += " (manifest)" if graph["compile_seconds"] else " (in the cache)"
    return {
        "batch": str(row["batch_size"]),
        "cold s": cold,
        "load or capture s": f"{graph['ready_seconds']:.2f}",
        "on disk MB": f"{graph['artefact_bytes'] / 1e6:.1f}",
    }


def table_lines(rows: Sequence[dict[str, str]]) -> list[str]:
    """Lines of a table whose columns are as wide as they must be; all rows have the same keys."""
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    head = "  ".join(name.rjust(width) for name, width in widths.items())
    return [head, "-" * len(head), *("  ".join(row[name].rjust(widths[name]) for name in widths) for row in rows)]


def graph_plot(result: dict[str, Any]) -> str:
    """The time per step over the batch size, as SVG."""
    rows = result["results"]
    lines = [Line("eager", [(row["batch_size"], row["eager_ms"]["median"]) for row in rows])]
    graphs = [(row["batch_size"], row["graph_ms"]["median"]) for row in rows if row["graph_ms"]]
    if graphs:
        lines.append(Line(f"graph ({result['backend']})", graphs))
    lines.append(Line("floor", [(row["batch_size"], row["floor_ms"]) for row in rows], is_bound=True))
    name = result["model_id"].rstrip("/").split("/")[-1]
    title = f"{name}, {result['num_layers']} layers, {result['dtype']}, {result['context_len']} tokens stored"
    return line_plot(title, "requests per step", "ms per step", lines)
