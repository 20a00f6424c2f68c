"""What users see when the core process dies or hangs, when they read slowly, and when nothing happens at all."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

MAIN = "from omni_engine.server.cli import main; import sys; sys.exit(main())"
# The first core is one that hangs; one that is started anew is whole.
HANGING = f"""
import subprocess, sys
from omni_engine.engine import core_launch
start = subprocess.Popen
def start_hanging(command, **options):
    core_launch.subprocess.Popen = start
    return start([sys.executable, {str(Path(__file__).with_name("hanging_core.py"))!r}, *command[3:]], **options)
core_launch.subprocess.Popen = start_hanging
"""
BODY = {"prompt": "The harbour", "max_tokens": 3000, "ignore_eos": True, "stream": True}


class Server:
    """A running `omni-engine serve` with a context long enough that streams run for many seconds."""

    def __init__(self, path, *flags, program=MAIN):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-c", program]
        self.process = subprocess.Popen(
            [*command, "serve", str(path), "--host", "127.0.0.1", "--port", str(self.port),
             "--dtype", "float32", *flags],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while self.health() != 200:
            assert self.process.poll() is None and time.monotonic() < deadline, self.process.communicate()[0]
            time.sleep(0.05)
        with open(f"/proc/{self.process.pid}/task/{self.process.pid}/children") as file:
            self.core_pid = int(file.read().split()[0])

    def health(self):
        """The status; None where nobody answers."""
        try:
            with urllib.request.urlopen(self.url + "/health", timeout=2) as response:
                return response.status
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return None

    def wait_health(self, status, seconds):
        """Seconds until /health answers with `status`."""
        started = time.monotonic()
        while time.monotonic() - started < seconds:
            if self.health() == status:
                return time.monotonic() - started
            time.sleep(0.02)
        raise AssertionError(f"/health was not {status} within {seconds} s")


class Stream:
    """A streamed completion, read in a thread: `begun` with the first event, `ended` with the connection."""

    def __init__(self, server):
        self.begun, self.ended = threading.Event(), threading.Event()
        self.events = []
        self.ended_at = 0.0
        self.thread = threading.Thread(target=self._read, args=(server.url,), daemon=True)
        self.thread.start()

    def _read(self, url):
        data = json.dumps(BODY).encode()
        request = urllib.request.Request(url + "/v1/completions", data, {"Content-Type": "application/json"})
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=60) as response:
            for line in response:
                if line.startswith(b"data: "):
                    self.events.append(line[6:].decode().strip())
                    self.begun.set()
        self.ended_at = time.monotonic()
        self.ended.set()


@pytest.fixture(scope="module")
def path(make_checkpoint):
    return make_checkpoint("LlamaForCausalLM", max_position_embeddings=4096)


@pytest.fixture
def server(path):
    server = Server(path)
    yield server
    with contextlib.suppress(ProcessLookupError):
        os.kill(server.core_pid, signal.SIGCONT)
    server.process.kill()
    server.process.communicate()


@pytest.mark.parametrize(("number", "seconds"), [(signal.SIGKILL, 2), (signal.SIGSTOP, 10)])
def test_a_lost_core_shows_in_health_ends_streams_with_an_error_and_ends_the_server(server, number, seconds):
    streams = [Stream(server) for _ in range(3)]
    assert all(stream.begun.wait(20) for stream in streams)
    os.kill(server.core_pid, number)
    server.wait_health(503, seconds)
    noticed = time.monotonic()
    for stream in streams:
        assert stream.ended.wait(5)
        assert stream.ended_at - noticed < 5
        assert stream.events[-1] == "[DONE]"
        error = json.loads(stream.events[-2])["error"]
        assert (error["code"], error["type"]) == (503, "ServiceUnavailableError")
    output, _ = server.process.communicate(timeout=5)
    assert server.process.returncode == 1
    assert "engine core process" in output.splitlines()[-1]
    assert not os.path.exists(f"/proc/{server.core_pid}")


def test_a_core_that_hangs_while_idle_is_noticed_too(server):
    os.kill(server.core_pid, signal.SIGSTOP)
    server.wait_health(503, 10)
    assert server.process.wait(timeout=5) == 1


def test_a_core_that_pauses_shortly_goes_on(server):
    stream = Stream(server)
    assert stream.begun.wait(20)
    os.kill(server.core_pid, signal.SIGSTOP)
    time.sleep(2)
    os.kill(server.core_pid, signal.SIGCONT)
    seen = len(stream.events)
    time.sleep(1)
    assert len(stream.events) > seen
    assert server.health() == 200


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_with_restart_core_a_lost_core_is_replaced_and_requests_go_on(path, number):
    server = Server(path, "--restart-core")
    try:
        stream = Stream(server)
        assert stream.begun.wait(20)
        os.kill(server.core_pid, number)
        server.wait_health(503, 10)
        assert stream.ended.wait(5)
        error = json.loads(stream.events[-2])["error"]
        assert error["code"] == 503
        assert "send the request again" in error["message"]
        request = urllib.request.Request(
            server.url + "/v1/completions",
            json.dumps({**BODY, "stream": False, "max_tokens": 5}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:  # waits for the new core
            assert json.load(response)["usage"]["completion_tokens"] == 5
        assert server.health() == 200
        assert num_running(server) == 0
        assert server.process.poll() is None
    finally:
        server.process.terminate()
        output, _ = server.process.communicate(timeout=10)
    assert server.process.returncode == 0, output
    assert "starting it anew" in output


def test_a_core_that_hangs_in_a_step_is_lost_though_it_answers_pings(path):
    server = Server(path, "--engine-hang-timeout", "1.5", program=HANGING + MAIN)
    try:
        streams = [Stream(server) for _ in range(2)]
        assert all(stream.begun.wait(20) for stream in streams)
        assert server.wait_health(503, 6) > 0.5
        for stream in streams:
            assert stream.ended.wait(5)
            error = json.loads(stream.events[-2])["error"]
            assert (error["code"], error["type"], stream.events[-1]) == (503, "ServiceUnavailableError", "[DONE]")
        output, _ = server.process.communicate(timeout=5)
    finally:
        server.process.kill()
    assert server.process.returncode == 1
    assert "has been in one step for more than 1.5 s (--engine-hang-timeout)" in output.splitlines()[-1]
    assert not os.path.exists(f"/proc/{server.core_pid}")


def test_without_a_limit_a_step_may_take_for_ever(path):
    server = Server(path, "--engine-hang-timeout", "0", program=HANGING + MAIN)
    try:
        stream = Stream(server)
        assert stream.begun.wait(20)
        time.sleep(3)
        assert server.health() == 200 and not stream.ended.is_set()
    finally:
        server.process.kill()
        server.process.communicate()


def test_with_restart_core_a_core_that_hangs_in_a_step_is_replaced(path):
    server = Server(path, "--restart-core", "--engine-hang-timeout", "1.5", program=HANGING + MAIN)
    try:
        stream = Stream(server)
        assert stream.begun.wait(20)
        server.wait_health(503, 6)
        assert stream.ended.wait(5)
        assert "send the request again" in json.loads(stream.events[-2])["error"]["message"]
        again = Stream(server)
        assert again.begun.wait(30)
        assert len(again.events) > 0 and server.health() == 200
    finally:
        server.process.kill()
        server.process.communicate()


def cpu_seconds(pid):
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_an_idle_server_uses_nearly_no_cpu(server):
    with urllib.request.urlopen(server.url + "/v1/models", timeout=5):
        time.sleep(0.5)
    pids = (server.process.pid, server.core_pid)
    before = [cpu_seconds(pid) for pid in pids]
    time.sleep(4)
    used = [cpu_seconds(pid) - start for pid, start in zip(pids, before, strict=True)]
    assert max(used) <= 0.04  # 1 % of 4 s


def test_a_client_that_does_not_read_slows_nobody_and_costs_its_own_answer_only(server):
    body = json.dumps({**BODY, "max_tokens": 600, "n": 4, "seed": 1, "logprobs": 20})
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        slow.connect(("127.0.0.1", server.port))
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        slow.sendall(f"{head}\r\n\r\n{body}".encode())
        assert slow.recv(10)
        assert num_running(server) > 0
        started = time.monotonic()
        request = urllib.request.Request(
            server.url + "/v1/completions",
            json.dumps({**BODY, "stream": False, "max_tokens": 300}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            assert json.load(response)["usage"]["completion_tokens"] == 300
        waited = time.monotonic() - started
        # The slow one is computed to its end, though its answer is not read.
        deadline = time.monotonic() + 30
        while num_running(server):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert waited < 20
        assert server.health() == 200
        received = 10
        slow.settimeout(10)
        while piece := slow.recv(1 << 20):
            received += len(piece)
            if piece.endswith(b"0\r\n\r\n"):
                break
        assert received > 1_000_000


def num_running(server):
    with urllib.request.urlopen(server.url + "/metrics", timeout=5) as response:
        lines = response.read().decode().splitlines()
    return float(next(line for line in lines if line.startswith("vllm:num_requests_running{")).rsplit(" ", 1)[1])
