"""How long each phase of a start took and how many bytes it was about: timed in both processes, told in one table."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from ..kvcache.budget import format_bytes
from .logs import logs_json

logger = logging.getLogger(__name__)


class Phase(msgspec.Struct, frozen=True):
    """One phase of a start; `num_bytes` is what was read or allocated, where that says something."""

    name: str
    seconds: float
    num_bytes: int | None = None


class PhaseTimer:
    """Phases one after another without a gap: each begins where the one before has ended."""

    def __init__(self, elapsed: float = 0.0) -> None:
        """The first phase began `elapsed` seconds ago."""
        self.phases: list[Phase] = []
        self._begun = time.monotonic() - elapsed

    def done(self, name: str, num_bytes: int | None = None) -> None:
        """The phase `name` ends here."""
        now = time.monotonic()
        self.phases.append(Phase(name, now - self._begun, num_bytes))
        self._begun = now


def process_age() -> float:
    """Seconds since this process was started (proc_pid_stat(5)), to the kernel's clock tick of 10 ms."""
    with open("/proc/self/stat") as file:
        fields = file.read().rsplit(")", 1)[1].split()  # the name before it may hold anything
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)


def phase_table(processes: Sequence[tuple[str, Sequence[Phase]]]) -> str:
    """The phases of each process, which start side by side, one line each."""
    rows = [
        (
            process,
            phase.name,
            f"{phase.seconds:.2f} s",
            "" if phase.num_bytes is None else format_bytes(phase.num_bytes),
        )
        for process, phases in processes
        for phase in phases
    ]
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(4)]
    return "\n".join(
        f"{process:<{widths[0]}}  {name:<{widths[1]}}  {seconds:>{widths[2]}}  {size:>{widths[3]}}".rstrip()
        for process, name, seconds, size in rows
    )


def phase_records(processes: Sequence[tuple[str, Sequence[Phase]]]) -> list[dict[str, Any]]:
    """The same for a JSON log."""
    return [
        {"process": process, "phase": phase.name, "seconds": round(phase.seconds, 3), "bytes": phase.num_bytes}
        for process, phases in processes
        for phase in phases
    ]


def log_start(processes: Sequence[tuple[str, Sequence[Phase]]]) -> None:
    """Tell of a start, the first process being the one that its user waited for: as a table, or where logs are JSON, as
    records."""
    title = f"started in {sum(phase.seconds for phase in processes[0][1]):.2f} s"
    text = title if logs_json() else f"{title}:\n{phase_table(processes)}"
    logger.info(text, extra={"data": {"phases": phase_records(processes)}})
