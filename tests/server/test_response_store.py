"""The store of responses: bounded by number and bytes, least recently used first, never what runs."""

from __future__ import annotations

import asyncio

from omni_engine.server.responses_api.protocol import ResponseBody
from omni_engine.server.responses_api.store import ResponseStore, StoredResponse


def entry(name, text=""):
    body = ResponseBody(id=name, created_at=0, status="completed", model="m", text={})
    return StoredResponse(body, [], [{"role": "user", "content": text}], keeps_events=False)


def test_the_least_recently_used_is_forgotten():
    store = ResponseStore(max_responses=2)
    store.put(entry("a"))
    store.put(entry("b"))
    assert store.get("a") is not None
    store.put(entry("c"))
    assert store.get("b") is None and store.get("a") is not None and store.get("c") is not None


def test_bytes_are_bounded_and_given_back():
    store = ResponseStore(max_bytes=5000)
    for number in range(100):
        store.put(entry(f"r{number}", "x" * 1000))
    assert 1 <= len(store) <= 4 and store.get("r99") is not None
    store.put(entry("r99", ""))  # weighed anew
    store.put(entry("small", ""))
    assert store.get("r99") is not None
    store.put(entry("huge", "x" * 9000))
    assert len(store) == 0  # larger than the store: not kept


def test_what_runs_is_never_forgotten():
    async def scenario():
        store = ResponseStore(max_responses=1)
        running = entry("a")
        running.task = task = asyncio.create_task(asyncio.sleep(60))
        store.put(running)
        assert store.is_full_of_running
        store.put(entry("b"))
        assert store.get("a") is running and store.get("b") is None
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert not store.is_full_of_running
        store.put(entry("c"))
        assert store.get("a") is None and store.get("c") is not None

    asyncio.run(scenario())
