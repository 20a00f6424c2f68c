"""The doctor of an NPU: checks in processes of their own, so that a crash or a hang costs one check and not the rest.

Torch-free: what is checked is in `npu_doctor_worker`, and a machine where torch cannot be imported gets a report too.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

DEVICE_GROUP = "device"
# In this order: what a group needs is checked before it.
GROUPS = (
    DEVICE_GROUP, "norms and rotation", "cache writes", "attention", "sparse attention", "products and experts", "int8",
    "one layer", "one gear",
)  # fmt: skip
WRONG = ("fail", "crash", "timeout")
START = "start of the group"
LAST_WORDS = 3  # lines of a process's output that stand in its finding


@dataclass(frozen=True)
class Finding:
    """A check and what came of it. `status`: pass | fail | crash | timeout; ran: on the simulated device, where nothing
    is computed; not run."""

    group: str
    name: str
    status: str
    detail: str
    seconds: float


@dataclass
class Report:
    """Findings in order, and what TorchAir asked of the installed CANN: (operator, optional inputs and attributes) with
    CANN's refusal, or "" for yes."""

    is_simulated: bool
    findings: list[Finding] = field(default_factory=list)
    questions: dict[tuple[str, str], str] = field(default_factory=dict)

    def note(self, question: dict[str, Any]) -> None:
        self.questions[question["operator"], ", ".join(question["optional"])] = question["refusal"]

    @property
    def is_wrong(self) -> bool:
        return any(finding.status in WRONG for finding in self.findings)


def examine(
    groups: Iterable[str],
    *,
    is_simulated: bool,
    timeout: float,
    on_finding: Callable[[Finding], None] = lambda finding: None,
    worker: Sequence[str] = (sys.executable, "-m", f"{__package__}.doctor_worker"),
) -> Report:
    """Runs these groups of checks, each check for at most `timeout` seconds. Where torch-npu cannot be imported, or
    there is no device, what comes after is not run."""
    report = Report(is_simulated)

    def found(finding: Finding) -> None:
        report.findings.append(finding)
        on_finding(finding)

    missing = ""
    for group in groups:
        if missing:
            found(Finding(group, START, "not run", missing, 0.0))
            continue
        for finding in _examine_group(group, report, timeout, worker):
            found(finding)
            if finding.status in WRONG and (group, finding.name) in _NEEDED:
                missing = f"{finding.name}: {finding.status}"
                break
    return report


# Without these nothing behind them can be right.
_NEEDED = tuple((DEVICE_GROUP, name) for name in (START, "import torch and torch-npu", "devices"))


def _examine_group(group: str, report: Report, timeout: float, worker: Sequence[str]) -> Iterator[Finding]:
    """One process after another, each from the check on at which the last one stopped."""
    first, names = 0, []
    while first == 0 or first < len(names):
        begun_with, current = first, -1
        with _Process([*worker, group, str(first), "simulated" if report.is_simulated else "npu"]) as process:
            began = time.monotonic()
            while (message := process.next(began + timeout)) is not None:
                if "question" in message:
                    report.note(message["question"])
                elif "start" in message:
                    yield Finding(group, START, "fail", message["start"], time.monotonic() - began)
                    return
                elif "checks" in message:
                    names = message["checks"]
                elif "begin" in message:
                    began, current = time.monotonic(), message["begin"]
                elif "end" in message:
                    seconds = time.monotonic() - began
                    yield Finding(group, names[current], message["status"], message["detail"], seconds)
                    began, first, current = time.monotonic(), current + 1, -1
            seconds = time.monotonic() - began
            status, detail = process.end()
        if current >= 0:
            yield Finding(group, names[current], status, detail, seconds)
            first = current + 1
        elif first == begun_with:  # it does not come as far as a check
            yield Finding(group, START, status, detail, seconds)
            for name in names[first:]:
                yield Finding(group, name, "not run", f"{START}: {status}", 0.0)
            return


class _Process:
    """A worker, the pipe it tells on, and the file that has its output. Ends the process with its whole session."""

    def __init__(self, command: Sequence[str]) -> None:
        self._read, write = os.pipe()
        self._output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the process
        self._buffer = b""
        self._timed_out = False
        try:
            *program, group, first, device = command
            self._process = subprocess.Popen(
                [*program, str(write), group, first, device],
                pass_fds=(write,),
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError:
            os.close(self._read)
            raise
        finally:
            os.close(write)

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *error: object) -> None:
        self._kill()
        os.close(self._read)
        self._output.close()

    def next(self, deadline: float) -> dict[str, Any] | None:
        """What it tells next; None once it has ended, or at the deadline."""
        while b"\n" not in self._buffer:
            if not select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))[0]:
                self._timed_out = True
                return None
            data = os.read(self._read, 65536)
            if not data:
                return None
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        return json.loads(line)

    def end(self) -> tuple[str, str]:
        """How it ended, `crash` | `timeout`, and its last words. One that leaves a check unfinished has crashed,
        whatever its exit status."""
        if self._timed_out:
            self._kill()
            return "timeout", self._last_words()
        try:
            code = self._process.wait(30)
        except subprocess.TimeoutExpired:  # it has closed its pipe and does not go
            self._kill()
            return "timeout", self._last_words()
        how = f"exit status {code}"
        if code < 0:
            with contextlib.suppress(ValueError):
                how = signal.Signals(-code).name
        return "crash", f"{how}. {self._last_words()}".rstrip(". ")

    def _kill(self) -> None:
        """The process and those it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _last_words(self) -> str:
        size = self._output.seek(0, os.SEEK_END)
        self._output.seek(max(0, size - 4000))
        lines = [" ".join(line.split()) for line in self._output.read().decode(errors="replace").splitlines()]
        return " / ".join([line for line in lines if line][-LAST_WORDS:])
