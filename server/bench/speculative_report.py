"""What `bench speculative` makes of the runs it took: figures by engine as JSON data, and tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...scheduler.draft_stats import DraftStats
from .acceptance import acceptance_fields
from .batch_run import BatchRun
from .graph_report import table_lines

SYNTHETIC = "SYNTHETIC"


@dataclass
class EngineRuns:
    """One engine's timed rounds at one batch size."""

    name: str
    depths: tuple[int, ...]  # that its steps may have; (0,): without speculation
    runs: list[BatchRun] = field(default_factory=list)
    drafts: DraftStats | None = None  # of all rounds
    num_replayed: dict[int, int] = field(default_factory=dict)  # steps by graph, by depth
    num_eager: int = 0  # steps that decode and found no graph


def engine_figures(own: EngineRuns, plain: EngineRuns, *, is_synthetic: bool) -> dict[str, Any]:
    """JSON data of one engine; `plain` is the one without speculation, in the same rounds. Rates are tokens per
    second; ratios are taken round by round."""
    pairs = list(zip(own.runs, plain.runs, strict=True))
    ratios = [ours.full_rate / theirs.full_rate for ours, theirs in pairs]
    whole_ratios = [ours.rate / theirs.rate for ours, theirs in pairs]
    texts = [pair for ours, theirs in pairs for pair in zip(ours.token_ids, theirs.token_ids, strict=True)]
    speculates = own.depths != (0,)
    return {
        "name": f"{own.name} {SYNTHETIC}" if is_synthetic and speculates else own.name,
        "depths": list(own.depths),
        "tokens_per_second": float(np.median([run.full_rate for run in own.runs])),
        "ratio": _spread(ratios),
        "whole_tokens_per_second": float(np.median([run.rate for run in own.runs])),
        "whole_ratio": _spread(whole_ratios),
        "rounds": {
            "tokens_per_second": [run.full_rate for run in own.runs],
            "whole_tokens_per_second": [run.rate for run in own.runs],
            "ratio": ratios,
            "whole_ratio": whole_ratios,
        },
        **acceptance_fields(own.drafts),
        "steps_by_graph": sum(own.num_replayed.values()),
        "steps_by_graph_and_depth": {str(depth): count for depth, count in sorted(own.num_replayed.items())},
        "steps_eager": own.num_eager,
        # Tokens of drafts that were accepted by lot mean nothing.
        "same_tokens": None
        if is_synthetic and speculates
        else float(np.mean([ours == plain for ours, plain in texts])),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": float(np.median(values)), "min": min(values), "max": max(values)}


def speculative_tables(result: dict[str, Any]) -> str:
    """The whole result as text."""
    threads = f", {result['num_threads']} threads" if result["num_threads"] else ""
    lines = [
        f"Model: {result['model_id']}, {result['dtype']} on {result['device']}{threads}; graphs: {result['backend']}",
        f"Drafts: {result['method']}. Prompts: {result['input_len']} tokens, {result['dataset']}; "
        f"{result['output_len']} tokens generated",
        f"{result['rounds']} rounds after {result['warmup']} of warm-up, each with the same prompts for all engines, "
        "in an order that rotates",
        "tokens/s: of the full batch, medians; ratio: to none, by rounds, median (min..max); whole: prompts and the "
        "batch's running empty included",
    ]
    rates = result["synthetic_acceptance"]
    if rates:
        shares = ", ".join(f"{rate:g}" for rate in rates)
        lines.insert(0, f"{SYNTHETIC}: drafts are accepted by lot, {shares} of them by place; the tokens mean nothing")
    for group in result["results"]:
        mark = f" {SYNTHETIC}" if rates else ""
        lines += ["", f"Batch size {group['batch_size']}, temperature {group['temperature']:g}{mark}"]
        lines += table_lines([_row(engine) for engine in group["engines"]])
    num_eager = sum(engine["steps_eager"] for group in result["results"] for engine in group["engines"])
    if num_eager:
        lines += ["", f"{num_eager} steps ran eager, for want of a graph: the figures are not those of compiled steps"]
    return "\n".join(lines)


def _row(engine: dict[str, Any]) -> dict[str, str]:
    has_drafts = "spec_decode_num_drafts" in engine
    per_position = engine.get("spec_decode_per_position_acceptance_rates", [])
    same = engine["same_tokens"]
    graphs = engine["steps_by_graph_and_depth"]
    by_depth = ", ".join(f"{count} of {depth}" for depth, count in graphs.items())
    return {
        "engine": engine["name"],
        "tokens/s": f"{engine['tokens_per_second']:,.1f}",
        "ratio": _ratio(engine["ratio"]),
        "whole": _ratio(engine["whole_ratio"]),
        "length": f"{engine['spec_decode_acceptance_length']:.2f}" if has_drafts else "-",
        "accepted %": f"{engine['spec_decode_acceptance_rate']:.1f}" if has_drafts else "-",
        "by position %": " ".join(f"{100 * rate:.1f}" for rate in per_position) or "-",
        "steps by graph (of depth)": by_depth or "0",
        "eager": str(engine["steps_eager"]),
        "same tokens %": "-" if same is None else f"{100 * same:.1f}",
    }


def _ratio(spread: dict[str, float]) -> str:
    return f"{spread['median']:.2f} ({spread['min']:.2f}..{spread['max']:.2f})"
