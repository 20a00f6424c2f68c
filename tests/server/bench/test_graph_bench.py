"""`omni-engine bench graph` and `bench host`: their figures, what they refuse, and both end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from omni_engine.engine.config import DEMO_MODEL, EngineArgs, EngineConfig
from omni_engine.engine.floor import (
    Floor,
    MachineRates,
    StepCost,
    decode_cost,
    draft_model_cost,
    prediction_cost,
)
from omni_engine.engine.graphs.decode_loop import SAMPLING, StepTimes
from omni_engine.engine.graphs.runner import CaptureReport, GraphKey
from omni_engine.server.bench.graph import _steps_until_compiled, bench_config, graph_parser, loop_steps, step_cost
from omni_engine.server.bench.graph_report import GearTimes, graph_plot, graph_result, graph_tables, sum_reports
from omni_engine.server.bench.host import host_result, host_table
from omni_engine.server.cli import main


def test_a_config_alone_is_enough_and_limits_fit_the_steps(config_only):
    arguments = graph_parser().parse(
        [config_only, "--num-layers", "1", "--batch-sizes", "8,2,2", "--context-len", "100"]
    )
    arguments.model, arguments.load_format = config_only, "dummy"
    config = bench_config(arguments)
    assert config.model.num_layers == 1
    assert config.args.cudagraph_capture_sizes == [2, 8]
    assert config.max_model_len == 100 + loop_steps(arguments) + 2
    blocks = -(-(100 + loop_steps(arguments) + 2) // 16)
    assert (config.args.max_num_seqs, config.args.num_gpu_blocks_override) == (8, 8 * blocks + 1)


def test_flags_go_before_what_the_benchmark_would_choose(config_only):
    words = [config_only, "--max-num-seqs", "16", "--cudagraph-capture-sizes", "16", "--block-size", "32"]
    arguments = graph_parser().parse([*words, "--batch-sizes", "4", "--context-len", "100"])
    arguments.model, arguments.load_format = config_only, "dummy"
    args = bench_config(arguments).args
    assert (args.max_num_seqs, args.cudagraph_capture_sizes, args.block_size) == (16, [16], 32)


def test_what_cannot_be_measured_is_refused_with_the_remedy(config_only, capsys):
    assert main(["bench", "graph", config_only, "--num-layers", "1", "--context-len", "500"]) == 1
    assert "tokens, more than the model's 512; lower one of them" in capsys.readouterr().err
    assert main(["bench", "graph", config_only, "--num-layers", "1", "--context-len", "9", "--max-num-seqs", "4"]) == 1
    assert "--batch-sizes must not be above --max-num-seqs=4: 128" in capsys.readouterr().err
    for words, answer in (
        (["--plot", "steps.png"], "end the name in .svg: steps.png"),
        (["--num-layers", "1", "--load-format", "auto"], "--num-layers needs --load-format dummy"),
        (["--batch-sizes", "1,0"], "must be at least 1: 0"),
    ):
        with pytest.raises(SystemExit):
            main(["bench", "graph", config_only, *words])
        assert answer in capsys.readouterr().err


@pytest.mark.parametrize(("words", "backend"), [(["--graph-backend", "eager"], "eager"), (["--enforce-eager"], "none")])
def test_cold_is_refused_where_nothing_is_compiled(config_only, capsys, words, backend):
    words = [*words, "--batch-sizes", "1", "--context-len", "9", "--num-layers", "1", "--cold", "--device", "cpu"]
    assert main(["bench", "graph", config_only, *words]) == 1
    assert f"by the backend inductor; drop it for: {backend}" in capsys.readouterr().err


def test_cold_graphs_have_a_folder_of_their_own_and_the_other_settings_stay(config_only):
    arguments = graph_parser().parse([config_only, "--batch-sizes", "1", "--context-len", "9", "-cc", '{"mode": 3}'])
    arguments.model, arguments.load_format = config_only, "dummy"
    assert bench_config(arguments, "/x").args.compilation_config == {"mode": 3, "cache_dir": "/x"}
    assert bench_config(arguments).args.compilation_config == {"mode": 3}


class SlowGraphs:
    """A runner's graphs whose backend loads for three questions, compiles for a number of steps each, and may fail."""

    def __init__(self, *ready_after, fails=False):
        self.ready_after = dict(enumerate(ready_after, start=1))  # batch size -> steps
        self.fails = fails
        self.num_steps = 0
        self.demanded = []
        self.closed = False
        self.backend = SimpleNamespace(current=None, demand=self.demand)

    def demand(self, key):
        self.demanded.append(key)
        if len(self.demanded) > 3:
            self.backend.current = key

    def is_ready(self, key):
        return not self.fails and self.num_steps >= self.ready_after[key]

    def wait(self, timeout):
        return self.num_steps >= max(self.ready_after.values())

    def close(self):
        self.closed = True


def until_compiled(graphs, *words):
    arguments = graph_parser().parse(["m", "--disable-tqdm", *words])
    timed = SimpleNamespace(graphs=graphs, bypassed=False)

    def make_loop(size):
        def step():
            assert timed.bypassed and graphs.backend.current is not None
            graphs.num_steps += 1
            return size, graphs.num_steps

        return SimpleNamespace(step=step)

    return _steps_until_compiled(timed, {size: size for size in graphs.ready_after}, make_loop, arguments)


@pytest.mark.parametrize("fails", [False, True])
def test_every_batch_size_has_its_turn_while_graphs_are_compiled(fails):
    graphs = SlowGraphs(2, 9, fails=fails)
    steps = until_compiled(graphs, "--num-steps", "2", "--num-steps-warmup", "1")
    # turns of three steps, of which the first is not counted; none after the last graph came, or could not be made
    assert steps == {1: [(1, 2), (1, 3), (1, 8), (1, 9)], 2: [(2, 5), (2, 6)]}
    assert graphs.closed and graphs.demanded[0] == 1 and (fails or graphs.demanded[-1] == 2)


def test_no_step_counts_as_beside_a_compiler_when_the_cache_had_all():
    graphs = SlowGraphs(0, 0)
    assert until_compiled(graphs) == {1: [], 2: []}
    assert graphs.closed and not graphs.demanded


def steps_of(*totals):
    return [StepTimes(0.001, 0.002, total - 0.006, 0.001, 0.001, 0.001) for total in totals]


def report(*, from_cache, compile_seconds):
    return SimpleNamespace(from_cache=from_cache, compile_seconds=compile_seconds, seconds=1.5, num_bytes=7_000_000)


def whole(*results, backend="inductor"):
    machine = {"device": "a CPU", "num_threads": 2, "bytes_per_second": 3e10, "flops_per_second": 4e11, "dtype": "b"}
    return {
        "model_id": "x/y", "num_layers": 2, "dtype": "b", "backend": backend, "sampler": "greedy",
        "context_len": 64, "num_steps": 3, "machine": machine, "results": list(results),
    }  # fmt: skip


def figures(report, compiling=()):
    times = GearTimes(steps_of(0.2, 0.3, 0.4), steps_of(0.1) if report else [], 0.08, compiling)
    return graph_result(4, report, times, StepCost(1e9, 5e8, 0, 2e9), Floor(0.05, "memory", 0.05, 0.01, 0))


def test_eager_steps_while_compiling_stand_beside_those_alone():
    row = figures(report(from_cache=False, compile_seconds=31.0), steps_of(*[0.5] * 99, 0.9))
    compiling = row["eager_while_compiling_ms"]
    assert (compiling["num_steps"], compiling["median"], compiling["max"]) == pytest.approx((100, 500, 900))
    assert row["eager_ms"]["max"] == pytest.approx(400)
    text = graph_tables(whole(row))
    assert "while a process of the lowest priority compiled the missing graphs" in text
    (line,) = [line for line in text.splitlines() if "500.000" in line]
    assert line.split() == ["4", "3", "300.000", "398.000", "400.000", "100", "500.000", "504.000", "900.000"]
    assert "31.0 " in text and "manifest" not in text


@pytest.mark.parametrize(
    ("made", "backend", "reason"),
    [
        (report(from_cache=True, compile_seconds=31.0), "inductor", "all graphs were in the cache (--cold compiles"),
        (report(from_cache=False, compile_seconds=31.0), "inductor", "were there before the first step"),
        (report(from_cache=False, compile_seconds=0.0), "cudagraph", "nothing is compiled for these graphs: cudagraph"),
        (None, "inductor", "none while compiling: there are no graphs"),
    ],
)
def test_no_step_while_compiling_has_its_reason(made, backend, reason):
    row = figures(made)
    assert row["eager_while_compiling_ms"] is None
    text = graph_tables(whole(row, backend=backend))
    assert reason in text
    (line,) = [line for line in text.splitlines() if "398.000" in line]
    assert line.split()[-4:] == ["-"] * 4


def test_a_graph_of_the_cache_tells_what_it_took_once():
    assert "31.0 (manifest)" in graph_tables(whole(figures(report(from_cache=True, compile_seconds=31.0))))
    assert "- (in the cache)" in graph_tables(whole(figures(report(from_cache=True, compile_seconds=0.0))))


def test_figures_of_a_batch_size():

    times = GearTimes(steps_of(0.2, 0.3, 0.4), steps_of(0.11, 0.1, 0.09), 0.08)
    cost = StepCost(1e9, 5e8, 0, 2e9)
    made = report(from_cache=True, compile_seconds=30.0)
    result = graph_result(4, made, times, cost, Floor(0.05, "memory", 0.05, 0.01, 0))
    assert result["graph"] == {
        "from_cache": True, "compile_seconds": 30.0, "ready_seconds": 1.5, "artefact_bytes": 7_000_000
    }  # fmt: skip
    assert result["eager_ms"] == pytest.approx(
        {"median": 300, "p10": 220, "p90": 380, "p99": 398, "max": 400, "num_steps": 3}
    )
    assert result["graph_ms"] == pytest.approx(
        {"median": 100, "p10": 92, "p90": 108, "p99": 109.8, "max": 110, "num_steps": 3}
    )
    assert result["replay_ms"] == pytest.approx(95)
    assert result["host_us"]["step_input"] == pytest.approx(2000)
    assert (result["gb_per_second"], result["gflop_per_second"]) == pytest.approx((15, 20))
    assert result["share_of_floor"] == pytest.approx(0.5)
    assert result["engine_share_of_floor"] == pytest.approx(0.625)
    assert result["tokens_per_second"] == pytest.approx(50)
    text = graph_tables(whole(result))
    assert "a CPU, 2 threads: reads 30.0 GB/s, multiplies 400 GFLOP/s" in text
    assert "100.000 (92.000..108.000)" in text and "50.000 memory" in text
    plot = graph_plot(whole(result))
    assert ">graph (inductor)</text>" in plot and ">floor</text>" in plot


def test_figures_without_a_graph_are_those_of_eager_steps():
    steps = [StepTimes(0.0, 0.0, 0.1, 0.0, 0.0, 0.0)]
    result = graph_result(1, None, GearTimes(steps, [], 0.1), StepCost(1e9, 0, 0, 0), Floor(0.05, "memory", 0.05, 0, 0))
    assert result["graph"] is None and result["graph_ms"] is None
    assert result["share_of_floor"] == pytest.approx(0.5)


@pytest.mark.parametrize("sampler", SAMPLING)
def test_bench_graph_end_to_end(config_only, tmp_path, capsys, monkeypatch, sampler):
    rates = MachineRates(1e9, 2e9, "float32", "a CPU", 1)
    monkeypatch.setattr("omni_engine.engine.machine_rates.measure_machine_rates", lambda device, dtype: rates)
    file, plot = tmp_path / "result.json", tmp_path / "steps.svg"
    words = ["--batch-sizes", "1,3", "--context-len", "24", "--num-steps", "4", "--num-steps-warmup", "1"]
    words += ["--num-layers", "2", "--graph-backend", "eager", "--sampler", sampler, "--skip-tokenizer-init"]
    assert (
        main(["bench", "graph", config_only, *words, "--output-json", str(file), "--plot", str(plot), "--disable-tqdm"])
        == 0
    )
    result = json.loads(file.read_text())
    assert (result["num_layers"], result["backend"], result["sampler"]) == (2, "eager", sampler)
    assert result["machine"]["bytes_per_second"] == 1e9
    assert [row["batch_size"] for row in result["results"]] == [1, 3]
    config = EngineConfig.from_args(EngineArgs(config_only, load_format="dummy", hf_overrides={"num_hidden_layers": 2}))
    for row in result["results"]:
        assert 0 < row["graph_ms"]["p10"] <= row["graph_ms"]["median"] <= row["graph_ms"]["p90"]
        # the timed steps begin with 24 + 2 * 1 stored tokens and end with 24 + 2 * 5 - 1: 29.5 on average
        assert row["kv_bytes"] == row["batch_size"] * 30.5 * 2 * 2 * 8 * 4
        cost = decode_cost(config.model, row["batch_size"], 26)
        assert row["weight_bytes"] == cost.weight_bytes
        bytes_ = row["weight_bytes"] + row["kv_bytes"] + row["other_bytes"]
        assert row["floor_ms"] == pytest.approx(1e3 * max(bytes_ / 1e9, row["flops"] / 2e9))
    out = capsys.readouterr().out
    assert "tokens/s" in out and "StepInput" in out
    assert plot.read_text().startswith("<svg")


def test_bench_host_end_to_end(tmp_path, capsys):
    file = tmp_path / "result.json"
    words = ["--batch-sizes", "1,5", "--num-steps", "20", "--num-steps-warmup", "2", "--disable-tqdm"]
    assert main(["bench", "host", *words, "--output-json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert [row["batch_size"] for row in result["results"]] == [1, 5]
    assert [row["target_us"] for row in result["results"]] == [153, 165]
    for row in result["results"]:
        assert list(row["rows_us"]) == ["schedule", "step_input", "launch", "step_output", "update"]
        assert 0 < row["p10_us"] <= row["total_us"] <= row["p90_us"]
    assert "target (150 + 3 per request)" in capsys.readouterr().out


def test_host_figures_count_the_step_that_needs_blocks():
    def step(seconds):
        return StepTimes(seconds, 0.0, 0.0, 0.0, 0.0, 0.0)

    # every sixteenth step takes 17 us, the others 1; one in the third period was interrupted
    times = [step(17e-6 if index % 16 == 7 else 1e-6) for index in range(5 * 16)]
    times[33] = step(1.0)
    result = host_result(32, times, [step.total for step in times])
    assert result["rows_us"]["schedule"] == pytest.approx(2.0)
    assert result["total_us"] == result["cpu_us"] == pytest.approx(2.0)
    assert result["target_us"] == 246
    assert "2.0" in host_table([result]) and "246.0" in host_table([result])


def test_host_figures_of_fewer_steps_than_a_block_has():
    assert host_result(1, [StepTimes(2e-6, 0, 0, 0, 0, 0)] * 3, [1e-6] * 3)["total_us"] == pytest.approx(2.0)


def test_importing_these_benchmarks_brings_no_torch():
    modules = "graph, graph_report, host, plot"
    code = f"import sys; from omni_engine.server.bench import {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def speculating(method="mtp", count=3, **rest):
    return json.dumps({"method": method, "num_speculative_tokens": count, **rest})


def config_of(path, *words):
    arguments = graph_parser().parse([path, "--batch-sizes", "800", "--context-len", "20", "--num-steps", "4", *words])
    arguments.model = path
    return bench_config(arguments), arguments


def test_limits_fit_steps_whose_drafts_are_all_accepted():
    config, arguments = config_of(str(DEMO_MODEL), "--speculative-config", speculating())
    length = 20 + 4 * loop_steps(arguments) + 2
    assert (config.max_model_len, config.max_num_batched_tokens) == (length, 4 * 800)
    assert config.args.num_gpu_blocks_override == 800 * -(-length // 16) + 1
    assert config.speculation.choice.depths == (3,)  # one depth, and graphs for it alone


def test_depths_that_change_are_refused(capsys):
    for command in ("graph", "host"):
        config = speculating(adaptive_depth=True)
        words = ["bench", command, *([str(DEMO_MODEL)] if command == "graph" else []), "--speculative-config", config]
        assert main(words) == 1
        assert "times steps of one depth" in capsys.readouterr().err
    config_of(str(DEMO_MODEL), "--speculative-config", speculating(adaptive_depth=False))


def test_each_method_has_its_own_floor(config_only):
    demo = str(DEMO_MODEL)
    plain = config_of(demo)[0]
    mtp = config_of(demo, "--speculative-config", speculating())[0]
    ngram = config_of(demo, "--speculative-config", speculating("ngram", prompt_lookup_max=3))[0]
    words = ("--load-format", "dummy", "--speculative-config", speculating("draft_model", 2, model=config_only))
    other = config_of(config_only, *words)[0]
    model = plain.model
    assert step_cost(plain, 4, 30.0, 1.0) == decode_cost(model, 4, 30.0)
    assert step_cost(ngram, 4, 30.0, 1.5) == decode_cost(model, 4, 30.0, 4)
    assert step_cost(mtp, 4, 30.0, 1.5) == decode_cost(model, 4, 30.0, 4) + prediction_cost(model, 4, 30.0, 3, 0.5)
    own = draft_model_cost(other.model, 4, 30.0, 2, 0.5)
    assert step_cost(other, 4, 30.0, 1.5) == decode_cost(other.model, 4, 30.0, 3) + own


def test_a_step_of_two_graphs_waits_for_both_and_adds_them_up():
    graphs = SlowGraphs(2, 9)
    arguments = graph_parser().parse(["m", "--disable-tqdm", "--num-steps", "2", "--num-steps-warmup", "0"])
    timed = SimpleNamespace(graphs=graphs, bypassed=False)

    def step():
        graphs.num_steps += 1
        return graphs.num_steps

    loop = SimpleNamespace(step=step)
    steps = _steps_until_compiled(timed, {1: 1}, lambda size: loop, arguments, [2, None])
    assert len(steps[1]) == 9  # until the second one was there
    keys = GraphKey(1, 4, "split"), GraphKey(1, 4, "draft")
    reports = [CaptureReport(keys[0], 5.0, True, 30.0, 100), CaptureReport(keys[1], 7.0, False, 12.0, 50)]
    assert sum_reports(reports) == CaptureReport(keys[0], 7.0, False, 42.0, 150)
    assert sum_reports(reports[:1]) is reports[0]


@pytest.mark.parametrize("sampler", SAMPLING)
def test_bench_graph_of_steps_with_drafts(tmp_path, capsys, monkeypatch, sampler):
    rates = MachineRates(1e9, 2e9, "float32", "a CPU", 1)
    monkeypatch.setattr("omni_engine.engine.machine_rates.measure_machine_rates", lambda device, dtype: rates)
    file = tmp_path / "result.json"
    words = ["--batch-sizes", "1,2", "--context-len", "24", "--num-steps", "3", "--num-steps-warmup", "1", "--device"]
    words += ["cpu", "--graph-backend", "eager", "--sampler", sampler, "--skip-tokenizer-init", "--disable-tqdm"]
    words += ["--output-json", str(file), "--speculative-config", speculating(count=2)]
    assert main(["bench", "graph", str(DEMO_MODEL), *words]) == 0
    result = json.loads(file.read_text())
    assert (result["method"], result["num_drafts"]) == ("mtp", 2)
    model = EngineConfig.from_args(EngineArgs(str(DEMO_MODEL))).model
    for row in result["results"]:
        brought, size = row["tokens_per_step"], row["batch_size"]
        assert 1 <= brought <= 3
        assert row["graph"] is not None and row["graph_ms"] is not None
        assert row["ms_per_token"] == pytest.approx(row["graph_ms"]["median"] / brought)
        assert row["tokens_per_second"] == pytest.approx(size * brought / row["engine_ms"] * 1e3)
        for name, value in row["host_us"].items():
            assert row["host_us_per_token"][name] == pytest.approx(value / brought)
        # with the first layer's dense weights and all but the experts' the same, whatever the context
        cost = decode_cost(model, size, 24, 3) + prediction_cost(model, size, 24, 2)
        assert row["weight_bytes"] == pytest.approx(cost.weight_bytes)
        assert row["kv_bytes"] > cost.kv_bytes  # the context has grown
        bytes_ = row["weight_bytes"] + row["kv_bytes"] + row["other_bytes"]
        assert row["floor_ms"] == pytest.approx(1e3 * max(bytes_ / 1e9, row["flops"] / 2e9))
    out = capsys.readouterr().out
    assert "Speculation: mtp; each step computes 3 tokens of a request, 2 of them drafts, and drafts 2 more" in out
    assert "tokens/step" in out and "The same for each token that a step brought a request" in out


def test_without_speculation_the_result_says_nothing_of_it(config_only, tmp_path, capsys, monkeypatch):
    rates = MachineRates(1e9, 2e9, "float32", "a CPU", 1)
    monkeypatch.setattr("omni_engine.engine.machine_rates.measure_machine_rates", lambda device, dtype: rates)
    file = tmp_path / "result.json"
    words = ["--batch-sizes", "1", "--context-len", "24", "--num-steps", "2", "--num-layers", "1", "--graph-backend"]
    words += ["eager", "--skip-tokenizer-init", "--output-json", str(file), "--disable-tqdm", "--device", "cpu"]
    assert main(["bench", "graph", config_only, *words]) == 0
    result = json.loads(file.read_text())
    assert list(result) == [
        "model_id", "num_layers", "dtype", "backend", "sampler", "context_len", "num_steps", "machine", "results",
    ]  # fmt: skip
    (row,) = result["results"]
    assert not any("token" in name and name != "tokens_per_second" for name in row)
    assert row["tokens_per_second"] == pytest.approx(1e3 / row["engine_ms"])
    assert "peculation" not in capsys.readouterr().out


@pytest.mark.parametrize(("method", "rest"), [("mtp", {}), ("ngram", {"prompt_lookup_max": 3})])
def test_bench_host_of_steps_with_drafts(tmp_path, capsys, method, rest):
    file = tmp_path / "result.json"
    words = ["--batch-sizes", "1,5", "--num-steps", "20", "--num-steps-warmup", "2", "--disable-tqdm"]
    words += ["--speculative-config", speculating(method, **rest), "--output-json", str(file)]
    assert main(["bench", "host", *words]) == 0
    result = json.loads(file.read_text())
    assert result["speculative_config"]["method"] == method
    for row in result["results"]:
        assert row["tokens_per_step"] == 4
        assert row["total_us_per_token"] == row["total_us"] / 4
        assert row["rows_us_per_token"] == {name: value / 4 for name, value in row["rows_us"].items()}
    assert "Per token of a request (4 in a step)" in capsys.readouterr().out


def test_bench_host_needs_no_model_that_drafts(capsys):
    config = speculating("draft_model", model="x")
    assert main(["bench", "host", "--speculative-config", config]) == 1
    assert "take one of them as the method of --speculative-config: draft_model" in capsys.readouterr().err
