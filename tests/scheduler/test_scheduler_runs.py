"""Whole runs over random requests, drafts, aborts and tiny pools, on a fake device that knows what every slot holds."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from omni_engine.kvcache.manager import KVCacheManager
from omni_engine.kvcache.spec import KVCacheSpec, KVGroup, KVPart
from omni_engine.scheduler.config import SchedulerConfig
from omni_engine.scheduler.draft_depth import DraftDepth
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
    """A slot that a row reads, or that a key of the prefix cache finds, holds something else."""


def spec(lookahead: int) -> KVCacheSpec:
    return KVCacheSpec((KVGroup((0,), (KVPart("k", 1, 1),)),), "float32", lookahead=lookahead)


class ChangingDepth(DraftDepth):
    """Another depth in every step."""

    def __init__(self, depths: tuple[int, ...], seed: int) -> None:
        super().__init__(depths)
        self.numbers = random.Random(seed)

    def choose(self, num_requests: int) -> int:
        self.chosen = self.numbers.choice(self.depths)
        return self.chosen


@dataclass
class Row:
    source: RequestInput
    token_ids: list[int]  # the device's own truth, which may be steps ahead of the host
    num_prompt: int
    logprobs_start: int
    length: int  # at which the request ends; what the device computes behind it means nothing
    block_ids: list[int] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)

    @property
    def has_ended(self) -> bool:
        return len(self.token_ids) >= self.length


class FakeDevice:
    """Holds per slot all tokens that its KV depends on, salt included: those up to its own, and `lookahead` more.

    With a lookahead of one it stands for multi-token prediction: an entry joins a token to the next one, and while the
    drafts for the next step are made, entries from the newest token on are written with what is guessed.
    """

    def __init__(self, sources: dict[str, RequestInput], num_blocks: int, block_size: int, lookahead: int) -> None:
        self.sources = sources
        self.block_size = block_size
        self.lookahead = lookahead
        self.slots: list[tuple[str | None, tuple[int, ...]] | None] = [None] * (num_blocks * block_size)
        self.rows: dict[int, Row] = {}
        self.numbers = random.Random(3)
        self.num_accepted = 0
        self.num_without_block = 0  # drafts

    def slot(self, row: Row, position: int) -> int | None:
        column, offset = divmod(position, self.block_size)
        if column >= len(row.block_ids):
            return None  # the null block's
        assert row.block_ids[column] > 0, "the null block is in a block table"
        return row.block_ids[column] * self.block_size + offset

    def write(self, row: Row, position: int, token_ids: list[int]) -> None:
        """`token_ids`: up to the position's own, and what is known behind it."""
        slot = self.slot(row, position)
        if slot is not None:
            depends_on = position + 1 + self.lookahead
            assert len(token_ids) >= depends_on
            self.slots[slot] = (row.source.cache_salt, tuple(token_ids[:depends_on]))

    def execute(self, plan: StepPlan) -> StepOutput:
        for number in plan.released_rows:
            del self.rows[number]
        for new in plan.new_rows:
            assert new.row not in self.rows
            source = self.sources[new.request_id]
            length = len(source.prompt_token_ids) + len(expected_output(source)[0])
            self.rows[new.row] = Row(
                source, list(new.token_ids), new.num_prompt_tokens, new.prompt_logprobs_start, length
            )
        assert len(set(plan.rows)) == len(plan.rows)
        for number, block_ids in zip(plan.rows, plan.new_block_ids, strict=True):
            self.rows[number].block_ids += block_ids
        windows = [self.store(plan, entry) for entry in range(len(plan.rows))]
        return self.attend(plan, windows)

    def store(self, plan: StepPlan, entry: int) -> tuple[int, list[int]]:
        """Write what the entry computes; returns its first position and the drafts it verifies."""
        row = self.rows[plan.rows[entry]]
        start, count = plan.num_computed[entry], plan.num_tokens[entry]
        drafts: list[int] = []
        if entry < plan.num_decode:
            assert count == 1 + plan.num_drafts and plan.samples[entry]
            first = len(row.token_ids) - 1
            assert start <= first, "the plan counts more than the certain tokens"
            assert plan.num_drafts or start == first or self.num_accepted, "it counts fewer though nothing was drafted"
            start = first
            for place, draft in enumerate(row.drafts[: plan.num_drafts], first + 1):
                if self.slot(row, place) is None:
                    self.num_without_block += 1
                    break
                drafts.append(draft)
            assert row.has_ended or self.slot(row, first) is not None, "a certain token has no block"
            count = 1 + len(drafts)
        else:
            assert plan.samples[entry] == (start + count == len(row.token_ids))
            assert all(self.slot(row, position) is not None for position in range(start, start + count))
        token_ids = row.token_ids + drafts
        for position in range(start, start + count):
            known = token_ids[: position + 1 + self.lookahead]
            if position + 1 >= len(row.token_ids):  # joined to what is sampled, whatever was drafted
                known = [*token_ids[: position + 1], token_after(token_ids[: position + 1])]
            self.write(row, position, known)
        return start, drafts

    def attend(self, plan: StepPlan, windows: list[tuple[int, list[int]]]) -> StepOutput:
        tokens: list[list[int]] = []
        num_drafts: list[int] = []
        prompt_logprobs = {}
        for entry, number in enumerate(plan.rows):
            row = self.rows[number]
            start, drafts = windows[entry]
            is_decode = entry < plan.num_decode
            end = len(row.token_ids) if is_decode else start + plan.num_tokens[entry]
            self.check_read(row, end)
            found: list[int] = []
            if plan.samples[entry]:
                found.append(token_after(row.token_ids))
                for draft in drafts:
                    if draft != found[-1]:
                        break
                    found.append(token_after(row.token_ids + found))
            if is_decode and plan.num_drafts:
                num_drafts.append(len(drafts))
                self.num_accepted += len(found) - 1
            tokens.append(found)
            if row.source.params.prompt_logprobs is not None:
                positions = range(max(start + 1, row.logprobs_start), min(end + 1, row.num_prompt))
                if positions:
                    prompt_logprobs[entry] = [TokenLogprobs([p], [-1.0], 1) for p in positions]
            row.token_ids += found
            self.check_read(row, end + max(0, len(found) - 1))
            if found:
                self.draft(row, plan.num_drafts)
        return StepOutput(plan.step, tokens, {}, prompt_logprobs, num_drafts, 0.001)

    def draft(self, row: Row, num_drafts: int) -> None:
        """Guess: some right tokens, then perhaps a wrong one, then nothing or anything."""
        guessed = list(row.token_ids)
        num_right = self.numbers.choice([num_drafts, self.numbers.randrange(num_drafts + 1)])
        for place in range(self.numbers.choice([num_drafts, num_drafts, num_right])):
            right = token_after(guessed)
            guessed.append(right if place < num_right else (right + 1 + self.numbers.randrange(5)) % VOCABULARY)
        newest = len(row.token_ids) - 1
        row.drafts = guessed[newest + 1 :]
        if self.lookahead:  # all but the first draft come of entries that hold guesses
            for position in range(newest, newest + len(row.drafts) - 1):
                self.write(row, position, guessed)

    def check_read(self, row: Row, end: int) -> None:
        """What a row attends to is its own, as far as the row means anything."""
        known = (*row.token_ids, token_after(row.token_ids))
        for position in range(min(end, row.length - 1)):
            slot = self.slot(row, position)
            depends_on = known[: position + 1 + self.lookahead]
            if slot is None or self.slots[slot] != (row.source.cache_salt, depends_on):
                raise WrongContent(f"{row.source.request_id}, position {position}: {slot and self.slots[slot]}")

    def check_published(self, kv: KVCacheManager, tokens_of_key: dict[bytes, tuple[bytes, int, list[int]]]) -> None:
        """Whatever a key finds holds the tokens it was made of."""
        size = self.block_size
        for key, block_id in kv.pool._block_of_key.items():
            root, index, token_ids = tokens_of_key[key]
            for offset in range(size):
                depends_on = index * size + offset + 1 + self.lookahead
                assert len(token_ids) >= depends_on, "a key does not tell what its block depends on"
                found = self.slots[block_id * size + offset]
                if found is None or (kv.hasher.start(found[0])[0], list(found[1])) != (root, token_ids[:depends_on]):
                    raise WrongContent(f"block {block_id}, offset {offset} of {token_ids}: {found}")


class Run:
    """Scheduler and device, with every check after every step."""

    def __init__(
        self,
        config: SchedulerConfig,
        num_blocks: int,
        block_size: int,
        hash_block_size: int,
        depth: DraftDepth | None = None,
        lookahead: int = 0,
    ) -> None:
        self.kv = KVCacheManager(spec(lookahead), num_blocks, block_size, hash_block_size)
        self.depth = depth
        self.scheduler = Scheduler(config, self.kv, depth)
        self.sources: dict[str, RequestInput] = {}
        self.device = FakeDevice(self.sources, num_blocks, block_size, lookahead)
        self.in_flight: deque[tuple[StepPlan, list[str], StepOutput]] = deque()
        self.outputs: dict[str, list[int]] = {}
        self.reported: dict[str, list[int]] = {}
        self.endings: dict[str, RequestUpdate] = {}
        self.drafted: dict[str, tuple[int, int]] = {}  # drafts verified and accepted, as the test counts them
        self.num_ended_inside = 0  # requests that ended with an accepted draft
        self.num_fallen = 0  # steps that verify fewer drafts than were chosen
        self.tokens_of_key: dict[bytes, tuple[bytes, int, list[int]]] = {}
        key_of = self.kv.hasher.key

        def key(digests: list[bytes], block_index: int, token_ids: Any) -> bytes:
            found = key_of(digests, block_index, token_ids)
            unit = max(block_size, hash_block_size)
            end = (block_index * block_size // unit + 1) * unit + lookahead
            known = (digests[0], block_index, list(token_ids[:end]))
            assert self.tokens_of_key.setdefault(found, known) == known, "two keys are the same"
            return found

        self.kv.hasher.key = key  # type: ignore[method-assign]

    def add(self, source: RequestInput) -> None:
        self.sources[source.request_id] = source
        self.outputs[source.request_id], self.reported[source.request_id] = [], []
        self.drafted[source.request_id] = (0, 0)
        refused = self.scheduler.add(source)
        if refused is not None:
            self.take([refused])

    def abort(self, request_id: str) -> None:
        self.take(self.scheduler.abort([request_id]))
        self.scheduler.check_integrity()

    def plan(self) -> bool:
        plan = self.scheduler.schedule()
        self.scheduler.check_integrity()
        assert sum(plan.num_tokens) <= self.scheduler.config.max_num_batched_tokens and 0 not in plan.num_tokens
        assert plan.num_drafts in (0, *(self.depth.depths if self.depth else ()))
        if isinstance(self.depth, ChangingDepth):
            assert plan.num_drafts <= self.depth.chosen or not plan.rows
            self.num_fallen += plan.num_drafts < self.depth.chosen and bool(plan.rows)
        assert plan.num_tokens[: plan.num_decode] == [1 + plan.num_drafts] * plan.num_decode
        for entry in range(plan.num_decode, len(plan.rows)):
            assert self.depth or not (plan.samples[entry] and plan.num_tokens[entry] == 1)
        wire = msgspec.msgpack.encode(plan)
        received = msgspec.msgpack.decode(wire, type=StepPlan)
        assert received == plan and msgspec.msgpack.encode(received) == wire
        if plan.rows:
            output = self.device.execute(received)
            self.device.check_published(self.kv, self.tokens_of_key)
            request_ids = [self.device.rows[row].source.request_id for row in plan.rows]
            self.in_flight.append((plan, request_ids, output))
        return bool(plan.rows)

    def update(self) -> None:
        plan, request_ids, output = self.in_flight.popleft()
        received = msgspec.msgpack.decode(msgspec.msgpack.encode(output), type=StepOutput)
        assert received == output
        for entry, num_drafts in enumerate(output.num_drafts):
            self.count(request_ids[entry], num_drafts, len(output.token_ids[entry]))
        self.take(self.scheduler.update(plan, received))
        self.scheduler.check_integrity()
        self.device.check_published(self.kv, self.tokens_of_key)

    def count(self, request_id: str, num_drafts: int, num_tokens: int) -> None:
        """A draft counts if the request was still there to take it."""
        if request_id in self.endings:
            return
        missing = len(expected_output(self.sources[request_id])[0]) - len(self.outputs[request_id])
        num_accepted = num_tokens - 1
        if missing <= num_accepted:
            num_drafts = num_accepted = missing
            self.num_ended_inside += 1
        drafted, accepted = self.drafted[request_id]
        self.drafted[request_id] = (drafted + num_drafts, accepted + num_accepted)

    def take(self, updates: list[RequestUpdate]) -> None:
        for update in updates:
            assert update.request_id not in self.endings
            self.outputs[update.request_id] += update.new_token_ids
            self.reported[update.request_id] += [item.token_ids[0] for item in update.prompt_logprobs or []]
            if update.finish_reason is not None:
                self.endings[update.request_id] = update

    def finish(self) -> None:
        """Every request ends in the end; some step of every round makes progress."""
        while self.in_flight:
            self.update()
        while self.scheduler.has_unfinished:
            assert self.plan(), "requests are left, but nothing is planned"
            self.update()
        assert self.kv.pool.num_pinned == 0
        assert set(self.endings) == set(self.sources)
        for request_id, ending in self.endings.items():
            source, reason = self.sources[request_id], ending.finish_reason
            output, expected_reason, expected_stop = expected_output(source)
            if reason == "abort":
                assert self.outputs[request_id] == output[: len(self.outputs[request_id])]
            elif reason != "error":
                found = (self.outputs[request_id], reason, ending.stop_reason)
                assert found == (output, expected_reason, expected_stop)
                if source.params.prompt_logprobs is not None:
                    assert self.reported[request_id] == list(range(1, len(source.prompt_token_ids)))
            assert (ending.num_draft_tokens, ending.num_accepted_tokens) == self.drafted[request_id]
        drafts = self.scheduler.stats().drafts
        if drafts is not None:
            assert drafts.num_draft_tokens == sum(drafted for drafted, _ in self.drafted.values())
            assert drafts.num_accepted_tokens == sum(accepted for _, accepted in self.drafted.values())
            assert sum(drafts.num_accepted_per_position) == drafts.num_accepted_tokens
            assert sorted(drafts.num_accepted_per_position, reverse=True) == drafts.num_accepted_per_position


DEPTHS = st.builds(
    ChangingDepth, st.sampled_from([(1,), (4,), (0, 1), (0, 2, 4), (0, 3, 5), (0, 8, 16)]), st.integers(0, 99)
)


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
        max_prefill_share=draw(st.sampled_from([1.0, 1.0, 0.5, 0.05])),
        policy=draw(st.sampled_from(["fcfs", "priority"])),
        max_num_queued_reqs=draw(st.sampled_from([None, None, 3])),
    )
    num_blocks = 1 + draw(st.integers(24, 60)) // block_size
    hash_block_size = draw(st.sampled_from([size for size in (1, 2, 4, 8) if size <= 2 * block_size]))
    depth = draw(st.one_of(st.none(), DEPTHS))
    return Run(config, num_blocks, block_size, hash_block_size, depth, draw(st.integers(0, 1)))


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
        elif action == "plan" and len(run.in_flight) < 3:
            run.plan()
        elif run.in_flight:
            run.update()
    run.finish()


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_busy_run_on_a_tiny_pool(policy):
    """Long and deterministic, so that it is known to preempt, share and evict."""
    run = Run(SchedulerConfig(6, 16, MAX_MODEL_LEN, policy=policy), num_blocks=17, block_size=4, hash_block_size=4)
    be_busy(run, num_requests=80, num_in_flight=1)
    stats = run.scheduler.stats()
    assert stats.num_preemptions > 5 and stats.prefix_cache_hits > 20
    assert sum(ending.finish_reason != "abort" for ending in run.endings.values()) > 70


@pytest.mark.parametrize("num_in_flight", [1, 2, 3])
@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_busy_run_with_drafts_on_a_tiny_pool(policy, lookahead, num_in_flight):
    """The same with drafts and steps in flight, known to meet what is rare in random runs too."""
    config = SchedulerConfig(6, 20, MAX_MODEL_LEN, policy=policy)
    run = Run(config, 17, 4, 4, ChangingDepth((0, 2, 5), seed=1), lookahead)
    be_busy(run, 160, num_in_flight)
    stats = run.scheduler.stats()
    assert stats.num_preemptions > 3 and stats.prefix_cache_hits > 20
    assert sum(ending.finish_reason != "abort" for ending in run.endings.values()) > 130
    drafts = stats.drafts
    assert drafts is not None and 100 < drafts.num_accepted_tokens < drafts.num_draft_tokens - 20
    assert min(drafts.num_accepted_per_position) > 0
    assert run.num_ended_inside > 20 and run.device.num_without_block > 20 and run.num_fallen > 2


def be_busy(run: Run, num_requests: int, num_in_flight: int) -> None:
    """Many requests and some aborts; a step is read when so many are in flight."""
    numbers = random.Random(5)
    for index in range(num_requests):
        prompt = [numbers.randrange(2) for _ in range(numbers.randrange(1, 25))]
        params = SamplingParams(max_tokens=numbers.randrange(1, 15), ignore_eos=index % 2 == 0, seed=1)
        run.add(RequestInput(f"r{index}", prompt, params, [EOS], priority=numbers.randrange(3)))
        for _ in range(2):
            if (not run.plan() and run.in_flight) or len(run.in_flight) == num_in_flight:
                run.update()
        if index % 9 == 8:
            run.abort(f"r{numbers.randrange(index)}")
    run.finish()


@pytest.mark.parametrize("damage", ["table", "publish", "salt", "lookahead", "draft"])
def test_the_fake_device_notices_wrong_blocks(damage, monkeypatch):
    """Control: what the checks above rest on fails when a table entry, a published block, a salt, the token behind a
    published block or an accepted draft is wrong."""
    config = SchedulerConfig(4, 32, MAX_MODEL_LEN, long_prefill_token_threshold=14)
    run = Run(config, 30, 4, 4, DraftDepth((2,)), lookahead=int(damage == "lookahead"))
    prompt = [0, 1, 2, 4, 5] * 4
    other = prompt
    if damage == "publish":  # a block is published although its last two tokens are not computed
        publish = run.kv.publish
        monkeypatch.setattr(run.kv, "publish", lambda blocks, ids, computed: publish(blocks, ids, blocks.capacity))
    if damage == "salt":
        start = run.kv.hasher.start
        monkeypatch.setattr(run.kv.hasher, "start", lambda salt: start(None))
    if damage == "lookahead":  # keys do not tell what stands behind their block
        key = run.kv.hasher.key
        monkeypatch.setattr(run.kv.hasher, "key", lambda digests, index, ids: key(digests, index, ids[: index * 4 + 4]))
        other = [*prompt[:8], 0, 0, 0, 0, 0]
    if damage == "draft":  # the device takes one for right that is not
        monkeypatch.setattr(FakeDevice, "attend", accepting_anything)
    params = SamplingParams(max_tokens=8, ignore_eos=True, seed=1)
    run.add(RequestInput("a", prompt, params, [EOS], cache_salt="x"))
    run.add(RequestInput("b", other, params, [EOS], cache_salt="y" if damage == "salt" else "x"))
    if damage == "table":
        run.plan()
        run.device.rows[0].block_ids[1] = 29
    with pytest.raises(AssertionError):
        run.finish()


def accepting_anything(device: FakeDevice, plan: StepPlan, windows: list[tuple[int, list[int]]]) -> StepOutput:
    tokens = []
    for entry, number in enumerate(plan.rows):
        row = device.rows[number]
        tokens.append([*windows[entry][1], 1] if plan.samples[entry] else [])
        row.token_ids += tokens[-1]
        row.drafts = [2] * plan.num_drafts
    return StepOutput(plan.step, tokens, {}, {}, [len(windows[entry][1]) for entry in range(plan.num_decode)], 0.001)
