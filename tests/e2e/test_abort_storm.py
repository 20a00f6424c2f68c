"""A storm of aborts in every phase: nothing is left behind, and who stays gets the tokens of a calm run."""

from __future__ import annotations

import asyncio
import os
import random
import re

import pytest

from omni_engine import AsyncEngine, EngineArgs, RequestOutputKind, SamplingParams

NUM_AT_ONCE = 64


@pytest.mark.parametrize("num_requests", [600, pytest.param(10_000, marks=pytest.mark.full)])
def test_aborts_leave_nothing_and_survivors_have_the_tokens_of_a_calm_run(make_checkpoint, num_requests):
    args = EngineArgs(
        model=str(make_checkpoint("LlamaForCausalLM")),
        dtype="float32", max_model_len=192, max_num_seqs=16, max_num_batched_tokens=64, num_gpu_blocks_override=80,
    )  # fmt: skip
    asyncio.run(storm(args, num_requests))


async def storm(args, num_requests):
    engine = AsyncEngine(args)
    await engine.wait_ready()
    chance = random.Random(5)
    calm = {kind: await survive(engine, kind) for kind in range(8)}
    pages, files = resident_kib(engine), open_files(engine)
    slots = asyncio.Semaphore(NUM_AT_ONCE)
    counts = {"left": 0, "survived": 0}

    async def one(number):
        kind = number % 8
        async with slots:
            if number % 20 == 0:
                assert await survive(engine, kind) == calm[kind], number
                counts["survived"] += 1
            else:
                left = await leave(engine, kind, chance.random())
                counts["left"] += left

    await asyncio.wait_for(asyncio.gather(*(one(number) for number in range(num_requests))), 1200)
    assert counts["survived"] == num_requests // 20
    assert counts["left"] > num_requests // 2
    for _ in range(200):
        stats = await engine.stats()
        if stats["num_running"] == stats["num_waiting"] == 0:
            break
        await asyncio.sleep(0.02)
    assert (stats["num_running"], stats["num_waiting"], stats["kv_cache_usage"]) == (0, 0, 0)
    assert not engine._streams and not engine._front.outputs.requests and not engine._telemetry._metrics._sequences
    assert await survive(engine, 3) == calm[3]
    assert open_files(engine) == files
    assert resident_kib(engine) - pages < 30 * 1024
    await engine.shutdown()


def params(kind):
    return SamplingParams(
        n=1 + (kind == 5) * 2, seed=kind, max_tokens=6 + 8 * kind, ignore_eos=True,
        logprobs=2 if kind == 2 else None, output_kind=RequestOutputKind.CUMULATIVE,
    )  # fmt: skip


def prompt(kind):
    return [(kind * 31 + 7 * place) % 500 + 4 for place in range(10 + 17 * kind)]


async def survive(engine, kind):
    """The token ids of every sequence."""
    outputs = [output async for output in engine.generate(prompt(kind), params(kind), "stays")]
    return [completion.token_ids for completion in outputs[-1].outputs]


async def leave(engine, kind, chance):
    """Begins a request and leaves: at once, after a while in whatever phase, or after some outputs. 1 if it had to."""
    stream = engine.generate(prompt(kind), params(kind), "leaves")
    if chance < 0.5:
        task = asyncio.create_task(read(stream, None))
        await asyncio.sleep(0 if chance < 0.1 else chance / 4)
        task.cancel()
        try:
            return await task
        except asyncio.CancelledError:
            return 1
    return await read(stream, 1 + int(chance * 10) % 5)


async def read(stream, most):
    """Reads at most so many outputs; 1 if there were more."""
    count = 0
    async for _ in stream:
        count += 1
        if count == most:
            await stream.aclose()
            return 1
    return 0


def open_files(engine):
    return [len(os.listdir(f"/proc/{pid}/fd")) for pid in (os.getpid(), engine._client.process.pid)]


def resident_kib(engine):
    with open(f"/proc/{engine._client.process.pid}/status") as file:
        return int(re.search(r"VmRSS:\s+(\d+)", file.read())[1])
