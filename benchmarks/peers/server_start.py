"""W6: from the start of a server's process to the first token, to full speed, and the memory that takes."""

from __future__ import annotations

import json
import subprocess
import threading
import time
import urllib.request
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from report import Spread
from server_process import PROMPT, first_token, memory_mb, model_name, running

STREAMS, STREAM_TOKENS, WATCHED_SECONDS = 8, 256, 24.0
FULL_SPEED = 0.9  # of what comes at the end


@dataclass(frozen=True)
class Start:
    """Seconds to the first token and, if it was watched, to full speed, and the peak of memory in MB until the first
    token."""

    first_token: float
    full_speed: float | None
    peak_mb: float


def time_start(
    command: Sequence[str], environment: Mapping[str, str], url: str, log: Path, watched: bool
) -> tuple[float, float | None]:
    """Seconds from the start of the process to its first token and, if it is watched, to full speed."""
    begin = time.perf_counter()
    with running(command, environment, log) as process:
        first_token(url, process)
        first = time.perf_counter() - begin
        return first, full_speed_after(watch_tokens(url, begin, first + WATCHED_SECONDS)) if watched else None


def watch_tokens(url: str, begin: float, until: float) -> list[float]:
    """When something came of STREAMS requests at once, one after another in each place, in seconds since `begin`."""
    body = {"model": model_name(url), "prompt": PROMPT, "max_tokens": STREAM_TOKENS, "temperature": 0}
    body |= {"ignore_eos": True, "stream": True}
    request = urllib.request.Request(
        f"{url}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    times: list[float] = []
    errors: list[Exception] = []

    def ask() -> None:
        try:
            while time.perf_counter() - begin < until:
                with urllib.request.urlopen(request, timeout=120) as response:
                    for line in response:
                        now = time.perf_counter() - begin
                        if now >= until:
                            return
                        if line.startswith(b'data: {"error"'):
                            raise RuntimeError(line.decode().strip())
                        if line.startswith(b"data: {"):
                            times.append(now)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(STREAMS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise RuntimeError(f"a stream failed: {errors[0]}")
    return sorted(times)


def full_speed_after(times: Sequence[float]) -> float:
    """When the first second began in which as much came as FULL_SPEED of the rate in the last third of `times`, which
    are in order. Raises RuntimeError if they are too few or too uneven to tell."""
    if times and times[-1] - times[0] > 1.0:
        begin = times[0] + (times[-1] - times[0]) * 2 / 3
        wanted = FULL_SPEED * (len(times) - bisect_left(times, begin)) / (times[-1] - begin)
        for index, time_of_token in enumerate(times):
            if bisect_left(times, time_of_token + 1.0) - index >= wanted:
                return time_of_token
    raise RuntimeError(f"no steady speed in what came of the streams: {len(times)} pieces")


def peak_of_start(command: Sequence[str], environment: Mapping[str, str], url: str, log: Path) -> float:
    """The peak of its memory in MB until the first token."""
    peak, stopped = [0.0], threading.Event()
    with running(command, environment, log) as process:

        def watch() -> None:
            while not stopped.wait(0.25):
                peak[0] = max(peak[0], memory_mb(process.pid))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            first_token(url, process)
        finally:
            stopped.set()
            watcher.join()
        return max(peak[0], memory_mb(process.pid))


def measure_start(
    command: Sequence[str], environment: Mapping[str, str], url: str, log: Path, watched: bool = True
) -> Start:
    """Of one server. Raises RuntimeError if it ends or answers nothing."""
    first, full_speed = time_start(command, environment, url, log, watched)
    peak = peak_of_start(command, environment, url, log)  # another one, which looking at it may slow down
    return Start(first, full_speed, peak)


def time_of_import(python: str) -> float:
    """Seconds that a Python takes to import torch."""
    begin = time.perf_counter()
    subprocess.run([python, "-c", "import torch"], check=True)
    return time.perf_counter() - begin


def start_table(starts: Mapping[str, Sequence[Start]], imports: Sequence[float]) -> str:
    """Medians and extremes."""
    lines = [
        f"| W6 | start to first token, s | start to {FULL_SPEED:.0%} of the speed of {STREAMS} streams, s | "
        "peak memory, MB |",
        "|---|---|---|---|",
    ]
    for name, taken in starts.items():
        if taken:
            first = Spread.of([each.first_token for each in taken]).text(2)
            watched = [each.full_speed for each in taken if each.full_speed is not None]
            full = Spread.of(watched).text(2) if watched else ""
            lines.append(f"| {name} | {first} | {full} | {Spread.of([each.peak_mb for each in taken]).text(0)} |")
    if imports:
        lines.append(f"| import torch | {Spread.of(list(imports)).text(2)} | | |")
    return "\n".join(lines)
