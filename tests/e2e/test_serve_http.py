"""`omni-engine serve` as its user meets it: a real process, a real engine, plain HTTP."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from omni_engine import Engine, SamplingParams

PROMPT = "The harbour lies below the town"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A running `omni-engine serve`."""

    def __init__(self, path, *flags):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-c", "from omni_engine.server.cli import main; import sys; sys.exit(main())"]
        self.process = subprocess.Popen(
            [*command, "serve", str(path), "--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32",
             "--served-model-name", "tiny", *flags],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=10) as response:
            return response.status, response.read()

    def post(self, path, body, timeout=60):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return response.status, json.loads(response.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def wait_ready(self):
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                return self.get("/health")
            except OSError:
                if self.process.poll() is not None:
                    break
                time.sleep(0.05)
        raise AssertionError(f"the server did not get ready: {self.stop()}")

    def core_pids(self):
        with open(f"/proc/{self.process.pid}/task/{self.process.pid}/children") as file:
            return [int(pid) for pid in file.read().split()]

    def stop(self, signum=signal.SIGTERM):
        if self.process.poll() is None:
            self.process.send_signal(signum)
        try:
            output, _ = self.process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            output, _ = self.process.communicate()
        return output


@pytest.fixture(scope="module")
def path(make_checkpoint):
    return make_checkpoint("DeepseekV3ForCausalLM")


@pytest.fixture(scope="module")
def server(path):
    server = Server(path, "--max-model-len", "192", "--max-num-seqs", "16")
    server.wait_ready()
    yield server
    output = server.stop()
    assert server.process.returncode == 0, output


def complete(**fields):
    return {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "ignore_eos": True, **fields}


def test_completions_equal_the_embedded_engine(server, path):
    engine = Engine(str(path), dtype="float32", max_model_len=192)
    params = SamplingParams(temperature=0.8, seed=5, max_tokens=12, ignore_eos=True, top_p=0.9)
    expected = engine.generate(PROMPT, params)[0].outputs[0]
    status, body = server.post("/v1/completions", complete(temperature=0.8, seed=5, top_p=0.9, return_token_ids=True))
    assert status == 200
    assert body["choices"][0]["text"] == expected.text
    assert body["choices"][0]["token_ids"] == expected.token_ids
    assert body["usage"]["completion_tokens"] == 12


def stream(server, route, body):
    """The events of a streamed answer, without the final [DONE], which must be there."""
    request = urllib.request.Request(
        server.url + route, json.dumps({**body, "stream": True}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        events = [line[6:].decode().strip() for line in response if line.startswith(b"data: ")]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def test_a_stream_adds_up_to_the_whole_answer(server):
    _, whole = server.post("/v1/completions", complete(max_tokens=30))
    events = stream(server, "/v1/completions", complete(max_tokens=30, stream_options={"include_usage": True}))
    assert "".join(e["choices"][0]["text"] for e in events if e["choices"]) == whole["choices"][0]["text"]
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 30
    assert len(events) > 5


def test_echo_with_logprobs_tells_the_prompt_for_each_of_n(server):
    status, body = server.post("/v1/completions", complete(n=2, temperature=1, echo=True, logprobs=2, max_tokens=3))
    assert status == 200
    for choice in body["choices"]:
        logprobs = choice["logprobs"]
        assert len(logprobs["tokens"]) == body["usage"]["prompt_tokens"] + 3
        assert logprobs["token_logprobs"][0] is None
        assert all(value <= 0 for value in logprobs["token_logprobs"][1:])


def test_extreme_parameters_do_not_reach_other_requests(server):
    for fields in ({"repetition_penalty": 1e39}, {"top_k": 2**70}, {"logit_bias": {"3": 1e300}}, {"priority": 2**80}):
        status, _ = server.post("/v1/completions", complete(**fields))
        assert status in (200, 400), fields
        assert server.post("/v1/completions", complete(max_tokens=1))[0] == 200


def test_chat_answers_whole_and_streamed(server):
    body = {"messages": [{"role": "user", "content": "Where?"}], "max_tokens": 10, "temperature": 0, "n": 1}
    _, whole = server.post("/v1/chat/completions", body)
    message = whole["choices"][0]["message"]
    assert message["role"] == "assistant"
    events = stream(server, "/v1/chat/completions", body)
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(e["choices"][0]["delta"].get("content") or "" for e in events) == message["content"]


@pytest.mark.parametrize(
    ("body", "status", "needle"),
    [
        (complete(prompt=""), 400, "prompt"),
        (complete(prompt=[]), 400, "prompt"),
        (complete(prompt=[99999]), 400, "vocabulary"),
        (complete(prompt="word " * 2000), 400, "maximum context length is 192"),
        (complete(temperature=-1), 400, "temperature"),
        (complete(max_tokens=-5), 400, "max_tokens"),
        (complete(logprobs=10**9), 400, "logprobs"),
        (complete(seed=2**70), 400, "seed"),
        (complete(n=0), 400, "n"),
        (complete(model="other"), 404, "does not exist"),
        (complete(max_tokens="many"), 400, "max_tokens"),
        (b"\xff\xfe", 400, ""),
        (b'{"prompt": ' + b"[" * 100_000, 400, ""),
        (b'{"prompt": "\\ud800", "max_tokens": 2}', 400, ""),
        (b"[]", 400, ""),
    ],
)
def test_bad_input_costs_only_its_own_request(server, body, status, needle):
    got, answer = server.post("/v1/completions", body)
    assert got == status
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["code"] == status
    assert needle in answer["error"]["message"]
    assert server.post("/v1/completions", complete(max_tokens=2))[0] == 200


def test_a_body_that_cannot_be_unpacked_is_the_callers_fault(server):
    request = urllib.request.Request(
        server.url + "/v1/completions", b"xxxx", {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    )
    with pytest.raises(urllib.error.HTTPError) as raised:
        urllib.request.urlopen(request, timeout=20)
    assert raised.value.code == 400
    assert json.loads(raised.value.read())["error"]["code"] == 400


def test_large_stops_and_bad_words_do_not_hold_up_the_server(server):
    for fields in ({"stop": ["x" * 5_000_000]}, {"bad_words": ["x" * 8_000_000]}):
        assert server.post("/v1/completions", complete(**fields))[0] == 400
    assert server.post("/v1/completions", complete(n=50, temperature=1, stop=["x" * 8000], max_tokens=2))[0] == 200


def test_requests_sent_while_loading_are_served(path):
    server = Server(path, "--max-model-len", "192")
    try:
        deadline = time.monotonic() + 30
        health = None
        while health is None and time.monotonic() < deadline:
            try:
                server.get("/health")
                health = 200
            except urllib.error.HTTPError as error:
                health, body = error.code, json.loads(error.read())
            except OSError:
                time.sleep(0.01)
        assert health == 503
        assert body == {"status": "loading"}
        status, answer = server.post("/v1/completions", complete(max_tokens=3))
        assert status == 200
        assert answer["usage"]["completion_tokens"] == 3
        assert server.get("/health")[0] == 200
    finally:
        output = server.stop()
    assert server.process.returncode == 0, output


def test_sigterm_ends_server_and_core_while_a_request_runs(path):
    server = Server(path, "--max-model-len", "192")
    try:
        server.wait_ready()
        cores = server.core_pids()
        assert cores
        request = subprocess.Popen(
            [sys.executable, "-c", "import sys, urllib.request as u; print(u.urlopen(u.Request(sys.argv[1], "
             "sys.argv[2].encode(), {'Content-Type': 'application/json'})).read().decode())",
             server.url + "/v1/completions", json.dumps(complete(max_tokens=150))],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        time.sleep(0.6)
        start = time.monotonic()
    finally:
        output = server.stop()
    assert time.monotonic() - start < 10
    assert server.process.returncode == 0, output
    answer, _ = request.communicate(timeout=10)
    if answer:
        assert json.loads(answer)["choices"][0]["finish_reason"] in ("abort", "length")
    assert not any(os.path.exists(f"/proc/{pid}") for pid in cores)


def test_a_killed_core_turns_health_to_503_and_ends_the_server(path):
    server = Server(path, "--max-model-len", "192")
    try:
        server.wait_ready()
        os.kill(server.core_pids()[0], signal.SIGKILL)
        server.process.wait(timeout=10)
        assert server.process.returncode != 0
    finally:
        output = server.stop()
    assert "engine core" in output


def test_a_bad_checkpoint_ends_in_one_line(tmp_path):
    server = Server(tmp_path)
    server.process.wait(timeout=30)
    output = server.stop()
    assert server.process.returncode == 1
    assert "config.json" in output
    assert "Traceback" not in output
