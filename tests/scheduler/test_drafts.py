"""The scheduler's decisions where requests verify drafts: tokens, blocks, ends, what is published, what is counted."""

from __future__ import annotations

from typing import Any

import pytest

from omni_engine.kvcache.manager import KVCacheManager
from omni_engine.kvcache.spec import KVCacheSpec, KVGroup, KVPart
from omni_engine.scheduler.config import SchedulerConfig
from omni_engine.scheduler.draft_depth import DraftDepth
from omni_engine.scheduler.plan import StepOutput, StepPlan, TokenLogprobs
from omni_engine.scheduler.request import RequestInput, RequestStatus, RequestUpdate
from omni_engine.scheduler.sampling_params import SamplingParams
from omni_engine.scheduler.scheduler import Scheduler

EOS = 2
BLOCK = 4


class Scripted(DraftDepth):
    """The depths of the coming steps, the last one for ever."""

    def __init__(self, depths: tuple[int, ...], *script: int) -> None:
        super().__init__(depths)
        self.script = list(script)
        self.observed: list[tuple[int, int, float, int]] = []

    def choose(self, num_requests: int) -> int:
        return self.script.pop(0) if len(self.script) > 1 else self.script[0]

    def observe(self, num_requests: int, depth: int, seconds: float, num_tokens: int) -> None:
        self.observed.append((num_requests, depth, seconds, num_tokens))


def make(depth: DraftDepth | int = 4, num_blocks: int = 100, lookahead: int = 0, **config: Any) -> Scheduler:
    limits = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 64} | config
    spec = KVCacheSpec((KVGroup((0,), (KVPart("k", 1, 1),)),), "float32", lookahead=lookahead)
    depth = DraftDepth((depth,)) if isinstance(depth, int) else depth
    return Scheduler(SchedulerConfig(**limits), KVCacheManager(spec, num_blocks, BLOCK), depth)


def add(scheduler: Scheduler, request_id: str, prompt: int | list[int], priority: int = 0, **params: Any) -> None:
    """`prompt`: its tokens, or their number (then unlike any other request's)."""
    if isinstance(prompt, int):
        prompt = [1000 + sum(request_id.encode()) * 100 + index for index in range(prompt)]
    sampling = SamplingParams(**({"max_tokens": 30, "seed": 1} | params))
    assert scheduler.add(RequestInput(request_id, prompt, sampling, eos_token_ids=[EOS], priority=priority)) is None


def output_of(plan: StepPlan, *accepted: int | list[int], there: list[int] | None = None) -> StepOutput:
    """Per entry that decodes the tokens, or how many drafts were accepted (then all its tokens are 7); the last word
    holds for the rest. Chunks that sample bring a 7. `there`: how many drafts there were, all by default."""
    words = list(accepted) or [0]
    tokens: list[list[int]] = []
    for entry, samples in enumerate(plan.samples):
        word = words[min(entry, len(words) - 1)]
        if entry >= plan.num_decode:
            tokens.append([7] if samples else [])
        else:
            tokens.append(word if isinstance(word, list) else [7] * (1 + word))
    num_drafts = [plan.num_drafts] * plan.num_decode if plan.num_drafts else []
    return StepOutput(plan.step, tokens, {}, {}, num_drafts if there is None else there, 0.5)


def step(scheduler: Scheduler, *accepted: int | list[int]) -> list[RequestUpdate]:
    """One whole step."""
    plan = scheduler.schedule()
    updates = scheduler.update(plan, output_of(plan, *accepted))
    scheduler.check_integrity()
    return updates


def started(scheduler: Scheduler, max_tokens: int = 30, **prompts: int | list[int]) -> Scheduler:
    """With these requests, each of which has its first token."""
    for request_id, prompt in prompts.items():
        add(scheduler, request_id, prompt, max_tokens=max_tokens)
    step(scheduler)
    assert len(scheduler.running) == len(prompts)
    return scheduler


def running(scheduler: Scheduler) -> list[str]:
    return [request.request_id for request in scheduler.running]


def num_cached(scheduler: Scheduler, token_ids: list[int]) -> int:
    """How many of these tokens a new request would find."""
    return len(scheduler.kv.find_prefix(scheduler.kv.new_blocks(None), token_ids)) * BLOCK


# --- tokens --------------------------------------------------------------------------------------------------------


def test_decoding_requests_compute_their_newest_token_and_the_drafts():
    scheduler = started(make(4), a=3, b=6)
    plan = scheduler.schedule()
    assert (plan.num_computed, plan.num_tokens, plan.samples) == ([3, 6], [5, 5], [True, True])
    assert (plan.num_decode, plan.num_drafts, plan.is_decode_only) == (2, 4, True)


def test_accepted_drafts_are_computed_and_the_next_step_goes_on_behind_them():
    scheduler = started(make(4), a=3, b=6)
    updates = step(scheduler, 4, 1)
    assert [update.new_token_ids for update in updates] == [[7] * 5, [7] * 2]
    assert scheduler.schedule().num_computed == [8, 8]


def test_no_depth_is_a_step_without_drafts():
    scheduler = started(make(Scripted((0, 4), 0)), a=3)
    plan = scheduler.schedule()
    assert (plan.num_tokens, plan.num_drafts, plan.is_decode_only) == ([1], 0, True)


@pytest.mark.parametrize(("depth", "decodes"), [(0, True), (4, False)])
def test_whoever_comes_in_with_one_token_to_compute_has_no_drafts_to_verify(depth, decodes):
    """A prompt of one token, or one of which the cache holds all but the last."""
    scheduler = make(Scripted((0, 4), depth))
    add(scheduler, "warm", [50] * BLOCK + [51])
    step(scheduler)
    add(scheduler, "one", [60])
    add(scheduler, "hit", [50] * BLOCK + [51])
    plan = scheduler.schedule()
    assert plan.num_tokens == [1 + depth, 1, 1] and plan.num_computed == [5, 0, BLOCK]
    assert plan.num_decode == (3 if decodes else 1) and plan.samples == [True] * 3
    scheduler.update(plan, output_of(plan, depth))
    assert scheduler.schedule().num_computed == [6 + depth, 1, 5]


def test_the_last_token_of_a_prompt_that_was_split_is_verified_like_others():
    """Its row holds no drafts; the device says so."""
    scheduler = make(4, max_num_batched_tokens=8)
    add(scheduler, "a", 9)
    step(scheduler)
    plan = scheduler.schedule()
    assert (plan.num_computed, plan.num_tokens, plan.num_decode) == ([8], [5], 1)
    scheduler.update(plan, output_of(plan, there=[0]))
    stats = scheduler.stats().drafts
    assert stats is not None and stats.num_draft_tokens == 0


def test_mixed_step_holds_decoding_requests_with_drafts_and_then_chunks():
    scheduler = started(make(4, max_num_batched_tokens=16), a=3, b=3)
    add(scheduler, "c", 20)
    plan = scheduler.schedule()
    assert (plan.num_tokens, plan.samples, plan.num_decode) == ([5, 5, 6], [True, True, False], 2)
    assert not plan.is_decode_only
    updates = scheduler.update(plan, output_of(plan, 2, 0))
    assert [(update.request_id, len(update.new_token_ids)) for update in updates] == [("a", 3), ("b", 1)]


@pytest.mark.parametrize(
    ("depths", "chosen", "budget", "expected"),
    [
        ((0, 2, 4), 4, 20, 4),
        ((0, 2, 4), 4, 19, 2),  # not 3: there are graphs for these depths only
        ((0, 2, 4), 4, 12, 2),
        ((0, 2, 4), 4, 11, 0),
        ((0, 2, 4), 2, 20, 2),
        ((3,), 3, 16, 3),
        ((3,), 3, 15, 0),
        ((0, 1), 1, 4, 0),
    ],
)
def test_depth_falls_until_every_request_gets_its_token(depths, chosen, budget, expected):
    scheduler = make(Scripted(depths, chosen), max_num_batched_tokens=budget)
    for name in "abcd":
        add(scheduler, name, 1)
    while not all(request.num_output_tokens for request in scheduler.requests.values()):
        step(scheduler)
    plan = scheduler.schedule()
    assert (plan.rows, plan.num_drafts, plan.num_tokens) == ([0, 1, 2, 3], expected, [1 + expected] * 4)
    assert [request.num_ahead for request in scheduler.running] == [expected] * 4
    scheduler.update(plan, output_of(plan, expected))
    assert [request.num_ahead for request in scheduler.running] == [0] * 4


def test_requests_behind_a_chunk_lose_their_drafts_and_not_their_token():
    scheduler = make(
        Scripted((0, 2, 4), 4), max_num_batched_tokens=16, max_model_len=128, long_prefill_token_threshold=9
    )
    add(scheduler, "long", 80)
    for name in "abc":
        add(scheduler, name, 2)
    plans = []
    for _ in range(4):
        plan = scheduler.schedule()
        plans.append((plan.num_drafts, plan.num_tokens))
        scheduler.update(plan, output_of(plan))
    assert plans[0] == (4, [9, 2, 2, 2])
    assert plans[1:] == [(0, [1, 1, 1, 9])] * 3  # 7 tokens left are too few for three times 1 + 2


def test_nobody_is_let_in_at_the_cost_of_a_running_request():
    scheduler = started(make(Scripted((0, 4), 4), max_num_batched_tokens=9), a=2, b=2)
    add(scheduler, "c", 9)
    assert scheduler.schedule().num_tokens == [1, 1, 7]


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_drafts_keep_nobody_out(policy):
    """The budget is 5, and one request with its drafts takes all of it."""
    scheduler = make(Scripted((0, 2, 4), 4), max_num_batched_tokens=5, policy=policy)
    add(scheduler, "a", 2, priority=1)
    step(scheduler)
    add(scheduler, "b", 6, priority=1)
    assert scheduler.schedule().num_tokens == [3, 2]
    assert scheduler.schedule().num_tokens == [3, 2]  # its prompt goes on
    add(scheduler, "urgent", 9)
    assert scheduler.schedule().num_tokens == ([1, 2, 2] if policy == "fcfs" else [5])


def test_a_prompt_that_takes_all_tokens_leaves_no_empty_entry_behind_it():
    scheduler = make(Scripted((0, 2, 4), 4), max_num_batched_tokens=9, long_prefill_token_threshold=7)
    add(scheduler, "a", 20)
    add(scheduler, "b", 20)
    assert [scheduler.schedule().num_tokens for _ in range(2)] == [[7, 2], [7, 2]]
    scheduler.config = SchedulerConfig(4, 4, 64)  # as if "a" had more to come than a step holds
    assert scheduler.schedule().num_tokens == [4]


def test_drafts_go_on_where_nobody_could_come_in():
    scheduler = make(Scripted((0, 4), 4), max_num_batched_tokens=5, max_num_seqs=1)
    add(scheduler, "a", 2)
    step(scheduler)
    add(scheduler, "b", 6)
    assert scheduler.schedule().num_tokens == [5]


# --- blocks --------------------------------------------------------------------------------------------------------


def block_counts(scheduler: Scheduler) -> list[int]:
    return [len(request.blocks.block_ids) for request in scheduler.running]


def test_blocks_reach_as_far_as_the_drafts():
    scheduler = started(make(4), a=7, b=3)
    assert block_counts(scheduler) == [2, 1]
    scheduler.schedule()  # positions 7 to 11, 3 to 7
    assert block_counts(scheduler) == [3, 2]


@pytest.mark.parametrize("num_in_flight", [1, 2, 3])
def test_blocks_reach_as_far_as_unread_steps_may_have_come(num_in_flight):
    scheduler = started(make(4), a=8)
    for ahead in range(num_in_flight):
        plan = scheduler.schedule()
        request = scheduler.requests["a"]
        assert (plan.num_computed, request.num_unread, request.num_ahead) == ([8 + ahead], ahead + 1, 4 * (ahead + 1))
        last = 8 + 5 * ahead + 4  # the position of the last draft if all before it are accepted
        assert block_counts(scheduler) == [last // BLOCK + 1]


def test_what_was_not_accepted_needs_no_blocks_again():
    scheduler = started(make(4), a=8)
    first, second = scheduler.schedule(), scheduler.schedule()
    assert block_counts(scheduler) == [5]
    scheduler.update(first, output_of(first, 0))
    scheduler.update(second, output_of(second, 1))
    request = scheduler.requests["a"]
    assert (request.num_computed, request.num_unread, request.num_ahead, request.num_tokens) == (11, 0, 0, 12)
    assert scheduler.schedule().new_block_ids == [[]]  # up to position 15


def test_drafts_without_blocks_preempt_nobody():
    scheduler = started(make(4, num_blocks=4), 5, a=7, b=3)  # all 3 blocks are taken
    plan = scheduler.schedule()
    assert (plan.rows, plan.num_drafts, plan.new_block_ids) == ([0, 1], 4, [[], []])
    assert scheduler.stats().num_preemptions == 0


def test_drafts_take_blocks_that_are_free_and_leave_those_of_others():
    scheduler = started(make(4, num_blocks=5), 5, a=7, b=3)
    assert scheduler.schedule().new_block_ids == [[4], []]


def test_the_newest_token_preempts_and_its_drafts_go_without():
    scheduler = started(make(4, num_blocks=5), 9, a=7, b=7)
    plan = scheduler.schedule()
    scheduler.update(plan, output_of(plan, 0))  # the last free place is filled
    plan = scheduler.schedule()
    assert (plan.rows, len(plan.new_block_ids[0])) == ([0], 1)  # of two that are free now
    assert scheduler.requests["b"].status is RequestStatus.PREEMPTED


def test_a_token_that_may_stand_behind_accepted_drafts_preempts():
    """The first step has blocks for two of its drafts, so the token of the second may be the first without a block."""
    scheduler = started(make(2, num_blocks=5), 9, a=5, b=7)
    first = scheduler.schedule()
    assert (first.rows, first.new_block_ids) == ([0, 1], [[], []])
    second = scheduler.schedule()
    assert second.rows == [0] and len(second.new_block_ids[0]) == 1
    assert scheduler.requests["b"].status is RequestStatus.PREEMPTED
    (update, _) = scheduler.update(first, output_of(first, 2, 0))
    assert update.new_token_ids == [7] * 3


def test_drafts_that_had_no_block_ask_for_none_later():
    """They cannot have been accepted, so the token behind them needs one place and not eight more."""
    scheduler = started(make(8, num_blocks=6), 14, a=7, b=7)
    first = scheduler.schedule()
    assert (first.rows, first.new_block_ids) == ([0, 1], [[], []])  # one block is free, and two would be needed
    second = scheduler.schedule()
    assert (second.rows, len(second.new_block_ids[0])) == ([0], 1)
    assert running(scheduler) == ["a", "b"] and scheduler.stats().num_preemptions == 0


def test_no_block_is_given_behind_the_longest_length():
    scheduler = make(8)
    add(scheduler, "a", 5, max_tokens=4)  # KV of 8 tokens: 2 blocks
    step(scheduler)
    scheduler.schedule()
    scheduler.schedule()
    assert block_counts(scheduler) == [2]


def test_largest_request_that_fits_alone_runs_to_its_end_with_drafts():
    scheduler = make(8, num_blocks=8)
    add(scheduler, "a", 9, max_tokens=20)  # KV of 28 tokens: 7 blocks
    step(scheduler)
    for _ in range(30):
        if not scheduler.has_unfinished:
            break
        step(scheduler, 1)
    assert not scheduler.has_unfinished and scheduler.stats().num_preemptions == 0


# --- ends ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "params", "kept", "finish_reason", "stop_reason"),
    [
        ([5, EOS, 6, 8], {}, [5, EOS], "stop", None),
        ([5, 6, 8, EOS], {}, [5, 6, 8, EOS], "stop", None),
        ([EOS, EOS, EOS, EOS], {}, [EOS], "stop", None),
        ([5, 6, 8, 9], {"stop_token_ids": [8]}, [5, 6, 8], "stop", 8),
        ([5, 6, 8, 9], {"max_tokens": 3}, [5, 6], "length", None),
        ([5, EOS, 8, 9], {"max_tokens": 3}, [5, EOS], "stop", None),
        ([5, EOS, 8, EOS], {"min_tokens": 4}, [5, EOS, 8, EOS], "stop", None),
        ([5, EOS, 8, 9], {"ignore_eos": True}, [5, EOS, 8, 9], None, None),
    ],
)
@pytest.mark.parametrize("is_next_in_flight", [False, True])
def test_a_request_ends_inside_its_accepted_drafts(tokens, params, kept, finish_reason, stop_reason, is_next_in_flight):
    scheduler = make(4)
    add(scheduler, "a", 3, logprobs=0, **params)
    step(scheduler)
    plan = scheduler.schedule()
    behind = scheduler.schedule() if is_next_in_flight else None
    logprobs = [TokenLogprobs([token], [-1.0], 1) for token in tokens]
    (update,) = scheduler.update(plan, StepOutput(plan.step, [tokens], {0: logprobs}, {}, [4], 0.5))
    scheduler.check_integrity()
    assert (update.new_token_ids, update.finish_reason, update.stop_reason) == (kept, finish_reason, stop_reason)
    assert update.logprobs == logprobs[: len(kept)]
    assert scheduler.has_unfinished == (finish_reason is None)
    if finish_reason:
        assert scheduler.kv.pool.num_pinned == 0
        assert behind is None or scheduler.next_output_is_dropped
    if behind is not None and behind.rows:
        assert bool(scheduler.update(behind, output_of(behind, 3))) == (finish_reason is None)
        scheduler.check_integrity()


def test_the_end_of_the_context_is_an_end():
    scheduler = make(4, max_model_len=10)
    add(scheduler, "a", 6, max_tokens=None)
    step(scheduler)
    (update,) = step(scheduler, 4)
    assert (len(update.new_token_ids), update.finish_reason) == (3, "length")


def test_plans_made_ahead_stop_when_the_certain_tokens_reach_the_longest_length():
    """What may come on top is not counted: such a step is dropped where it turns out to be too much."""
    scheduler = make(4)
    add(scheduler, "a", 6, max_tokens=4)
    plans = [scheduler.schedule() for _ in range(6)]
    assert [plan.num_computed for plan in plans] == [[0], [6], [7], [8], [], []]
    updates = [scheduler.update(plan, output_of(plan, 1)) for plan in plans[:4]]
    assert [[len(update.new_token_ids) for update in each] for each in updates] == [[1], [2], [1], []]
    assert updates[2][0].finish_reason == "length"
    scheduler.check_integrity()
    assert scheduler.kv.pool.num_pinned == 0 and not scheduler.has_unfinished


# --- abort and preemption between draft and verification -----------------------------------------------------------


def test_abort_with_drafts_in_flight_leaves_nothing_behind():
    scheduler = started(make(4), a=3, b=3)
    first, second = scheduler.schedule(), scheduler.schedule()
    (ended,) = scheduler.abort(["a"])
    assert (ended.num_draft_tokens, ended.num_accepted_tokens) == (0, 0)
    for plan in (first, second):
        assert [update.request_id for update in scheduler.update(plan, output_of(plan, 4, 2))] == ["b"]
        scheduler.check_integrity()
    stats = scheduler.stats().drafts
    assert stats is not None and (stats.num_draft_tokens, stats.num_accepted_tokens) == (8, 4)
    scheduler.abort(["b"])
    assert scheduler.kv.pool.num_pinned == 0


def preempted(in_flight: int) -> tuple[Scheduler, list[StepPlan]]:
    """A scheduler whose request "b" has so many unread steps and was preempted by an urgent one, which is aborted."""
    scheduler = make(4, policy="priority", max_num_seqs=2)
    for name in "ab":
        add(scheduler, name, 3, priority=1)
    step(scheduler)
    plans = [scheduler.schedule() for _ in range(in_flight)]
    add(scheduler, "urgent", 2)
    plans.append(scheduler.schedule())
    scheduler.abort(["urgent"])
    assert scheduler.requests["b"].status is RequestStatus.PREEMPTED
    return scheduler, plans


@pytest.mark.parametrize("in_flight", [1, 2])
def test_a_preempted_request_keeps_what_was_accepted_and_comes_back_with_it(in_flight):
    scheduler, plans = preempted(in_flight)
    request = scheduler.requests["b"]
    for plan in plans[:in_flight]:
        assert "b" not in [new.request_id for new in scheduler.schedule().new_rows]
        assert len(scheduler.update(plan, output_of(plan, 0, 3))) == 2
        scheduler.check_integrity()
    assert (request.num_computed, request.num_unread, request.num_ahead) == (0, 0, 0)
    assert request.num_tokens == 4 + 4 * in_flight
    plan = scheduler.schedule()
    assert [(new.request_id, len(new.token_ids)) for new in plan.new_rows] == [("b", 4 + 4 * in_flight)]


def test_a_preempted_request_may_end_in_drafts_that_were_in_flight():
    scheduler, plans = preempted(2)
    updates = scheduler.update(plans[0], output_of(plans[0], 0, [5, EOS, 6, 6]))
    assert [(update.request_id, update.finish_reason) for update in updates] == [("a", None), ("b", "stop")]
    assert [update.request_id for update in scheduler.update(plans[1], output_of(plans[1], 0, 4))] == ["a"]
    scheduler.check_integrity()


def test_an_id_used_again_hears_nothing_of_drafts_in_flight():
    scheduler = started(make(4), a=3)
    plan = scheduler.schedule()
    scheduler.abort(["a"])
    add(scheduler, "a", 5)
    assert scheduler.update(plan, output_of(plan, 4)) == []
    assert scheduler.schedule().num_computed == [0]


# --- what is published ---------------------------------------------------------------------------------------------

PROMPT = [50, 51, 52, 53, 54, 55]


def test_a_block_of_accepted_drafts_is_published_when_the_next_step_is_planned():
    scheduler = started(make(4), a=PROMPT)
    step(scheduler, [8, 9, 10, 11, 12])  # tokens 7 to 11; the last one is not computed yet
    scheduler.schedule()
    assert num_cached(scheduler, [*PROMPT, 7, 8, 9, 10, 11, 12, 0]) == 12
    assert num_cached(scheduler, [*PROMPT, 7, 8, 9, 10, 11, 13, 0]) == 8


def test_drafts_that_were_not_accepted_are_never_published():
    scheduler = started(make(4), a=PROMPT)
    step(scheduler, [8])
    assert len(scheduler.requests["a"].blocks.block_ids) == 3  # the drafts filled the second block
    scheduler.schedule()
    assert scheduler.requests["a"].blocks.num_published == 2  # 6 and 7, and the token that is computed now
    assert scheduler.kv.pool.num_cached == 0
    assert len(scheduler.kv.pool._block_of_key) == 2


def test_a_block_is_not_published_while_one_of_its_tokens_is_unread():
    scheduler = started(make(4), a=PROMPT)
    first = scheduler.schedule()
    second = scheduler.schedule()  # token 7 is certain, and not known
    assert num_cached(scheduler, [*PROMPT, 7, 8, 0]) == 4
    scheduler.update(first, output_of(first, [8, 9]))
    scheduler.schedule()
    assert num_cached(scheduler, [*PROMPT, 7, 8, 0]) == 8
    scheduler.update(second, output_of(second, 4))
    scheduler.check_integrity()


def test_with_lookahead_a_block_waits_for_the_token_behind_it():
    scheduler = make(4, lookahead=1)
    add(scheduler, "a", [*PROMPT, 56, 57])
    plan = scheduler.schedule()
    assert num_cached(scheduler, [*PROMPT, 56, 57, 7, 0]) == 4
    scheduler.update(plan, output_of(plan))
    scheduler.schedule()
    assert num_cached(scheduler, [*PROMPT, 56, 57, 7, 0]) == 8
    assert num_cached(scheduler, [*PROMPT, 56, 57, 8, 0]) == 4
    assert num_cached(scheduler, [*PROMPT, 56, 57]) == 4


def test_with_lookahead_a_block_of_a_prompt_is_published_with_its_chunk():
    """The token behind it is known, though it is computed later."""
    scheduler = make(4, lookahead=1, max_num_batched_tokens=4)
    add(scheduler, "a", PROMPT)
    assert scheduler.schedule().num_tokens == [4]
    assert num_cached(scheduler, PROMPT) == 4


@pytest.mark.parametrize(("lookahead", "found"), [(0, 8), (1, 4)])
def test_a_request_that_ends_in_its_drafts_publishes_what_it_keeps(lookahead, found):
    """Not the token behind its end, and with a lookahead not the block that ends with it."""
    scheduler = started(make(4, lookahead=lookahead), a=PROMPT)
    (update,) = step(scheduler, [EOS, 9, 10, 11, 12])
    assert update.finish_reason == "stop"
    assert num_cached(scheduler, [*PROMPT, 7, EOS, 9, 10, 11, 12, 0]) == found
    assert num_cached(scheduler, [*PROMPT, 7, EOS, 5, 5, 5, 5, 0]) == found


@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_request_that_ends_with_a_step_in_flight_publishes_what_it_keeps(lookahead):
    scheduler = started(make(4, lookahead=lookahead), a=PROMPT)
    first, second = scheduler.schedule(), scheduler.schedule()
    scheduler.update(first, output_of(first, [8, 9, 10, 11, EOS]))
    assert num_cached(scheduler, [*PROMPT, 7, 8, 9, 10, 11, EOS, 0]) == 12 - 4 * lookahead
    assert scheduler.update(second, output_of(second, 4)) == []
    assert num_cached(scheduler, [*PROMPT, 7, 8, 9, 10, 11, EOS, *[7] * 9]) == 12 - 4 * lookahead


# --- what is counted -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "there", "counted"),
    [
        ([5], 0, (0, 0, 0, [0, 0, 0])),  # nothing was drafted
        ([5], 3, (1, 3, 0, [0, 0, 0])),
        ([5, 6], 2, (1, 2, 1, [1, 0, 0])),  # the third draft was missing
        ([5, 6, 8, 9], 3, (1, 3, 3, [1, 1, 1])),
        ([5, EOS, 8, 9], 3, (1, 2, 2, [1, 1, 0])),  # ended with its second draft: the third was for nothing
        ([EOS, 6, 8], 3, (1, 1, 1, [1, 0, 0])),
        ([5, EOS, 8], 3, (1, 2, 2, [1, 1, 0])),  # the last one accepted is its end
        ([5, 6, 8, EOS], 3, (1, 3, 3, [1, 1, 1])),  # ended behind its drafts
        ([EOS], 3, (1, 3, 0, [0, 0, 0])),
        ([5, EOS], 3, (1, 3, 1, [1, 0, 0])),
    ],
)
def test_drafts_count_as_far_as_the_request_goes(tokens, there, counted):
    scheduler = started(make(3), a=3)
    plan = scheduler.schedule()
    scheduler.update(plan, output_of(plan, tokens, there=[there]))
    stats = scheduler.stats().drafts
    assert stats is not None
    found = (stats.num_drafts, stats.num_draft_tokens, stats.num_accepted_tokens, stats.num_accepted_per_position)
    assert found == counted


def test_a_request_is_told_of_its_drafts_so_far():  # a stop string may end it at any time, without a last update
    scheduler = started(make(3), a=3, b=3)
    (first, _) = step(scheduler, 2, 1)
    assert (first.num_draft_tokens, first.num_accepted_tokens) == (3, 2)
    plan = scheduler.schedule()
    (ended, _) = scheduler.update(plan, output_of(plan, [5, 6, EOS], 0, there=[2, 1]))
    assert (ended.num_draft_tokens, ended.num_accepted_tokens) == (5, 4)
    (aborted,) = scheduler.abort(["b"])
    assert (aborted.num_draft_tokens, aborted.num_accepted_tokens) == (4, 1)


def test_without_speculation_there_is_nothing_to_count():
    scheduler = Scheduler(SchedulerConfig(1, 1, 4), KVCacheManager(None, 4, BLOCK))
    assert scheduler.stats().drafts is None


def test_the_depth_hears_what_steps_took_and_brought():
    depth = Scripted((0, 2), 2)
    scheduler = started(make(depth), a=3, b=3)
    step(scheduler, 2, 0)
    depth.script = [0]
    step(scheduler)
    add(scheduler, "c", 3)
    depth.script = [2]
    step(scheduler)  # with a chunk in it, so that its time says nothing about drafts
    assert depth.observed == [(0, 2, 0.0, 2), (2, 2, 0.5, 4), (2, 0, 0.5, 2), (2, 2, 0.0, 3)]


@pytest.mark.parametrize(("num_drafts", "depth"), [([], 4), ([4, 4], 4), ([0], 0)])
def test_output_that_does_not_tell_of_its_drafts_is_refused(num_drafts, depth):
    scheduler = started(make(Scripted((0, 4), depth)), a=3)
    plan = scheduler.schedule()
    with pytest.raises(ValueError, match="how many drafts were verified for each entry that decodes: step 1"):
        scheduler.update(plan, StepOutput(plan.step, [[7]], {}, {}, num_drafts))
    scheduler.update(plan, output_of(plan))  # nothing has changed
