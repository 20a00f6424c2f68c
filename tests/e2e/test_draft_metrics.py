"""Speculation as a server reports it: equal counts on `/metrics`, in answers, in the log and in `bench serve`."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from omni_engine.engine.config import DEMO_MODEL
from omni_engine.server.bench.acceptance import read_counters

COMMAND = [sys.executable, "-c", "from omni_engine.server.cli import main; import sys; sys.exit(main())"]
SPECULATION = {"method": "mtp", "num_speculative_tokens": 3, "adaptive_depth": False}


class Server:
    def __init__(self, log):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        words = ["serve", str(DEMO_MODEL), "--host", "127.0.0.1", "--port", str(self.port), "--max-num-seqs", "4"]
        words += ["--speculative-config", json.dumps(SPECULATION), "--enable-per-request-metrics", "--device", "cpu"]
        self.log = log
        self.process = subprocess.Popen(
            [*COMMAND, *words], stdout=log.open("w"), stderr=subprocess.STDOUT,
            env=os.environ | {"VLLM_LOG_STATS_INTERVAL": "0.2"},
        )  # fmt: skip

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=10) as response:
            return response.read().decode()

    def complete(self, **fields):
        body = {"prompt": "And it came to pass", "max_tokens": 30, "temperature": 0, "ignore_eos": True, **fields}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/v1/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.loads(response.read())

    def drafts(self):
        return read_counters(self.get("/metrics"))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("log") / "log")
    deadline = time.monotonic() + 60
    while True:
        try:
            server.get("/health")
            break
        except OSError:
            assert time.monotonic() < deadline and server.process.poll() is None, server.log.read_text()
            time.sleep(0.05)
    yield server
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(20) == 0


def test_the_counters_are_there_before_the_first_request(server):
    text = server.get("/metrics")
    assert re.search(r"^vllm:spec_decode_num_drafts_total\{engine=\"0\",model_name=\"\S+\"\} ", text, re.MULTILINE)
    assert text.count("vllm:spec_decode_num_accepted_tokens_per_pos_total{") == 3


def test_the_answers_sum_up_to_the_counters(server):
    before = server.drafts()
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda seed: server.complete(seed=seed, temperature=seed % 2), range(6)))
    grown = server.drafts().since(before)
    metrics = [answer["metrics"] for answer in answers]
    assert sum(each["num_draft_tokens"] for each in metrics) == grown.num_draft_tokens > 0
    assert sum(each["num_accepted_tokens"] for each in metrics) == grown.num_accepted_tokens > 0
    assert sum(grown.num_accepted_per_position) == grown.num_accepted_tokens


def test_the_log_lines_sum_up_to_the_counters(server):
    server.complete()
    deadline = time.monotonic() + 20
    while True:
        lines = re.findall(
            r"SpecDecoding metrics: .*Accepted: (\d+) tokens, Drafted: (\d+) tokens", server.log.read_text()
        )
        told = [sum(int(line[index]) for line in lines) for index in (0, 1)]
        drafts = server.drafts()
        if told == [drafts.num_accepted_tokens, drafts.num_draft_tokens]:
            break
        assert time.monotonic() < deadline, (told, drafts)
        time.sleep(0.1)


def test_bench_serve_tells_what_came_on_top(server, tmp_path):
    before, file = server.drafts(), tmp_path / "result.json"
    command = [
        *COMMAND, "bench", "serve", "--port", str(server.port), "--ignore-eos", "--disable-tqdm", "--save-result",
        "--result-filename", str(file), "--num-prompts", "5", "--input-len", "20", "--output-len", "16",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    grown, result = server.drafts().since(before), json.loads(file.read_text())
    assert (result["spec_decode_num_drafts"], result["spec_decode_accepted_tokens"]) == (
        grown.num_drafts, grown.num_accepted_tokens,
    )  # fmt: skip
    assert result["spec_decode_per_position_acceptance_rates"] == grown.acceptance_per_position
    assert f"{'Draft tokens:':<40} {grown.num_draft_tokens:<10}" in done.stdout.splitlines()
