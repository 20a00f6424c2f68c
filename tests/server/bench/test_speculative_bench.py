"""`omni-engine bench speculative`: its rounds, its figures, what it refuses, and that its lottery is nowhere else."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import omni_engine
from omni_engine import Engine
from omni_engine.engine.config import DEMO_MODEL, EngineArgs, EngineConfig
from omni_engine.engine.graphs.runner import GraphKey
from omni_engine.engine.graphs.startup import _speculation_field
from omni_engine.engine.messages import Start
from omni_engine.models.config_parser import parse_config
from omni_engine.models.tokenizer import load_tokenizer
from omni_engine.scheduler.draft_stats import DraftStats
from omni_engine.scheduler.request import RequestInput, RequestUpdate
from omni_engine.scheduler.sampling_params import SamplingParams
from omni_engine.server.bench import batch_run, speculative
from omni_engine.server.bench.batch_run import BatchRun, run_batch
from omni_engine.server.bench.shapes import SHAPES
from omni_engine.server.bench.speculative import make_contenders, prompt_source, speculative_parser, wait_for_graphs
from omni_engine.server.bench.speculative_report import EngineRuns, engine_figures, speculative_tables
from omni_engine.server.cli import main
from omni_engine.server.serve_arguments import serve_parser

DEMO = str(DEMO_MODEL)
SHORT = ("--warmup", "0", "--input-len", "12", "--output-len", "10", "--disable-tqdm", "--device", "cpu")


@pytest.fixture
def bench(capsys, tmp_path):
    """`bench(*words)`: standard output and the saved JSON."""

    def bench(*words):
        file = tmp_path / "result.json"
        assert main(["bench", "speculative", *SHORT, "--output-json", str(file), *words]) == 0
        return capsys.readouterr().out, json.loads(file.read_text())

    return bench


def parsed(*words):
    arguments = speculative_parser().parse([*words])
    if arguments.model_argument:
        arguments.model = arguments.model_argument
    arguments.require_graph = False
    return arguments


def contenders(*words):
    arguments = parsed(*words)
    return make_contenders(arguments, EngineArgs(arguments.model), {"method": "mtp"})


# --- a whole run ---------------------------------------------------------------------------------------------------


def test_a_run_with_the_demo(bench):
    words = ("--depths", "1,3", "--adaptive", "--batch-sizes", "2", "--temperature", "0,0.8")
    out, result = bench(DEMO, *words)
    assert (result["method"], result["acceptance"], result["synthetic_acceptance"]) == ("mtp", "measured", None)
    assert (result["dataset"], result["backend"], result["rounds"]) == ("cut from held_out.txt", "eager", 5)
    groups = [(group["temperature"], group["batch_size"]) for group in result["results"]]
    assert groups == [(0, 2), (0.8, 2)]
    for group in result["results"]:
        none, one, three, adaptive = group["engines"]
        assert [engine["name"] for engine in group["engines"]] == ["none", "k=1", "k=3", "adaptive to 3"]
        assert (one["depths"], three["depths"], adaptive["depths"]) == ([1], [3], [0, 2, 3])
        size = group["batch_size"]
        # without drafts each round is one step by the prompts and one for each further token
        assert none["steps_by_graph_and_depth"] == {"0": 5 * 9} and none["ratio"] == {"median": 1, "min": 1, "max": 1}
        assert "spec_decode_num_drafts" not in none
        for engine in (one, three, adaptive):
            assert engine["same_tokens"] == 1.0
            assert engine["steps_eager"] == 0 and engine["steps_by_graph"] > 0
            assert set(map(int, engine["steps_by_graph_and_depth"])) <= set(engine["depths"])
            assert len(engine["spec_decode_per_position_acceptance_rates"]) == max(engine["depths"])
            ratios = engine["rounds"]["ratio"]
            rates = engine["rounds"]["tokens_per_second"]
            assert ratios == [own / base for own, base in zip(rates, none["rounds"]["tokens_per_second"], strict=True)]
            assert engine["ratio"] == {"median": sorted(ratios)[2], "min": min(ratios), "max": max(ratios)}
            assert engine["tokens_per_second"] == sorted(rates)[2]
        for engine in (one, three):  # each step brings a request what it accepts and one more, but for the last perhaps
            brought = engine["spec_decode_num_drafts"] + engine["spec_decode_accepted_tokens"]
            assert 5 * size * 9 <= brought <= 5 * size * 10
    assert "Batch size 2, temperature 0.8" in out and "SYNTHETIC" not in out


def test_acceptance_is_that_of_an_engine_with_the_same_prompts(bench):
    _, result = bench(DEMO, "--depths", "2", "--batch-sizes", "3")
    arguments = parsed(DEMO, *SHORT)
    _, make_prompt = prompt_source(arguments, EngineConfig.from_args(EngineArgs(DEMO)))
    config = {"method": "mtp", "num_speculative_tokens": 2, "adaptive_depth": False}
    engine = Engine(DEMO, speculative_config=config, max_num_seqs=3, enable_prefix_caching=False, device="cpu")
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    for index in range(5):
        generator = np.random.default_rng([0, 3, index])
        engine.generate([{"prompt_token_ids": make_prompt(generator)} for _ in range(3)], params)
    own = result["results"][0]["engines"][1]
    drafts = engine.stats().drafts
    assert own["spec_decode_accepted_tokens"] == drafts.num_accepted_tokens > 0
    assert own["spec_decode_per_position_acceptance_rates"] == drafts.acceptance_per_position


def test_tokens_that_speculation_changes_are_noticed(bench, monkeypatch):
    monkeypatch.setattr("omni_engine.engine.build.accept_equal", lambda drafts, *_: (drafts >= 0).sum(dim=1))
    _, result = bench(DEMO, "--depths", "3", "--batch-sizes", "2", "--temperature", "1.5")
    none, three = result["results"][0]["engines"]
    assert none["same_tokens"] == 1.0 and three["same_tokens"] < 0.5
    assert three["spec_decode_acceptance_rate"] > 99


def test_prompt_lookup_and_random_prompts(bench, config_only):
    words = ("--spec-method", "ngram", "--speculative-config.prompt_lookup_max", "2", "--dataset", "random")
    _, result = bench(config_only, *words, "--load-format", "dummy", "--depths", "2", "--batch-sizes", "2",
                      "--skip-tokenizer-init")  # fmt: skip
    assert (result["method"], result["dataset"]) == ("ngram", "drawn at random")
    assert result["results"][0]["engines"][1]["same_tokens"] == 1.0


# --- the lottery ---------------------------------------------------------------------------------------------------


def test_acceptance_by_lot_has_its_rates_and_is_labelled_everywhere(bench):
    words = ("--depths", "1,3", "--batch-sizes", "8", "--output-len", "32")
    out, result = bench(DEMO, *words, "--synthetic-acceptance", "0.5,0.2,0.1")
    assert (result["acceptance"], result["synthetic_acceptance"]) == ("SYNTHETIC", [0.5, 0.2, 0.1])
    none, *others = result["results"][0]["engines"]
    assert none["name"] == "none" and none["same_tokens"] == 1.0
    assert all(engine["name"].endswith(" SYNTHETIC") and engine["same_tokens"] is None for engine in others)
    one, three = others
    for engine, rates in ((one, [0.5]), (three, [0.5, 0.2, 0.1])):
        number = engine["spec_decode_num_drafts"]
        assert number > 400
        for share, rate in zip(engine["spec_decode_per_position_acceptance_rates"], rates, strict=True):
            assert abs(share - rate) < 4 * (rate * (1 - rate) / number) ** 0.5
    lines = out.splitlines()
    assert lines[0] == "SYNTHETIC: drafts are accepted by lot, 0.5, 0.2, 0.1 of them by place; the tokens mean nothing"
    assert "Batch size 8, temperature 0 SYNTHETIC" in lines
    assert sum("SYNTHETIC" in line for line in lines) == 2 + 2


def test_drafts_of_real_acceptance_have_other_rates(bench):
    # the control of the test above
    _, result = bench(DEMO, "--depths", "3", "--batch-sizes", "8", "--output-len", "24")
    shares = result["results"][0]["engines"][1]["spec_decode_per_position_acceptance_rates"]
    assert all(share - rate > 0.1 for share, rate in zip(shares, (0.5, 0.2, 0.1), strict=True))


def test_no_engine_that_serves_can_be_told_to_accept_by_lot(capsys):
    names = [field.name for field in dataclasses.fields(EngineArgs)]
    assert not [name for name in names if "accept" in name or "synthetic" in name]
    assert list(Start.__struct_fields__) == ["args"]  # all that a core in its own process is told
    assert not [action for action in serve_parser()._option_string_actions if "accept" in action or "synth" in action]
    for key in ("acceptance_rates", "synthetic_acceptance", "acceptance"):
        with pytest.raises(ValueError, match=f"not supported: {key}"):
            EngineArgs(DEMO, speculative_config={"method": "mtp", key: [0.5]})
        with pytest.raises(TypeError):
            Engine(DEMO, **{key: (0.5,)})
    for command in (["serve"], ["generate"], ["compile"], *(["bench", name] for name in (
        "serve", "throughput", "latency", "startup", "graph", "host"))):  # fmt: skip
        with pytest.raises(SystemExit):
            main([*command, "--synthetic-acceptance", "0.5"])
        assert "unknown flag" in capsys.readouterr().err, command


def test_only_this_benchmark_loads_an_engine_with_rates():
    root = Path(omni_engine.__file__).parent.resolve()
    passing = re.compile(r"acceptance_rates\s*=\s*(?!None|tuple)\w")
    users = {
        path.relative_to(root).as_posix()
        for folder in ("engine", "server", "models", "scheduler")
        for path in (root / folder).rglob("*.py")
        if passing.search(path.read_text())
    }
    assert users == {"server/bench/speculative.py"}


def test_graphs_with_a_lottery_are_other_graphs_in_the_cache():
    config = {"method": "mtp", "num_speculative_tokens": 2}
    speculation = EngineConfig.from_args(EngineArgs(DEMO, speculative_config=config)).speculation
    fields = [_speculation_field(speculation, rates) for rates in (None, (0.8, 0.5), (0.8, 0.4))]
    assert len(set(fields)) == 3


# --- rounds --------------------------------------------------------------------------------------------------------


class ScriptedCore:
    """Says in each step what the script does: {request id: (number of tokens, whether it ends)}; a step takes 1 s."""

    def __init__(self, clock, *script):
        self.clock, self.script, self.added = clock, list(script), []

    def add(self, request):
        self.added.append(request.request_id)
        return []

    @property
    def has_unfinished(self):
        return bool(self.script)

    def step(self):
        self.clock.now += 1
        return [
            RequestUpdate(name, [5] * number, finish_reason="length" if ends else None)
            for name, (number, ends) in self.script.pop(0).items()
        ]


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(batch_run.time, "perf_counter", lambda: clock.now)
    return clock


def requests_of(names):
    return [RequestInput(name, [1], SamplingParams(max_tokens=9)) for name in names]


def test_a_batch_is_full_from_the_last_first_token_to_the_first_end(clock):
    core = ScriptedCore(
        clock, {"a": (1, False)}, {"a": (3, False), "b": (1, False)}, {"a": (2, False), "b": (1, False)},
        {"a": (3, True), "b": (4, False)}, {"b": (3, True)},
    )  # fmt: skip
    run = run_batch(core, requests_of("ab"))
    assert core.added == ["a", "b"]
    assert (run.seconds, run.full_seconds, run.full_tokens) == (5, 2, 2 + 1 + 3 + 4)
    assert (run.rate, run.full_rate) == (18 / 5, 5)
    assert run.token_ids == [[5] * 9, [5] * 9]


def test_a_batch_that_is_never_full_is_refused(clock):
    core = ScriptedCore(clock, {"a": (1, False)}, {"a": (8, True), "b": (1, False)}, {"b": (8, True)})
    with pytest.raises(ValueError, match="they never decode all at once; raise --output-len"):
        run_batch(core, requests_of("ab"))


def test_every_round_has_the_same_requests_for_all_in_an_order_that_rotates(monkeypatch):
    calls = []

    def run(core, requests):
        calls.append((core.name, [(request.request_id, tuple(request.prompt_token_ids)) for request in requests]))
        return BatchRun(1.0, 1.0, 1, [[1]])

    monkeypatch.setattr(speculative, "run_batch", run)
    graphs = SimpleNamespace(num_replayed=Counter(), num_eager=0)
    cores = [
        SimpleNamespace(name=name, runner=SimpleNamespace(graphs=graphs), stats=lambda: SimpleNamespace(drafts=None))
        for name in "xyz"
    ]
    entries = [EngineRuns(name, (0,)) for name in "xyz"]
    arguments = parsed(DEMO, "--warmup", "1", "--rounds", "6")
    bar = SimpleNamespace(update=lambda: None)

    def make_prompt(generator):
        return generator.integers(1000, size=3).tolist()

    speculative._run_rounds(cores, entries, arguments, 2, 0.5, make_prompt, bar)
    orders = ["".join(name for name, _ in calls[start : start + 3]) for start in range(0, 21, 3)]
    assert orders == ["xyz", "yzx", "zxy", "xyz", "yzx", "zxy", "xyz"]
    prompts = [calls[start][1] for start in range(0, 21, 3)]
    assert all(calls[index][1] == prompts[index // 3] for index in range(21))
    assert len({prompt for round_ in prompts for _, prompt in round_}) == 14  # new ones in each round
    assert [len(entry.runs) for entry in entries] == [6, 6, 6]


def test_steps_and_drafts_are_those_of_the_timed_rounds(monkeypatch):
    graphs = SimpleNamespace(num_replayed=Counter(), num_eager=0)
    state = SimpleNamespace(drafts=DraftStats(0, 0, 0, [0]))

    def run(core, requests):
        graphs.num_replayed[GraphKey(8, 2, "greedy")] += 10
        graphs.num_replayed[GraphKey(1, 1, "greedy")] += 1
        graphs.num_replayed[GraphKey(8, 2, "draft")] += 10  # the second graph of a step, which is one
        graphs.num_eager += 2
        state.drafts = DraftStats(state.drafts.num_drafts + 3, state.drafts.num_draft_tokens + 3, 0, [0])
        return BatchRun(1.0, 1.0, 1, [[1]])

    monkeypatch.setattr(speculative, "run_batch", run)
    core = SimpleNamespace(runner=SimpleNamespace(graphs=graphs), stats=lambda: state)
    entry = EngineRuns("k=1", (0, 1))
    arguments = parsed(DEMO, "--warmup", "3", "--rounds", "5")
    speculative._run_rounds(
        [core], [entry], arguments, 1, 0, lambda generator: [1], SimpleNamespace(update=lambda: None)
    )
    assert entry.num_replayed == {1: 50, 0: 5} and entry.num_eager == 10
    assert (entry.drafts.num_drafts, entry.drafts.num_draft_tokens) == (15, 15)


def runs_of(*rates):
    return [BatchRun(2.0, 1.0, rate, [[1] * rate]) for rate in rates]


def test_ratios_are_taken_round_by_round():
    plain = EngineRuns("none", (0,), runs_of(10, 20, 40), None, {0: 30}, 0)
    own = EngineRuns("k=2", (2,), runs_of(20, 30, 50), DraftStats(4, 8, 4, [3, 1]), {2: 7}, 3)
    figures = engine_figures(own, plain, is_synthetic=False)
    assert figures["tokens_per_second"] == 30 and figures["whole_tokens_per_second"] == 15
    assert figures["ratio"] == {"median": 1.5, "min": 1.25, "max": 2.0}  # and not 30 / 20 by chance alone
    assert figures["same_tokens"] == 0
    assert (figures["steps_by_graph"], figures["steps_eager"]) == (7, 3)
    assert figures["spec_decode_acceptance_length"] == 2
    assert engine_figures(plain, plain, is_synthetic=False)["same_tokens"] == 1
    uneven = EngineRuns("k=2", (2,), runs_of(30, 20, 40))
    assert engine_figures(uneven, plain, is_synthetic=False)["ratio"]["median"] == 1.0  # medians: 30 and 20


def test_the_table_says_when_steps_ran_eager():
    plain = EngineRuns("none", (0,), runs_of(10, 20, 40), None, {0: 30}, 0)
    own = EngineRuns("k=2", (2,), runs_of(20, 30, 50), DraftStats(4, 8, 4, [3, 1]), {2: 7}, 3)
    result = {
        "model_id": "m", "dtype": "d", "device": "cpu", "num_threads": 2, "backend": "inductor", "method": "mtp",
        "synthetic_acceptance": None, "dataset": "drawn at random", "input_len": 1, "output_len": 2, "rounds": 3,
        "warmup": 0,
    }  # fmt: skip
    engines = [engine_figures(each, plain, is_synthetic=False) for each in (plain, own)]
    text = speculative_tables({**result, "results": [{"batch_size": 1, "temperature": 0.0, "engines": engines}]})
    assert "3 steps ran eager, for want of a graph" in text
    (line,) = [line for line in text.splitlines() if line.strip().startswith("k=2")]
    expected = "k=2 30.0 1.50 (1.25..2.00) 1.50 (1.25..2.00) 2.00 50.0 75.0 25.0 7 of 2 3 0.0"
    assert " ".join(line.split()) == expected
    text = speculative_tables({**result, "results": [{"batch_size": 1, "temperature": 0.0, "engines": engines[:1]}]})
    assert "eager, for want" not in text


# --- graphs, prompts, flags ----------------------------------------------------------------------------------------


def test_a_step_without_a_graph_ends_the_run_unless_it_may_be_eager(bench, capsys):
    words = ("--depths", "1", "--batch-sizes", "1,2", "--cudagraph-capture-sizes", "1")
    assert main(["bench", "speculative", DEMO, *SHORT, *words]) == 1
    answer = capsys.readouterr().err
    assert "1 of the 2 graphs that the steps of the engine 'none' need are not there" in answer
    assert "or time eager steps with --no-require-graph: batch sizes 2" in answer
    out, result = bench(DEMO, *words, "--no-require-graph")
    one, two = (group["engines"][0] for group in result["results"])
    assert (one["steps_eager"], two["steps_eager"], two["steps_by_graph"]) == (0, 45, 0)
    assert "steps ran eager, for want of a graph" in out


def test_graphs_are_not_required_where_they_are_turned_off(bench):
    _, result = bench(DEMO, "--depths", "1", "--batch-sizes", "1", "--enforce-eager")
    assert result["backend"] == "none" and result["results"][0]["engines"][0]["steps_eager"] == 45


class LateGraphs:
    """A runner's graphs that come one per question, in the order in which they are demanded, the last not at all."""

    def __init__(self, never=()):
        self.ready, self.demanded, self.never, self.closed = set(), [], set(never), False
        self.backend = SimpleNamespace(demand=self.demand)

    def key_for(self, size, part, depth):
        return GraphKey(size, 1 + depth, part)

    def demand(self, key):
        if key not in self.demanded:
            self.demanded.append(key)

    def is_ready(self, key):
        return key in self.ready

    def wait(self, timeout):
        coming = [key for key in self.demanded if key not in self.ready and key not in self.never]
        self.ready.update(coming[:1])
        return bool(self.demanded) and not coming

    def close(self):
        self.closed = True


def test_the_graphs_that_steps_need_are_waited_for_and_then_the_background_ends(monkeypatch):
    monkeypatch.setattr(speculative, "POLL_SECONDS", 0)
    words = (DEMO, "--depths", "3", "--adaptive", "--batch-sizes", "1,8", "--temperature", "0,1", "--disable-tqdm")
    adaptive = contenders(*words)[-1]
    graphs = LateGraphs()
    core = SimpleNamespace(runner=SimpleNamespace(graphs=graphs))
    wait_for_graphs(core, adaptive, parsed(*words), True)
    assert graphs.closed and len(graphs.ready) == 2 * 3 * 2
    assert {(key.sampler, key.tokens_per_request) for key in graphs.ready} == {
        (part, tokens) for part in ("greedy", "gumbel") for tokens in (1, 3, 4)
    }
    failing = LateGraphs(never=[GraphKey(8, 4, "greedy")])
    core = SimpleNamespace(runner=SimpleNamespace(graphs=failing))
    with pytest.raises(ValueError, match=r"1 of the 12 graphs .* 'adaptive to 3' need .*: batch sizes 8"):
        wait_for_graphs(core, adaptive, parsed(*words), True)
    assert failing.closed
    wait_for_graphs(core, adaptive, parsed(*words), False)


def test_prompts_are_cut_from_text_that_the_demo_has_not_seen():
    tokenizer = load_tokenizer(DEMO_MODEL)
    whole = tokenizer.encode((DEMO_MODEL / "held_out.txt").read_text(), add_special_tokens=False)
    for model in (DEMO, str(DEMO_MODEL.parent / "deepseek-v32")):
        name, make = prompt_source(parsed(model, "--input-len", "20"), EngineConfig.from_args(EngineArgs(model)))
        generator = np.random.default_rng(0)
        prompts = [make(generator) for _ in range(20)]
        assert name == "cut from held_out.txt" and len(set(map(tuple, prompts))) > 10
        for prompt in prompts:
            assert len(prompt) == 20 and prompt[0] == tokenizer.bos_token_id
            assert any(whole[start : start + 19] == prompt[1:] for start in range(len(whole)))


def test_prompts_of_a_file_and_of_other_models(tmp_path, config_only, make_checkpoint):
    file = tmp_path / "story.txt"
    file.write_text("In the beginning " * 30)
    config = EngineConfig.from_args(EngineArgs(DEMO))
    name, make = prompt_source(parsed(DEMO, "--dataset", str(file), "--input-len", "5"), config)
    assert name == "cut from story.txt" and len(make(np.random.default_rng(0))) == 5
    with pytest.raises(ValueError, match=r"for story.txt has no more: 4000"):
        prompt_source(parsed(DEMO, "--dataset", str(file), "--input-len", "4000"), config)
    other = EngineConfig.from_args(EngineArgs(str(make_checkpoint("LlamaForCausalLM"))))
    assert prompt_source(parsed("m"), other)[0] == "drawn at random"
    without = EngineConfig.from_args(EngineArgs(config_only, load_format="dummy", skip_tokenizer_init=True))
    with pytest.raises(ValueError, match="prompts of a text need a tokenizer"):
        prompt_source(parsed("m", "--dataset", str(file)), without)


def test_engines_differ_in_their_drafts_alone():
    none, one, three, adaptive = contenders(DEMO, "--depths", "3,1", "--adaptive", "--batch-sizes", "4,1")
    assert [each.depths for each in (none, one, three, adaptive)] == [(0,), (1,), (3,), (0, 2, 3)]
    plain = dataclasses.replace(none.config.args, speculative_config={})
    for each in (one, three, adaptive):
        assert dataclasses.replace(each.config.args, speculative_config={}) == plain
    assert (plain.max_num_seqs, plain.max_model_len, plain.cudagraph_capture_sizes) == (4, 64 + 128, [1, 4])
    assert plain.num_gpu_blocks_override == 4 * 12 + 1


def test_the_small_shape_is_what_it_says():
    import torch

    from omni_engine.engine.build import build_models

    config = parse_config(SHAPES["160m"])
    assert (config.num_layers, config.hidden_size, config.vocab_size, config.moe) == (12, 768, 32000, None)
    assert config.mla is not None and config.num_mtp_layers == 1
    made = SimpleNamespace(
        model=config, dtype="bfloat16", max_num_seqs=lambda device_type: 1,
        speculation=SimpleNamespace(choice=SimpleNamespace(method="mtp", remembers=True)),
    )  # fmt: skip
    sizes = [tensor.numel() for tensor in build_models(made, torch.device("meta")).tensors()]
    assert 150e6 < sum(sizes) < 175e6


def test_a_built_in_shape_needs_no_model(bench):
    small = {**SHAPES["160m"], "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 96,
             "q_lora_rank": 16, "kv_lora_rank": 16, "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, "160m", small)
        _, result = bench("--shape", "160m", "--depths", "1", "--batch-sizes", "2")
    assert (result["model_id"], result["dataset"], result["dtype"]) == ("160m", "drawn at random", "bfloat16")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rounds", "4"], "a median of fewer than 5 rounds says little: 4"),
        (["--synthetic-acceptance", "0.5,0.8,0.3"], "each at most the one before: 0.5,0.8,0.3"),
        (["--synthetic-acceptance", "1,0.5,0.3"], "shares must be between 0 and 1"),
        (["--synthetic-acceptance", "0.5", "--depths", "2"], "needs a share for each of 2 drafts: 0.5"),
        (["--speculative-config.num_speculative_tokens=2"], "it comes from --depths: 2"),
        (["--speculative-config.adaptive_depth=true"], "it comes from --adaptive: True"),
        (["--spec-tokens", "2"], "it comes from --depths: 2"),
        (["--shape", "160m"], "--shape is a model of its own, leave out MODEL"),
        (["--depths", "0"], "must be at least 1: 0"),
        (["--temperature", "-1"], "must be at least 0: -1"),
    ],
)
def test_flags_that_make_no_sense_are_refused(capsys, words, message):
    with pytest.raises(SystemExit):
        main(["bench", "speculative", DEMO, *words])
    assert message in capsys.readouterr().err


def test_what_cannot_be_measured_is_refused_with_the_remedy(capsys, config_only):
    for words, message in (
        ([DEMO, "--output-len", "1000"], "64 + 1000 tokens, more than the model's 1024; lower one of them"),
        ([DEMO, "--max-num-seqs", "4"], "--batch-sizes must not be above --max-num-seqs=4: 32"),
        ([config_only, "--load-format", "dummy"], "needs an architecture with a prediction layer"),
        ([DEMO, "--depths", "17"], "num_speculative_tokens must be at most 16: 17"),
    ):
        assert main(["bench", "speculative", *words]) == 1
        assert message in capsys.readouterr().err


def test_importing_it_brings_no_torch():
    code = "import sys; from omni_engine.server.bench import speculative; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
