"""Prompts that are held back while others decode: which step computes them, and that nothing waits for ever."""

from __future__ import annotations

import random
from typing import Any

import pytest

from omni_engine.kvcache.manager import KVCacheManager
from omni_engine.scheduler.config import SchedulerConfig
from omni_engine.scheduler.plan import StepOutput, StepPlan
from omni_engine.scheduler.request import RequestInput
from omni_engine.scheduler.sampling_params import SamplingParams
from omni_engine.scheduler.scheduler import Scheduler

PROMPT_SECONDS, DECODE_SECONDS = 0.375, 0.125


def make(num_blocks: int = 100, **config: Any) -> Scheduler:
    limits = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "max_model_len": 64} | config
    return Scheduler(SchedulerConfig(**limits), KVCacheManager(None, num_blocks, 4, enable_prefix_caching=False))


def add(scheduler: Scheduler, request_id: str, num_prompt: int, priority: int = 0, max_tokens: int = 20) -> None:
    params = SamplingParams(max_tokens=max_tokens, seed=1)
    assert scheduler.add(RequestInput(request_id, [5] * num_prompt, params, [2], priority=priority)) is None


def running(scheduler: Scheduler) -> list[str]:
    return [request.request_id for request in scheduler.running]


def seconds_of(plan: StepPlan) -> float:
    return DECODE_SECONDS if plan.is_decode_only else PROMPT_SECONDS


def read(scheduler: Scheduler, plan: StepPlan) -> None:
    tokens = [[7] if samples else [] for samples in plan.samples]
    scheduler.update(plan, StepOutput(plan.step, tokens, {}, {}, seconds=seconds_of(plan)))
    scheduler.check_integrity()


def step(scheduler: Scheduler) -> dict[str, int]:
    """One whole step: {request id: its tokens}."""
    plan = scheduler.schedule()
    assert plan.rows
    ids = {request.row: request.request_id for request in scheduler.running}
    planned = {ids[row]: count for row, count in zip(plan.rows, plan.num_tokens, strict=True)}
    read(scheduler, plan)
    return planned


def test_prompts_come_one_by_one_and_leave_the_others_their_time():
    scheduler = make(max_prefill_share=0.25)
    add(scheduler, "a", 3)
    assert step(scheduler) == {"a": 3}
    add(scheduler, "b", 5)
    add(scheduler, "c", 6)
    assert step(scheduler) == {"a": 1, "b": 5}  # nothing had stalled a
    assert [step(scheduler) for _ in range(9)] == 9 * [{"a": 1, "b": 1}]  # 3 of 12 eighths of a second were b's prompt
    assert step(scheduler) == {"a": 1, "b": 1, "c": 6}


def test_without_a_limit_they_come_at_once():
    scheduler = make()
    add(scheduler, "a", 3)
    step(scheduler)
    add(scheduler, "b", 5)
    add(scheduler, "c", 6)
    assert step(scheduler) == {"a": 1, "b": 5, "c": 6}


def test_prompts_that_stall_nobody_are_not_held():
    scheduler = make(max_prefill_share=0.1)
    add(scheduler, "a", 3, max_tokens=3)
    add(scheduler, "b", 5, max_tokens=3)
    assert step(scheduler) == {"a": 3, "b": 5}
    add(scheduler, "c", 4, max_tokens=2)
    add(scheduler, "d", 4)
    assert step(scheduler) == {"a": 1, "b": 1, "c": 4}
    assert step(scheduler) == {"a": 1, "b": 1, "c": 1}
    assert step(scheduler) == {"d": 4}  # 3 s were owed, to those who have ended
    add(scheduler, "e", 4)
    assert step(scheduler) == {"d": 1, "e": 4}


def test_each_piece_of_a_long_prompt_leaves_the_others_their_time():
    scheduler = make(max_prefill_share=0.5, max_num_batched_tokens=9)
    add(scheduler, "a", 3)
    step(scheduler)
    add(scheduler, "b", 20)
    assert [step(scheduler).get("b", 0) for _ in range(9)] == [8, 0, 0, 0, 8, 0, 0, 0, 4]


def test_no_further_prompt_while_the_time_of_one_is_not_known():
    scheduler = make(max_prefill_share=0.9)
    add(scheduler, "a", 3)
    step(scheduler)
    add(scheduler, "b", 5)
    add(scheduler, "c", 6)
    first, second = scheduler.schedule(), scheduler.schedule()
    assert (first.num_tokens, second.num_tokens) == ([1, 5], [1, 1])
    read(scheduler, first)  # a third of a step that only decodes is owed
    third = scheduler.schedule()
    assert third.num_tokens == [1, 1]
    read(scheduler, second)
    assert scheduler.schedule().num_tokens == [1, 1, 6]


def test_more_urgent_requests_are_not_held():
    scheduler = make(max_prefill_share=0.1, policy="priority")
    add(scheduler, "a", 3, priority=1)
    step(scheduler)
    add(scheduler, "b", 5, priority=1)
    step(scheduler)
    add(scheduler, "c", 6, priority=1)
    add(scheduler, "urgent", 6, priority=0)
    assert step(scheduler) == {"urgent": 6, "a": 1, "b": 1}
    assert running(scheduler) == ["urgent", "a", "b"]


def test_who_holds_the_blocks_that_decoding_needs_goes_on():
    # The long prompt is first in line, so that it is not preempted, and its blocks leave the other one none to grow.
    scheduler = make(num_blocks=8, max_prefill_share=0.01, policy="priority", max_num_batched_tokens=9)
    add(scheduler, "a", 4, priority=1)
    step(scheduler)
    add(scheduler, "long", 24, priority=0, max_tokens=2)
    planned = []
    while scheduler.has_unfinished:
        planned.append(step(scheduler))
    num_alone = planned.index({"long": 9}, 1) - 1  # steps of a alone, until it finds no block
    assert planned[0] == {"long": 9} and planned[1 : 1 + num_alone] == num_alone * [{"a": 1}]
    assert num_alone > 8 and scheduler.stats().num_preemptions == 1


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_prompts_take_their_share_of_a_busy_engine(share):
    """Requests never stop coming and are never alone: prompts have their share of the time, and no more."""
    scheduler = make(max_prefill_share=share, num_blocks=400, max_num_seqs=30)
    numbers, spent = random.Random(1), [0.0, 0.0]
    for number in range(2000):
        if len(scheduler.waiting) < 3:
            add(scheduler, f"r{number}", numbers.randrange(2, 20), max_tokens=numbers.randrange(10, 40))
        plan = scheduler.schedule()
        spent[plan.is_decode_only] += seconds_of(plan)
        read(scheduler, plan)
    assert spent[False] / sum(spent) == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5, float("nan")])
def test_wrong_shares_are_refused(share):
    with pytest.raises(ValueError, match=r"max_prefill_share must be in \(0, 1\]"):
        SchedulerConfig(4, 32, 64, max_prefill_share=share)
