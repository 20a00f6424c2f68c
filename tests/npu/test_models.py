"""Whole decode steps at the widths of published models: each lowers to one graph, from embedding to sampled token.

Histograms of the nodes lie in `golden`, for one version of torch-npu. Where one has changed for a reason, this writes
them anew: make test-npu PYTEST_ARGS="tests/npu/test_models.py --rewrite-golden"
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import resource
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from omni_engine.engine.config import EngineArgs, EngineConfig
from omni_engine.engine.graphs.runner import GraphKey

GOLDEN = Path(__file__).parent / "golden"
PUBLISHED = Path(__file__).parents[1] / "models" / "test_config_parser.py"
LAYERS = 2
GIB = 2**30
MTP = {"method": "mtp", "num_speculative_tokens": 1, "adaptive_depth": False}


@dataclass(frozen=True)
class Case:
    """A step, and how often its graph must write caches: nodes of each type."""

    config: str  # of the published ones
    requests: int
    sampler: str
    writes: dict[str, int]
    speculation: dict[str, Any] | None = None
    written: slice = field(default_factory=lambda: slice(None))  # of the caches, those that it writes

    @property
    def name(self) -> str:
        parts = (self.config.lower().replace("_", "-"), str(self.requests), self.sampler)
        return "-".join(parts) + ("-mtp" if self.speculation else "")


GQA = {"ScatterPaKvCache": LAYERS}
SPARSE = {"KvRmsNormRopeCache": LAYERS, "ScatterNdUpdate": LAYERS}
PREDICTED = {"KvRmsNormRopeCache": LAYERS + 1}
CASES = [
    Case("QWEN3_8B", 4, "greedy", GQA),
    Case("QWEN3_8B", 16, "greedy", GQA),
    Case("QWEN3_8B", 4, "split", GQA),
    Case("QWEN3_30B_A3B", 4, "gumbel", GQA),
    Case("DEEPSEEK_V3", 4, "greedy", PREDICTED, MTP),
    Case("DEEPSEEK_V3", 4, "gumbel", PREDICTED, MTP),
    Case("DEEPSEEK_V3", 4, "split", {"KvRmsNormRopeCache": LAYERS}, MTP, slice(2 * LAYERS)),
    Case("DEEPSEEK_V3", 4, "draft", {"KvRmsNormRopeCache": 1}, MTP, slice(2 * LAYERS, None)),
    Case("DEEPSEEK_V32", 4, "greedy", SPARSE),
    Case("DEEPSEEK_V32", 1, "gumbel", SPARSE),
]


@functools.cache
def published() -> Any:
    """The module whose tests read config.json as it was published."""
    specification = importlib.util.spec_from_file_location("published_configs", PUBLISHED)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def engine_config(case: Case, folder: Path) -> EngineConfig:
    """The published model with two layers: a dense one and a routed one, where it has both."""
    raw = getattr(published(), case.config)
    (folder / "config.json").write_text(json.dumps(raw))
    fewer: dict[str, Any] = {"num_hidden_layers": LAYERS}
    if "first_k_dense_replace" in raw:
        fewer["first_k_dense_replace"] = 1
    return EngineConfig.from_args(
        EngineArgs(
            model=str(folder),
            load_format="dummy",
            skip_tokenizer_init=True,
            hf_overrides=fewer,
            speculative_config=case.speculation or {},
        )
    )


@pytest.fixture(scope="module")
def lowered(graphs, tmp_path_factory) -> Callable[[Case], Any]:
    """`lowered(case)`: its `LoweredStep`, made once."""
    from omni_engine.engine.npu.lowering import lower_step

    @functools.cache
    def lower(name: str) -> Any:
        (case,) = [case for case in CASES if case.name == name]
        config = engine_config(case, tmp_path_factory.mktemp("published"))
        return lower_step(config, GraphKey(case.requests, 2 if case.speculation else 1, case.sampler))

    return lambda case: lower(case.name)


def problems(step: Any, writes: dict[str, int], caches: slice = slice(None)) -> list[str]:
    """What must not be in the graph of a decode step, or must."""
    graph, found = step.graph, []
    requests, tokens = step.key.num_requests, step.key.tokens_per_request
    state = {(requests + 1,), (requests + 1, 1)}
    if step.key.sampler == "split":  # what is handed to the graph behind it
        state |= {(requests * tokens,), (requests * tokens, step.hidden_size)}
    written = [shape for shape in graph.mutated if shape not in state]
    if sorted(written) != sorted(step.cache_shapes[caches]):
        found.append(f"caches written in place: {written}")
    if graph.copied_inputs or any(node.type != "Identity" for node in graph.copies):
        found.append(f"copies: {[node.type for node in graph.copies]}")
    # An Identity makes a view of an activation whole; it must not be of a cache.
    sizes = {kind: graph.work[kind] for kind in writes}
    if sizes != writes:
        found.append(f"cache writes: {sizes}")
    large = [one.shape for one in graph.inputs.values() if not one.frozen and not one.mutated]
    weights = [shape for shape in large if shape in step.weight_shapes]
    if weights:
        found.append(f"weights that are not frozen: {weights}")
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_decode_step_is_one_graph_without_copies(lowered, case: Case) -> None:
    step = lowered(case)
    assert problems(step, case.writes, case.written) == []
    assert step.graph.work["ArgMaxV2"] == {"split": 0, "draft": 1}.get(case.sampler, 2 if case.speculation else 1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < 8 * GIB


def summary(step: Any) -> dict[str, Any]:
    given = Counter(
        "frozen" if one.frozen else "mutated" if one.mutated else "read" for one in step.graph.inputs.values()
    )
    return {
        "torch-npu": importlib.metadata.version("torch-npu"),
        "inputs": dict(sorted(given.items())),
        "nodes": dict(sorted(step.graph.work.items())),
        "streams": dict(sorted(Counter(node.stream for node in step.graph.nodes if node.stream).items())),
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_graph_has_the_nodes_it_had(lowered, case: Case, request) -> None:
    path = GOLDEN / f"{case.name}.json"
    if request.config.getoption("--rewrite-golden", default=False):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(summary(lowered(case)), indent=1) + "\n")
    golden = json.loads(path.read_text())
    installed = importlib.metadata.version("torch-npu")
    if golden["torch-npu"] != installed:
        pytest.skip(f"the histograms are those of torch-npu {golden['torch-npu']}, installed is {installed}")
    assert difference(golden, summary(lowered(case))) == []


def difference(golden: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Lines such as `Cast: 3 -> 5`."""
    return [
        f"{name}: {golden[part].get(name, 0)} -> {now[part].get(name, 0)}"
        for part in ("inputs", "nodes", "streams")
        for name in sorted(golden[part].keys() | now[part].keys())
        if golden[part].get(name, 0) != now[part].get(name, 0)
    ]


def test_a_node_more_or_less_is_told(lowered) -> None:
    now = summary(lowered(CASES[0]))
    changed = {**now, "nodes": {**now["nodes"], "TensorMove": 2, "MatMul": now["nodes"]["MatMul"] - 1}}
    assert difference(now, changed) == [f"MatMul: {now['nodes']['MatMul']} -> {now['nodes']['MatMul'] - 1}",
                                        "TensorMove: 0 -> 2"]  # fmt: skip


def test_a_larger_gear_is_the_same_graph(lowered) -> None:
    small, large = (lowered(case).graph for case in CASES[:2])
    assert small.work == large.work
    assert [one.shape for one in small.inputs.values()] != [one.shape for one in large.inputs.values()]


def test_experts_reach_the_graph_packed(lowered) -> None:
    """[experts, inputs, outputs] in tiles, not as checkpoints have them."""
    step = lowered(next(case for case in CASES if case.config == "DEEPSEEK_V3"))
    experts = {one.shape: one for one in step.graph.inputs.values() if one.shape[:1] == (256,) and len(one.shape) == 3}
    assert set(experts) == {(256, 7168, 4096), (256, 2048, 7168)}
    assert all(one.frozen and one.format == 29 for one in experts.values())


def test_hints_are_labels_of_streams(lowered) -> None:
    """What model code says may run beside the rest has streams of its own, and nothing else has."""
    routed, sparse = (
        lowered(next(case for case in CASES if case.config == name)).graph for name in ("DEEPSEEK_V3", "DEEPSEEK_V32")
    )
    kinds = [Counter((node.stream, node.type) for node in graph.nodes if node.stream) for graph in (routed, sparse)]
    shared = {("shared experts", "MatMul"): 2, ("shared experts", "SwiGlu"): 1}
    assert {kind: count for kind, count in kinds[0].items() if kind[0] == "shared experts"} == {
        kind: 2 * count
        for kind, count in shared.items()  # of the routed layer, and of the prediction layer
    }
    assert {kind: count for kind, count in kinds[1].items() if kind[0] == "shared experts"} == shared
    assert kinds[0]["prefetch", "Cmo"] == LAYERS + 1 and kinds[1]["prefetch", "Cmo"] == LAYERS
    indexer = {kind: count for (stream, kind), count in kinds[1].items() if stream == "indexer"}
    assert indexer["LightningIndexer"] == LAYERS and indexer["ScatterNdUpdate"] == LAYERS
    assert {stream for stream, _ in kinds[0]} == {"shared experts", "prefetch"}
    assert {stream for stream, _ in kinds[1]} == {"shared experts", "prefetch", "indexer"}


def test_captured_calls_have_no_hints(graphs, monkeypatch, tmp_path) -> None:
    from omni_engine.engine.npu import lowering as graph_lowering
    from omni_engine.ops.table import npu_table

    monkeypatch.setattr(graph_lowering, "npu_table", lambda: npu_table(with_hints=False))
    case = CASES[0]
    graph = graph_lowering.lower_step(engine_config(case, tmp_path), GraphKey(case.requests, 1, case.sampler)).graph
    assert graph.work["Cmo"] == 0 and {node.stream for node in graph.nodes} == {""}


# --- negative controls: `problems` must see each of these ----------------------------------------------------------


def lower_with(monkeypatch, tmp_path: Path, **bodies: Any) -> Any:
    from omni_engine.engine.npu import lowering as graph_lowering
    from omni_engine.ops.table import npu_table

    monkeypatch.setattr(graph_lowering, "npu_table", lambda: replace(npu_table(), **bodies))
    case = CASES[0]
    return graph_lowering.lower_step(engine_config(case, tmp_path), GraphKey(case.requests, 1, case.sampler))


def test_a_missing_cache_write_is_seen(graphs, monkeypatch, tmp_path) -> None:
    from omni_engine.engine.npu import lowering as graph_lowering
    from omni_engine.ops.table import BoundOps, npu_table

    build = graph_lowering.build_models

    def with_one_that_writes_nothing(*arguments: Any) -> Any:
        models = build(*arguments)
        models.decoder.layers[1].attention.ops = BoundOps(replace(npu_table(), write_kv_cache=lambda *tensors: None))
        return models

    monkeypatch.setattr(graph_lowering, "build_models", with_one_that_writes_nothing)
    found = problems(lower_with(monkeypatch, tmp_path), GQA)
    assert "cache writes: {'ScatterPaKvCache': 1}" in found
    assert any(problem.startswith("caches written in place") for problem in found)


def test_a_write_through_a_view_is_seen(graphs, monkeypatch, tmp_path) -> None:
    def through_views(key, value, key_cache, value_cache, slots) -> None:
        for new, stored in ((key, key_cache), (value, value_cache)):
            torch.ops.npu.npu_scatter_nd_update_(stored.view(-1, *stored.shape[2:]), slots.unsqueeze(1), new)

    found = problems(lower_with(monkeypatch, tmp_path, write_kv_cache=through_views), {"ScatterNdUpdate": 2 * LAYERS})
    assert any(problem.startswith("copies: ") and "TensorMove" in problem for problem in found)


def test_a_weight_that_is_no_parameter_is_seen(graphs, monkeypatch, tmp_path) -> None:
    """Of a module, torch tells parameters from buffers, and TorchAir freezes parameters only."""
    from omni_engine.engine.npu import lowering as graph_lowering

    build = graph_lowering.build_models

    def with_a_buffer(*arguments: Any) -> Any:
        models = build(*arguments)
        projection = models.decoder.layers[0].mlp.down_proj
        weight = projection.weight.data
        del projection.weight
        projection.register_buffer("weight", weight)
        return models

    monkeypatch.setattr(graph_lowering, "build_models", with_a_buffer)
    assert problems(lower_with(monkeypatch, tmp_path), GQA) == ["weights that are not frozen: [(4096, 12288)]"]
