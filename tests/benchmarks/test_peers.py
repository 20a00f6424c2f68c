"""benchmarks/peers: its bounds are those published beside the rivals' figures, its statistics those of rounds."""

from __future__ import annotations

import json
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

LLAMA = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 64,
}
# Of the same roofline, reckoned independently for 32 GB/s and 437 GFLOP/s: W2 at batch 1, 8 and 32 and W3 in ms,
# W1 and W4 in output tokens per second.
PUBLISHED = {
    "llama-160m": (8.7, 9.2, 20.4, 1238, 858, 602),
    "qwen3-0.6b": (37.5, 39.1, 88.4, 5229, 206, 164),
    "deepseek-tiny": (2.4, 4.3, 5.9, 310, 3345, 2681),
    "deepseek-tiny576": (3.2, 5.2, 8.2, 527, 2163, 1554),
}


def config_of(peers, name):
    kind, _, shape = peers.checkpoints.SHAPES[name]
    return {"model_type": kind, **shape}


@pytest.mark.parametrize("name", PUBLISHED)
def test_bounds_are_the_published_ones(peers, name):
    rates = peers.bounds.Rates(32e9, 437e9)
    shape = peers.bounds.Shape.of(config_of(peers, name))
    work = ("W2b1", "W2b8", "W2b32", "W3", "W1", "W4")
    reckoned = [peers.bounds.bound(shape, peers.workloads.WORKLOADS[each], rates) for each in work]
    for each, value, published in zip(work, reckoned, PUBLISHED[name], strict=True):
        assert value == pytest.approx(published, rel=0.005, abs=0.05), each  # published with one digit


def test_a_bound_follows_the_rate_that_sets_it(peers):
    shape = peers.bounds.Shape.of(LLAMA)
    one, many = (peers.workloads.WORKLOADS[name] for name in ("W2b1", "W2b32"))
    slow, fast = peers.bounds.Rates(32e9, 100e9), peers.bounds.Rates(64e9, 100e9)
    assert peers.bounds.bound(shape, one, fast) == pytest.approx(peers.bounds.bound(shape, one, slow) / 2)
    assert peers.bounds.bound(shape, many, fast) == peers.bounds.bound(shape, many, slow)


def test_another_model_type_is_refused_by_name(peers):
    with pytest.raises(ValueError, match=r"qwen3_moe and deepseek_v3: gpt2$"):
        peers.bounds.Shape.of({**LLAMA, "model_type": "gpt2"})


def test_prompts_are_the_same_for_a_seed_and_new_for_another(peers):
    shared = peers.workloads.WORKLOADS["W4"]
    prompts, again, other = (peers.workloads.draw_prompts(shared, seed) for seed in (1, 1, 2))
    assert prompts == again and len(prompts) == 32 and {len(prompt) for prompt in prompts} == {544}
    assert len({tuple(prompt[:512]) for prompt in prompts}) == 1 and len({tuple(prompt) for prompt in prompts}) == 32
    assert other[0][:512] != prompts[0][:512]


def test_time_per_token_leaves_out_what_comes_before_the_first(peers, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(peers.workloads.time, "perf_counter", lambda: clock[0])

    def generate(prompts, output):
        clock[0] += 7.0 + 0.01 * output
        return [[7] * output] * len(prompts)

    assert peers.workloads.measure(peers.workloads.WORKLOADS["W2b8"], 3, generate) == pytest.approx(10.0)
    assert peers.workloads.measure(peers.workloads.WORKLOADS["W3"], 3, generate) == pytest.approx(7010.0)


def test_an_answer_of_another_length_is_no_sample(peers):
    with pytest.raises(RuntimeError, match="must have 128 tokens"):
        peers.workloads.measure(
            peers.workloads.WORKLOADS["W1"], 0, lambda prompts, output: [[7] * (output - 1)] * len(prompts)
        )


def test_ratios_are_those_of_rounds(peers):
    ours, theirs = {"a": 2.0, "b": 8.0, "c": 1.0}, {"a": 3.0, "b": 4.0, "d": 9.0}
    assert peers.report.speed_ratios(ours, theirs, True) == [1.5, 0.5]
    assert peers.report.speed_ratios(ours, theirs, False) == [pytest.approx(2 / 3), 2.0]


def test_the_table_has_medians_extremes_and_what_was_not_run(peers):
    times = {"omni-engine": [10.0, 11.0, 12.0, 13.0, 30.0], "vllm": [20.0, 22.0, 24.0, 26.0, 15.0]}
    records = [{"rates": {"bytes_per_second": rate, "flops_per_second": rate}, "round": "x/0"} for rate in (1e9, 2e9)]
    records += [
        {
            "model": "llama-160m",
            "workload": "W2b1",
            "engine": engine,
            "version": "9",
            "round": f"x/{number}",
            "value": value,
            "foreign": 0.01,
        }
        for engine, values in times.items()
        for number, value in enumerate(values)
    ]
    given = peers.bounds.Rates(32e9, 437e9)
    table = peers.report.markdown(records, {"llama-160m": config_of(peers, "llama-160m")}, ["W2b1", "W3"], given)
    assert "| llama-160m | W2b1 | omni-engine | 12.00 (10.00 to 30.00) | 5 |  | 72% |" in table
    assert "| llama-160m | W2b1 | vllm | 22.00 (15.00 to 26.00) | 5 | 2.00 (0.50 to 2.00) | 39% |" in table
    assert "| llama-160m | W3 | vllm | not run |" in table
    assert "bound B, measured in these runs: 2.0 GB/s, 2 GFLOP/s" in table
    assert statistics.median(times["vllm"]) == 22.0


def test_a_line_of_llama_batched_bench_becomes_the_workloads_metric(peers):
    row = {"pp": 32, "tg": 64, "pl": 8, "t_pp": 0.5, "t_tg": 1.6}
    assert peers.llama_cpp.metric_of(row, "W2b8") == pytest.approx(25.0)
    assert peers.llama_cpp.metric_of(row, "W3") == pytest.approx(500.0)
    assert peers.llama_cpp.metric_of(row, "W1") == pytest.approx(32 * 128 / 2.1)


def test_without_peers_the_command_prints_what_is_there(peers, tmp_path):
    (tmp_path / "llama-160m").mkdir()
    (tmp_path / "llama-160m" / "config.json").write_text(json.dumps(LLAMA))
    arguments = [str(tmp_path), "--pairs", "0", "--models", "llama-160m", "--work", "W3"]
    done = subprocess.run([sys.executable, peers.compare.__file__, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| llama-160m | W3 | omni-engine | not run |" in done.stdout


def test_the_memory_of_a_server_is_that_of_all_its_processes(peers):
    program = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'x = bytearray(10**8); input()'])"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        deadline = time.monotonic() + 20
        while peers.server_process.memory_mb(process.pid) < 100 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(peers.server_process.descendants(process.pid)) == 2
        assert 100 <= peers.server_process.memory_mb(process.pid) < 1000
        process.communicate(b"\n")


def test_a_server_that_ends_is_told_from_one_that_is_slow(peers, tmp_path):
    with (
        peers.server_process.running([sys.executable, "-c", "raise SystemExit(3)"], {}, tmp_path / "log") as process,
        pytest.raises(RuntimeError, match="ended with status 3"),
    ):
        peers.server_process.first_token("http://127.0.0.1:9/v1", process)


def test_full_speed_begins_with_the_first_second_that_is_as_fast_as_the_end(peers):
    slow, fast = [number / 10 for number in range(50)], [5 + number / 100 for number in range(1000)]
    assert peers.server_start.full_speed_after(slow + fast) == pytest.approx(5.0, abs=0.15)
    assert peers.server_start.full_speed_after(fast) == 5.0
    gap = [time for time in fast if not 6 < time < 8]  # a fast beginning counts
    assert peers.server_start.full_speed_after(gap) == 5.0
    for few in ([], [1.0], [1.0, 1.5]):
        with pytest.raises(RuntimeError, match=f"no steady speed in what came of the streams: {len(few)} pieces"):
            peers.server_start.full_speed_after(few)


def test_streams_are_watched_until_their_time_is_over(peers, tmp_path, monkeypatch):
    """By the demo model's server; what is counted are its tokens, of all places at once."""
    monkeypatch.setattr(peers.server_start, "STREAMS", 2)
    monkeypatch.setattr(peers.server_start, "WATCHED_SECONDS", 4.0)
    monkeypatch.setattr(peers.server_start, "STREAM_TOKENS", 20)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [str(Path(sys.executable).with_name("omni-engine")), "serve", "--host", "127.0.0.1", "--port", port]
    start = peers.server_start.measure_start(
        [*command, "--enforce-eager"], {}, f"http://127.0.0.1:{port}/v1", tmp_path / "log"
    )
    assert 0 < start.first_token <= start.full_speed < start.first_token + 4 and start.peak_mb > 50
    table = peers.server_start.start_table({"ours": [start], "none": []}, [1.0])
    assert table.count("\n") == 3 and "| ours |" in table and "| import torch | 1.00" in table


def test_tokens_are_checked_once_for_each_state_of_the_code_and_wrong_ones_stop_the_measuring(
    peers, tmp_path, monkeypatch
):
    samples, asked = tmp_path / "samples.jsonl", []
    wrong = {"float32": False, "bfloat16": False}

    def check(model, dtype, extra):
        asked.append((model.name, dtype, extra))
        return peers.check.Check.of(dtype, [9.0 if wrong[dtype] else 0.0] * 10)

    monkeypatch.setattr(peers.compare, "check", check)
    options = SimpleNamespace(extra='{"block_size": 8}', run="now")
    for _ in range(2):
        peers.compare.ensure_checked(options, tmp_path / "one", samples)
    assert asked == [("one", dtype, {"block_size": 8}) for dtype in wrong]
    monkeypatch.setattr(peers.compare, "installed_versions", lambda: {"code": "other"})
    wrong["bfloat16"] = True
    for _ in range(2):
        with pytest.raises(RuntimeError, match="bfloat16: 0 of 10 tokens"):
            peers.compare.ensure_checked(options, tmp_path / "one", samples)
    assert [dtype for _, dtype, _ in asked[2:]] == ["float32", "bfloat16", "bfloat16"]
