"""The stream of the load: one sampler for all who look, nothing at all while nobody does."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import ClientSession, web

from omni_engine.engine.errors import EngineDeadError
from omni_engine.engine.load import CoreLoad, StepReport
from omni_engine.engine.messages import CoreInfo
from omni_engine.engine.phases import Phase
from omni_engine.scheduler.scheduler import SchedulerStats
from omni_engine.server.app import build_app
from omni_engine.server.settings import ServerSettings
from omni_engine.server.ui import live

SAMPLER = "LiveFeed._sample"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Samples come every 20 ms."""
    monkeypatch.setattr(live.LiveFeed.__init__, "__defaults__", (0.02,))


def samplers():
    return [task for task in asyncio.all_tasks() if task.get_coro().__qualname__ == SAMPLER]


@asynccontextmanager
async def looking(client):
    """A function that returns the next event of a stream of its own."""
    async with client.session.get(client.address + "/ui/live") as response:
        assert response.status == 200 and response.content_type == "text/event-stream"

        async def event():
            line = await response.content.readline()
            await response.content.readline()
            return json.loads(line.removeprefix(b"data: ")) if line != b"data: [DONE]\n" else None

        yield event


async def until(holds):
    for _ in range(200):
        if holds():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("not within 2 s")


def test_nothing_is_sampled_while_nobody_looks_and_once_for_all_who_do(serve):
    async def scenario(client, engine):
        await client.post("/v1/completions", {"prompt": "x", "max_tokens": 2})
        assert samplers() == [] and engine.num_watches == 0
        async with looking(client) as first:
            assert (await first())["event"] == "engine"
            assert len(samplers()) == 1 and engine.meter is not None
            async with looking(client) as second, looking(client) as third:
                assert [(await one())["event"] for one in (second, third)] == ["engine"] * 2
                assert (await first())["event"] == (await second())["event"] == (await third())["event"] == "load"
                assert len(samplers()) == 1 and engine.num_watches == 1
            await asyncio.sleep(0.1)
            assert len(samplers()) == 1 and engine.meter is not None  # one still looks
        await until(lambda: not samplers())
        assert engine.meter is None
        async with looking(client) as again:
            await again()
            assert len(samplers()) == 1 and engine.num_watches == 2
        await until(lambda: not samplers() and engine.meter is None)

    serve(scenario)


def test_samples_carry_what_the_meter_counted(serve):
    async def scenario(client, engine):
        async with looking(client) as event:
            await event()
            stats = SchedulerStats(2, 1, 9, 0.5, 0, 0, 0)
            load = CoreLoad(6, 3, [StepReport(2, 2, 2, 4, 0.1), StepReport(2, 2, 2, 4, 0.1)])
            engine.meter.take([], stats, load, 11, 4, 1.0)
            seen = [await event() for _ in range(3)]
            loads = [one["load"] for one in seen if one["load"]["num_steps"]]
            assert len(loads) == 1
            assert loads[0]["num_running"] == 2 and loads[0]["num_waiting"] == 1
            assert loads[0]["num_blocks_pinned"] == 6 and loads[0]["num_blocks_cached"] == 3
            assert loads[0]["num_prompt_tokens"] == 11 and loads[0]["num_generation_tokens"] == 4
            assert loads[0]["steps_by_gear"] == {"4": 2} and loads[0]["drafts"] is None
            assert sum(one["load"]["num_generation_tokens"] for one in seen) == 4  # told once

    serve(scenario)


def test_the_engine_is_told_first_and_again_when_its_status_changes(serve):
    async def scenario(client, engine):
        engine.is_ready = False
        async with looking(client) as event:
            first = await event()
            assert (first["status"], first["num_blocks"], first["start"]) == ("loading", None, [])
            engine.core_info = CoreInfo(512, 65, 16, gears=[1, 8])
            engine.start_phases = [("front", [Phase("imports", 0.5)]), ("core", [Phase("weights", 1.5, 1024)])]
            engine.config = SimpleNamespace(speculation=SimpleNamespace(choice=SimpleNamespace(num_drafts=3)))
            engine.is_ready = True
            while (told := await event())["event"] != "engine":
                pass
            assert (told["status"], told["message"], told["max_model_len"]) == ("ready", None, 512)
            assert (told["num_blocks"], told["block_size"], told["gears"], told["num_drafts"]) == (64, 16, [1, 8], 3)
            phases = [{"name": "weights", "seconds": 1.5, "num_bytes": 1024}]
            assert told["start"][1] == {"process": "core", "phases": phases}
            engine.errored, engine.dead_error = True, EngineDeadError("/secret/path went wrong")
            while (told := await event())["event"] != "engine":
                pass
            assert told["status"] == "dead" and "secret" not in told["message"] and "log" in told["message"]
            assert (await event())["event"] == "load"  # it goes on: the server may outlive its engine

    serve(scenario)


def test_streams_end_with_a_fault_of_the_sampler(serve):
    async def ends(client, engine):
        async with looking(client) as event:
            await event()
            engine.meter.sample = None  # TypeError
            while await event() is not None:
                pass
        await until(lambda: engine.meter is None and not samplers())

    serve(ends)


def test_streams_end_with_the_server(fake_engine):
    async def main():
        app = build_app(fake_engine, ServerSettings(model="tiny"))
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=10)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        async with ClientSession() as session:
            client = SimpleNamespace(session=session, address=f"http://127.0.0.1:{runner.addresses[0][1]}")
            async with looking(client) as event:
                assert (await event())["event"] == "engine"
                cleanup = asyncio.create_task(runner.cleanup())
                while await event() is not None:
                    pass
                await asyncio.wait_for(cleanup, 3)  # nobody was waited for until the timeout
        assert fake_engine.meter is None and samplers() == []

    asyncio.run(main())


def test_a_viewer_who_does_not_read_loses_the_oldest_events_and_costs_no_memory():
    async def scenario():
        engine = SimpleNamespace(
            errored=False, is_ready=True, dead_error=None, core_info=None, watched=lambda: FakeWatch()
        )
        feed = live.LiveFeed(SimpleNamespace(engine=engine, model_name="m"), 0.001)
        events = feed.events()
        await anext(events)
        await asyncio.sleep(0.2)
        (viewer,) = feed._viewers
        assert viewer.qsize() == live.MAX_PENDING_EVENTS
        numbers: list[Any] = [(await anext(events)).load for _ in range(4)]
        assert numbers == list(range(numbers[0], numbers[0] + 4)) and numbers[0] > live.MAX_PENDING_EVENTS
        await events.aclose()
        assert feed._task is None and not feed._viewers

    asyncio.run(scenario())


class FakeWatch:
    """A meter whose samples are numbers."""

    def __enter__(self):
        self.number = 0
        return self

    def __exit__(self, *_):
        pass

    def sample(self, now):
        self.number += 1
        return self.number
