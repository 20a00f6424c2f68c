"""The table of a comparison: medians and extremes, ratios within rounds, shares of the bound."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bounds import Rates, Shape, bound
from workloads import WORKLOADS

OURS = "omni-engine"


@dataclass(frozen=True)
class Spread:
    """Of some samples."""

    median: float
    least: float
    greatest: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values), len(values))

    def text(self, digits: int) -> str:
        return f"{self.median:.{digits}f} ({self.least:.{digits}f} to {self.greatest:.{digits}f})"


def speed_ratios(ours: Mapping[str, float], theirs: Mapping[str, float], lower_is_better: bool) -> list[float]:
    """How many times as fast ours is, round by round; rounds that only one of both has are left out."""
    shared = [name for name in ours if name in theirs]
    return [theirs[name] / ours[name] if lower_is_better else ours[name] / theirs[name] for name in shared]


def share_of_bound(value: float, least: float, lower_is_better: bool) -> float:
    """1 at the bound, less above it."""
    return least / value if lower_is_better else value / least


def measured_rates(records: Iterable[Mapping[str, Any]]) -> Rates | None:
    """The best of what the runs measured: what else ran on the machine can only make a rate too low."""
    found = [record["rates"] for record in records if "rates" in record]
    if not found:
        return None
    return Rates(*(max(rates[key] for rates in found) for key in ("bytes_per_second", "flops_per_second")))


def markdown(
    records: Sequence[Mapping[str, Any]], configs: Mapping[str, Mapping[str, Any]], work: Sequence[str], given: Rates
) -> str:
    """A row per model, workload and engine. Ratios are how many times as fast omni-engine is; above 1 it is ahead."""
    own_rates = measured_rates(records)
    values: dict[tuple[str, str, str], dict[str, float]] = {}
    versions: dict[str, str] = {}
    foreign = 0.0
    for record in records:
        if "value" in record:
            key = (record["model"], record["workload"], record["engine"])
            values.setdefault(key, {})[record["round"]] = record["value"]
            versions[record["engine"]] = record["version"]
            foreign = max(foreign, record["foreign"])
    lines = [", ".join(f"{name} {version}" for name, version in sorted(versions.items()))]
    if own_rates is not None:
        lines.append(
            f"bound A: {given.bytes_per_second / 1e9:.0f} GB/s, {given.flops_per_second / 1e9:.0f} GFLOP/s; bound B, "
            f"measured in these runs: {own_rates.bytes_per_second / 1e9:.1f} GB/s, "
            f"{own_rates.flops_per_second / 1e9:.0f} GFLOP/s. Most that other processes took: {foreign:.1%}"
        )
    lines += ["", "| model | work | engine | median (extremes) | n | ours is faster by | % of A | % of B |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for model, config in configs.items():
        shape = Shape.of(config)
        for name in work:
            workload = WORKLOADS[name]
            digits = 1 if workload.metric != "tpot_ms" else 2
            ours = values.get((model, name, OURS), {})
            engines = [engine for engine in versions if engine != OURS]
            for engine in (OURS, *engines):
                theirs = values.get((model, name, engine))
                if not theirs:
                    lines.append(f"| {model} | {name} | {engine} | not run | | | | |")
                    continue
                spread = Spread.of(list(theirs.values()))
                ratios = speed_ratios(ours, theirs, workload.lower_is_better) if engine != OURS else []
                ratio = Spread.of(ratios).text(2) if ratios else ""
                shares = [
                    f"{share_of_bound(spread.median, bound(shape, workload, rates), workload.lower_is_better):.0%}"
                    for rates in (given, own_rates or given)
                ]
                lines.append(
                    f"| {model} | {name} | {engine} | {spread.text(digits)} | {spread.count} | {ratio} | "
                    f"{shares[0]} | {shares[1] if own_rates else ''} |"
                )
    lines += ["", *(f"{name}: {WORKLOADS[name].summary}, {WORKLOADS[name].metric}" for name in work)]
    return "\n".join(lines)
