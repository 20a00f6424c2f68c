"""Clients that give up: the real HTTP application over a real engine core leaves nothing of their requests behind."""

from __future__ import annotations

import asyncio
import os

from aiohttp import ClientSession, ClientTimeout, web

from omni_engine import AsyncEngine, EngineArgs
from omni_engine.server.app import build_app
from omni_engine.server.settings import ServerSettings

NUM_CLIENTS = 200


def test_two_hundred_impatient_clients_leave_no_request_and_no_pinned_block(make_checkpoint):
    path = make_checkpoint("DeepseekV3ForCausalLM")

    async def scenario():
        engine = AsyncEngine(EngineArgs(model=str(path), dtype="float32", max_model_len=192, max_num_seqs=16))
        await engine.wait_ready()
        runner = web.AppRunner(build_app(engine, ServerSettings(model="tiny")), handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1/completions"
        try:
            async with ClientSession() as session:
                await session.post(url, json=body(0, max_tokens=2))  # connections and caches exist from here on
                files = num_open_files()
                results = await asyncio.gather(*(client(session, url, index) for index in range(NUM_CLIENTS)))
                await settle(engine)
                survivor = await session.post(url, json=body(0, max_tokens=12, stream=False))
                assert survivor.status == 200
                assert (await survivor.json())["usage"]["completion_tokens"] == 12
                await settle(engine)
            await asyncio.sleep(0.2)
            assert num_open_files() <= files
            assert not engine._streams
            return results
        finally:
            await runner.cleanup()
            await engine.shutdown()

    results = asyncio.run(scenario())
    assert results.count("gave up") > NUM_CLIENTS // 2
    assert set(results) <= {"gave up", "served"}


def body(index, **fields):
    prompt = f"The harbour lies below the town {index}"
    return {
        "prompt": prompt,
        "max_tokens": 150,
        "ignore_eos": True,
        "n": 1 + index % 2,
        "stream": index % 3 == 0,
        **fields,
    }


async def client(session, url, index):
    """Asks for much and waits little; how little differs, so that requests are left in every phase."""
    patience = ClientTimeout(total=0.05 + 0.01 * (index % 100))
    try:
        async with session.post(url, json=body(index), timeout=patience) as response:
            await response.read()
            return "served"
    except asyncio.TimeoutError:
        return "gave up"


async def settle(engine):
    """Within 5 seconds nothing runs, nothing waits and no block is pinned."""
    for _ in range(250):
        stats = await engine.stats()
        if stats["num_running"] == stats["num_waiting"] == stats["kv_cache_usage"] == 0 and not engine._streams:
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"left behind: {await engine.stats()}, {len(engine._streams)} streams")


def num_open_files():
    return len(os.listdir("/proc/self/fd"))
