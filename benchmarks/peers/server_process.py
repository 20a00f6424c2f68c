"""A server in a process of its own: its start, its first token, what it takes, and its end."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from compare import own_seconds

READY_SECONDS, POLL_SECONDS = 300.0, 0.02
_ADOPT_ORPHANS = 36  # PR_SET_CHILD_SUBREAPER
PROMPT = list(range(100, 132))


def descendants(pid: int) -> list[int]:
    """The process and all that it started and that live."""
    found = [pid]
    for one in found:
        try:
            for task in Path(f"/proc/{one}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
        except OSError:
            continue
    return found


def memory_mb(pid: int) -> float:
    """Proportional set size of the process and its descendants."""
    total = 0
    for one in descendants(pid):
        try:
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1024


def model_name(url: str) -> str:
    """Of the model that the server has."""
    with urllib.request.urlopen(f"{url}/models", timeout=5) as response:
        return json.load(response)["data"][0]["id"]


def first_token(url: str, alive: subprocess.Popen[bytes]) -> None:
    """Returns when the server has answered with a token; raises RuntimeError if it ends or takes too long."""
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if alive.poll() is not None:
            raise RuntimeError(f"the server ended with status {alive.returncode}; see its log")
        try:
            body = {"model": model_name(url), "prompt": PROMPT, "max_tokens": 1, "temperature": 0, "ignore_eos": True}
            request = urllib.request.Request(
                f"{url}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=120) as response:
                json.load(response)
            return
        except (urllib.error.URLError, OSError, KeyError, IndexError):
            time.sleep(POLL_SECONDS)
    raise RuntimeError(f"no token within {READY_SECONDS:.0f} s")


@contextmanager
def running(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The server, ended with all of its processes, also those that have left its group or have outlived it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_ADOPT_ORPHANS, 1)
    others = set(descendants(os.getpid()))
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=file, stderr=file, start_new_session=True
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pid in [pid for pid in descendants(os.getpid()) if pid not in others]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with suppress(ChildProcessError):  # the child of another one that is being ended
                os.waitpid(pid, 0)


def tree_seconds(pid: int) -> float:
    """Processor time so far of the process and its descendants."""
    total = 0.0
    for one in descendants(pid):
        with suppress(OSError):
            total += own_seconds(one)
    return total
