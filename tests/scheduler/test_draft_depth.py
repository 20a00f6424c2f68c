"""`DraftDepth` on simulated timings: what it finds, what finding it costs, how soon it notices that all is different.

Losses are told against the best constant depth, from expected times and tokens; the noise is only what it sees.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from omni_engine.scheduler.draft_depth import DraftDepth


class Constant(DraftDepth):
    """Always the same."""

    def __init__(self, depth: int) -> None:
        super().__init__((depth,))


@dataclass
class World:
    """A device and a text. Steps are read one step after the next one is planned, as in the engine."""

    seconds: Callable[[int, int, int], float]  # (step, requests, depth) -> what the step takes, without noise
    acceptance: Callable[[int], float]  # step -> how likely a draft is accepted, if those before it are
    sizes: Callable[[int], int] = lambda step: 32
    num_steps: int = 400
    seed: int = 0
    sigma: float = 0.08  # of the logarithm of the noise
    outliers: float = 0.01  # steps that take ten times as long
    overlap: bool = True
    depths: list[int] = field(default_factory=list)  # of the steps

    def run(self, policy: DraftDepth) -> float:
        """Seconds per token and request."""
        numbers = random.Random(self.seed)
        planned: deque[tuple[int, int, int]] = deque()
        made = 0
        seconds = tokens = 0.0
        self.depths = []
        for step in range(self.num_steps + self.overlap):
            if step < self.num_steps:
                size = self.sizes(step)
                planned.append((step, size, policy.choose(size)))
                self.depths.append(planned[-1][2])
                if self.overlap and step == 0:
                    continue
            number, size, depth = planned.popleft()
            there, made = min(made, depth), depth  # the step before made them
            rate = self.acceptance(number)
            took = self.seconds(number, size, depth)
            seconds += took
            tokens += size * sum(rate**place for place in range(there + 1))
            if isinstance(policy, Constant):
                continue  # it does not look
            noise = 10.0 if numbers.random() < self.outliers else numbers.lognormvariate(0, self.sigma)
            if numbers.random() < 0.05:
                noise *= numbers.paretovariate(3)
            accepted = 0
            for _ in range(size if there else 0):
                for _ in range(there):
                    if numbers.random() >= rate:
                        break
                    accepted += 1
            policy.observe(size, depth, took * noise, size + accepted)
        return seconds / tokens

    def loss(self, depths: tuple[int, ...]) -> float:
        """What `DraftDepth` takes longer than the best constant depth, as a share."""
        best = min(self.run(Constant(depth)) for depth in depths)
        return self.run(DraftDepth(depths)) / best - 1


def dearer(deepest: float) -> Callable[[int, int, int], float]:
    """A step of four drafts takes `deepest` times as long as one of none."""
    return lambda step, size, depth: 0.01 * (1 + (deepest - 1) * depth / 4)


def always(rate: float) -> Callable[[int], float]:
    return lambda step: rate


# where no drafts are best: what verifying costs, and how likely a draft is accepted
NOT_WORTH_IT = [(1.3, 0.0), (1.3, 0.1), (1.6, 0.2), (2.0, 0.0), (2.0, 0.3), (2.5, 0.0), (2.5, 0.2), (2.5, 0.4)]


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(("cost", "rate"), NOT_WORTH_IT)
@pytest.mark.parametrize("depths", [(0, 2, 4), (0, 4)])
def test_a_full_batch_loses_less_than_3_percent_where_drafts_do_not_pay(depths, cost, rate, overlap):
    losses = [World(dearer(cost), always(rate), seed=seed, overlap=overlap).loss(depths) for seed in range(8)]
    assert sum(losses) / len(losses) < 0.022
    assert sorted(losses)[-2] < 0.03  # in at most one of eight runs bad luck has a share in it
    constant = World(dearer(cost), always(rate))
    assert constant.run(Constant(4)) / constant.run(Constant(0)) > 1.1  # control: there was something to lose


@pytest.mark.parametrize(("cost", "rate"), NOT_WORTH_IT)
def test_that_holds_with_much_noise(cost, rate):
    losses = [
        World(dearer(cost), always(rate), seed=seed, sigma=0.2, outliers=0.03).loss((0, 2, 4)) for seed in range(16)
    ]
    assert sum(losses) / len(losses) < 0.03


def test_in_the_long_run_hardly_anything_is_lost():
    losses = [World(dearer(2.0), always(0.2), num_steps=8000, seed=seed).loss((0, 2, 4)) for seed in range(2)]
    assert max(losses) < 0.015


@pytest.mark.parametrize(
    ("depths", "cost", "rate", "size", "best"),
    [
        ((0, 2, 4), 1.2, 0.8, 1, 4),
        ((0, 2, 4), 1.2, 0.9, 2, 4),
        ((0, 4), 1.2, 0.6, 1, 4),
        ((0, 2, 4), 1.3, 0.8, 8, 4),
        ((0, 2, 4), 1.3, 0.8, 32, 4),  # where verifying is cheap in a full batch too
        ((0, 2, 4), 2.5, 0.2, 32, 0),
        ((0, 2, 4), 2.0, 0.05, 1, 0),
        ((2, 4), 2.0, 0.2, 16, 2),
    ],
)
def test_the_best_depth_is_found_and_kept(depths, cost, rate, size, best):
    for seed in range(5):
        world = World(dearer(cost), always(rate), lambda step: size, num_steps=1500, seed=seed)
        loss = world.loss(depths)
        assert Counter(world.depths[500:])[best] > 900, seed
        assert loss < 0.06


def test_a_depth_between_is_found():
    seconds = {0: 0.010, 2: 0.011, 4: 0.020}
    for seed in range(5):
        world = World(lambda step, size, depth: seconds[depth], always(0.7), lambda step: 4, 1500, seed)
        world.loss((0, 2, 4))
        assert Counter(world.depths[500:])[2] > 900


@pytest.mark.parametrize(("depths", "cost"), [((0, 2, 4), 1.2), ((0, 4), 1.3)])
def test_a_single_request_gains_from_the_first_steps_on(depths, cost):
    """Speculation begins with its drafts where they cost least."""
    for seed in range(10):
        world = World(dearer(cost), always(0.8), lambda step: 1, num_steps=200, seed=seed)
        assert world.run(Constant(0)) / world.run(DraftDepth(depths)) > 1.4
        assert world.depths[:8] == [4] * 8


def test_a_depth_that_becomes_twenty_times_faster_is_noticed():
    """Its graph has been compiled."""
    for seed in range(5):
        world = World(
            lambda step, size, depth: 0.01 if not depth else 0.014 * (20 if step < 500 else 1),
            always(0.8), num_steps=5000, seed=seed,
        )  # fmt: skip
        world.run(DraftDepth((0, 4)))
        assert Counter(world.depths[:500])[4] < 6
        assert Counter(world.depths[2500:])[4] > 2300


def test_a_depth_that_stays_slow_is_looked_at_and_no_more():
    world = World(lambda step, size, depth: 0.2 if depth else 0.01, always(0.8), num_steps=8000)
    assert world.loss((0, 2, 4)) < 0.03
    looks = [step for step, depth in enumerate(world.depths[3000:]) if depth]
    assert 2 <= len(looks) < 6 and all(later - earlier > 1 for earlier, later in pairwise(looks))


def test_all_graphs_arrive_and_nothing_changes_for_the_worse():
    world = World(
        lambda step, size, depth: 0.01 * (1 + 0.05 * depth) * (20 if step < 300 else 1),
        always(0.8), lambda step: 1, num_steps=2000,
    )  # fmt: skip
    assert world.loss((0, 2, 4)) < 0.04


def test_another_text_is_noticed():
    """Drafts are worth nothing for a while, then much, and so on."""
    deep_at_worst, deep_at_best = 0, 0
    for seed in range(3):
        world = World(
            dearer(1.3), lambda step: 0.85 if step // 1000 % 2 else 0.05, lambda step: 1, num_steps=6000, seed=seed
        )
        assert world.loss((0, 2, 4)) < 0.05  # against depth 4 throughout; 0 throughout takes 1.8 times as long
        for start in range(0, 6000, 2000):
            deep_at_worst += Counter(world.depths[start + 500 : start + 1000])[4]
            deep_at_best += Counter(world.depths[start + 1500 : start + 2000])[4]
    assert deep_at_worst < 0.25 * 9 * 500 and deep_at_best > 0.75 * 9 * 500


def test_a_depth_that_becomes_dear_is_left():
    """A longer context, another model of clock: whatever it is."""
    world = World(lambda step, size, depth: 0.01 * (1 + depth * (0.05 if step < 500 else 0.6)), always(0.6),
                  lambda step: 1, num_steps=1500)  # fmt: skip
    world.run(DraftDepth((0, 4)))
    assert Counter(world.depths[200:500])[4] > 280
    assert Counter(world.depths[800:])[0] > 600


def compute_bound(step: int, size: int, depth: int) -> float:
    return 0.01 * (1 + size / 64) * (1 + depth / 4 * size / 24)


@pytest.mark.parametrize(
    ("sizes", "limit"),
    [
        (lambda step: 32 - step // 20, 0.04),  # requests end one by one
        (lambda step: min(32, 1 + step // 20), 0.06),  # and come one by one
        (lambda step: random.Random(step // 3).choice([15, 18]), 0.04),  # about a power of two
        (lambda step: random.Random(step // 3).randint(24, 36), 0.04),
        (lambda step: random.Random(step // 50).randint(1, 40) - step % 50 // 10, 0.06),  # bursts
    ],
    ids=["ramp down", "ramp up", "15 or 18", "24 to 36", "bursts"],
)
def test_sizes_that_change_all_the_time_cost_little(sizes, limit):
    losses = [
        World(compute_bound, always(0.6), lambda step: max(1, sizes(step)), num_steps=900, seed=seed).loss((0, 2, 4))
        for seed in range(5)
    ]
    assert sum(losses) / len(losses) < limit


# --- one thing at a time -------------------------------------------------------------------------------------------


def settled(depths: tuple[int, ...], size: int, best: int) -> DraftDepth:
    """Has found `best`, without noise, where drafts are free and all accepted, or dear and all wrong."""
    policy = DraftDepth(depths)
    made = 0
    for _ in range(2000):
        depth = policy.choose(size)
        tokens = size * (1 + (min(made, depth) if best else 0))
        policy.observe(size, depth, 0.01 if best else 0.01 * (1 + depth), tokens)
        made = depth
    assert Counter(policy.choose(size) for _ in range(50))[best] == 50
    return policy


def test_a_single_depth_is_no_choice():
    policy = DraftDepth((3,))
    for size in (0, 1, 100):
        assert policy.choose(size) == 3
        policy.observe(size, 3, 0.01, size)
    assert policy.deepest == 3


@pytest.mark.parametrize("depths", [(), (2, 1), (1, 1)])
def test_depths_are_ascending(depths):
    with pytest.raises(AssertionError):
        DraftDepth(depths)


@pytest.mark.parametrize(("size", "first"), [(0, 4), (1, 4), (6, 4), (7, 2), (10, 2), (11, 0), (1000, 0)])
def test_with_nothing_known_the_first_depth_is_one_that_hardly_costs_anything(size, first):
    assert DraftDepth((0, 2, 4)).choose(size) == first


def test_without_depth_0_the_first_is_the_shallowest():
    assert DraftDepth((2, 4)).choose(100) == 2


@pytest.mark.parametrize(("best", "size"), [(0, 1), (4, 64)])
def test_a_new_size_begins_like_the_nearest_known_one(best, size):
    policy = settled((0, 4), 16, best)
    assert policy.choose(size) == best


def test_a_size_that_varies_about_a_power_of_two_is_one_size():
    policy = settled((0, 4), 16, 4)
    assert [policy._size_of(size) for size in (16, 18, 20, 7, 6, 21)] == [16, 16, 16, 16, 8, 32]
    policy.choose(30)
    assert [policy._size_of(size) for size in (16, 40, 13, 12, 41)] == [32, 32, 32, 16, 64]


def test_a_step_whose_drafts_were_never_made_says_nothing_about_their_worth():
    """Where sizes alternate, one of which does without drafts, the other's drafts are never there; that is not held
    against them once they are."""
    policy = settled((0, 4), 2, 4)
    for _ in range(30):
        policy.observe(100, 0, 0.01, 100)
        policy.observe(2, 4, 0.01, 2)
    assert policy._of_size[2]._recent.rate() == pytest.approx(500)


def test_steps_that_are_no_measure_end_a_trial_in_time():
    """Prompts in nearly every step: little is learned, and the depth on trial is not kept for long."""
    policy = DraftDepth((0, 4))
    seen = Counter()
    for step in range(3000):
        depth = policy.choose(32)
        seen[depth] += 1
        policy.observe(32, depth, 0.0 if step % 50 else 0.01 * (1 + depth), 32)
    assert 0 < seen[4] < 60


@pytest.mark.parametrize(("gain", "switches"), [(0.95, False), (1.01, False), (1.06, True)])
def test_another_depth_must_be_better_by_more_than_chance(gain, switches):
    policy = DraftDepth((0, 4))
    made = 0
    for _ in range(600):
        depth = policy.choose(32)
        policy.observe(32, depth, 0.02 / gain if depth else 0.01, 32 + (32 if made and depth else 0))
        made = depth
    assert policy._of_size[32].best == (4 if switches else 0)


def test_a_look_that_is_held_up_does_not_put_off_the_next_one_for_long():
    def looks(seconds: float) -> list[int]:
        policy = DraftDepth((0, 4))
        found = []
        for step in range(12000):
            depth = policy.choose(32)
            if depth:
                found.append(step)
            took = 0.06 if step < 4000 else seconds  # 6 times as long as none: hopeless
            policy.observe(32, depth, took if depth else 0.01, 32)
        return found

    assert len(looks(0.06)) > 10
    assert looks(0.60) == looks(0.06)  # held up each time, and known to have been faster


def test_when_the_best_depth_brings_much_less_the_others_are_tried_at_once():
    policy = settled((0, 4), 32, 4)
    made = 4
    for _ in range(1000):  # until 0 has just been tried in vain
        depth = policy.choose(32)
        policy.observe(32, depth, 0.01, 32 * (1 + min(made, depth)))
        if made == 0:
            break
        made = depth
    assert made == 0 and policy.choose(32) == 4
    chosen = []
    for _ in range(60):  # now they are worth nothing, and dear
        chosen.append(policy.choose(32))
        policy.observe(32, chosen[-1], 0.03 if chosen[-1] else 0.01, 32)
    assert Counter(chosen)[0] > 10


def test_a_depth_that_is_never_given_ends_its_trial():
    """The scheduler lowers it where tokens are short."""
    policy = DraftDepth((0, 2, 4))
    asked = Counter()
    for _ in range(1000):
        depth = policy.choose(32)
        asked[depth] += 1
        policy.observe(32, min(depth, 2), 0.01 * (1 + min(depth, 2)), 32)
    assert asked[0] > 800 and asked[4] < 100


def test_ten_times_longer_steps_sway_nothing():
    policy = DraftDepth((0, 4))
    chosen = Counter()
    made = 0
    for step in range(2000):
        depth = policy.choose(1)
        chosen[depth] += 1
        policy.observe(1, depth, 0.01 * (10 if step % 7 == 3 else 1), 1 + min(made, depth))
        made = depth
    assert chosen[4] > 1900


def test_the_longer_nothing_is_better_the_less_is_tried_and_a_change_is_found_all_the_same():
    world = World(dearer(1.6), lambda step: 0.1 if step < 6000 else 0.9, num_steps=9000, seed=3)
    world.run(DraftDepth((0, 4)))
    early, late = (sum(map(bool, world.depths[first:][:1500])) for first in (100, 4400))
    assert 0 < late < 0.5 * early
    found = next(step for step in range(6000, 9000) if all(world.depths[step : step + 50]))
    assert found < 8200
