"""Which graphs the arguments ask for, and which are refused."""

from pathlib import Path

import pytest

from omni_engine.engine.config import EngineArgs
from omni_engine.engine.graphs.config import COMPILED_GEARS, GraphConfig, choose_graphs, resolve_graphs


def resolve(device="cpu", max_num_seqs=128, **args):
    return resolve_graphs(choose_graphs(EngineArgs("m", **args)), device, max_num_seqs)


def test_the_default_on_a_cpu_is_six_gears(monkeypatch):
    monkeypatch.delenv("OMNI_ENGINE_GRAPH_BACKEND")
    assert resolve() == GraphConfig("inductor", COMPILED_GEARS)
    assert resolve("cuda", 512).backend == "cudagraph"


@pytest.mark.parametrize(
    ("rows", "gears"), [(1, (1,)), (6, (1, 4, 6)), (64, COMPILED_GEARS), (33, (1, 4, 8, 16, 32, 33))]
)
def test_a_full_batch_has_a_gear_of_its_own(rows, gears):
    assert resolve(max_num_seqs=rows).gears == gears


@pytest.mark.parametrize(
    "args",
    [
        {"enforce_eager": True},
        {"compilation_config": {"mode": 0}},
        {"compilation_config": {"level": 0}},
        {"compilation_config": {"cudagraph_mode": "NONE"}},
    ],
)
def test_eager_has_no_gears(args):
    assert resolve(**args).gears == ()


def test_sizes_come_from_the_flag_before_the_config():
    both = {"cudagraph_capture_sizes": [8, 2, 2], "compilation_config": {"cudagraph_capture_sizes": [5]}}
    assert resolve(**both).gears == (2, 8)
    assert resolve(compilation_config={"cudagraph_capture_sizes": [5]}).gears == (5,)
    assert resolve(max_cudagraph_capture_size=9).gears == (1, 4, 8, 9)


def test_compiled_graphs_may_have_a_folder_of_their_own():
    assert choose_graphs(EngineArgs("m")).cache_dir is None
    assert choose_graphs(EngineArgs("m", compilation_config={"cache_dir": ""})).cache_dir is None  # vLLM's default
    assert choose_graphs(EngineArgs("m", compilation_config={"cache_dir": "/x"})).cache_dir == Path("/x")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"cudagraph_capture_sizes": [0]}, "from 1 to 4096: 0"),
        ({"cudagraph_capture_sizes": [4097]}, "from 1 to 4096: 4097"),
        ({"cudagraph_capture_sizes": []}, "list of batch sizes"),
        ({"compilation_config": {"cudagraph_capture_sizes": ["a"]}}, "batch sizes from 1 to 4096: a"),
        ({"compilation_config": {"mode": 4}}, "mode must be 0"),
        ({"compilation_config": {"mode": True}}, "mode must be 0"),
        ({"compilation_config": {"cudagraph_mode": "PIECEWISE"}}, "must be one of NONE, FULL.*: PIECEWISE"),
        ({"compilation_config": {"cache_dir": 4}}, "cache_dir must be the path of a folder: 4"),
        ({"compilation_config": {"use_inductor": True}}, "not supported: use_inductor"),
        ({"graph_backend": "tensorrt"}, "graph_backend must be one of"),
        ({"require_graph": True, "enforce_eager": True}, "contradicts"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_loaded(args, message):
    with pytest.raises(ValueError, match=message):
        EngineArgs("m", **args)


def test_gears_above_the_batch_are_refused():
    with pytest.raises(ValueError, match="max_num_seqs=8; lower them or raise it: 16"):
        resolve(max_num_seqs=8, cudagraph_capture_sizes=[4, 16])


def test_backends_of_another_device_are_refused():
    with pytest.raises(ValueError, match=r"NVIDIA GPU.*: cpu"):
        resolve(graph_backend="cudagraph")
    with pytest.raises(ValueError, match=r"for the CPU.*: cuda"):
        resolve("cuda", graph_backend="inductor")
    for backend in ("torchair", "npugraph_ex"):
        with pytest.raises(ValueError, match=rf"{backend} needs an Ascend NPU; use auto on: cpu"):
            resolve(graph_backend=backend)


def test_an_npu_has_few_gears_and_the_graph_engine_unless_told_otherwise(monkeypatch):
    monkeypatch.delenv("OMNI_ENGINE_GRAPH_BACKEND")
    chosen = resolve("npu", max_num_seqs=200)
    assert (chosen.backend, chosen.gears) == ("torchair", (1, 4, 8, 16, 32, 64))
    assert resolve("npu", max_num_seqs=20).gears == (1, 4, 8, 16, 20)
    assert resolve("npu", graph_backend="npugraph_ex").backend == "npugraph_ex"


def test_the_environment_names_the_backend_that_auto_stands_for(monkeypatch):
    monkeypatch.setenv("OMNI_ENGINE_GRAPH_BACKEND", "inductor")
    assert resolve().backend == "inductor"
    assert resolve(graph_backend="eager").backend == "eager"
    monkeypatch.setenv("OMNI_ENGINE_GRAPH_BACKEND", "tvm")
    with pytest.raises(ValueError, match=r"OMNI_ENGINE_GRAPH_BACKEND must be one of.*: tvm"):
        resolve()
