"""`omni-engine bench throughput | latency | startup` with a tiny model, and what importing them brings in."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from omni_engine.engine.config import DEMO_MODEL, EngineArgs
from omni_engine.engine.outputs import CompletionOutput, RequestOutput
from omni_engine.server.arguments import engine_args
from omni_engine.server.bench.latency import latency_parser, latency_result
from omni_engine.server.bench.startup import engine_words, phase_result, time_server
from omni_engine.server.bench.throughput import throughput_result
from omni_engine.server.cli import main
from omni_engine.server.serve_arguments import serve_parser


@pytest.fixture(scope="module")
def path(make_checkpoint):
    return str(make_checkpoint("LlamaForCausalLM"))


@pytest.fixture
def bench(capsys, tmp_path, path):
    """`bench(*words)`: standard output and the saved JSON."""

    def bench(command, *words):
        file = tmp_path / "result.json"
        assert main(["bench", command, path, "--disable-tqdm", "--output-json", str(file), *words]) == 0
        return capsys.readouterr().out, json.loads(file.read_text())

    return bench


def test_throughput_counts_what_was_generated(bench, path):
    out, result = bench(
        "throughput", "--num-prompts", "4", "--input-len", "12", "--output-len", "5", "--n", "2", "--num-warmups", "2"
    )
    assert list(result) == [
        "model_id", "elapsed_time", "num_requests", "total_num_tokens", "requests_per_second", "tokens_per_second",
    ]  # fmt: skip
    assert (result["model_id"], result["num_requests"], result["total_num_tokens"]) == (path, 4, 4 * (12 + 2 * 5))
    elapsed = result["elapsed_time"]
    assert out.splitlines() == [
        f"Throughput: {4 / elapsed:.2f} requests/s, {88 / elapsed:.2f} total tokens/s, "
        f"{40 / elapsed:.2f} output tokens/s",
        "Total num prompt tokens:  48",
        "Total num output tokens:  40",
    ]


def test_throughput_with_the_core_in_its_own_process(bench):
    words = ("--num-prompts", "3", "--input-len", "7", "--output-len", "4", "--num-warmups", "1", "--async-engine")
    assert bench("throughput", *words)[1]["total_num_tokens"] == 33


def test_throughput_of_a_text_file(bench, tmp_path):
    file = tmp_path / "s.json"
    text = "The harbour lies below the town, and every morning the boats go out."
    file.write_text(json.dumps([{"conversations": [{"value": text}, {"value": "yes"}]}]))
    words = ("--dataset-path", str(file), "--num-prompts", "2", "--sharegpt-output-len", "3")
    out, result = bench("throughput", *words)
    assert result["num_requests"] == 2
    assert "Total num output tokens:  6" in out


def test_throughput_without_a_tokenizer(bench):
    words = ("--num-prompts", "2", "--input-len", "9", "--output-len", "2", "--skip-tokenizer-init")
    assert bench("throughput", *words)[1]["total_num_tokens"] == 22


def test_requests_longer_than_the_model_are_refused_with_the_remedy(capsys, path):
    words = ["--input-len", "250", "--output-len", "20", "--disable-tqdm"]
    assert main(["bench", "throughput", path, "--num-prompts", "2", *words]) == 1
    assert "250 prompt and 20 output tokens, more than the model's 256; lower --input-len" in capsys.readouterr().err
    assert main(["bench", "latency", path, *words]) == 1
    assert "250 + 20 tokens, more than the model's 256" in capsys.readouterr().err


def test_latency_times_every_batch(bench, path):
    words = ("--num-iters", "3", "--num-iters-warmup", "1", "--batch-size", "2", "--output-len", "4")
    out, result = bench("latency", *words)
    assert list(result) == ["model_id", "avg_latency", "latencies", "percentiles"]
    assert len(result["latencies"]) == 3 and all(seconds > 0 for seconds in result["latencies"])
    assert list(result["percentiles"]) == ["10", "25", "50", "75", "90", "99"]
    assert out.splitlines() == [
        f"Avg latency: {result['avg_latency']} seconds",
        *(f"{name}% percentile latency: {value} seconds" for name, value in result["percentiles"].items()),
    ]


def test_latency_leaves_prefix_caching_off_unless_asked_for():
    assert latency_parser().parse(["m"]).enable_prefix_caching is False
    assert latency_parser().parse(["m", "--enable-prefix-caching"]).enable_prefix_caching is True


def test_latency_figures():
    assert latency_result("m", [1.0, 2.0, 3.0, 4.0, 10.0]) == {
        "model_id": "m", "avg_latency": 4.0, "latencies": [1.0, 2.0, 3.0, 4.0, 10.0],
        "percentiles": pytest.approx({10: 1.4, 25: 2, 50: 3, 75: 4, 90: 7.6, 99: 9.76}),
    }  # fmt: skip


def test_throughput_figures():
    outputs = [
        RequestOutput("0", None, [1, 2, 3], None, [CompletionOutput(0, "", [4, 5]), CompletionOutput(1, "", [6])], True)
    ]
    assert throughput_result("m", outputs * 2, 4.0) == {
        "model_id": "m", "elapsed_time": 4.0, "num_requests": 2, "total_num_tokens": 12, "requests_per_second": 0.5,
        "tokens_per_second": 3.0,
    }  # fmt: skip


def test_startup_starts_fresh_processes(bench):
    words = ("--num-iters-cold", "1", "--num-iters-warmup", "0", "--num-iters-warm", "1", "--max-model-len", "64")
    out, result = bench("startup", *words)
    assert list(result) == [
        f"{begin}{phase}_{name}{end}"
        for phase in ("cold", "warm")
        for name in ("startup", "compilation", "first_health", "server_ready")
        for begin, end in (("avg_", "_time"), ("", "_times"), ("", "_percentiles"))
    ]
    assert result["cold_startup_times"][0] > 0.3  # no engine starts faster: torch alone takes longer
    assert (result["cold_compilation_times"], result["avg_warm_compilation_time"]) == ([0.0], 0.0)
    assert 0 < result["cold_first_health_times"][0] < result["cold_server_ready_times"][0]
    assert f"Avg first health time: {result['avg_cold_first_health_time']:.2f} seconds" in out
    assert f"Avg startup time: {result['avg_warm_startup_time']:.2f} seconds" in out
    assert "COLD STARTUP:" in out and "WARM STARTUP:" in out


def test_an_engine_that_does_not_start_is_an_error_with_its_cause(capsys, path):
    assert main(["bench", "startup", path, "--disable-tqdm", "--max-model-len", "4k"]) == 1
    assert "the engine did not start: ValueError: max_model_len is greater than the 256" in capsys.readouterr().err


def test_the_command_line_of_engine_arguments_comes_to_the_same_arguments():
    args = EngineArgs(
        model="a b", max_model_len=100, enable_prefix_caching=False, skip_tokenizer_init=True, hf_overrides={"a": [1]}
    )
    words = engine_words(args)
    assert engine_args(serve_parser().parse(words)) == args
    assert engine_words(EngineArgs(model="m")) == ["--model=m"]


def test_a_server_that_does_not_start_is_an_error_with_its_cause(path):
    with pytest.raises(RuntimeError, match=r"the server did not start: .*max_model_len is greater than the 256"):
        time_server(EngineArgs(model=path, max_model_len=4000))


def test_startup_figures():
    result = phase_result("cold", {"startup": [1.0, 3.0], "compilation": [0.0, 0.0]})
    assert (result["avg_cold_startup_time"], result["cold_startup_times"]) == (2.0, [1.0, 3.0])
    assert result["cold_startup_percentiles"][75] == pytest.approx(2.5)
    assert result["cold_compilation_percentiles"] == dict.fromkeys((10, 25, 50, 75, 90, 99), 0.0)


def test_importing_the_benchmarks_brings_no_torch():
    modules = "serve, throughput, latency, startup, commands"
    code = f"import sys, omni_engine.server.bench; from omni_engine.server.bench import {modules}; "
    code += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


SPECULATING = ("--speculative-config", '{"method": "mtp", "num_speculative_tokens": 2, "adaptive_depth": false}')
DRAFT_KEYS = [
    "spec_decode_acceptance_rate", "spec_decode_acceptance_length", "spec_decode_num_drafts",
    "spec_decode_draft_tokens", "spec_decode_accepted_tokens", "spec_decode_per_position_acceptance_rates",
]  # fmt: skip


@pytest.fixture
def demo_bench(capsys, tmp_path):
    """As `bench`, of the demo with two drafts per step."""

    def bench(command, *words):
        file = tmp_path / "result.json"
        flags = ["--disable-tqdm", "--output-json", str(file), *SPECULATING, "--max-num-seqs", "4", "--device", "cpu"]
        assert main(["bench", command, str(DEMO_MODEL), *flags, *words]) == 0
        return capsys.readouterr().out, json.loads(file.read_text())

    return bench


@pytest.mark.parametrize("mode", [(), ("--async-engine",)], ids=["embedded", "async"])
def test_throughput_tells_what_the_drafts_of_the_measured_prompts_came_to(demo_bench, mode):
    words = ("--num-prompts", "2", "--input-len", "12", "--output-len", "9", "--num-warmups", "2", *mode)
    out, result = demo_bench("throughput", *words)
    assert list(result)[-6:] == DRAFT_KEYS
    # Per request the prompt brings a token, and each step those it accepts and one more, but for the last perhaps.
    drafts, accepted = result["spec_decode_num_drafts"], result["spec_decode_accepted_tokens"]
    assert 2 * 8 <= drafts + accepted <= 2 * 9
    assert 2 * drafts - 2 <= result["spec_decode_draft_tokens"] <= 2 * drafts
    assert result["spec_decode_acceptance_length"] == 1 + accepted / drafts
    assert f"{'Drafts:':<40} {drafts:<10}" in out.splitlines()


def test_latency_tells_what_the_drafts_of_the_measured_batches_came_to(demo_bench):
    words = ("--num-iters", "2", "--num-iters-warmup", "3", "--batch-size", "2", "--output-len", "9")
    out, result = demo_bench("latency", *words)
    assert list(result)[-6:] == DRAFT_KEYS
    drafts, accepted = result["spec_decode_num_drafts"], result["spec_decode_accepted_tokens"]
    assert 2 * 2 * 8 <= drafts + accepted <= 2 * 2 * 9
    assert sum(result["spec_decode_per_position_acceptance_rates"]) * drafts == pytest.approx(accepted)
    assert out.splitlines()[7] == "Speculative Decoding".center(50, "-")


@pytest.mark.full
def test_startup_takes_a_drafter(demo_bench):
    words = ("--num-iters-cold", "1", "--num-iters-warmup", "0", "--num-iters-warm", "1", "--max-model-len", "64")
    assert demo_bench("startup", *words)[1]["warm_startup_times"][0] > 0.3


def test_a_model_that_cannot_draft_is_refused_by_name(path, capsys):
    for command in ("throughput", "latency", "startup"):
        assert main(["bench", command, path, "--disable-tqdm", *SPECULATING]) == 1
        assert "needs an architecture with a prediction layer" in capsys.readouterr().err, command
