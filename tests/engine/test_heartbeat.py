"""The heartbeat: a busy core answers, a silent one is noticed, an ended one is not called hung."""

from __future__ import annotations

import asyncio
import socket
import threading
import time

import pytest

from omni_engine.engine.heartbeat import answer_pings, watch


@pytest.fixture
def ends():
    """The front's end and the core's."""
    front, core = socket.socketpair()
    front.setblocking(False)
    with front, core:
        yield front, core


def test_silence_is_noticed_after_so_many_pings(ends):
    started = time.monotonic()
    assert asyncio.run(watch(ends[0], 0.02, 5)) is True
    assert 0.1 <= time.monotonic() - started < 1


def test_a_core_that_computes_answers(ends):
    answer_pings(ends[1])
    stop = threading.Event()

    def compute():
        while not stop.is_set():
            sum(range(10_000))

    busy = threading.Thread(target=compute)
    busy.start()

    async def watch_a_while():
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(watch(ends[0], 0.1, 3), 1)

    try:
        asyncio.run(watch_a_while())
    finally:
        stop.set()
        busy.join()


def test_a_single_answer_forgives_what_was_missed(ends):
    front, core = ends

    async def answer_now_and_then():
        watching = asyncio.create_task(watch(front, 0.05, 4))
        for _ in range(5):
            await asyncio.sleep(0.1)
            core.send(b".")
        assert not watching.done()
        assert await watching is True

    asyncio.run(answer_now_and_then())


@pytest.mark.parametrize("end", [0, 1])
def test_a_closed_connection_is_an_end_and_no_hang(ends, end):
    async def close_soon():
        watching = asyncio.create_task(watch(ends[0], 0.02, 50))
        await asyncio.sleep(0.05)
        ends[end].close()
        return await watching

    assert asyncio.run(close_soon()) is False
