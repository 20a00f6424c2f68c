"""The decode loop of the benchmarks: its steps are those of an engine whose requests have a context."""

from __future__ import annotations

import dataclasses
import time

import pytest

from omni_engine.engine.config import DEMO_MODEL, EngineArgs, EngineConfig
from omni_engine.engine.core import EngineCore
from omni_engine.engine.graphs.decode_loop import FIRST_TOKEN, SAMPLING, DecodeLoop, StepTimes, TimedGraphs


@pytest.fixture(scope="module")
def core(config_only):
    args = EngineArgs(
        config_only, load_format="dummy", skip_tokenizer_init=True, device="cpu", max_num_seqs=4, max_model_len=128,
        num_gpu_blocks_override=40, enforce_eager=True,
    )  # fmt: skip
    return EngineCore.load(EngineConfig.from_args(args))


@pytest.fixture
def loop(core):
    """`loop(**settings)`; the core has its own graphs back afterwards."""
    graphs = core.runner.graphs

    def make(num_requests=3, context_len=20, max_steps=30, sampler="greedy"):
        timed = TimedGraphs(graphs)
        return DecodeLoop(
            core, timed, num_requests=num_requests, context_len=context_len, max_steps=max_steps, sampler=sampler
        )

    yield make
    core.runner.graphs = graphs


def test_a_loop_decodes_behind_a_context_that_nobody_computed(core, loop):
    made = loop()
    for step in range(5):
        assert made.context_len == 20 + step
        assert made.runner.table.state.position[:3].tolist() in ([[20 + step] * 3] if step else [[0] * 3, [20] * 3])
        made.step()
    assert core.runner.table.state.position[:3].tolist() == [25] * 3
    for request in made.scheduler.running:
        assert request.num_tokens == 26 and request.token_ids[20] == FIRST_TOKEN
        assert request.token_ids[-1] == core.runner.table.state.last_token[request.row].item()
        assert len(request.blocks.block_ids) == 2  # of 16 tokens
    made.scheduler.check_integrity()


def test_the_blocks_of_the_context_have_been_written(core, loop):
    """Pages that were never written would be one page to the system, and read from the processor's cache."""
    for part in core.runner.caches[0]:
        part.fill_(float("nan"))
    made = loop()
    blocks = [block for request in made.scheduler.running for block in request.blocks.block_ids]
    assert len(blocks) == 3 * 2
    for part in core.runner.caches[0]:
        assert not part[blocks].isnan().any() and part.isnan().any()


def test_every_step_is_one_decode_step_of_the_whole_batch(core, loop, monkeypatch):
    made = loop()
    plans = []
    dispatch = core.runner.dispatch
    monkeypatch.setattr(core.runner, "dispatch", lambda plan: plans.append(plan) or dispatch(plan))
    for _ in range(15):
        made.step()
    assert all(plan.is_decode_only and len(plan.rows) == 3 for plan in plans)
    assert [len(plan.new_rows) for plan in plans] == [3, *[0] * 14]
    assert [max(map(len, plan.new_block_ids)) for plan in plans] == [2, *[0] * 11, 1, 0, 0]  # the 33rd token's


def test_a_second_loop_takes_the_rows_over(core, loop):
    loop(num_requests=4).step()
    made = loop(num_requests=2)
    made.step()
    assert sorted(core.runner.rows) == [0, 1]


@pytest.mark.parametrize("sampler", SAMPLING)
def test_the_requests_ask_for_the_sampler(core, loop, sampler, monkeypatch):
    made = loop(sampler=sampler)
    kinds = []
    graphs = made.graphs.graphs
    monkeypatch.setattr(graphs, "replay", lambda kind, *rest: kinds.append(kind) or graphs.run_eager(kind, *rest))
    made.step()
    assert kinds == [sampler]


def test_the_engines_own_steps_run_to_the_end_of_the_requests(core, loop):
    made = loop(max_steps=12)
    made.step()
    assert made.engine_step_seconds(6) > 0
    assert not made.scheduler.has_unfinished
    assert len(made.runner._unread) == 0


def test_eager_steps_go_past_the_graphs(loop, monkeypatch):
    made = loop()
    calls = []
    graphs = made.graphs.graphs
    monkeypatch.setattr(graphs, "replay", lambda *rest: calls.append("graph") or graphs.run_eager(*rest))
    for made.graphs.bypassed in (True, False, True):
        made.step()
    assert calls == ["graph"]


def test_a_steps_parts_are_disjoint():
    times = StepTimes(1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
    assert (times.total, times.replay) == (63.0, 12.0)


@pytest.fixture(scope="module")
def predicting():
    """The demo, whose steps verify two drafts."""
    config = {"method": "mtp", "num_speculative_tokens": 2, "adaptive_depth": False}
    args = EngineArgs(
        str(DEMO_MODEL), skip_tokenizer_init=True, device="cpu", max_num_seqs=3, max_model_len=256,
        num_gpu_blocks_override=60, cudagraph_capture_sizes=[3], speculative_config=config,
    )  # fmt: skip
    return EngineCore.load(EngineConfig.from_args(args))


def predicting_loop(core, sampler="greedy", max_steps=20):
    timed = TimedGraphs(core.runner.graphs)
    return DecodeLoop(core, timed, num_requests=3, context_len=20, max_steps=max_steps, sampler=sampler)


@pytest.fixture
def restored(predicting):
    graphs = predicting.runner.graphs
    yield predicting
    predicting.runner.graphs = graphs


def test_with_drafts_contexts_grow_by_what_is_accepted(restored):
    made = predicting_loop(restored)
    plans = []
    dispatch = restored.runner.dispatch
    restored.runner.dispatch = lambda plan: plans.append(plan) or dispatch(plan)
    for _ in range(8):
        made.step()
    del restored.runner.dispatch
    assert all(plan.is_decode_only and plan.num_drafts == 2 and plan.num_tokens == [3] * 3 for plan in plans)
    positions = restored.runner.table.state.position[:3].tolist()
    assert made.context_len == pytest.approx(sum(positions) / 3)
    accepted = made.scheduler.stats().drafts.num_accepted_tokens
    assert sum(positions) == 3 * (20 + 8) + accepted
    assert [request.num_tokens for request in made.scheduler.running] == [position + 1 for position in positions]
    made.scheduler.check_integrity()


def test_requests_all_of_whose_drafts_are_accepted_do_not_end_before_their_steps_do(restored, monkeypatch):
    graphs = restored.runner.graphs
    drafting = dataclasses.replace(graphs.drafting, acceptance=lambda drafts, *_: (drafts >= 0).sum(dim=1))
    monkeypatch.setattr(graphs, "drafting", drafting)
    monkeypatch.setattr(graphs, "_programs", {})
    made = predicting_loop(restored, max_steps=12)
    made.graphs.bypassed = True
    for _ in range(12):
        made.step()
    assert len(made.scheduler.running) == 3
    assert made.context_len == 20 + 1 + 11 * 3  # in the first step there is nothing to verify


def test_the_two_graphs_of_a_step_that_ends_at_its_logits_are_timed_together(restored, monkeypatch):
    made = predicting_loop(restored, sampler="split")
    kinds = []
    graphs = made.graphs.graphs
    replay = graphs.replay
    monkeypatch.setattr(
        graphs, "replay", lambda kind, *rest: (kinds.append(kind), time.sleep(0.05), replay(kind, *rest))[2]
    )
    times = made.step()
    assert kinds == ["split", "draft"]
    assert times.launch > 0.1
    assert times.total < 2 * times.launch  # and they are not in the rest as well
