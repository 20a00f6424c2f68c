"""Whole runs over random requests, aborts and tiny pools, on a fake device that knows what every KV slot holds."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from omni_engine.kvcache.manager import KVCacheManager
from omni_engine.scheduler.config import SchedulerConfig
from omni_engine.scheduler.plan import StepOutput, StepPlan, TokenLogprobs
from omni_engine.scheduler.request import RequestInput, RequestUpdate
from omni_engine.scheduler.sampling_params import SamplingParams
from omni_engine.scheduler.scheduler import Scheduler

EOS = 3
VOCABULARY = 6  # few tokens, so that prefixes are often equal
MAX_MODEL_LEN = 40


def token_after(token_ids: list[int]) -> int:
    """What the fake model samples behind these tokens: a pure function of them, as with counter-based noise."""
    return random.Random(bytes(token_ids)).randrange(VOCABULARY)


def expected_output(source: RequestInput) -> tuple[list[int], str, int | None]:
    """Generated tokens, finish_reason and stop_reason of a request that has the engine to itself."""
    params, token_ids = source.params, list(source.prompt_token_ids)
    while True:
        token_ids.append(token_after(token_ids))
        output = token_ids[len(source.prompt_token_ids) :]
        if len(output) >= params.min_tokens:
            if output[-1] == EOS and not params.ignore_eos:
                return output, "stop", None
            if output[-1] in (params.stop_token_ids or ()):
                return output, "stop", output[-1]
        if len(output) == params.max_tokens or len(token_ids) == MAX_MODEL_LEN:
            return output, "length", None


class WrongContent(AssertionError):
    """The block table of a row points at KV that is not that row's."""


@dataclass
class Row:
    source: RequestInput
    token_ids: list[int]
    num_prompt: int
    logprobs_start: int
    block_ids: list[int] = field(default_factory=list)


class FakeDevice:
    """Holds per slot the whole prefix that its KV was computed from, salt included; KV depends on all of it."""

    def __init__(self, sources: dict[str, RequestInput], num_blocks: int, block_size: int) -> None:
        self.sources = sources
        self.block_size = block_size
        self.slots: list[tuple[str | None, tuple[int, ...]] | None] = [None] * (num_blocks * block_size)
        self.rows: dict[int, Row] = {}

    def slot(self, row: Row, position: int) -> int:
        block_id = row.block_ids[position // self.block_size]
        assert block_id > 0, "the null block is in a block table"
        return block_id * self.block_size + position % self.block_size

    def execute(self, plan: StepPlan) -> StepOutput:
        for number in plan.released_rows:
            del self.rows[number]
        for new in plan.new_rows:
            assert new.row not in self.rows
            source = self.sources[new.request_id]
            self.rows[new.row] = Row(source, list(new.token_ids), new.num_prompt_tokens, new.prompt_logprobs_start)
        assert len(set(plan.rows)) == len(plan.rows)
        for number, start, count, block_ids in zip(
            plan.rows, plan.num_computed, plan.num_tokens, plan.new_block_ids, strict=True
        ):
            row = self.rows[number]
            row.block_ids += block_ids
            for position in range(start, start + count):
                self.slots[self.slot(row, position)] = (row.source.cache_salt, tuple(row.token_ids[: position + 1]))
        return self.attend(plan)

    def attend(self, plan: StepPlan) -> StepOutput:
        tokens: list[list[int]] = []
        prompt_logprobs = {}
        for entry, number in enumerate(plan.rows):
            row = self.rows[number]
            start = plan.num_computed[entry]
            end = start + plan.num_tokens[entry]
            for position in range(end):
                found = self.slots[self.slot(row, position)]
                if found != (row.source.cache_salt, tuple(row.token_ids[: position + 1])):
                    raise WrongContent(f"{row.source.request_id}, position {position}: {found}")
            assert plan.samples[entry] == (end == len(row.token_ids))
            tokens.append([token_after(row.token_ids)] if plan.samples[entry] else [])
            if row.source.params.prompt_logprobs is not None:
                positions = range(max(start + 1, row.logprobs_start), min(end + 1, row.num_prompt))
                if positions:
                    prompt_logprobs[entry] = [TokenLogprobs([p], [-1.0], 1) for p in positions]
            row.token_ids += tokens[-1]
        return StepOutput(plan.step, tokens, {}, prompt_logprobs)


class Run:
    """Scheduler and device, with every check after every step."""

    def __init__(self, config: SchedulerConfig, num_blocks: int, block_size: int, hash_block_size: int) -> None:
        self.kv = KVCacheManager(None, num_blocks, block_size, hash_block_size)
        self.scheduler = Scheduler(config, self.kv)
        self.sources: dict[str, RequestInput] = {}
        self.device = FakeDevice(self.sources, num_blocks, block_size)
        self.in_flight: deque[tuple[StepPlan, StepOutput]] = deque()
        self.outputs: dict[str, list[int]] = {}
        self.reported: dict[str, list[int]] = {}
        self.endings: dict[str, tuple[str | None, int | None]] = {}

    def add(self, source: RequestInput) -> None:
        self.sources[source.request_id] = source
        self.outputs[source.request_id], self.reported[source.request_id] = [], []
        refused = self.scheduler.add(source)
        if refused is not None:
            self.take([refused])

    def abort(self, request_id: str) -> None:
        self.take(self.scheduler.abort([request_id]))
        self.scheduler.check_integrity()

    def plan(self) -> bool:
        plan = self.scheduler.schedule()
        self.scheduler.check_integrity()
        assert sum(plan.num_tokens) <= self.scheduler.config.max_num_batched_tokens
        decodes = [samples and count == 1 for samples, count in zip(plan.samples, plan.num_tokens, strict=True)]
        assert decodes == sorted(decodes, reverse=True)
        wire = msgspec.msgpack.encode(plan)
        received = msgspec.msgpack.decode(wire, type=StepPlan)
        assert received == plan and msgspec.msgpack.encode(received) == wire
        if plan.rows:
            self.in_flight.append((plan, self.device.execute(received)))
        return bool(plan.rows)

    def update(self) -> None:
        plan, output = self.in_flight.popleft()
        received = msgspec.msgpack.decode(msgspec.msgpack.encode(output), type=StepOutput)
        assert received == output
        self.take(self.scheduler.update(plan, received))
        self.scheduler.check_integrity()

    def take(self, updates: list[RequestUpdate]) -> None:
        for update in updates:
            assert update.request_id not in self.endings
            self.outputs[update.request_id] += update.new_token_ids
            self.reported[update.request_id] += [item.token_ids[0] for item in update.prompt_logprobs or []]
            if update.finish_reason is not None:
                self.endings[update.request_id] = (update.finish_reason, update.stop_reason)

    def finish(self) -> None:
        """Every request ends in the end; some step of every round makes progress."""
        while self.in_flight:
            self.update()
        while self.scheduler.has_unfinished:
            assert self.plan(), "requests are left, but nothing is planned"
            self.update()
        assert self.kv.pool.num_pinned == 0
        assert set(self.endings) == set(self.sources)
        for request_id, (reason, stop_reason) in self.endings.items():
            source = self.sources[request_id]
            output, expected_reason, expected_stop = expected_output(source)
            if reason == "abort":
                assert self.outputs[request_id] == output[: len(self.outputs[request_id])]
            elif reason != "error":
                assert (self.outputs[request_id], reason, stop_reason) == (output, expected_reason, expected_stop)
                if source.params.prompt_logprobs is not None:
                    assert self.reported[request_id] == list(range(1, len(source.prompt_token_ids)))


@st.composite
def runs(draw: st.DrawFn) -> Run:
    max_num_seqs = draw(st.integers(1, 5))
    block_size = draw(st.sampled_from([1, 2, 4]))
    chunked = draw(st.booleans())
    config = SchedulerConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + draw(st.integers(0, 20)),
        max_model_len=MAX_MODEL_LEN,
        enable_chunked_prefill=chunked,
        long_prefill_token_threshold=draw(st.sampled_from([0, 0, 1, 5])) if chunked else 0,
        policy=draw(st.sampled_from(["fcfs", "priority"])),
        max_num_queued_reqs=draw(st.sampled_from([None, None, 3])),
    )
    num_blocks = 1 + draw(st.integers(24, 60)) // block_size
    return Run(config, num_blocks, block_size, block_size * draw(st.sampled_from([1, 2])))


PROMPTS = st.one_of(
    st.lists(st.integers(0, 1), min_size=0, max_size=30),
    st.integers(1, 24).map(lambda length: [0, 1, 2, 4, 5, 1] * 4 + [length]).map(lambda ids: ids[: ids[-1]]),
)


@st.composite
def requests(draw: st.DrawFn, request_id: str) -> RequestInput:
    max_tokens = draw(st.integers(1, 16))
    params = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, max_tokens)) if draw(st.booleans()) else 0,
        ignore_eos=draw(st.booleans()),
        stop_token_ids=draw(st.sampled_from([None, None, [4], [EOS, 5]])),
        prompt_logprobs=draw(st.sampled_from([None, None, None, 0])),
        seed=1,
    )
    return RequestInput(
        request_id,
        draw(PROMPTS),
        params,
        eos_token_ids=[EOS],
        priority=draw(st.integers(0, 2)),
        cache_salt=draw(st.sampled_from([None, None, "a", "b"])),
    )


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data())
def test_random_runs_end_with_the_tokens_of_a_lone_request(data):
    run = data.draw(runs())
    for turn in range(data.draw(st.integers(5, 50))):
        action = data.draw(st.sampled_from(["add", "add", "plan", "plan", "update", "abort"]))
        if action == "add":
            run.add(data.draw(requests(f"r{turn}")))
        elif action == "abort" and run.sources:
            run.abort(data.draw(st.sampled_from(sorted(run.sources))))
        elif action == "plan" and len(run.in_flight) < 2:
            run.plan()
        elif run.in_flight:
            run.update()
    run.finish()


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_busy_run_on_a_tiny_pool(policy):
    """Long and deterministic, so that it is known to preempt, share and evict."""
    numbers = random.Random(5)
    config = SchedulerConfig(6, 16, MAX_MODEL_LEN, policy=policy)
    run = Run(config, num_blocks=17, block_size=4, hash_block_size=4)
    for index in range(80):
        prompt = [numbers.randrange(2) for _ in range(numbers.randrange(1, 25))]
        params = SamplingParams(max_tokens=numbers.randrange(1, 15), ignore_eos=index % 2 == 0, seed=1)
        run.add(RequestInput(f"r{index}", prompt, params, [EOS], priority=numbers.randrange(3)))
        for _ in range(2):
            if run.plan():
                run.update()
        if index % 9 == 8:
            run.abort(f"r{numbers.randrange(index)}")
    run.finish()
    stats = run.scheduler.stats()
    assert stats.num_preemptions > 5 and stats.prefix_cache_hits > 20
    assert sum(reason != "abort" for reason, _ in run.endings.values()) > 70


@pytest.mark.parametrize("damage", ["table", "publish", "salt"])
def test_the_fake_device_notices_wrong_blocks(damage, monkeypatch):
    """Control: what the checks above rest on fails when a table entry, a published block or a salt is wrong."""
    config = SchedulerConfig(4, 32, MAX_MODEL_LEN, long_prefill_token_threshold=14)
    run = Run(config, num_blocks=30, block_size=4, hash_block_size=4)
    if damage == "publish":  # a block is published although its last two tokens are not computed
        publish = run.kv.publish
        monkeypatch.setattr(run.kv, "publish", lambda blocks, ids, computed: publish(blocks, ids, blocks.capacity))
    if damage == "salt":
        start = run.kv.hasher.start
        monkeypatch.setattr(run.kv.hasher, "start", lambda salt: start(None))
    prompt = [0, 1, 2, 4, 5] * 4
    params = SamplingParams(max_tokens=8, ignore_eos=True, seed=1)
    run.add(RequestInput("a", prompt, params, [EOS], cache_salt="x"))
    run.add(RequestInput("b", prompt, params, [EOS], cache_salt="y" if damage == "salt" else "x"))
    if damage == "table":
        run.plan()
        run.device.rows[0].block_ids[1] = 29
    with pytest.raises(WrongContent):
        run.finish()
