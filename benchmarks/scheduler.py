"""Times the scheduler's part of a step while more and more requests wait.

    python benchmarks/scheduler.py [--waiting 10 1000 100000] [--running 32]

Needs no model and no torch. All rows are taken by decoding requests, of which one ends in every step and the first in
line takes its place, so that the queue is used and not only there. Times are those of the thread's processor, for
machines that others use too: medians of the steps, and of adding one request.
"""

from __future__ import annotations

import argparse
import statistics
import time

from omni_engine.kvcache.manager import KVCacheManager
from omni_engine.scheduler.config import SchedulerConfig
from omni_engine.scheduler.plan import StepOutput
from omni_engine.scheduler.request import RequestInput
from omni_engine.scheduler.sampling_params import SamplingParams
from omni_engine.scheduler.scheduler import Scheduler

BLOCK_SIZE, PROMPT, END_OF_TEXT, ORDINARY = 16, 32, 2, 7


def measure(waiting: int, running: int, steps: int) -> tuple[float, float]:
    """Median microseconds of a step (plan and update) and of adding a request, with `waiting` of them in line."""
    config = SchedulerConfig(running, max(2048, running * PROMPT), 4096)
    scheduler = Scheduler(
        config, KVCacheManager(None, running * (PROMPT + steps) // BLOCK_SIZE + 2 * running, BLOCK_SIZE)
    )
    prompt = list(range(10, 10 + PROMPT))
    params = SamplingParams(max_tokens=4000, seed=1)
    add_times = []
    for number in range(waiting + running):
        source = RequestInput(str(number), [number, *prompt[1:]], params, eos_token_ids=[END_OF_TEXT])
        begin = time.thread_time()
        refused = scheduler.add(source)
        add_times.append(time.thread_time() - begin)
        assert refused is None
    times = []
    for number in range(steps):
        begin = time.thread_time()
        plan = scheduler.schedule()
        planned = time.thread_time()
        sampled = [[ORDINARY] if samples else [] for samples in plan.samples]
        sampled[number % len(sampled)] = [END_OF_TEXT]  # one ends, and the first in line takes its place
        output = StepOutput(plan.step, sampled, {}, {})
        built = time.thread_time()
        scheduler.update(plan, output)
        times.append(planned - begin + time.thread_time() - built)
    assert len(scheduler.running) >= running - 1 and len(scheduler.waiting) >= waiting - steps
    return statistics.median(times[1:]) * 1e6, statistics.median(add_times[-1000:]) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the scheduler while more and more requests wait.")
    parser.add_argument("--waiting", type=int, nargs="+", default=[10, 1000, 10_000, 100_000])
    parser.add_argument("--running", type=int, default=32)
    parser.add_argument("--steps", type=int, default=500)
    options = parser.parse_args()
    print(f"{'waiting':>8} {'step us':>8} {'add us':>7}")
    for waiting in options.waiting:
        step, add = measure(waiting + options.steps, options.running, options.steps)
        print(f"{waiting:8} {step:8.1f} {add:7.1f}", flush=True)


if __name__ == "__main__":
    main()
