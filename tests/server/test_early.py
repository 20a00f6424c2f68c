"""/health before the server is imported; every other request waits, unread, for the server."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys

import pytest
from aiohttp import web

from omni_engine.server.app import build_app
from omni_engine.server.early import EarlyAnswers
from omni_engine.server.listener import listen
from omni_engine.server.settings import ServerSettings
from omni_engine.server.sockets import HeaderLimits, bind, bind_unix

HEALTH = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"
VERSION = b"GET /version HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


@pytest.fixture(params=["tcp", "unix"])
def listener(request, tmp_path):
    with bind("127.0.0.1", 0) if request.param == "tcp" else bind_unix(str(tmp_path / "s.sock")) as listener:
        yield listener


@pytest.fixture
def early(listener):
    with EarlyAnswers(listener, ("/health", "/v/health")) as early:
        yield early


def connect(listener):
    client = socket.socket(listener.family, socket.SOCK_STREAM)
    client.settimeout(5)
    client.connect(listener.getsockname())
    return client


def read(client):
    """Status and body, once the other side has closed."""
    answer = b""
    while piece := client.recv(65536):
        answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


@pytest.mark.parametrize("question", [HEALTH, b"GET /v/health HTTP/1.0\r\n\r\n"])
def test_health_is_answered_as_loading(listener, early, question):
    for _ in range(3):
        with connect(listener) as client:
            client.sendall(question)
            assert read(client) == (503, {"status": "loading"})
    assert early.finish() == []


NO_QUESTIONS = [
    VERSION,
    HEALTH[:20],
    HEALTH[:-2],
    HEALTH + HEALTH,
    HEALTH.replace(b"GET", b"POST"),
    HEALTH.replace(b"health", b"healthy"),
    b"GET /health\r\n\r\n",
    b"\x16\x03\x01\x02",
]


@pytest.mark.parametrize("sent", NO_QUESTIONS, ids=lambda value: str(value)[:30])
def test_whatever_else_is_sent_is_left_unread_for_the_server(listener, early, sent):
    with connect(listener) as client:
        client.sendall(sent)
        with connect(listener) as other:  # answered after the first was looked at
            other.sendall(HEALTH)
            read(other)
        (connection,) = early.finish()
        with connection:
            connection.settimeout(5)
            assert connection.recv(4096) == sent


def test_a_connection_that_has_sent_nothing_yet_is_handed_over_too(listener, early):
    with connect(listener) as client, connect(listener) as other:
        other.sendall(HEALTH)
        read(other)
        (connection,) = early.finish()
        with connection:
            client.sendall(b"later")
            connection.settimeout(5)
            assert connection.recv(10) == b"later"


def test_a_client_that_leaves_is_forgotten(listener, early):
    connect(listener).close()
    with connect(listener) as client:
        client.sendall(HEALTH)
        read(client)
    assert early.finish() == []


def test_without_a_server_the_connections_are_closed_at_the_end(listener):
    with EarlyAnswers(listener, ()), connect(listener) as client:
        client.sendall(VERSION)
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.recv(1)
    with connect(listener) as client:
        client.sendall(HEALTH)  # it stays in the kernel's queue
        client.settimeout(0.1)
        with pytest.raises(TimeoutError):
            client.recv(1)


def test_requests_that_came_early_are_answered_by_the_server(listener, early, fake_engine):
    async def serve(accepted):
        runner = web.AppRunner(build_app(fake_engine, ServerSettings(model="m")), shutdown_timeout=0.1)
        await runner.setup()
        server = await listen(runner, listener, None, HeaderLimits(), accepted)
        answers = await asyncio.gather(*(asyncio.to_thread(read, client) for client in (client_early, client_slow)))
        server.close()
        await runner.cleanup()
        return answers

    with connect(listener) as client_early, connect(listener) as client_slow, connect(listener) as other:
        client_early.sendall(VERSION)
        client_slow.sendall(VERSION[:9])
        other.sendall(HEALTH)
        read(other)
        accepted = early.finish()
        assert len(accepted) == 2
        client_slow.sendall(VERSION[9:])
        fake_engine.ready = asyncio.Event()
        for status, body in asyncio.run(serve(accepted)):
            assert (status, list(body)) == (200, ["version"])


def test_the_command_imports_no_event_loop_and_no_web_framework_before_it_listens():
    heavy = ("asyncio", "aiohttp", "tokenizers", "jinja2", "prometheus_client", "numpy", "torch", "ssl")
    script = f"import sys, omni_engine.server.serve; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
