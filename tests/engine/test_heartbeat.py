"""The heartbeat: a busy core answers, a silent one and an endless step are noticed, an ended one is not called hung."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
import time

import pytest

from omni_engine.engine.heartbeat import StepClock, answer_pings, watch

IDLE = struct.pack("<d", 0.0)


@pytest.fixture
def ends():
    """The front's end and the core's."""
    front, core = socket.socketpair()
    front.setblocking(False)
    with front, core:
        yield front, core


def watch_for(seconds, *arguments, **options):
    """What `watch` says within so many seconds; TimeoutError if nothing."""
    return asyncio.run(asyncio.wait_for(watch(*arguments, **options), seconds))


def test_silence_is_noticed_after_so_many_pings(ends):
    started = time.monotonic()
    assert watch_for(5, ends[0], interval=0.02, max_missed=5) == "does not answer any more"
    assert 0.1 <= time.monotonic() - started < 1


def test_a_core_that_computes_answers(ends):
    answer_pings(ends[1], StepClock())
    stop = threading.Event()

    def compute():
        while not stop.is_set():
            sum(range(10_000))

    busy = threading.Thread(target=compute)
    busy.start()
    try:
        with pytest.raises(asyncio.TimeoutError):
            watch_for(1, ends[0], interval=0.1, max_missed=3)
    finally:
        stop.set()
        busy.join()


def test_a_step_that_runs_for_too_long_is_noticed(ends):
    clock = StepClock()
    answer_pings(ends[1], clock)
    with clock:
        started = time.monotonic()
        why = watch_for(5, ends[0], interval=0.02, step_timeout=0.3)
        assert 0.3 <= time.monotonic() - started < 1.5
    assert why == "has been in one step for more than 0.3 s (--engine-hang-timeout)"


@pytest.mark.parametrize("timeout", [0, 60])
def test_a_step_may_run_for_as_long_as_the_timeout_and_for_ever_without_one(ends, timeout):
    clock = StepClock()
    answer_pings(ends[1], clock)
    with clock, pytest.raises(asyncio.TimeoutError):
        watch_for(0.5, ends[0], interval=0.02, step_timeout=timeout)


def test_many_short_steps_are_no_long_one(ends):
    clock = StepClock()
    answer_pings(ends[1], clock)
    stop = threading.Event()

    def step():
        while not stop.is_set():
            with clock:
                time.sleep(0.05)

    stepping = threading.Thread(target=step)
    stepping.start()
    try:
        with pytest.raises(asyncio.TimeoutError):
            watch_for(1, ends[0], interval=0.02, step_timeout=0.4)
    finally:
        stop.set()
        stepping.join()


def test_a_step_that_fails_is_over():
    clock = StepClock()
    with pytest.raises(RuntimeError), clock:
        raise RuntimeError
    assert clock.seconds() == 0


def test_a_single_answer_forgives_what_was_missed(ends):
    front, core = ends

    async def answer_now_and_then():
        watching = asyncio.create_task(watch(front, interval=0.05, max_missed=4))
        for _ in range(5):
            await asyncio.sleep(0.1)
            core.send(IDLE)
        assert not watching.done()
        assert await watching == "does not answer any more"

    asyncio.run(answer_now_and_then())


@pytest.mark.parametrize("end", [0, 1])
def test_a_closed_connection_is_an_end_and_no_hang(ends, end):
    async def close_soon():
        watching = asyncio.create_task(watch(ends[0], interval=0.02, max_missed=50))
        await asyncio.sleep(0.05)
        ends[end].close()
        return await watching

    assert asyncio.run(close_soon()) is None
