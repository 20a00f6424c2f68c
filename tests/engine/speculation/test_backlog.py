"""Tokens that a drafter has only remembered are taken in before anybody reads their entries."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

import omni_engine
from omni_engine import Engine, SamplingParams
from omni_engine.engine.model_runner import ModelRunner
from omni_engine.engine.speculation.backlog import Backlog

DEMO = Path(omni_engine.__file__).parent / "models" / "demo"
PROMPTS = [[7 + index % 50 for index in range(20 + 9 * request)] for request in range(4)]


def test_only_what_is_behind_is_due_and_in_the_order_of_its_positions():
    backlog = Backlog(4, window=3)
    rows = np.array([2, 0])
    backlog.add(rows)
    backlog.add(np.array([2]))
    assert backlog.due(rows, 0).tolist() == []
    assert backlog.due(np.array([1, 2, 3]), 1).tolist() == [2]
    backlog.add(np.array([2]))
    assert backlog.due(rows, 0).tolist() == [2, 0], "one window is full: all go together"
    token_rows, distances = backlog.take(rows)
    assert token_rows.tolist() == [2, 2, 2, 0] and distances.tolist() == [3, 2, 1, 1]
    assert backlog.take(rows)[0].tolist() == [] and backlog.due(rows, 1).tolist() == []


CASES = {
    "never drafts": ((0, 1),),
    "now and then": ((0, 7), (2, 2), (0, 40), (2, 1)),
    "drafts mostly": ((2, 6), (0, 1)),
}
OPTIONS = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "block_size": 4}


def blocks_of(engine, token_ids):
    """Every layer's cache over the full blocks of these tokens, found as a new request with them would."""
    manager = engine._core.scheduler.kv
    found = manager.find_prefix(manager.new_blocks(None), token_ids)
    return found, [part[found] for cache in engine._core.runner.caches for part in cache]


def differences(model, depths, monkeypatch, **options):
    """Of the cache that finished requests leave, from what it is when their tokens are a prompt: the largest one in the
    model's layers, and in the drafter's. Steps verify `depths` in turn: so many drafts, in so many steps."""
    config = {"method": "mtp", "num_speculative_tokens": 2}
    engine = Engine(str(DEMO / model), speculative_config=config, max_num_seqs=3, **OPTIONS, **options)
    chosen = itertools.cycle([depth for depth, count in depths for _ in range(count)])
    monkeypatch.setattr(engine._core.scheduler.draft_depth, "choose", lambda num_requests: next(chosen))
    params = [SamplingParams(temperature=0.0, max_tokens=60 + 7 * index, ignore_eos=True) for index in range(4)]
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params)
    engine.generate({"prompt_token_ids": [5, 6, 7]}, SamplingParams(max_tokens=1))  # its plan tells which rows are free
    engine.check_integrity()
    fresh = Engine(str(DEMO / model), speculative_config=config | {"adaptive_depth": False}, max_num_seqs=3, **OPTIONS)
    of_model, of_drafter = 0.0, 0.0
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        token_ids = [*prompt, *output.outputs[0].token_ids]
        fresh.generate({"prompt_token_ids": token_ids}, SamplingParams(max_tokens=1))
        (ids, mine), (_, theirs) = blocks_of(engine, token_ids), blocks_of(fresh, token_ids)
        assert len(ids) >= (len(token_ids) - 2) // 4
        apart = [float((one - other).abs().max()) for one, other in zip(mine, theirs, strict=True)]
        parts = len(engine._core.runner.caches[-1])
        of_model, of_drafter = max(of_model, *apart[:-parts]), max(of_drafter, *apart[-parts:])
    return of_model, of_drafter


@pytest.mark.parametrize("model", ["deepseek", "deepseek-v32"])
@pytest.mark.parametrize("depths", CASES.values(), ids=CASES)
def test_finished_requests_leave_whole_entries(model, depths, monkeypatch):
    of_model, of_drafter = differences(model, depths, monkeypatch)
    assert of_model < 1e-3 and of_drafter < 1e-3


def test_a_row_that_starts_over_is_caught_up(monkeypatch):
    """A pool too small for three requests: they take each other's blocks."""
    of_model, of_drafter = differences("deepseek", CASES["now and then"], monkeypatch, num_gpu_blocks_override=90)
    assert of_model < 1e-3 and of_drafter < 1e-3


def test_the_comparison_sees_what_is_never_taken_in(monkeypatch):
    monkeypatch.setattr(ModelRunner, "_catch_up", lambda self, rows, backlog: None)
    of_model, of_drafter = differences("deepseek", CASES["now and then"], monkeypatch)
    assert of_model < 1e-3 and of_drafter > 0.1


@pytest.mark.parametrize("is_cached", [True, False])
def test_a_row_whose_blocks_nobody_will_read_is_not_caught_up(is_cached, monkeypatch):
    engine = Engine(
        str(DEMO / "deepseek"),
        speculative_config={"method": "mtp", "num_speculative_tokens": 2},
        enable_prefix_caching=is_cached,
        max_num_seqs=2,
        **OPTIONS,
    )
    depths, taken_in = iter([0] * 12 + [2] * 90), []
    monkeypatch.setattr(engine._core.scheduler.draft_depth, "choose", lambda num_requests: next(depths))
    drafter = engine._core.runner.drafting.drafter
    catch_up = drafter.catch_up
    monkeypatch.setattr(drafter, "catch_up", lambda rows, *rest: (taken_in.append(len(rows)), catch_up(rows, *rest)))
    for prompt in PROMPTS[:2]:  # the second on the row of the first, of whose tokens none must be taken in then
        params = SamplingParams(temperature=0.0, max_tokens=7 if prompt is PROMPTS[0] else 30, ignore_eos=True)
        engine.generate({"prompt_token_ids": prompt}, params)
    assert sum(taken_in) == (6 if is_cached else 0) + 3
