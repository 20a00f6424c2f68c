"""An engine on the simulated NPU, from its start to tokens, which mean nothing there: kernels compute nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._functorch import config as functorch_config

from omni_engine import Engine, SamplingParams
from omni_engine.engine.graphs.runner import GraphKey, GraphRunner
from omni_engine.engine.graphs.supply import GraphError

MTP = {"method": "mtp", "num_speculative_tokens": 1, "adaptive_depth": False}
PROMPTS = [[5, 6, 7], [8] * 130]
ATTENTION = "aclnnFusedInferAttentionScoreV4"
UPDATE = ["task update begin", ATTENTION, "task update end"]
EXPERTS = ["aclnnMoeInitRoutingV3", "aclnnGroupedMatmulWeightNz", "aclnnSwiGlu", "aclnnGroupedMatmulWeightNz",
           "aclnnMoeFinalizeRoutingV4"]  # fmt: skip
DENSE = ["aclnnMatmul", "aclnnSwiGlu", "aclnnMatmul"]
SHARED = DENSE
ROTATED = ["aclnnRotaryPositionEmbeddingV2"]
# What a step must call, in order; casts, copies and arithmetic on indices are left out.
QWEN3_LAYER = [
    "aclnnMatmul", "aclnnRmsNorm", "aclnnRmsNorm", *ROTATED, *ROTATED,
    "aclnnScatterPaKvCache", ATTENTION, "aclnnMatmul", "aclnnAddRmsNorm", *DENSE, "aclnnAddRmsNorm",
]  # fmt: skip
MLA = [
    "aclnnMatmul", "aclnnRmsNorm", "aclnnMatmul", "aclnnKvRmsNormRopeCache", "aclnnInterleaveRope",
    "aclnnTransposeBatchMatMul", ATTENTION, "aclnnTransposeBatchMatMul", "aclnnMatmul",
]  # fmt: skip
GATED = ["aclnnAddRmsNormCast", "aclnnMatmul", "aclnnMoeGatingTopK", *SHARED, *EXPERTS]
CALLS = {
    "QWEN3": ["aclnnEmbedding", "aclnnRmsNorm", *QWEN3_LAYER, *QWEN3_LAYER, "aclnnMatmul", "aclnnArgMax"],
    "DEEPSEEK_V3": [
        "aclnnEmbedding", "aclnnRmsNorm", *MLA, "aclnnAddRmsNorm", *DENSE, "aclnnAddRmsNorm", *MLA, *GATED,
        "aclnnAddRmsNorm", "aclnnMatmul", "aclnnArgMax",  # the model's own; then what its prediction layer drafts
        "aclnnEmbedding", "aclnnRmsNorm", "aclnnRmsNorm", "aclnnMatmul", "aclnnRmsNorm", *MLA, *GATED,
        "aclnnAddRmsNorm", "aclnnMatmul", "aclnnArgMax",
    ],
}  # fmt: skip


@pytest.fixture
def start(graphs, tiny_models, tmp_path: Path, monkeypatch) -> Callable[..., Engine]:
    """`start(model, backend)`: an engine with one gear, of greedy steps alone unless told otherwise."""
    monkeypatch.setenv("OMNI_ENGINE_CACHE", str(tmp_path / "cache"))
    whole = GraphRunner.keys.fget
    assert whole is not None

    def engine(name: str, backend: str, samplers: tuple[str, ...] = ("greedy",), **options: Any) -> Engine:
        monkeypatch.setattr(
            GraphRunner, "keys", property(lambda runner: [key for key in whole(runner) if key.sampler in samplers])
        )
        torch._dynamo.reset()
        settings = {
            "device": "npu:0", "load_format": "dummy", "skip_tokenizer_init": True, "max_num_seqs": 2,
            "num_gpu_blocks_override": 8, "max_model_len": 250, "graph_backend": backend,
            "cudagraph_capture_sizes": [2], "require_graph": True,
        }  # fmt: skip
        return Engine(tiny_models.write_config(name, tmp_path), **(settings | options))

    return engine


def generate(engine: Engine, max_tokens: int = 3) -> None:
    params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [max_tokens, max_tokens]
    engine.check_integrity()


def captured(names: list[str], wanted: list[str]) -> list[str]:
    """Of the one graph that was captured, the calls of the kinds in `wanted`."""
    start = len(names) - names[::-1].index("capture begin")
    return [name for name in names[start : names.index("capture end", start)] if name in wanted]


def problems(names: list[str], model: str) -> list[str]:
    found, wanted = captured(names, CALLS[model]), CALLS[model]
    if found == wanted:
        return []
    place = next((index for index, pair in enumerate(zip(found, wanted, strict=False)) if pair[0] != pair[1]), -1)
    return [f"call {place} of {len(found)}, wanted are {len(wanted)}: {found[place:][:4]} for {wanted[place:][:4]}"]


@functorch_config.patch(error_on_custom_op_aliasing=True)  # as torch has it where the variable CI is set
@pytest.mark.parametrize(("model", "speculation"), [("QWEN3", {}), ("DEEPSEEK_V3", MTP)], ids=["QWEN3", "DEEPSEEK_V3"])
def test_a_step_is_captured_call_by_call_and_replayed(start, trace, simulator, model, speculation) -> None:
    engine = start(model, "npugraph_ex", speculative_config=speculation)
    runner = engine._core.runner
    assert problems(trace(), model) == []
    assert runner.device == torch.device("npu:0") and {part.device for part in runner.caches[0]} == {runner.device}
    generate(engine)
    graphs = runner.graphs
    (key,) = graphs.keys
    assert graphs.num_eager == 0 and list(graphs.num_replayed) == [key]
    names = trace()
    assert names.count("replay") == graphs.num_replayed[key] >= 2
    last = names[len(names) - names[::-1].index("replay") :]
    layers = 2 + len(speculation and [1])
    assert [name for name in last if name in (ATTENTION, *UPDATE)] == UPDATE * layers
    if not speculation:  # three tokens after each prompt; the last one needs no step
        given = {simulator.npu_simulator_numbers(index) for index in range(layers)}
        assert given == {f"{len(PROMPTS[0]) + 2},{len(PROMPTS[1]) + 2}".encode()}


def test_a_step_without_one_op_is_seen(start, trace, monkeypatch) -> None:
    from omni_engine.engine.graphs import startup as graph_startup
    from omni_engine.ops.table import npu_table

    def without_writes(with_hints: bool) -> Any:
        return replace(npu_table(with_hints), write_kv_cache=lambda *tensors: None)

    monkeypatch.setattr(graph_startup, "npu_table", without_writes)
    start("QWEN3", "npugraph_ex")
    names = trace()
    assert problems(names, "QWEN3") != [] and "aclnnScatterPaKvCache" not in names


def test_sparse_attention_needs_no_lengths_before_a_replay(start, trace) -> None:
    engine = start("DEEPSEEK_V32", "npugraph_ex")
    names = trace()
    assert names.count("aclnnSparseFlashAttention") >= 2 and "task group begin" not in names
    generate(engine)
    assert "replay" in (names := trace()) and "task update begin" not in names


def test_the_graph_engines_graphs_are_found_at_the_next_start(start, graphs, trace, tmp_path: Path) -> None:
    first = start("QWEN3_MOE", "torchair")
    (key,) = first._core.runner.graphs.keys
    assert not first._core.runner.graphs.reports[key].from_cache
    experts = [module.gate_up for module in first._core.runner.model.modules() if hasattr(module, "gate_up")]
    import torch_npu  # pyright: ignore[reportMissingImports]

    assert experts and {str(torch_npu.get_npu_format(weight)) for weight in experts} == {"FRACTAL_NZ"}
    parts = [part for cache in first._core.runner.caches for part in cache]
    assert torch.npu.memory_allocated() > sum(tensor.nbytes for tensor in (*experts, *parts))
    graphs.launched.clear()
    trace()
    generate(first)
    assert len(graphs.launched) == first._core.runner.graphs.num_replayed[key] >= 2
    assert len({id(graph) for graph in graphs.launched}) == 1 and first._core.runner.graphs.num_eager == 0
    assert ATTENTION not in trace()  # attention of a prompt is another op, and that of a decode step in the graph
    loaded = graphs.launched[0]
    second = start("QWEN3_MOE", "torchair")
    assert second._core.runner.graphs.reports[key].from_cache
    assert graphs.launched[-1].work == loaded.work and graphs.launched[-1] is not loaded
    (code,) = (tmp_path / "cache" / "npu-graphs").rglob("compiled_module")
    assert code.stat().st_mode & 0o077 == 0
    code.write_bytes(code.read_bytes()[:-1] + b"x")
    third = start("QWEN3_MOE", "torchair")
    assert not third._core.runner.graphs.reports[key].from_cache
    other = start("QWEN3_MOE", "torchair", num_gpu_blocks_override=9)  # another shape, another graph
    assert not other._core.runner.graphs.reports[key].from_cache
    manifests = [json.loads(path.read_text()) for path in (tmp_path / "cache").rglob("manifest.json")]
    assert sorted(manifest["key"]["num_blocks"] for manifest in manifests) == [8, 9]
    assert {"torch_npu", "cann", "soc"} <= manifests[0]["key"].keys()


def test_an_eager_step_is_told_its_lengths(start, trace, simulator) -> None:
    engine = start("QWEN3", "auto", cudagraph_capture_sizes=None, enforce_eager=True, require_graph=False)
    trace()
    generate(engine, max_tokens=2)
    assert trace().count(ATTENTION) == 2
    given = {simulator.npu_simulator_numbers(index) for index in range(64)}
    assert f"{len(PROMPTS[0]) + 1},{len(PROMPTS[1]) + 1}".encode() in given


def test_a_graph_that_cannot_be_made_is_told_and_its_steps_run_eager(start, monkeypatch, caplog) -> None:
    from omni_engine.engine.npu import graphs as npu_graphs

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("the graph engine says no")

    monkeypatch.setattr(npu_graphs.TorchairGraphs, "_compiled", refuse)
    engine = start("QWEN3", "torchair", require_graph=False)
    assert "the steps of 2x1 greedy run eager, their graph cannot be made: the graph engine says no" in caplog.text
    generate(engine)
    assert engine._core.runner.graphs.num_eager == 2
    with pytest.raises(GraphError, match=r"a graph cannot be made \(the graph engine says no\).*: 2x1 greedy"):
        start("QWEN3", "torchair")


@pytest.mark.parametrize(("options", "message"), [
    ({"dtype": "float32"}, "dtype must be bfloat16 or float16 on an NPU.*: float32"),
    ({"block_size": 32}, r"block_size must be 16 or 128 on an NPU.*\(MLA\).*: 32"),
    ({"num_gpu_blocks_override": 2**15}, r"num_gpu_blocks_override must be at most 32767 on an NPU.*: 32768"),
    ({"device": "npu:1"}, "npu:N with N below 1, the number of NPUs here: npu:1"),
    ({"speculative_config": MTP | {"num_speculative_tokens": 2}}, "torchair for: mtp with 2"),
])  # fmt: skip
def test_what_the_operators_do_not_take_is_refused(start, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        start("DEEPSEEK_V3", "npugraph_ex", **options)


def test_the_cache_is_no_larger_than_attention_takes(graphs, tiny_models, tmp_path: Path) -> None:
    """The simulated device has 64 TiB free."""
    from omni_engine.engine.build import cache_spec
    from omni_engine.engine.config import EngineArgs, EngineConfig
    from omni_engine.engine.npu.limits import for_npu
    from omni_engine.engine.startup import size_cache

    args = EngineArgs(tiny_models.write_config("DEEPSEEK_V3", tmp_path), load_format="dummy", skip_tokenizer_init=True)
    config = for_npu(EngineConfig.from_args(args))
    budget = size_cache(config, cache_spec(config), torch.device("npu:0"), 256, 0)
    assert (budget.block_size, budget.num_blocks) == (128, 32767)
    assert budget.num_blocks * 128 * 512 < 2**31 <= (budget.num_blocks + 1) * 128 * 512


def test_keys_are_functions_of_their_own() -> None:
    from omni_engine.engine.graphs.decode_step import DecodeStep
    from omni_engine.engine.npu.graphs import gear_function

    program = DecodeStep(torch.nn.Module(), "greedy")  # type: ignore[arg-type]
    one, four = (gear_function(program, GraphKey(size, 1, "greedy")) for size in (1, 4))
    assert one.__func__.__code__ != four.__func__.__code__ and one.__self__ is four.__self__ is program
