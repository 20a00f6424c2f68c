"""`omni-engine doctor --npu`: what a machine with NPUs has, and whether each op computes there what it should."""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..engine.npu.doctor import GROUPS, Finding, Report, examine
from ..engine.npu.machine import Fact, machine_facts
from .arguments import CommandParser
from .graph_commands import format_table

_MEANING = (
    "Check an NPU from the bottom up: the machine, the device, each operator against its reference on the host, alone "
    "and in a graph, then one layer and one gear of small models. Each group of checks runs in a process of its own."
)
_NOT_HERE = ("npu_moe_distribute_dispatch_v2", "npu_moe_distribute_combine_v2")
_NOT_HERE_REASON = "takes two ranks, and this command runs on one device"
_SECONDS = 300.0


def run_doctor(words: Sequence[str]) -> int:
    """The exit status: 0 if nothing is wrong, 1 if something is."""
    parser = CommandParser("doctor", "", _MEANING)
    add = parser.add_argument
    add("--npu", action="store_true", required=True, help="the device to check")
    add(
        "--simulated",
        action="store_true",
        help="a simulated device instead: shows that the calls are taken, and nothing of what they compute",
    )
    add("--only", metavar="TEXT", help="only the groups with this in their name: " + ", ".join(GROUPS))
    add("--timeout", metavar="SECONDS", type=_seconds, default=_SECONDS, help=f"for one check ({_SECONDS:.0f})")
    add("--json", action="store_true", help="print JSON")
    arguments = parser.parse(words)
    groups = [group for group in GROUPS if arguments.only is None or arguments.only.lower() in group]
    if not groups:
        parser.error(f"--only must be part of one of {', '.join(GROUPS)}: {arguments.only}")
    facts = machine_facts(arguments.simulated)
    if not arguments.json:
        _show_facts(facts)
    report = examine(
        groups,
        is_simulated=arguments.simulated,
        timeout=arguments.timeout,
        on_finding=(lambda finding: None) if arguments.json else _show_finding,
    )
    if arguments.only is None:
        for name in _NOT_HERE:
            report.findings.append(Finding("expert parallelism", name, "not run", _NOT_HERE_REASON, 0.0))
    is_wrong = report.is_wrong or any(fact.problem for fact in facts)
    if arguments.json:
        print(json.dumps(_record(facts, report), indent=2))
    else:
        _show(report)
    return 1 if is_wrong else 0


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0: {text}")
    return value


def _tier(report: Report) -> str:
    if report.is_simulated:
        return (
            'Simulated device: nothing was computed, and CANN was not asked. "ran" says that torch-npu and TorchAir '
            "took the call, and nothing about its result."
        )
    if not any(finding.status == "pass" for finding in report.findings):
        return "Nothing has been shown to work on hardware."
    return 'Run on hardware: "pass" is a result within the bound that stands beside it.'


def _counts(report: Report) -> dict[str, int]:
    return dict(Counter(finding.status for finding in report.findings))


def _record(facts: Sequence[Fact], report: Report) -> dict[str, Any]:
    return {
        "simulated": report.is_simulated,
        "tier": _tier(report),
        "machine": [asdict(fact) for fact in facts],
        "checks": [{**asdict(finding), "seconds": round(finding.seconds, 3)} for finding in report.findings],
        "cann_questions": [
            {"operator": operator, "optional": optional, "answer": _answer(report, refusal)}
            for (operator, optional), refusal in sorted(report.questions.items())
        ],
        "counts": _counts(report),
    }


def _answer(report: Report, refusal: str) -> str:
    return "not asked: simulated" if report.is_simulated else refusal or "yes"


def _show_facts(facts: Sequence[Fact]) -> None:
    print(format_table(("machine", "", "wrong"), [(fact.name, fact.value, fact.problem) for fact in facts]))
    print()


def _show_finding(finding: Finding) -> None:
    """A line as it comes: the last one that a machine shows before it hangs is worth something."""
    status = "ran, nothing computed" if finding.status == "ran" else finding.status
    print(f"{status:<22}{finding.seconds:6.1f} s  {finding.group}: {finding.name}", flush=True)
    if finding.detail:
        print(f"{'':<32}{finding.detail}", flush=True)


def _show(report: Report) -> None:
    for finding in report.findings:
        if finding.detail == _NOT_HERE_REASON:
            _show_finding(finding)
    print()
    if report.questions:
        rows = [
            (operator, optional or "(the operator)", _answer(report, refusal))
            for (operator, optional), refusal in sorted(report.questions.items())
        ]
        print(format_table(("CANN is asked for", "optional inputs and attributes", "answer"), rows))
        print()
    print(", ".join(f"{count} {status}" for status, count in _counts(report).items()))
    print(_tier(report))
