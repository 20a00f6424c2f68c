"""The life of `omni-engine serve`: bound before loading, drained and ended by signals."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest
from aiohttp import ClientSession, ClientTimeout
from prometheus_client import CollectorRegistry

from omni_engine.engine.config import EngineArgs
from omni_engine.engine.errors import EngineDeadError
from omni_engine.engine.outputs import CompletionOutput, RequestOutput
from omni_engine.server import lifecycle
from omni_engine.server.settings import ServerSettings
from omni_engine.server.sockets import bind


class SlowEngine:
    """Generates until it is told to shut down; loads until `loaded` is set."""

    is_ready = False
    errored = False
    dead_error: BaseException | None = None
    max_model_len = 64
    tokenizer = None
    pooling_config = None
    served_model_name = "m"
    tracer = None

    def __init__(self) -> None:
        self.loaded = asyncio.Event()
        self.aborting = asyncio.Event()
        self.finish = asyncio.Event()
        self.load_error: Exception | None = None
        self.default_sampling_params = {}
        self.metrics_registry = CollectorRegistry()
        self.running = 0
        self.shutdowns: list[float] = []

    async def start(self) -> None:
        pass

    def warm_up_grammars(self) -> None:
        pass

    async def wait_ready(self) -> None:
        await self.loaded.wait()
        if self.load_error is not None:
            raise self.load_error
        self.is_ready = True

    async def generate(self, prompt, _params, request_id, *, priority=0):
        self.running += 1
        try:
            ending = [asyncio.create_task(event.wait()) for event in (self.aborting, self.finish)]
            await asyncio.wait(ending, return_when=asyncio.FIRST_COMPLETED)
            reason = "abort" if self.aborting.is_set() else "stop"
            yield RequestOutput(request_id, "a", [1], None, [CompletionOutput(0, "b", [2], finish_reason=reason)], True)
        finally:
            self.running -= 1

    async def shutdown(self, timeout: float = 0) -> None:
        self.shutdowns.append(timeout)
        deadline = asyncio.get_running_loop().time() + timeout
        while self.running and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.01)
        self.aborting.set()


@pytest.fixture
def run_server(monkeypatch):
    """Runs the server with a scenario beside it; returns what the scenario returned."""

    def run(scenario, shutdown_timeout=0.0):
        async def main():
            engine = SlowEngine()
            monkeypatch.setattr(lifecycle, "AsyncEngine", type("", (), {"from_engine_args": lambda *_, **__: engine}))
            with bind("127.0.0.1", 0) as listener:
                port = listener.getsockname()[1]
                settings = ServerSettings(model="m")
                server = lifecycle.Server(EngineArgs(model="m"), settings, listener, shutdown_timeout)
                async with ClientSession(f"http://127.0.0.1:{port}", timeout=ClientTimeout(total=5)) as session:
                    playing = asyncio.create_task(scenario(session, engine))
                    await asyncio.wait_for(server.run(), 10)
                    return await playing

        return asyncio.run(main())

    return run


async def ask(session):
    async with session.post("/v1/completions", json={"prompt": "a"}) as response:
        return response.status, await response.json()


async def wait_running(engine):
    while not engine.running:
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_aborts_running_requests_and_ends_the_server(run_server, number):
    async def scenario(session, engine):
        engine.loaded.set()
        asking = asyncio.create_task(ask(session))
        await wait_running(engine)
        os.kill(os.getpid(), number)
        status, body = await asking
        assert (status, body["choices"][0]["finish_reason"]) == (200, "abort")
        return "played"

    assert run_server(scenario) == "played"


def test_running_requests_may_end_within_the_shutdown_timeout(run_server):
    async def scenario(session, engine):
        engine.loaded.set()
        asking = asyncio.create_task(ask(session))
        await wait_running(engine)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.1)
        engine.finish.set()
        status, body = await asking
        assert (status, body["choices"][0]["finish_reason"]) == (200, "stop")

    run_server(scenario, shutdown_timeout=5.0)


def test_a_second_signal_cuts_the_drain_short(run_server):
    async def scenario(session, engine):
        engine.loaded.set()
        asking = asyncio.create_task(ask(session))
        await wait_running(engine)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert (await asking)[1]["choices"][0]["finish_reason"] == "abort"

    run_server(scenario, shutdown_timeout=60.0)


def test_no_connection_is_accepted_while_draining(run_server):
    async def scenario(session, engine):
        engine.loaded.set()
        asking = asyncio.create_task(ask(session))
        await wait_running(engine)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.1)
        with pytest.raises(OSError):
            await ask(session)
        engine.finish.set()
        await asking

    run_server(scenario, shutdown_timeout=5.0)


def test_health_answers_while_the_model_loads_and_a_signal_ends_the_loading(run_server):
    async def scenario(session, _engine):
        async with session.get("/health") as response:
            assert (response.status, await response.json()) == (503, {"status": "loading"})
        os.kill(os.getpid(), signal.SIGTERM)

    run_server(scenario)


def test_what_keeps_the_model_from_loading_is_raised(run_server):
    async def scenario(_session, engine):
        engine.load_error = EngineDeadError("too large: use less")
        engine.loaded.set()

    with pytest.raises(EngineDeadError, match="too large"):
        run_server(scenario)


def test_the_death_of_the_engine_ends_the_server(run_server):
    async def scenario(_session, engine):
        engine.loaded.set()
        await asyncio.sleep(0.1)
        engine.dead_error = EngineDeadError("a step failed")

    with pytest.raises(EngineDeadError, match="a step failed"):
        run_server(scenario)


def test_a_port_in_use_is_refused_with_the_remedy():
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ValueError, match=f"choose another --host or --port: 127.0.0.1:{port}"):
            bind("127.0.0.1", port)


def test_connections_queue_from_the_moment_of_binding():
    import socket

    with bind(None, 0) as listener:
        socket.create_connection(("127.0.0.1", listener.getsockname()[1]), timeout=2).close()
