"""Requests that are pooled: they end when their prompts are computed, whatever happens on the way."""

from __future__ import annotations

import random

import pytest

from omni_engine.kvcache.manager import KVCacheManager
from omni_engine.scheduler.config import SchedulerConfig
from omni_engine.scheduler.plan import StepOutput, StepPlan
from omni_engine.scheduler.pooling_params import Pooled, PoolingParams
from omni_engine.scheduler.request import RequestInput
from omni_engine.scheduler.sampling_params import SamplingParams, ValidationError
from omni_engine.scheduler.scheduler import Scheduler

BLOCK_SIZE = 4


def make_scheduler(num_blocks: int = 64, **limits: int | bool) -> Scheduler:
    config = SchedulerConfig(**{"max_num_seqs": 4, "max_num_batched_tokens": 8, "max_model_len": 40, **limits})
    return Scheduler(config, KVCacheManager(None, num_blocks, BLOCK_SIZE))


def request(name: str, length: int, first: int = 0, **fields: object) -> RequestInput:
    params = PoolingParams(task="embed", skip_reading_prefix_cache=False, **fields)
    return RequestInput(name, list(range(first, first + length)), SamplingParams(max_tokens=1, seed=0), pooling=params)


def answer(plan: StepPlan) -> StepOutput:
    pooled = {entry: Pooled([1], bytes(4)) for entry, samples in enumerate(plan.samples) if samples}
    return StepOutput(plan.step, [[] for _ in plan.rows], {}, {}, pooled=pooled)


def test_a_prompt_is_computed_in_pieces_and_ends_with_the_last() -> None:
    scheduler = make_scheduler()
    scheduler.add(request("a", 19))
    steps = []
    while scheduler.has_unfinished:
        plan = scheduler.schedule()
        steps.append((plan.num_computed, plan.num_tokens, plan.samples, plan.num_decode))
        updates = scheduler.update(plan, answer(plan))
    assert steps == [([0], [8], [False], 0), ([8], [8], [False], 0), ([16], [3], [True], 0)]
    assert [update.finish_reason for update in updates] == ["stop"] and updates[0].pooled is not None
    assert updates[0].new_token_ids == []
    scheduler.check_integrity()


def test_a_last_piece_of_one_token_is_no_decode_step() -> None:
    scheduler = make_scheduler()
    scheduler.add(request("a", 9))
    scheduler.add(request("b", 1, first=50))
    plan = scheduler.schedule()
    scheduler.update(plan, answer(plan))
    plan = scheduler.schedule()
    assert (plan.num_tokens, plan.samples, plan.num_decode) == ([1, 1], [True, True], 0)
    assert len(scheduler.update(plan, answer(plan))) == 2


def test_nothing_is_planned_for_a_prompt_whose_last_piece_is_in_flight() -> None:
    scheduler = make_scheduler()
    scheduler.add(request("a", 5))
    first = scheduler.schedule()
    assert scheduler.schedule().rows == []
    assert [update.request_id for update in scheduler.update(first, answer(first))] == ["a"]


def test_a_prompt_may_fill_the_whole_length_and_no_more() -> None:
    scheduler = make_scheduler()
    assert scheduler.add(request("a", 40)) is None
    refusal = scheduler.add(request("b", 41))
    assert refusal is not None and refusal.error_kind == "invalid" and (refusal.error or "").endswith("41")
    generating = RequestInput("c", list(range(40)), SamplingParams(max_tokens=1, seed=0))
    assert scheduler.add(generating) is not None  # the control: there the output needs room


def test_without_chunked_prefill_a_prompt_waits_for_a_step_of_its_own() -> None:
    scheduler = make_scheduler(enable_chunked_prefill=False)
    for place, (name, length) in enumerate((("a", 5), ("b", 5), ("c", 3))):
        scheduler.add(request(name, length, first=100 * place))
    plan = scheduler.schedule()
    assert plan.num_tokens == [5]  # the second prompt would have to be cut
    scheduler.update(plan, answer(plan))
    assert scheduler.schedule().num_tokens == [5, 3]
    assert scheduler.add(request("d", 9)) is not None


def test_a_cached_prefix_is_read_where_the_last_token_is_all_that_counts() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=32)
    for name, skips in (("a", False), ("b", False), ("c", True)):
        source = request(name, 20)
        assert source.pooling is not None
        scheduler.add(
            RequestInput(
                name,
                source.prompt_token_ids,
                source.params,
                pooling=source.pooling.clone(skip_reading_prefix_cache=skips),
            )
        )
        plan = scheduler.schedule()
        (update,) = scheduler.update(plan, answer(plan))
        assert (update.num_cached_tokens, plan.num_computed) == {"a": (0, [0]), "b": (16, [16]), "c": (0, [0])}[name]


def test_an_output_without_what_the_plan_asks_for_is_refused() -> None:
    scheduler = make_scheduler()
    scheduler.add(request("a", 5))
    plan = scheduler.schedule()
    with pytest.raises(ValueError, match="what was pooled"):
        scheduler.update(plan, StepOutput(plan.step, [[]], {}, {}))


@pytest.mark.parametrize("seed", range(30))
def test_every_request_ends_once_whatever_happens(seed: int) -> None:
    """Few blocks, two steps in flight, aborts: preemptions while a last piece is computed included."""
    generator = random.Random(seed)
    scheduler = make_scheduler(
        num_blocks=generator.choice([11, 13, 20]), max_num_batched_tokens=generator.choice([4, 9])
    )
    scheduler._by_priority = generator.random() < 0.5
    waiting = [f"r{index}" for index in range(25)]
    ended: list[str] = []
    in_flight: list[StepPlan] = []
    num_preemptions = 0
    while waiting or scheduler.has_unfinished or in_flight:
        if waiting and generator.random() < 0.6:
            length, priority = generator.randint(1, 40), generator.randint(0, 2)
            source = request(waiting.pop(), length, first=generator.choice([0, 1000]))
            fields = {name: getattr(source, name) for name in source.__struct_fields__}
            assert scheduler.add(RequestInput(**{**fields, "priority": priority})) is None
        if generator.random() < 0.05 and scheduler.requests:
            ended += [update.request_id for update in scheduler.abort([generator.choice(list(scheduler.requests))])]
        if len(in_flight) < 2:
            plan = scheduler.schedule()
            if plan.rows:
                in_flight.append(plan)
        if in_flight and (len(in_flight) == 2 or generator.random() < 0.5):
            plan = in_flight.pop(0)
            updates = scheduler.update(plan, answer(plan))
            assert all(update.pooled is not None for update in updates)
            num_preemptions += sum(update.num_preemptions for update in updates)
            ended += [update.request_id for update in updates]
        scheduler.check_integrity()
    assert sorted(ended) == sorted(f"r{index}" for index in range(25))
    assert scheduler.kv.pool.num_pinned == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"task": "plugin"}, {"dimensions": 0}, {"dimensions": True}, {"dimensions": 1.5}, {"use_activation": 1},
        {"truncate_prompt_tokens": -2}, {"task": "classify", "dimensions": 8},
    ],
)  # fmt: skip
def test_wrong_parameters_are_refused_by_name(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError) as caught:
        PoolingParams(**fields)
    assert caught.value.parameter in fields
