"""What drafts come to: counted by the scheduler in all and by request, and the figures made of the counts."""

from __future__ import annotations

import pytest

from omni_engine.kvcache.manager import KVCacheManager
from omni_engine.scheduler.config import SchedulerConfig
from omni_engine.scheduler.draft_depth import DraftDepth
from omni_engine.scheduler.draft_stats import DraftStats
from omni_engine.scheduler.plan import StepOutput
from omni_engine.scheduler.request import RequestInput
from omni_engine.scheduler.sampling_params import SamplingParams
from omni_engine.scheduler.scheduler import Scheduler


class Play:
    """A scheduler with three drafts per step, to which a step's outcome is told request by request."""

    def __init__(self, num_blocks=100):
        config = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=64)
        self.scheduler = Scheduler(config, KVCacheManager(None, num_blocks, 4), DraftDepth((3,)))
        self.last = {}  # request id -> its last update with counts

    def add(self, request_id, max_tokens=20, **params):
        params = SamplingParams(max_tokens=max_tokens, seed=1, **params)
        assert self.scheduler.add(RequestInput(request_id, [ord(request_id)] * 5, params, [2])) is None

    def step(self, **outcome):
        """request id -> (tokens that were sampled, drafts that were there), of those that decode in the step."""
        plan = self.scheduler.schedule()
        names = {request.row: request.request_id for request in self.scheduler.running}
        entries = [names[row] for row in plan.rows]
        tokens, drafts = [], []
        for index, name in enumerate(entries):
            if index < plan.num_decode and plan.num_drafts:
                own, there = outcome[name]
                drafts.append(there)
            else:
                own = [7]
            tokens.append(list(own))
        updates = self.scheduler.update(plan, StepOutput(plan.step, tokens, {}, {}, drafts))
        for update in updates:
            self.last[update.request_id] = (update.num_draft_tokens, update.num_accepted_tokens)
        return updates

    @property
    def counts(self):
        stats = self.scheduler.stats().drafts
        return (
            stats.num_drafts, stats.num_draft_tokens, stats.num_accepted_tokens, stats.num_accepted_per_position
        )  # fmt: skip


def test_each_step_of_a_request_is_one_draft_of_so_many_tokens():
    play = Play()
    play.add("a")
    play.step()
    play.step(a=([7, 8, 9], 3))  # two of three accepted
    play.step(a=([7], 3))  # none
    play.step(a=([7], 0))  # there was nothing to verify
    play.step(a=([7, 8], 1))  # one of one
    play.step(a=([7, 8, 9, 10], 3))  # all
    assert play.counts == (4, 10, 6, [3, 2, 1])
    assert play.last["a"] == (10, 6)


def test_what_the_requests_are_told_sums_up_to_the_counters():
    play = Play()
    for name in "abc":
        play.add(name)
    play.step()
    play.step(a=([7, 8, 9], 3), b=([7], 3), c=([7, 8], 2))
    play.step(a=([7, 8, 9, 1], 3), b=([7], 0), c=([7], 3))
    assert play.last == {"a": (6, 5), "b": (3, 0), "c": (5, 1)}
    assert play.counts == (5, 14, 6, [3, 2, 1])


def test_an_aborted_request_is_told_what_it_had():
    play = Play()
    play.add("a")
    play.step()
    play.step(a=([7, 8], 3))
    (update,) = play.scheduler.abort(["a"])
    assert (update.finish_reason, update.num_draft_tokens, update.num_accepted_tokens) == ("abort", 3, 1)


def test_a_preempted_request_goes_on_counting():
    play = Play(num_blocks=8)  # room for one of them at full length
    play.add("a")
    play.add("b")
    play.step()
    while not play.scheduler.stats().num_preemptions:
        play.step(a=([7, 8], 3), b=([7, 8], 3))
    before = play.last["b"]
    assert before[0] > 0
    while "a" in play.scheduler.requests:
        play.step(a=([7, 8, 9, 10], 3), b=([7, 8], 3))
    while "b" in play.scheduler.requests:
        play.step(b=([7, 8, 9, 10], 3))
    assert play.last["b"] > before
    assert play.counts[1:3] == tuple(map(sum, zip(*play.last.values(), strict=True)))


def test_figures_are_vllms():
    stats = DraftStats(203, 609, 206, [122, 58, 26])
    assert stats.acceptance_rate == pytest.approx(0.338, abs=5e-4)
    assert stats.acceptance_length == pytest.approx(2.01, abs=5e-3)
    assert stats.acceptance_per_position == pytest.approx([0.601, 0.286, 0.128], abs=5e-4)


def test_figures_without_drafts_are_those_of_plain_decoding():
    stats = DraftStats(0, 0, 0, [0, 0])
    assert (stats.acceptance_rate, stats.acceptance_length, stats.acceptance_per_position) == (0, 1, [0, 0])


def test_what_has_come_since():
    early, late = DraftStats(2, 6, 3, [2, 1, 0]), DraftStats(5, 15, 8, [4, 3, 1])
    assert late.since(early) == DraftStats(3, 9, 5, [2, 2, 1])
    assert late.since(None) is late
    assert early.since(late) is early  # of a new engine
    assert DraftStats(9, 27, 1, [1, 0, 0]).since(late) == DraftStats(9, 27, 1, [1, 0, 0])
