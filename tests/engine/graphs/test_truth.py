"""Eager, compiled and replayed decode steps are the same: models x backends x samplers, with negative controls."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import omni_engine
from omni_engine import Engine, SamplingParams
from omni_engine.engine.graphs.runner import GraphRunner
from omni_engine.engine.row_state import decode_context
from omni_engine.ops.cache_folder import cache_root
from omni_engine.ops.cpu.build import available, describe
from omni_engine.ops.table import PLAIN

ARCHITECTURES = [
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "DeepseekV32ForCausalLM",
    "GlmMoeDsaForCausalLM",
]
COMPILED = "DeepseekV3ForCausalLM"  # latent attention, experts and shared experts: the one the commit tier compiles
SAMPLERS = ["greedy", "gumbel", "split"]
GEARS = [3]
NUM_BLOCKS = 10  # too few for three requests of these lengths


# --- the gate --------------------------------------------------------------------------------------------------------

# float32, sums in another order: largest difference in units of the reference's standard deviation.
LOGIT_BOUND = 1e-4
CACHE_BOUND = 1e-4


class Mismatch(AssertionError):
    """A replayed step and the reference disagree."""


class GatedGraphs:
    """Stands in for a `GraphRunner`: replays, then computes the same step with plain torch bodies on the same state.

    Compared after every step: tokens (equal) or logits, every cache block but the null block, newest tokens and
    positions of all rows but the null row. `sabotage` breaks the replayed step, for the negative controls.
    """

    def __init__(self, graphs: GraphRunner, sabotage: Callable[[GraphRunner, np.ndarray], None] | None = None) -> None:
        self.graphs = graphs
        self.sabotage = sabotage
        self.num_checked: Counter[str] = Counter()
        self.batch_sizes: set[int] = set()
        self.mismatch: Mismatch | None = None  # told at the end: raised in a step it would be the engine's death

    @property
    def tensors(self) -> list[torch.Tensor]:
        drafting = self.graphs.drafting
        of_drafts = () if drafting is None else (*drafting.handoff, *drafting.memory)
        return [*self.graphs.state, *(part for cache in self.graphs.caches for part in cache), *of_drafts]

    @property
    def last_gear(self) -> int:
        return self.graphs.last_gear

    def replay(self, sampler: str, rows: np.ndarray, num_blocks: int, num_drafts: int = 0) -> torch.Tensor:
        graphs = self.graphs
        key = graphs.key_for(len(rows), sampler, num_drafts)
        before = [tensor.clone() for tensor in self.tensors]
        if self.sabotage is not None:
            self.sabotage(graphs, rows)
        replayed = graphs.num_replayed[key] if key else 0
        output = graphs.replay(sampler, rows, num_blocks, num_drafts).clone()
        if key is not None and graphs.num_replayed[key] == replayed:
            self._fail(f"{key} was not replayed")
        after = [tensor.clone() for tensor in self.tensors]
        for tensor, value in zip(self.tensors, before, strict=True):
            tensor.copy_(value)
        fast, graphs.model.ops.table = graphs.model.ops.table, PLAIN
        compared = output
        has_block = self._has_block(rows, num_drafts) if sampler == "split" and num_drafts else None
        expected = graphs.run_eager(sampler, rows, num_blocks, num_drafts)
        graphs.model.ops.table = fast
        if has_block is not None:
            compared, expected = output[has_block], expected[has_block]
        self._compare(sampler, compared, expected, after)
        self.num_checked[sampler] += 1
        self.batch_sizes.add(len(rows))
        # Go on from the replayed state, so that an error in it is carried on as it would be.
        for tensor, value in zip(self.tensors, after, strict=True):
            tensor.copy_(value)
        return output

    def _has_block(self, rows: np.ndarray, num_drafts: int) -> torch.Tensor:
        """bool [n * (1 + num_drafts)]: the tokens of a step that have a block. A draft without one is never accepted,
        and its logits come of whatever lies in the null block."""
        state, index = self.graphs.state, torch.from_numpy(rows)
        block_size = self.graphs.caches[0][0].shape[1]
        context = decode_context(state, index, state.position[index], 1 + num_drafts, block_size)
        return context.slots >= block_size

    def _compare(self, sampler: str, output: torch.Tensor, expected: torch.Tensor, after: list[torch.Tensor]) -> None:
        if sampler == "split":
            error = float((output - expected).abs().max() / expected.std())
            if not error <= LOGIT_BOUND:
                self._fail(f"logits differ by {error:.2e} of their standard deviation")
        elif not torch.equal(output, expected):
            self._fail(f"tokens differ: {output.tolist()} instead of {expected.tolist()}")
        count = len(self.graphs.state)
        for name, mine, theirs in zip(self.graphs.state._fields, after, self.graphs.state, strict=False):
            if not torch.equal(mine[:-1], theirs[:-1]):
                self._fail(f"{name} of some row differs")
        parts = [part for cache in self.graphs.caches for part in cache]
        for index, (mine, theirs) in enumerate(zip(after[count:], parts, strict=False)):
            error = float((mine[1:] - theirs[1:]).abs().max() / theirs[1:].std().clamp(min=1e-6))
            if not error <= CACHE_BOUND:
                self._fail(f"cache tensor {index} differs by {error:.2e} of its standard deviation")

    def _fail(self, message: str) -> None:
        if self.mismatch is None:
            self.mismatch = Mismatch(message)

    def close(self) -> None:
        self.graphs.close()


SAMPLING = {
    "greedy": {"temperature": 0.0},
    "gumbel": {"temperature": 0.9},
    "split": {"temperature": 0.9, "top_p": 0.8, "presence_penalty": 0.5, "logprobs": 2},
}


def gate_prompts() -> list[list[int]]:
    shared = [7 + index % 50 for index in range(40)]
    return [[*shared[: 40 - 7 * index], 100 + index] for index in range(5)] + [[9 + index] * 3 for index in range(3)]


def gate_params(sampler: str) -> list[SamplingParams]:
    return [
        SamplingParams(seed=index, max_tokens=30 + 6 * index, ignore_eos=True, **SAMPLING[sampler])
        for index in range(len(gate_prompts()))
    ]


def run_gate(
    engine: Engine, sampler: str, sabotage: Callable[[GraphRunner, np.ndarray], None] | None = None
) -> tuple[GatedGraphs, list[list[int]]]:
    """A run with joins and leaves, preemption, prefix hits and padding; raises Mismatch. Returns the tokens too.

    The engine's pool must be too small for all requests at once.
    """
    runner = engine._core.runner
    graphs = runner.graphs
    gate = GatedGraphs(graphs, sabotage)
    runner.graphs = gate  # type: ignore[assignment]
    prompts, params = gate_prompts(), gate_params(sampler)
    engine.reset_prefix_cache()
    before = engine._core.stats()
    try:
        outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
    finally:
        runner.graphs = graphs
    if gate.mismatch is not None:
        raise gate.mismatch
    stats = engine._core.stats()
    assert stats.num_preemptions > before.num_preemptions, "nobody was preempted, so the gate is not what it says"
    assert stats.prefix_cache_hits > before.prefix_cache_hits
    assert gate.num_checked[sampler] > 20
    assert graphs.drafting is None or stats.drafts.num_accepted_tokens > before.drafts.num_accepted_tokens
    assert len(gate.batch_sizes) > 2, "no joins and leaves"
    engine.check_integrity()
    return gate, [output.outputs[0].token_ids for output in outputs]


def make_engine(path, backend, **options):
    settings = {
        "dtype": "float32",
        "max_num_seqs": 3,
        "max_model_len": 128,
        "max_num_batched_tokens": 64,
        "num_gpu_blocks_override": NUM_BLOCKS,
        "graph_backend": backend,
        "cudagraph_capture_sizes": GEARS,
    }
    return Engine(str(path), **(settings | options))


@pytest.fixture(scope="module")
def plain_tokens(make_checkpoint):
    """Tokens of the gate's run without graphs, kernels or overlap."""
    known = {}

    def tokens(architecture, sampler):
        if (architecture, sampler) not in known:
            options = {"cudagraph_capture_sizes": None, "enforce_eager": True, "async_scheduling": False}
            engine = make_engine(make_checkpoint(architecture), "auto", **options)
            known[architecture, sampler] = run_gate(engine, sampler)[1]
        return known[architecture, sampler]

    return tokens


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padded_steps_equal_plain_ones(make_checkpoint, plain_tokens, architecture, sampler):
    engine = make_engine(make_checkpoint(architecture), "eager")
    _, tokens = run_gate(engine, sampler)
    assert tokens == plain_tokens(architecture, sampler)


@pytest.fixture(scope="module")
def compile_cache(tmp_path_factory):
    """A cache of graphs for these tests alone, with the kernels that are built already."""
    if not available():
        pytest.skip(f"there are no C++ kernels: {describe()}")
    root = tmp_path_factory.mktemp("cache")
    if (cache_root() / "kernels").is_dir():
        shutil.copytree(cache_root() / "kernels", root / "kernels")
    root.chmod(0o700)
    before = os.environ.get("OMNI_ENGINE_CACHE")
    os.environ["OMNI_ENGINE_CACHE"] = str(root)
    yield root
    if before is None:
        del os.environ["OMNI_ENGINE_CACHE"]
    else:
        os.environ["OMNI_ENGINE_CACHE"] = before


@pytest.fixture(scope="module")
def compiled(make_checkpoint, compile_cache):
    engines = {}

    def get(architecture):
        if architecture not in engines:
            engines[architecture] = make_engine(make_checkpoint(architecture), "inductor", require_graph=True)
        return engines[architecture]

    yield get
    for engine in engines.values():
        engine._core.close()


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    "architecture",
    [name if name == COMPILED else pytest.param(name, marks=pytest.mark.full) for name in ARCHITECTURES],
)
def test_compiled_steps_equal_plain_ones(compiled, plain_tokens, architecture, sampler):
    _, tokens = run_gate(compiled(architecture), sampler)
    assert tokens == plain_tokens(architecture, sampler)


def test_compiled_steps_equal_plain_ones_with_overlap_and_without(compiled, make_checkpoint, plain_tokens):
    compiled(COMPILED)
    engine = make_engine(make_checkpoint(COMPILED), "inductor", require_graph=True, async_scheduling=False)
    _, tokens = run_gate(engine, "gumbel")
    assert tokens == plain_tokens(COMPILED, "gumbel")


@pytest.fixture(scope="module")
def drafting_engine(compile_cache):
    """The demos, whose prediction layers are trained, with two drafts in the graph."""
    engines = {}

    def get(demo, backend):
        if (demo, backend) not in engines:
            path = Path(omni_engine.__file__).parent / "models" / "demo" / demo
            options = {"enforce_eager": True} if backend == "plain" else {"require_graph": True}
            config = {"method": "mtp", "num_speculative_tokens": 2, "adaptive_depth": False}
            backend_name = "auto" if backend == "plain" else backend
            engines[demo, backend] = make_engine(path, backend_name, speculative_config=config, **options)
        return engines[demo, backend]

    yield get
    for engine in engines.values():
        engine._core.close()


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.full)])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("demo", ["deepseek", "deepseek-v32"])
def test_steps_with_drafts_equal_plain_ones(drafting_engine, demo, sampler, backend):
    """Tokens, caches and drafts of every step, and in the end what was accepted at each place: a share that falls under
    the graph would show nowhere else."""
    compiled, plain = drafting_engine(demo, backend), drafting_engine(demo, "plain")
    before = [engine._core.stats().drafts.num_accepted_per_position for engine in (compiled, plain)]
    _, tokens = run_gate(compiled, sampler)
    after = []
    plain.reset_prefix_cache()
    outputs = plain.generate([{"prompt_token_ids": prompt} for prompt in gate_prompts()], gate_params(sampler))
    assert tokens == [output.outputs[0].token_ids for output in outputs]
    for engine, earlier in zip((compiled, plain), before, strict=True):
        accepted = engine._core.stats().drafts.num_accepted_per_position
        after.append([count - old for count, old in zip(accepted, earlier, strict=True)])
    assert after[0] == after[1] and after[0][1] > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_captured_steps_equal_plain_ones(make_checkpoint, architecture, sampler):
    engine = make_engine(make_checkpoint(architecture), "cudagraph", device="cuda")
    run_gate(engine, sampler)


# --- negative controls: the gate must see each of these ------------------------------------------------------------


def shift_position(graphs, rows):
    graphs.state.position[torch.from_numpy(rows[:1])] += 1


def corrupt_block_table(graphs, rows):
    """Swap the first two blocks of a row that has two."""
    for row in rows:
        table = graphs.state.block_table[row]
        if table[1]:
            table[[0, 1]] = table[[1, 0]]
            return


@pytest.mark.parametrize("architecture", ["Qwen3ForCausalLM", COMPILED])
@pytest.mark.parametrize("sabotage", [shift_position, corrupt_block_table])
def test_the_gate_sees_a_wrong_input(make_checkpoint, architecture, sabotage):
    engine = make_engine(make_checkpoint(architecture), "eager")
    with pytest.raises(Mismatch):
        run_gate(engine, "split", sabotage)


@pytest.mark.parametrize("sabotage", [shift_position, corrupt_block_table])
def test_the_gate_sees_a_wrong_input_of_a_compiled_step(compiled, sabotage):
    with pytest.raises(Mismatch):
        run_gate(compiled(COMPILED), "split", sabotage)


@pytest.mark.parametrize(("architecture", "name"), [
    ("Qwen3ForCausalLM", "write_kv_cache"),
    (COMPILED, "write_latent_cache"),
    ("DeepseekV32ForCausalLM", "write_index_keys"),
])  # fmt: skip
def test_the_gate_sees_a_missing_cache_write(make_checkpoint, monkeypatch, architecture, name):
    engine = make_engine(make_checkpoint(architecture), "eager")
    graphs = engine._core.runner.graphs
    ops = graphs.model.ops
    write = getattr(ops.table, name)
    programs = {key: graphs._ready[key] for key in graphs.keys}

    def without_one_write(program):
        def run():
            calls = []

            def skip_the_second(*args):
                calls.append(None)
                if len(calls) != 2:
                    write(*args)

            with monkeypatch.context() as patch:
                patch.setattr(ops, "table", dataclasses.replace(ops.table, **{name: skip_the_second}))
                return program()

        return run

    for key, program in programs.items():
        graphs._ready[key] = without_one_write(program)
    with pytest.raises(Mismatch, match=r"cache tensor|logits|tokens"):
        run_gate(engine, "greedy")


# --- what a start and a long run must not do -------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_2000_steps_with_joins_and_leaves_trace_and_compile_nothing(compiled, sampler):
    engine = compiled(COMPILED)
    graphs = engine._core.runner.graphs
    backend = graphs.backend
    before = graphs.num_replayed.total(), graphs.num_eager, backend.num_compiled
    sampling = {"greedy": {"temperature": 0}, "gumbel": {"temperature": 1.0}, "split": {"top_k": 5, "temperature": 1.0}}
    params = [SamplingParams(seed=i, max_tokens=3 + i % 90, ignore_eos=True, **sampling[sampler]) for i in range(150)]
    engine.generate([{"prompt_token_ids": [5 + i, 6, 7]} for i in range(150)], params)
    assert graphs.num_replayed.total() - before[0] >= 2000
    assert graphs.num_eager == before[1]
    assert backend.num_compiled == before[2]


def test_a_second_start_compiles_nothing_and_each_gear_is_small(compiled, make_checkpoint, compile_cache):
    """In a process of its own: no compiler is even imported, and a further gear takes under 20 MB."""
    compiled(COMPILED)
    script = f"""
        import os, sys, threading
        from omni_engine import Engine, SamplingParams
        from omni_engine.engine.graphs.runner import GraphRunner

        def rss():
            return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

        sizes = []
        install = GraphRunner.install
        def watched(self, graph, report):
            graph()  # once, so that its workspace counts; all rows are the null row
            install(self, graph, report)
            sizes.append(rss())
        GraphRunner.install = watched
        engine = Engine({str(make_checkpoint(COMPILED))!r}, dtype="float32", max_num_seqs=3, max_model_len=128,
                        max_num_batched_tokens=64, num_gpu_blocks_override={NUM_BLOCKS}, graph_backend="inductor",
                        cudagraph_capture_sizes={GEARS}, require_graph=True)
        graphs = engine._core.runner.graphs
        assert graphs.backend.num_compiled == 0 and len(graphs.reports) == 3
        assert all(report.from_cache for report in graphs.reports.values())
        engine.generate("The harbour", SamplingParams(max_tokens=5, temperature=0))
        assert graphs.num_replayed.total() >= 3
        assert "torch._inductor.compile_fx" not in sys.modules and "torch._dynamo.convert_frame" not in sys.modules
        growth = [after - before for before, after in zip(sizes, sizes[1:])]
        print(growth)
        assert max(growth) < 20e6, growth
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout
