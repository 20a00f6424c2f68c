"""When requests are sent: arrival times, and the run that keeps to them and to the number of open requests."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from .client import Client, RequestResult
from .prompts import BenchRequest

_POLL_SECONDS = 1.0


@dataclass(frozen=True)
class TrafficPattern:
    """How requests arrive: at a rate (requests per second), or at one that grows from start to end.

    `burstiness` is the shape of the gamma distribution of the gaps: 1 is a Poisson process, under 1 burstier, over 1
    more even, inf a metronome.
    """

    request_rate: float = float("inf")
    burstiness: float = 1.0
    ramp_up_strategy: str | None = None  # linear | exponential
    ramp_up_start_rps: float = 0.0
    ramp_up_end_rps: float = 0.0

    def arrival_times(self, number: int, generator: np.random.Generator) -> np.ndarray:
        """Seconds from the start, float64, ascending.

        Without a ramp, the last request comes exactly number/rate seconds after the start, as in vLLM: the rate of a
        run is the one asked for, whatever its seed.
        """
        if self.ramp_up_strategy is None and self.request_rate == float("inf"):
            return np.zeros(number)
        rates = self._rates(number)
        if self.burstiness == float("inf"):
            gaps = 1 / rates
        else:
            gaps = generator.gamma(self.burstiness, 1 / (rates * self.burstiness))
        times = np.cumsum(gaps)
        if self.ramp_up_strategy is None:
            times *= number / self.request_rate / times[-1]
        return times

    def _rates(self, number: int) -> np.ndarray:
        if self.ramp_up_strategy is None:
            return np.full(number, self.request_rate)
        progress = np.arange(number) / max(number - 1, 1)
        start, end = self.ramp_up_start_rps, self.ramp_up_end_rps
        if self.ramp_up_strategy == "linear":
            return start + (end - start) * progress
        return start * (end / start) ** progress


class TrafficRun:
    """Sends requests at their times. No request is waited for without end: once nothing at all has been received for
    `stall_timeout` seconds while requests are open, these and all later ones have failed."""

    def __init__(
        self, client: Client, *, max_concurrency: int | None = None, stall_timeout: float = 600.0,
        request_id_prefix: str = "bench-",
    ) -> None:  # fmt: skip
        self.client = client
        self.stall_timeout = stall_timeout
        self.request_id_prefix = request_id_prefix
        self._slots = asyncio.Semaphore(max_concurrency) if max_concurrency else contextlib.nullcontext()
        self._open: set[asyncio.Task[RequestResult]] = set()
        self._stalled = False

    async def run(
        self, requests: Sequence[BenchRequest], times: Sequence[float] | np.ndarray, bar: tqdm[Any]
    ) -> tuple[list[RequestResult], float]:
        """Results in the order of the requests, and the seconds from the start to the last answer."""
        watch = asyncio.create_task(self._watch())
        tasks: list[asyncio.Task[RequestResult]] = []
        start = time.perf_counter()
        try:
            for index, (request, at) in enumerate(zip(requests, times, strict=True)):
                delay = start + at - time.perf_counter()
                if delay > 0 and not self._stalled:
                    await asyncio.sleep(delay)
                tasks.append(asyncio.create_task(self._send(request, f"{self.request_id_prefix}{index}", bar)))
            return await asyncio.gather(*tasks), time.perf_counter() - start
        finally:
            for task in [watch, *tasks]:
                task.cancel()
            await asyncio.gather(watch, *tasks, return_exceptions=True)

    async def _send(self, request: BenchRequest, request_id: str, bar: tqdm[Any]) -> RequestResult:
        result = RequestResult(prompt_len=request.prompt_len)
        arrived = time.perf_counter()
        try:
            async with self._slots:
                result.queue_time = time.perf_counter() - arrived
                if self._stalled:
                    result.error = "not sent: the server had stopped answering"
                else:
                    await self._complete(request, request_id, result)
        except asyncio.CancelledError:
            if not self._stalled:
                raise
            result.success = False
            result.error = f"the server sent nothing for {self.stall_timeout:g} s (--stall-timeout)"
        bar.update()
        return result

    async def _complete(self, request: BenchRequest, request_id: str, result: RequestResult) -> None:
        task = asyncio.current_task()
        assert task is not None
        if not self._open:
            self.client.last_activity = time.perf_counter()
        self._open.add(task)
        try:
            await self.client.complete(request, request_id, result)
        finally:
            self._open.discard(task)

    async def _watch(self) -> None:
        while not self._stalled:
            await asyncio.sleep(min(_POLL_SECONDS, self.stall_timeout / 4))
            if self._open and time.perf_counter() - self.client.last_activity > self.stall_timeout:
                self._stalled = True
                for task in self._open:
                    task.cancel()
