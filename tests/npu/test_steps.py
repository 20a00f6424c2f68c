"""Whole decode steps through the NPU's ops, as TorchAir traces and rewrites them, against the plain step.

TorchAir runs its rewritten graph operator by operator on the CPU (its `run_eagerly`), with reference kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from omni_engine.engine.config import EngineArgs, EngineConfig
from omni_engine.engine.graphs.runner import GraphKey, GraphRunner
from omni_engine.ops.table import PLAIN, OpTable

BLOCK_SIZE, BLOCKS, WIDTH = 128, 6, 2
POSITIONS = (5, 130, 200)  # of three requests
BOUND = 0.03  # of logits and caches, relative to their norm: bfloat16 keeps 8 bits, and errors add up over the layers
SPARSE_BOUND = 0.1  # of logits, where two scores that are equal but for rounding decide what is attended to
MTP = {"method": "mtp", "num_speculative_tokens": 1, "adaptive_depth": False}
CASES = {
    "QWEN3": {}, "QWEN3_MOE": {}, "DEEPSEEK_V3": {}, "DEEPSEEK_V32": {}, "DEEPSEEK_V3 with MTP": MTP,
}  # fmt: skip
Run = Callable[[Any, GraphKey, tuple[Any, ...]], torch.Tensor]


@dataclass(frozen=True)
class Outcome:
    """What a step leaves behind."""

    output: torch.Tensor
    state: dict[str, torch.Tensor]
    caches: list[torch.Tensor]


@pytest.fixture
def configured(tiny_models, tmp_path: Path) -> Callable[[str], EngineConfig]:
    def config(case: str) -> EngineConfig:
        return EngineConfig.from_args(
            EngineArgs(
                model=tiny_models.write_config(case.split()[0], tmp_path),
                load_format="dummy",
                skip_tokenizer_init=True,
                speculative_config=CASES[case],
            )
        )

    return config


def step(config: EngineConfig, sampler: str, table: OpTable, run: Run) -> Outcome:
    """One step of three requests, whose caches hold noise. Another table than the plain one gets packed weights."""
    from omni_engine.engine.build import cache_spec, load_models, make_drafting
    from omni_engine.engine.row_state import RowTable
    from omni_engine.kvcache.tensors import allocate_kv_tensors
    from omni_engine.models.npu_weights import pack_for_npu

    device = torch.device("cpu")
    models = load_models(config, device)
    if table is not PLAIN:
        for module in (models.decoder, models.drafter):
            if isinstance(module, torch.nn.Module):
                pack_for_npu(module)
        models.bind(table)
    requests = len(POSITIONS)
    drafting = make_drafting(config, models.drafter, requests, BLOCK_SIZE * WIDTH, device, None)
    num_drafts = 0 if drafting is None else drafting.num_drafts
    caches = allocate_kv_tensors(cache_spec(config), BLOCKS, BLOCK_SIZE, device)
    generator = torch.Generator().manual_seed(1)
    for part in (part for cache in caches for part in cache):
        part.copy_(torch.randn(part.shape, generator=generator))
    state = RowTable(requests, WIDTH, device, num_drafts).state
    state.last_token[:requests] = torch.tensor([7, 70, 500])
    state.position[:requests] = torch.tensor(POSITIONS)
    state.block_table[:requests] = torch.tensor([[1, 0], [2, 3], [4, 5]], dtype=torch.int32)
    state.drafts[:requests] = 9
    runner = GraphRunner(models.decoder, state, caches, drafting)
    runner.allocate((requests,))
    key = GraphKey(requests, 1 + num_drafts, sampler)
    inputs = runner.inputs(key)
    inputs.rows.copy_(torch.arange(requests))
    with torch.inference_mode():
        output = run(runner.program(key), key, tuple(inputs))
    return Outcome(output, state._asdict(), [part for cache in caches for part in cache])


def eager(program: Any, key: GraphKey, inputs: tuple[Any, ...]) -> torch.Tensor:
    return program(*inputs)


def through_torchair(program: Any, key: GraphKey, inputs: tuple[Any, ...]) -> torch.Tensor:
    import torchair  # pyright: ignore[reportMissingImports]

    from omni_engine.engine.npu.graphs import gear_function, torchair_config

    config = torchair_config()
    config.debug.run_eagerly = True
    backend = torchair.get_npu_backend(compiler_config=config)
    torch._dynamo.reset()
    return torch.compile(gear_function(program, key), backend=backend, dynamic=False, fullgraph=True)(*inputs)


def npu_bodies() -> OpTable:
    from omni_engine.ops.table import npu_table

    return npu_table()


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def differences(actual: Outcome, expected: Outcome, bound: float = BOUND) -> list[str]:
    """What of a step is not what the plain one leaves. `bound`: of logits."""
    found = []
    if actual.output.is_floating_point():
        error = distance(actual.output, expected.output)
        if not error < bound:
            found.append(f"logits: {error:.3f}")
    elif not torch.equal(actual.output, expected.output):
        found.append(f"tokens: {actual.output.tolist()} instead of {expected.output.tolist()}")
    for name, mine in actual.state.items():
        if not torch.equal(mine[:-1], expected.state[name][:-1]):
            found.append(f"{name}: {mine[:-1].tolist()} instead of {expected.state[name][:-1].tolist()}")
    for index, (mine, theirs) in enumerate(zip(actual.caches, expected.caches, strict=True)):
        error = distance(mine[1:], theirs[1:])  # block 0 is for padding
        if not error < BOUND:
            found.append(f"cache tensor {index}: {error:.3f}")
        written = (theirs[1:] - mine[1:]).abs().amax(dim=-1) > 0.2 * theirs[1:].float().std()
        if written.any():
            found.append(f"cache tensor {index}: {int(written.sum())} entries are others")
    return found


def bound(case: str) -> float:
    return SPARSE_BOUND if case == "DEEPSEEK_V32" else BOUND


@pytest.mark.parametrize("sampler", ["split", "greedy"])
@pytest.mark.parametrize("case", CASES)
def test_a_step_that_torchair_has_rewritten_is_the_plain_step(references, configured, case: str, sampler: str) -> None:
    config = configured(case)
    expected = step(config, sampler, PLAIN, eager)
    assert differences(step(config, sampler, npu_bodies(), through_torchair), expected, bound(case)) == []


@pytest.mark.parametrize("case", ["QWEN3_MOE", "DEEPSEEK_V3"])
def test_an_eager_step_with_lengths_as_numbers_is_the_plain_step(references, configured, case: str) -> None:
    def with_numbers(program: Any, key: GraphKey, inputs: tuple[Any, ...]) -> torch.Tensor:
        return program(*inputs, [position + 1 for position in POSITIONS])

    config = configured(case)
    expected = step(config, "split", PLAIN, eager)
    assert differences(step(config, "split", npu_bodies(), with_numbers), expected) == []


# --- negative controls: a step without one op --------------------------------------------------------------------


def unturned(heads: torch.Tensor, *angles: Any) -> torch.Tensor:
    return heads.clone()


def unnormed(hidden: torch.Tensor, residual: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return hidden + residual, hidden + residual


def unrouted(hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
    return torch.zeros_like(hidden)


def unwritten(*tensors: Any) -> None:
    pass


def unselected(query: torch.Tensor, weights: Any, keys: Any, table: Any, lengths: Any, topk: int) -> torch.Tensor:
    """The first tokens, whatever their scores."""
    return torch.arange(topk, dtype=torch.int32).expand(query.shape[0], 1, -1).contiguous()


@pytest.mark.parametrize(("case", "removed", "body"), [
    ("QWEN3", "write_kv_cache", unwritten),
    ("QWEN3", "rotate", unturned),
    ("QWEN3_MOE", "routed_experts", unrouted),
    ("QWEN3_MOE", "add_rms_norm", unnormed),
    ("DEEPSEEK_V3 with MTP", "write_latent_cache", unwritten),
    ("DEEPSEEK_V32", "write_index_keys", unwritten),
    ("DEEPSEEK_V32", "lightning_indexer", unselected),
])  # fmt: skip
def test_a_missing_op_is_seen(references, configured, case: str, removed: str, body: Callable[..., Any]) -> None:
    config = configured(case)
    expected = step(config, "split", PLAIN, eager)
    actual = step(config, "split", replace(npu_bodies(), **{removed: body}), through_torchair)
    found = differences(actual, expected, bound(case))
    assert found != []
    if body is unwritten:
        assert any("entries are others" in difference for difference in found)
