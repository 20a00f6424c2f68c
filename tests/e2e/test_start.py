"""The first seconds of a real server: /health from the beginning, requests that come early, an end while it loads."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

HEALTH = b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
BODY = json.dumps({"prompt": "The harbour", "max_tokens": 3, "ignore_eos": True}).encode()
COMPLETION = (
    b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%b" % (len(BODY), BODY)
)


@pytest.fixture
def server(make_checkpoint, tmp_path):
    """(process, path of its socket, when it was started)."""
    path = tmp_path / "s.sock"
    model = make_checkpoint("LlamaForCausalLM")
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "omni_engine.server.cli", "serve", str(model), "--uds", str(path),
         "--log-format", "json"],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    yield process, path, started
    process.kill()
    process.communicate()


def connect(path):
    deadline = time.monotonic() + 30
    while True:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(60)
        try:
            client.connect(str(path))
            return client
        except OSError:
            client.close()
            assert time.monotonic() < deadline
            time.sleep(0.005)


def read(client):
    with client:
        answer = b""
        while piece := client.recv(65536):
            answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body or b"null")


def test_health_says_loading_from_the_first_connection_on_and_requests_queue(server):
    process, path, started = server
    asking = connect(path)
    asking.sendall(COMPLETION)
    answers = []
    while not answers or answers[-1][0] != 200:
        client = connect(path)
        client.sendall(HEALTH)
        answers.append(read(client))
        time.sleep(0.02)
    assert answers[0] == (503, {"status": "loading"})
    assert len(answers) > 5
    assert all(answer == answers[0] for answer in answers[:-1])
    status, body = read(asking)
    assert (status, body["usage"]["completion_tokens"]) == (200, 3)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=10)
    assert process.returncode == 0
    assert not path.exists()
    (line,) = [line for line in map(json.loads, said.splitlines()) if "phases" in line]
    assert line["message"].startswith("started in ")
    phases = {(phase["process"], phase["phase"]): phase for phase in line["phases"]}
    fronts = ("until the port was open", "imports", "configuration, tokenizer", "wait for the core")
    cores = ("imports", "wait for the front", "configuration", "weights", "KV cache")
    expected = [*(("front", name) for name in fronts), *(("core", name) for name in cores)]
    assert list(phases)[: len(expected)] == expected
    assert phases["core", "weights"]["bytes"] > 100_000 and phases["core", "KV cache"]["bytes"] > 100_000
    assert all(0 <= phase["seconds"] < 60 for phase in phases.values())
    total = sum(phase["seconds"] for name, phase in phases.items() if name[0] == "front")
    assert float(line["message"].split()[2]) == pytest.approx(total, abs=0.05)
    assert 0 < total <= time.monotonic() - started


def test_a_request_that_waits_while_an_end_comes_is_told_so(server):
    process, path, _ = server
    asking = connect(path)
    asking.sendall(COMPLETION)
    while "listens on" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGTERM)
    status, body = read(asking)
    assert (status, body["error"]["type"]) == (503, "ServiceUnavailableError")
    assert body["error"]["message"] == "the server is shutting down; send the request again later"
    assert process.wait(10) == 0
    assert not path.exists()


def test_an_end_before_anything_is_loaded_is_orderly(server):
    process, path, _ = server
    connect(path).close()
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    assert not path.exists()
