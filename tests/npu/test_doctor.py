"""The doctor's checks: right kernels pass, a broken one is seen, and nothing passes on a simulated device."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from omni_engine.engine.npu.doctor import GROUPS
from omni_engine.engine.npu.doctor_worker import Bench, Reported, eager_check, graph_check
from omni_engine.engine.npu.model_checks import MODEL_GROUPS, MODELS, gear_case
from omni_engine.ops.npu import norm as npu_norm
from omni_engine.ops.npu.op_checks import OP_GROUPS, op_checks
from omni_engine.server.cli import main

NAMESPACES = ("npu", "air", "omni_engine_npu")
CASES = {check.name: check.make for check in op_checks()} | {
    f"{name} ({group})": make for group, cases in MODEL_GROUPS.items() for name, make in cases
}
CPU = torch.device("cpu")
# The model of a dense layer has routed ones too, whose weights are packed and not looked at.
PASSED_BY = {"DeepSeek-V3, dense layer (one layer)": {"npu::npu_format_cast"}}


class Watched(TorchDispatchMode):
    """Notes the NPU's operators that are called; what `broken` returns, and writes, is noise of the same size."""

    def __init__(self, broken: str = "") -> None:
        super().__init__()
        self.called: set[str] = set()
        self.broken = broken

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        arguments = kwargs or {}
        if func.namespace not in NAMESPACES:
            return func(*args, **arguments)
        name = f"{func.namespace}::{func._opname}"
        self.called.add(name)
        results = func(*args, **arguments)
        if name != self.broken:
            return results
        for schema, value in zip(func._schema.arguments, args, strict=False):
            if schema.alias_info is not None and schema.alias_info.is_write:
                value.copy_(noise(value))
        if isinstance(results, torch.Tensor):
            return results if results is args[0] else noise(results)
        return results if results is None else type(results)(map(noise, results))


def noise(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.dtype.is_floating_point:
        return tensor.flip(tuple(range(tensor.dim())))
    return (torch.randn(tensor.shape) * tensor.float().nan_to_num().std()).to(tensor.dtype)


def result(name: str, broken: str = "") -> tuple[float, float, set[str]]:
    """Error, bound, and the operators called."""
    case = CASES[name]()
    with Watched(broken) as watched, torch.no_grad():
        function, inputs = case.prepare(CPU, True)
        error = case.error(function(*inputs), inputs)
    return error, case.bound, watched.called


@pytest.mark.parametrize("name", CASES)
def test_right_kernels_pass_and_a_broken_one_is_seen(references, name: str) -> None:
    torch.manual_seed(0)
    error, bound, called = result(name)
    assert error <= bound
    assert called
    unseen = [
        operator for operator in sorted(called - PASSED_BY.get(name, set())) if result(name, operator)[0] <= bound
    ]
    assert unseen == []


def test_the_greedy_gear_hangs_on_no_rounding() -> None:
    for name in MODELS:
        logits = gear_case(name, "split").expected[0]
        best = logits.topk(2).values
        assert float(((best[:, 0] - best[:, 1]) / logits.std(-1)).amin()) > 0.15


def bench(is_simulated: bool) -> Bench:
    def compile(function: Any) -> Any:
        return torch.compile(function, backend="eager", dynamic=False, fullgraph=True)

    return Bench(CPU, is_simulated, compile)


@pytest.mark.parametrize("name", ["npu_rms_norm", "npu_scatter_pa_kv_cache", "npu_fused_infer_attention_score_v2"])
def test_checks_compare_what_comes_back(references, name: str) -> None:
    for check in (eager_check(CASES[name]), graph_check(CASES[name])):
        assert check(bench(False)).startswith("relative error")


def test_a_wrong_result_is_reported_unless_nothing_is_computed(references) -> None:
    with Watched("npu::npu_rms_norm"):
        with pytest.raises(Reported, match="relative error"):
            eager_check(CASES["npu_rms_norm"])(bench(False))
        assert eager_check(CASES["npu_rms_norm"])(bench(True)) == ""


def test_a_gear_runs_twice_in_one_graph(references) -> None:
    name = "DeepSeek-V3, 4x1 split (one gear)"
    assert graph_check(CASES[name], again=True)(bench(False)).startswith("relative error")


def test_a_second_graph_is_an_error(references) -> None:
    case = CASES["npu_rms_norm"]()
    calls: list[int] = []

    def changing(hidden: torch.Tensor, weight: torch.Tensor) -> Any:
        calls.append(0)
        return npu_norm.rms_norm(hidden, weight, float(len(calls)))

    with pytest.raises(RuntimeError, match="recompile"):
        graph_check(lambda: replace(case, run=changing), again=True)(bench(False))
    assert graph_check(lambda: case, again=True)(bench(False)).startswith("relative error")


def test_every_group_has_checks() -> None:
    assert set(GROUPS) == {"device", *OP_GROUPS, *MODEL_GROUPS}


def examined(capsys, *words: str) -> tuple[int, dict[str, Any]]:
    status = main(["doctor", "--npu", "--simulated", "--json", *words])
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("group", ["device", "norms", pytest.param("", marks=pytest.mark.full)])
def test_on_a_simulated_device_checks_run_and_none_passes(simulator, capsys, group: str) -> None:
    status, report = examined(capsys, *(["--only", group] if group else []))
    statuses = {check["status"] for check in report["checks"]} - ({"not run"} if not group else set())
    assert status == 0 and statuses == {"ran"}
    assert report["simulated"] is True and report["tier"].startswith("Simulated device: nothing was computed")
    assert {question["answer"] for question in report["cann_questions"]} <= {"not asked: simulated"}
    assert group or {check["name"] for check in report["checks"] if check["status"] == "not run"} == {
        "npu_moe_distribute_dispatch_v2", "npu_moe_distribute_combine_v2",
    }  # fmt: skip


def test_a_graph_of_the_indexer_asks_cann_for_it(simulator, capsys) -> None:
    _, report = examined(capsys, "--only", "sparse attention")
    assert {"LightningIndexer", "SparseFlashAttention"} <= {one["operator"] for one in report["cann_questions"]}
