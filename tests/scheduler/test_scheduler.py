"""The scheduler's decisions, one at a time: what a step holds, who gives way, who is refused, when a request ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from omni_engine.kvcache.manager import KVCacheManager
from omni_engine.scheduler.config import SchedulerConfig
from omni_engine.scheduler.plan import StepOutput, StepPlan, TokenLogprobs
from omni_engine.scheduler.request import Request, RequestInput, RequestStatus, RequestUpdate
from omni_engine.scheduler.sampling_params import SamplingParams
from omni_engine.scheduler.scheduler import Scheduler

EOS = 2
BLOCK = 4


def make(num_blocks: int = 100, hash_block_size: int | None = None, **config: Any) -> Scheduler:
    limits = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "max_model_len": 64} | config
    return Scheduler(SchedulerConfig(**limits), KVCacheManager(None, num_blocks, BLOCK, hash_block_size))


def offer(
    scheduler: Scheduler,
    request_id: str,
    prompt: int | list[int],
    priority: int = 0,
    salt: str | None = None,
    **params: Any,
) -> RequestUpdate | None:
    """What `add` says. `prompt`: its tokens, or their number (then unlike any other request's)."""
    if isinstance(prompt, int):
        prompt = [1000 + sum(request_id.encode()) * 100 + index for index in range(prompt)]
    params = {"max_tokens": 20, "seed": 1} | params
    source = RequestInput(
        request_id, prompt, SamplingParams(**params), eos_token_ids=[EOS], priority=priority, cache_salt=salt
    )
    return scheduler.add(source)


def add(scheduler: Scheduler, request_id: str, prompt: int | list[int], **rest: Any) -> None:
    assert offer(scheduler, request_id, prompt, **rest) is None


def output_of(plan: StepPlan, token: int | list[int] = 7) -> StepOutput:
    tokens = token if isinstance(token, list) else [token]
    return StepOutput(plan.step, [list(tokens) if samples else [] for samples in plan.samples], {}, {})


def step(scheduler: Scheduler, token: int | list[int] = 7) -> tuple[dict[str, tuple[int, int]], list[RequestUpdate]]:
    """One whole step: ({request id: its tokens [start, end)}, updates)."""
    plan = scheduler.schedule()
    ids = {request.row: request.request_id for request in scheduler.running}
    planned = {
        ids[row]: (start, start + count)
        for row, start, count in zip(plan.rows, plan.num_computed, plan.num_tokens, strict=True)
    }
    updates = scheduler.update(plan, output_of(plan, token)) if plan.rows else []
    scheduler.check_integrity()
    return planned, updates


def running(scheduler: Scheduler) -> list[str]:
    return [request.request_id for request in scheduler.running]


def step_until(
    scheduler: Scheduler, reached: Callable[[], bool], spans: list[dict[str, tuple[int, int]]] | None = None
) -> None:
    for _ in range(200):
        if reached():
            return
        planned, _ = step(scheduler)
        assert planned  # something goes on in every step
        if spans is not None:
            spans.append(planned)
    pytest.fail("200 steps were not enough")


# --- what a step holds ---------------------------------------------------------------------------------------------


def test_nothing_to_do_gives_an_empty_plan():
    plan = make().schedule()
    assert plan.rows == [] and plan.new_rows == [] and plan.released_rows == []


def test_new_request_is_told_whole():
    scheduler = make()
    add(scheduler, "a", [5, 6, 7])
    plan = scheduler.schedule()
    (row,) = plan.new_rows
    assert (row.row, row.request_id, row.token_ids, row.num_prompt_tokens) == (0, "a", [5, 6, 7], 3)
    assert row.eos_token_ids == [EOS] and row.params.max_tokens == 20
    assert (plan.rows, plan.num_computed, plan.num_tokens, plan.samples) == ([0], [0], [3], [True])
    assert plan.new_block_ids == [[1]]


def test_token_ids_of_a_new_row_are_a_copy():
    scheduler = make()
    add(scheduler, "a", [5, 6, 7])
    plan = scheduler.schedule()
    scheduler.update(plan, output_of(plan))
    assert plan.new_rows[0].token_ids == [5, 6, 7]


def test_decoding_request_computes_its_last_token():
    scheduler = make()
    add(scheduler, "a", 3)
    step(scheduler)
    assert [step(scheduler)[0] for _ in range(2)] == [{"a": (3, 4)}, {"a": (4, 5)}]


def test_known_rows_get_only_new_blocks():
    scheduler = make()
    add(scheduler, "a", 3)
    told = []
    for _ in range(7):
        plan = scheduler.schedule()
        told.append(plan.new_block_ids)
        scheduler.update(plan, output_of(plan))
    assert told == [[[1]], [[]], [[2]], [[]], [[]], [[]], [[3]]]


def test_long_prompt_is_split_by_the_token_budget():
    scheduler = make(max_num_batched_tokens=8)
    add(scheduler, "a", 20)
    assert [step(scheduler)[0]["a"] for _ in range(4)] == [(0, 8), (8, 16), (16, 20), (20, 21)]


def test_chunks_of_one_prompt_are_limited_by_the_threshold():
    scheduler = make(long_prefill_token_threshold=6)
    add(scheduler, "a", 20)
    add(scheduler, "b", 8)
    assert step(scheduler)[0] == {"a": (0, 6), "b": (0, 6)}
    assert step(scheduler)[0] == {"a": (6, 12), "b": (6, 8)}


def test_running_requests_take_the_budget_before_waiting_ones():
    scheduler = make(max_num_batched_tokens=8)
    add(scheduler, "a", 4)
    step(scheduler)
    add(scheduler, "b", 20)
    assert step(scheduler)[0] == {"a": (4, 5), "b": (0, 7)}


def test_decoding_entries_come_before_chunks():
    scheduler = make(max_num_batched_tokens=16)
    add(scheduler, "a", 40, max_tokens=4)
    add(scheduler, "b", 3)
    for _ in range(2):
        step(scheduler)
    plan = scheduler.schedule()
    scheduler.update(plan, output_of(plan))
    assert (plan.num_tokens, plan.samples) == ([8, 3], [True, True])
    add(scheduler, "c", 30)
    plan = scheduler.schedule()
    assert (plan.rows, plan.num_tokens, plan.samples) == ([0, 1, 2], [1, 1, 14], [True, True, False])
    scheduler.update(plan, output_of(plan))
    scheduler.abort(["a"])
    plan = scheduler.schedule()
    assert (plan.rows, plan.num_tokens) == ([1, 2], [1, 15])


def test_one_token_that_does_not_sample_is_a_chunk():
    scheduler = make(max_num_seqs=3, max_num_batched_tokens=3)
    add(scheduler, "a", 2)
    add(scheduler, "b", 2)
    plan = scheduler.schedule()
    assert (plan.rows, plan.num_tokens, plan.samples) == ([0, 1], [2, 1], [True, False])
    assert not plan.is_decode_only


def test_only_uniform_steps_are_decode_only():
    scheduler = make()
    add(scheduler, "a", 4)
    plan = scheduler.schedule()
    assert not plan.is_decode_only
    scheduler.update(plan, output_of(plan))
    assert scheduler.schedule().is_decode_only


def test_lowest_free_row_is_taken_and_released_rows_are_told_once():
    scheduler = make()
    for name in "abc":
        add(scheduler, name, 2)
    step(scheduler)
    scheduler.abort(["a", "b"])
    add(scheduler, "d", 2)
    plan = scheduler.schedule()
    assert sorted(plan.released_rows) == [0, 1]
    assert [(new.request_id, new.row) for new in plan.new_rows] == [("d", 0)]
    scheduler.update(plan, output_of(plan))
    assert scheduler.schedule().released_rows == []


def test_rows_released_while_idle_are_told_with_the_next_step():
    scheduler = make()
    add(scheduler, "a", 2)
    step(scheduler)
    scheduler.abort(["a"])
    assert scheduler.schedule().rows == []
    add(scheduler, "b", 2)
    assert scheduler.schedule().released_rows == [0]


def test_head_of_the_queue_blocks_those_behind_it():
    scheduler = make(num_blocks=8)
    add(scheduler, "a", 12, max_tokens=4)
    step(scheduler)
    add(scheduler, "big", 20, max_tokens=2)
    add(scheduler, "small", 1)
    assert step(scheduler)[0] == {"a": (12, 13)}
    scheduler.abort(["a"])
    assert set(step(scheduler)[0]) == {"big", "small"}


def test_without_chunked_prefill_a_prompt_waits_until_it_fits_whole():
    scheduler = make(enable_chunked_prefill=False, max_num_batched_tokens=8)
    add(scheduler, "a", 4)
    add(scheduler, "b", 7)
    assert step(scheduler)[0] == {"a": (0, 4)}
    assert step(scheduler)[0] == {"a": (4, 5), "b": (0, 7)}


def test_without_chunked_prefill_a_preempted_request_that_outgrew_a_step_comes_back_in_chunks():
    scheduler = make(enable_chunked_prefill=False, max_num_batched_tokens=8, num_blocks=6)
    scheduler.kv.enable_prefix_caching = False
    add(scheduler, "a", 7, max_tokens=13)
    add(scheduler, "b", 7, max_tokens=13)
    spans: list[dict[str, tuple[int, int]]] = []
    step_until(scheduler, lambda: not scheduler.has_unfinished, spans)
    assert max(end - start for planned in spans for start, end in planned.values()) == 8
    assert scheduler.stats().num_preemptions > 0


# --- blocks: preemption, prefix hits -------------------------------------------------------------------------------


def test_last_in_line_is_preempted_and_comes_back_in_its_place():
    scheduler = make(num_blocks=7)  # 6 blocks of 4 tokens
    for name in "abc":
        add(scheduler, name, 7, max_tokens=10)
    add(scheduler, "d", 2)
    step(scheduler)
    assert running(scheduler) == ["a", "b", "c"]
    step(scheduler)  # 8 tokens each
    planned, _ = step(scheduler)  # each needs a third block
    assert planned == {"a": (8, 9), "b": (8, 9)}
    assert scheduler.requests["c"].status is RequestStatus.PREEMPTED
    assert scheduler.waiting.peek() is scheduler.requests["c"]
    scheduler.abort(["a"])
    plan = scheduler.schedule()
    assert plan.new_rows[0].request_id == "c"
    assert plan.new_rows[0].token_ids[-2:] == [7, 7]
    assert plan.new_rows[0].num_prompt_tokens == 7


def test_nobody_is_let_in_while_a_running_request_waits_for_blocks():
    scheduler = make(num_blocks=8, max_num_batched_tokens=9)  # 7 blocks
    add(scheduler, "a", 3, max_tokens=4)
    add(scheduler, "b", 24, max_tokens=2)
    step(scheduler)
    step(scheduler)
    add(scheduler, "c", 1, max_tokens=2)
    assert step(scheduler)[0] == {"a": (4, 5)}  # "b" needs two blocks
    assert scheduler.kv.pool.num_free == 1
    assert step(scheduler)[0] == {"a": (5, 6)}
    assert step(scheduler)[0] == {"b": (14, 23)}


def test_last_in_line_waits_for_a_block_without_losing_its_own():
    scheduler = make(num_blocks=6)  # 5 blocks
    add(scheduler, "a", 7, max_tokens=4)
    add(scheduler, "b", 7, max_tokens=4)
    step(scheduler)
    step(scheduler)
    assert step(scheduler)[0] == {"a": (8, 9)}
    assert running(scheduler) == ["a", "b"]
    assert step(scheduler)[0] == {"a": (9, 10)}
    assert step(scheduler)[0] == {"b": (8, 9)}
    assert scheduler.stats().num_preemptions == 0


def test_preempted_request_finds_its_own_prefix_again():
    scheduler = make(num_blocks=9)  # 8 blocks
    add(scheduler, "a", 7, max_tokens=20)
    add(scheduler, "b", 15, max_tokens=14)
    step_until(scheduler, lambda: scheduler.stats().num_preemptions > 0)
    scheduler.abort(["a"])
    planned, _ = step(scheduler)
    assert planned["b"][0] >= 8


def test_equal_prompts_of_one_step_share_blocks():
    scheduler = make()
    prompt = list(range(100, 110))
    add(scheduler, "a", prompt)
    add(scheduler, "b", prompt)
    plan = scheduler.schedule()
    assert plan.num_computed == [0, 8]
    assert plan.new_block_ids[1][:2] == plan.new_block_ids[0][:2]
    updates = scheduler.update(plan, output_of(plan))
    assert [update.num_cached_tokens for update in updates] == [0, 8]
    assert (scheduler.stats().prefix_cache_queries, scheduler.stats().prefix_cache_hits) == (20, 8)


def test_salts_isolate():
    scheduler = make()
    prompt = list(range(100, 110))
    for name, salt in [("a", "x"), ("b", "y"), ("c", None)]:
        add(scheduler, name, prompt, salt=salt)
    assert step(scheduler)[0] == {"a": (0, 10), "b": (0, 10), "c": (0, 10)}


def test_generated_tokens_are_found_as_a_prefix():
    scheduler = make()
    add(scheduler, "a", [100, 101, 102], max_tokens=6)
    step_until(scheduler, lambda: not scheduler.has_unfinished)
    add(scheduler, "b", [100, 101, 102, 7, 7, 7, 7, 7, 5])
    assert step(scheduler)[0] == {"b": (8, 9)}


def test_tokens_behind_a_stop_never_become_a_prefix():
    scheduler = make()
    add(scheduler, "a", [100, 101, 102])
    step(scheduler, [5, EOS, 9, 9, 9, 9])
    add(scheduler, "b", [100, 101, 102, 5, EOS, 9, 9, 9, 9, 1])
    assert step(scheduler)[0] == {"b": (0, 10)}


def test_request_may_refuse_to_read_the_cache_but_still_fills_it():
    scheduler = make()
    prompt = list(range(100, 110))
    add(scheduler, "a", prompt, skip_reading_prefix_cache=True)
    add(scheduler, "b", prompt, skip_reading_prefix_cache=True)
    add(scheduler, "c", prompt)
    assert step(scheduler)[0] == {"a": (0, 10), "b": (0, 10), "c": (8, 10)}
    assert scheduler.stats().prefix_cache_queries == 10


# --- priority ------------------------------------------------------------------------------------------------------


def test_priority_is_ignored_under_fcfs():
    scheduler = make(max_num_seqs=1)
    add(scheduler, "a", 2, priority=5)
    add(scheduler, "b", 2, priority=0)
    step(scheduler)
    assert running(scheduler) == ["a"]


def test_urgent_request_is_let_in_first():
    scheduler = make(max_num_seqs=2, policy="priority")
    for name, priority in [("a", 2), ("b", 1), ("c", 1), ("d", 0)]:
        add(scheduler, name, 2, priority=priority)
    step(scheduler)
    assert running(scheduler) == ["d", "b"]


def test_urgent_request_takes_the_row_of_the_least_urgent():
    scheduler = make(max_num_seqs=2, policy="priority")
    add(scheduler, "a", 2, priority=1)
    add(scheduler, "b", 2, priority=2)
    step(scheduler)
    add(scheduler, "c", 2, priority=0)
    assert step(scheduler)[0] == {"c": (0, 2), "a": (2, 3)}
    assert scheduler.requests["b"].status is RequestStatus.PREEMPTED


def test_equal_priority_does_not_preempt():
    scheduler = make(max_num_seqs=1, policy="priority")
    add(scheduler, "a", 2, priority=1)
    step(scheduler)
    add(scheduler, "b", 2, priority=1)
    assert step(scheduler)[0] == {"a": (2, 3)}


def test_urgent_request_takes_the_blocks_of_the_less_urgent():
    scheduler = make(num_blocks=9, policy="priority")  # 8 blocks
    add(scheduler, "a", 4, priority=0)
    add(scheduler, "b", 11, priority=2)
    add(scheduler, "c", 11, priority=3)
    step(scheduler)
    add(scheduler, "d", 12, priority=1)
    planned, _ = step(scheduler)
    assert "c" not in planned and planned["d"] == (0, 12)
    assert running(scheduler) == ["a", "d", "b"]


def test_urgent_request_that_cannot_fit_preempts_nobody():
    scheduler = make(num_blocks=9, policy="priority")  # 8 blocks
    add(scheduler, "a", 20, priority=0, max_tokens=4)
    add(scheduler, "b", 4, priority=2)
    step(scheduler)
    add(scheduler, "c", 20, priority=1, max_tokens=4)
    assert set(step(scheduler)[0]) == {"a", "b"}
    assert scheduler.stats().num_preemptions == 0


def test_urgent_request_gets_the_budget_before_less_urgent_running_ones():
    scheduler = make(max_num_batched_tokens=8, policy="priority")
    add(scheduler, "a", 4, priority=1)
    step(scheduler)
    add(scheduler, "b", 12, priority=0)
    assert step(scheduler)[0] == {"b": (0, 8)}
    assert step(scheduler)[0] == {"b": (8, 12), "a": (4, 5)}


# --- limits and refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "config", "message"),
    [
        ([], {}, "at least one token: 0"),
        (64, {}, "maximum context length is 64 tokens.*number of tokens is: 64"),
        (33, {"enable_chunked_prefill": False}, "without chunked prefill.*max_num_batched_tokens=32.*is: 33"),
        (12, {"num_blocks": 8}, "holds 7 blocks of 4 tokens.*12 prompt tokens and 20 output tokens need blocks: 8"),
    ],
)
def test_request_that_can_never_run_is_refused(prompt, config, message):
    scheduler = make(**config)
    update = offer(scheduler, "a", prompt)
    assert update is not None and (update.finish_reason, update.error_kind) == ("error", "invalid")
    with pytest.raises(ValueError, match=message):
        raise ValueError(update.error)
    assert not scheduler.has_unfinished


def test_largest_request_that_fits_alone_runs_to_its_end():
    scheduler = make(num_blocks=8)
    assert offer(scheduler, "a", 9, max_tokens=20) is None  # KV of 28 tokens: 7 blocks
    step_until(scheduler, lambda: not scheduler.has_unfinished)


def test_known_id_is_refused_and_leaves_the_first_alone():
    scheduler = make()
    add(scheduler, "a", 2)
    update = offer(scheduler, "a", 3)
    assert update is not None and update.error_kind == "invalid"
    assert scheduler.requests["a"].num_prompt_tokens == 2


def test_id_may_be_used_again_after_its_end():
    scheduler = make()
    add(scheduler, "a", 2)
    plan = scheduler.schedule()
    scheduler.abort(["a"])
    assert offer(scheduler, "a", 3) is None
    assert scheduler.update(plan, output_of(plan)) == []
    assert step(scheduler)[0] == {"a": (0, 3)}


def test_queue_of_requests_is_limited():
    scheduler = make(max_num_seqs=1, max_num_queued_reqs=2)
    add(scheduler, "running", 2)
    step(scheduler)
    add(scheduler, "a", 2)
    add(scheduler, "b", 2)
    update = offer(scheduler, "c", 2)
    assert update is not None and (update.finish_reason, update.error_kind) == ("error", "queue_full")
    scheduler.abort(["a"])
    assert offer(scheduler, "c", 2) is None


def test_queue_of_tokens_is_limited():
    scheduler = make(max_num_queued_tokens=10)
    assert offer(scheduler, "a", 9) is None
    assert offer(scheduler, "b", 9) is None
    update = offer(scheduler, "c", 1)
    assert update is not None and update.error_kind == "queue_full"
    step(scheduler)
    assert offer(scheduler, "c", 1) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs must be at least 1: 0"),
        ({"max_num_queued_reqs": -1}, "max_num_queued_reqs must not be negative: -1"),
        ({"policy": "lifo"}, "must be one of fcfs, priority: lifo"),
        ({"max_num_batched_tokens": 3}, r"\(3\) must be greater than or equal to max_num_seqs.*: 4"),
        ({"long_prefill_token_threshold": 5, "enable_chunked_prefill": False}, "set it to 0: 5"),
    ],
)
def test_impossible_configurations_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        make(**fields)


# --- abort ---------------------------------------------------------------------------------------------------------


def test_unknown_and_repeated_ids_are_ignored():
    scheduler = make()
    add(scheduler, "a", 2)
    assert [update.request_id for update in scheduler.abort(["x", "a", "a"])] == ["a"]
    assert scheduler.abort(["a"]) == []


@pytest.mark.parametrize("phase", ["waiting", "prefill", "decode", "preempted"])
def test_abort_frees_everything_in_any_phase(phase):
    scheduler = make(num_blocks=13, max_num_batched_tokens=8)
    if phase == "preempted":
        add(scheduler, "first", 20, max_tokens=25)
        for _ in range(3):
            step(scheduler)
    add(scheduler, "a", 20, max_tokens=25)
    for _ in range({"waiting": 0, "prefill": 1, "decode": 5, "preempted": 22}[phase]):
        step(scheduler)
    assert (scheduler.requests["a"].status is RequestStatus.PREEMPTED) == (phase == "preempted")
    (update,) = scheduler.abort(["a"])
    assert (update.request_id, update.finish_reason) == ("a", "abort")
    scheduler.abort(["first"])
    scheduler.check_integrity()
    assert scheduler.kv.pool.num_pinned == 0 and not scheduler.has_unfinished
    assert scheduler.stats().num_running == scheduler.stats().num_waiting == 0


def test_output_for_a_request_aborted_in_flight_is_dropped():
    scheduler = make()
    add(scheduler, "a", 2)
    add(scheduler, "b", 2)
    plan = scheduler.schedule()
    scheduler.abort(["a"])
    assert [update.request_id for update in scheduler.update(plan, output_of(plan))] == ["b"]
    scheduler.check_integrity()


# --- update: stops, several tokens, logprobs, plans in flight ------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "params", "kept", "finish_reason", "stop_reason"),
    [
        ([5, EOS, 6], {}, [5, EOS], "stop", None),
        ([5, EOS, 6], {"ignore_eos": True, "max_tokens": 3}, [5, EOS, 6], "length", None),
        ([5, 6, 7], {"stop_token_ids": [6]}, [5, 6], "stop", 6),
        ([5, EOS], {"stop_token_ids": [EOS]}, [5, EOS], "stop", None),
        ([5, EOS], {"stop_token_ids": [EOS], "ignore_eos": True}, [5, EOS], "stop", EOS),
        ([5, 6, 7], {"max_tokens": 2}, [5, 6], "length", None),
        ([5, EOS], {"max_tokens": 2}, [5, EOS], "stop", None),
        ([EOS, 6, EOS], {"min_tokens": 3}, [EOS, 6, EOS], "stop", None),
        ([EOS, 6], {"min_tokens": 2, "max_tokens": 2}, [EOS, 6], "length", None),
        ([6, 5, 6], {"min_tokens": 2, "stop_token_ids": [6]}, [6, 5, 6], "stop", 6),
        ([5, 6, 7], {}, [5, 6, 7], None, None),
    ],
)
def test_stop_checks_in_order(tokens, params, kept, finish_reason, stop_reason):
    scheduler = make()
    add(scheduler, "a", 2, **params)
    _, (update,) = step(scheduler, tokens)
    assert (update.new_token_ids, update.finish_reason, update.stop_reason) == (kept, finish_reason, stop_reason)
    assert scheduler.has_unfinished == (finish_reason is None)
    assert finish_reason is None or scheduler.kv.pool.num_pinned == 0


@pytest.mark.parametrize("max_tokens", [None, 60])
def test_model_length_ends_a_sequence(max_tokens):
    scheduler = make(max_model_len=10)
    add(scheduler, "a", 8, max_tokens=max_tokens)
    step(scheduler)
    _, (update,) = step(scheduler)
    assert update.finish_reason == "length"


def test_several_tokens_of_one_step_are_caught_up_with():
    scheduler = make()
    add(scheduler, "a", 2)
    step(scheduler, [5, 6, 7])
    assert step(scheduler)[0] == {"a": (2, 5)}


def test_logprobs_follow_the_kept_tokens():
    scheduler = make()
    add(scheduler, "a", 2, logprobs=0)
    plan = scheduler.schedule()
    logprobs = [TokenLogprobs([token], [-1.0], 1) for token in (5, EOS, 6)]
    (update,) = scheduler.update(plan, StepOutput(plan.step, [[5, EOS, 6]], {0: logprobs}, {}))
    assert update.logprobs == logprobs[:2]


def test_times_and_cached_tokens_are_told_with_the_first_token_only():
    scheduler = make(max_num_batched_tokens=4)
    add(scheduler, "a", 6)
    assert step(scheduler)[1] == []
    _, (first,) = step(scheduler)
    _, (second,) = step(scheduler)
    assert 0 < first.queued_time <= first.scheduled_time and first.num_cached_tokens == 0
    assert (second.queued_time, second.scheduled_time, second.num_cached_tokens) == (0, 0, None)


def prompt_logprobs_step(scheduler: Scheduler, reported: list[int]) -> None:
    """A step whose runner reports each prompt position of a chunk, from the row's start on; the id is the position."""
    plan = scheduler.schedule()
    output, found = output_of(plan), {}
    for entry, row in enumerate(plan.rows):
        request = next(request for request in scheduler.running if request.row == row)
        first = max(plan.num_computed[entry] + 1, request.num_prompt_logprobs + 1)
        end = min(plan.num_computed[entry] + plan.num_tokens[entry] + 1, request.num_prompt_tokens)
        if request.params.prompt_logprobs is not None and first < end:
            found[entry] = [TokenLogprobs([position], [-1.0], 1) for position in range(first, end)]
    for new in plan.new_rows:
        assert new.prompt_logprobs_start == scheduler.requests[new.request_id].num_prompt_logprobs + 1
    for update in scheduler.update(plan, StepOutput(plan.step, output.token_ids, {}, found)):
        reported += [item.token_ids[0] for item in update.prompt_logprobs or []]
    scheduler.check_integrity()


def test_prompt_positions_are_reported_once_across_preemption():
    scheduler = make(max_num_batched_tokens=8, max_num_seqs=2, policy="priority")
    reported: list[int] = []
    add(scheduler, "a", 20, priority=1, prompt_logprobs=0)
    prompt_logprobs_step(scheduler, reported)
    assert reported == list(range(1, 9))
    add(scheduler, "b", 4)
    add(scheduler, "c", 4)
    prompt_logprobs_step(scheduler, reported)
    assert scheduler.requests["a"].status is RequestStatus.PREEMPTED
    scheduler.abort(["b", "c"])
    for _ in range(3):
        prompt_logprobs_step(scheduler, reported)
    assert reported == list(range(1, 20))


def test_cache_is_not_read_until_prompt_logprobs_are_complete():
    scheduler = make(policy="priority", max_num_seqs=1)
    prompt = list(range(100, 120))
    add(scheduler, "warm", prompt, max_tokens=1)
    step(scheduler)
    add(scheduler, "a", prompt, priority=1, prompt_logprobs=0)
    reported: list[int] = []
    prompt_logprobs_step(scheduler, reported)
    assert reported == list(range(1, 20))
    add(scheduler, "urgent", 2, max_tokens=1)
    step(scheduler)
    assert scheduler.requests["a"].status is RequestStatus.PREEMPTED
    assert step(scheduler)[0] == {"a": (20, 21)}  # all but the newest token come from the cache now


def test_a_plan_made_ahead_computes_the_token_that_nobody_has_read():
    scheduler = make(max_num_batched_tokens=8)
    add(scheduler, "a", 6)
    add(scheduler, "b", 10)
    first = scheduler.schedule()
    second = scheduler.schedule()
    assert (first.rows, first.num_tokens) == ([0, 1], [6, 2])
    assert (second.rows, second.num_computed, second.num_tokens) == ([0, 1], [6, 2], [1, 7])
    assert [update.request_id for update in scheduler.update(first, output_of(first))] == ["a"]
    assert [update.request_id for update in scheduler.update(second, output_of(second))] == ["a"]
    assert scheduler.requests["a"].num_tokens == 8


def test_plans_made_ahead_stop_at_the_longest_length():
    scheduler = make()
    add(scheduler, "a", 6, max_tokens=3)
    plans = [scheduler.schedule() for _ in range(4)]
    assert [plan.num_computed for plan in plans] == [[0], [6], [7], []]
    endings = [scheduler.update(plan, output_of(plan))[0].finish_reason for plan in plans[:3]]
    assert endings == [None, None, "length"]


def test_a_token_sampled_behind_the_end_is_dropped_and_never_cached():
    scheduler = make()
    add(scheduler, "a", [1] * (BLOCK - 1), stop_token_ids=[5])
    first, second, third = (scheduler.schedule() for _ in range(3))
    scheduler.update(first, output_of(first, 7))
    (ended,) = scheduler.update(second, output_of(second, 5))
    assert (ended.new_token_ids, ended.finish_reason) == ([5], "stop")
    assert scheduler.update(third, output_of(third, 9)) == []
    assert not scheduler.has_unfinished
    scheduler.check_integrity()
    # The first block, whose last token was read after the block was full, is found by the next turn of a chat.
    add(scheduler, "b", [1] * (BLOCK - 1) + [7, 5, 9] + [2] * BLOCK)
    assert scheduler.schedule().num_computed == [BLOCK]


def test_a_preempted_request_waits_until_its_tokens_are_read():
    scheduler = make(num_blocks=5)
    add(scheduler, "a", 2 * BLOCK - 1, max_tokens=4)
    add(scheduler, "b", 2 * BLOCK - 1, max_tokens=4)
    first = scheduler.schedule()
    second = scheduler.schedule()
    third = scheduler.schedule()  # "a" takes the blocks of "b", of which two tokens are unread
    assert (third.rows, scheduler.requests["b"].status) == ([0], RequestStatus.PREEMPTED)
    for plan in (first, second, third):
        scheduler.update(plan, output_of(plan))
    assert scheduler.requests["b"].num_tokens == 2 * BLOCK + 1
    scheduler.abort(["a"])
    planned, _ = step(scheduler)
    assert planned["b"][1] == 2 * BLOCK + 1


def test_output_of_another_step_is_refused():
    scheduler = make()
    add(scheduler, "a", 6)
    plan = scheduler.schedule()
    with pytest.raises(ValueError, match="expected the output of step 0 with its plan, got: 3 and 0"):
        scheduler.update(plan, StepOutput(3, [[1]], {}, {}))
    with pytest.raises(ValueError, match="tokens for the entries that sample, and no others: step 0"):
        scheduler.update(plan, StepOutput(0, [[]], {}, {}))
    scheduler.update(plan, output_of(plan))
    with pytest.raises(ValueError, match=r"no step is in flight.*: 0"):
        scheduler.update(plan, output_of(plan))


# --- cost ----------------------------------------------------------------------------------------------------------


class WatchedRequest(Request):
    """Counts how often anybody looks at a request."""

    __slots__ = ()
    looks = 0

    def __getattribute__(self, name: str) -> Any:
        WatchedRequest.looks += 1
        return super().__getattribute__(name)


def test_a_step_looks_at_no_waiting_request_behind_the_head():
    scheduler = make(max_num_seqs=2)
    for index in range(500):
        add(scheduler, f"r{index}", 2, max_tokens=50)
    step(scheduler)
    deep = [request for request in scheduler.requests.values() if request.order[1] > 2]
    for request in deep:
        request.__class__ = WatchedRequest
    WatchedRequest.looks = 0
    for _ in range(20):
        plan = scheduler.schedule()
        scheduler.update(plan, output_of(plan))
        scheduler.stats()
    assert WatchedRequest.looks == 0
    scheduler.abort(["r2"])
    assert scheduler.waiting.peek() is deep[0] and deep[0].order  # control: the watch works
    assert WatchedRequest.looks == 1


# --- state that check_integrity must catch -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        lambda scheduler: scheduler.running.reverse(),
        lambda scheduler: scheduler.running.pop(),
        lambda scheduler: setattr(scheduler.running[0], "row", 3),
        lambda scheduler: scheduler.running[0].blocks.block_ids.pop(),
        lambda scheduler: setattr(scheduler.requests["waiting"], "num_computed", 1),
    ],
)
def test_integrity_check_sees_damage(damage):
    scheduler = make()
    add(scheduler, "a", 6)
    add(scheduler, "b", 6)
    step(scheduler)
    add(scheduler, "waiting", 6)
    damage(scheduler)
    with pytest.raises(RuntimeError, match="integrity"):
        scheduler.check_integrity()
