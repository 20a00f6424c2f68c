"""The load that is told while somebody looks: what the meter makes of the core's words, and a real core's words."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from omni_engine import AsyncEngine, EngineArgs, SamplingParams
from omni_engine.engine.load import CoreLoad, LoadMeter, StepReport
from omni_engine.scheduler.draft_stats import DraftStats
from omni_engine.scheduler.request import RequestUpdate
from omni_engine.scheduler.scheduler import SchedulerStats


def stats(running=0, waiting=0, queries=0, hits=0, preemptions=0, drafts=None):
    return SchedulerStats(running, waiting, 7 * waiting, 0.0, queries, hits, preemptions, drafts)


def update(name, tokens, finish_reason=None, queued_time=0.0):
    return RequestUpdate(name, [1] * tokens, finish_reason=finish_reason, queued_time=queued_time)


def take(meter, now, *updates, load=None, prompt=0, new=0, **counters):
    meter.take(updates, stats(**counters), load, prompt, new, now)


def test_a_sample_tells_the_moment_and_what_came_since_the_last_one():
    meter = LoadMeter(100.0)
    take(meter, 100.1, queries=50, hits=20, preemptions=3)  # what was before nobody has seen
    steps = [StepReport(2, 0, 30, 0, 0.5), StepReport(3, 3, 3, 4, 0.25)]
    take(
        meter, 101.0, prompt=30, new=5, running=2, waiting=1, queries=80, hits=36, preemptions=4,
        load=CoreLoad(9, 4, steps),
    )  # fmt: skip
    take(meter, 101.5, new=2, running=1, waiting=0, queries=80, hits=36, preemptions=4,
         load=CoreLoad(8, 5, [StepReport(1, 1, 1, 1, 0.25)]))  # fmt: skip
    sample = meter.sample(102.0)
    assert sample.seconds == 2.0 and (sample.num_running, sample.num_waiting, sample.num_waiting_tokens) == (1, 0, 0)
    assert (sample.num_blocks_pinned, sample.num_blocks_cached) == (8, 5)
    assert (sample.num_prompt_tokens, sample.num_generation_tokens) == (30, 7)
    assert (sample.num_prefix_queries, sample.num_prefix_hits, sample.num_preemptions) == (30, 16, 1)
    assert (sample.num_steps, sample.step_seconds, sample.steps_by_gear) == (3, 1.0, {0: 1, 4: 1, 1: 1})
    assert sample.largest_batch == 3
    quiet = meter.sample(103.0)
    assert quiet.num_generation_tokens == quiet.num_prefix_queries == quiet.num_steps == quiet.largest_batch == 0
    assert (quiet.num_running, quiet.num_blocks_pinned, quiet.steps_by_gear) == (1, 8, {})


def test_times_to_first_tokens_and_between_tokens():
    meter = LoadMeter(10.0)
    take(meter, 11.0, update("old", 1))  # begun before anybody looked: no first token, and no token before this one
    take(meter, 11.5, update("old", 1), update("new", 1, queued_time=11.2))
    take(meter, 12.0, update("new", 2), update("old", 1, finish_reason="stop"))
    sample = meter.sample(12.0)
    assert sample.first_token_seconds == [pytest.approx(0.3)]
    # old: 0.5 and 0.5; new: two tokens that share 0.5
    assert sample.token_seconds == pytest.approx(1.5 / 4)
    assert meter.sample(13.0).token_seconds is None
    take(meter, 14.0, update("old", 1))  # another request by that name: what ended is forgotten
    assert meter.sample(14.0).token_seconds is None


def test_drafts_are_counted_from_the_last_sample_on_and_a_new_core_from_zero():
    meter = LoadMeter(0.0)
    take(meter, 0.1, drafts=DraftStats(10, 20, 12, [8, 4]))
    take(meter, 0.2, drafts=DraftStats(14, 28, 15, [10, 5]))
    assert meter.sample(1.0).drafts == DraftStats(4, 8, 3, [2, 1])
    meter.core_lost()
    assert meter.sample(2.0).drafts is None
    take(meter, 2.5, drafts=DraftStats(0, 0, 0, [0, 0]), running=1)
    take(meter, 2.6, drafts=DraftStats(2, 4, 3, [2, 1]), running=1)
    sample = meter.sample(3.0)
    assert sample.drafts == DraftStats(2, 4, 3, [2, 1]) and sample.num_running == 1


def test_a_lost_core_runs_nothing():
    meter = LoadMeter(0.0)
    take(meter, 0.5, running=3, waiting=2, load=CoreLoad(9, 1, [StepReport(3, 3, 3, 4, 0.1)]), queries=10)
    meter.core_lost()
    sample = meter.sample(1.0)
    assert (sample.num_running, sample.num_waiting, sample.num_blocks_pinned) == (0, 0, 0)
    assert sample.num_prefix_queries == 0


@pytest.fixture(scope="module")
def path(make_checkpoint):
    return make_checkpoint("LlamaForCausalLM")


def test_a_core_tells_of_its_steps_while_it_is_watched_and_only_then(path):
    async def scenario():
        args = EngineArgs(
            model=str(path), dtype="float32", max_model_len=192, max_num_seqs=8, num_gpu_blocks_override=64,
            cudagraph_capture_sizes=[2, 8], disable_log_stats=True,
        )  # fmt: skip
        engine = AsyncEngine.from_engine_args(args)
        told = []
        original = engine._take_updates
        engine._take_updates = lambda message: (told.append(message.load), original(message))[1]

        async def generate(count, tokens):
            async def one(number):
                params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
                prompt = {"prompt_token_ids": [number + 5, *range(10, 30)]}
                return [output async for output in engine.generate(prompt, params)]

            await asyncio.gather(*map(one, range(count)))

        try:
            assert engine.core_info is None and engine.start_phases == []
            await engine.wait_ready()
            assert engine.core_info.gears == [2, 8]
            assert [process for process, phases in engine.start_phases if phases] == ["front", "core"]
            await generate(3, 10)
            assert told and set(told) == {None}
            with engine.watched() as meter:
                with pytest.raises(RuntimeError, match="watched already"), engine.watched():
                    pass
                await generate(3, 10)
                sample = meter.sample(0.0)
                assert sample.num_generation_tokens == 30 and sample.num_prompt_tokens == 63
                assert len(sample.first_token_seconds) == 3 and min(sample.first_token_seconds) > 0
                assert sample.token_seconds and sample.step_seconds > 0
                assert (
                    sample.steps_by_gear[8] >= 5
                )  # three that decode: the gear of 8; where a prompt comes in there is none
                assert sum(sample.steps_by_gear.values()) == sample.num_steps >= 10
                assert sample.largest_batch == 3
                assert sample.num_blocks_cached > 0 and sample.num_blocks_pinned == 0
                await generate(1, 10)
                assert meter.sample(0.0).steps_by_gear[2] >= 8
            await generate(1, 3)  # the word that nobody looks goes before these
            told.clear()
            await generate(1, 10)
            assert told and set(told) == {None}
        finally:
            await engine.shutdown()

    asyncio.run(asyncio.wait_for(scenario(), 120))


def test_a_watch_begins_before_the_engine_is_ready_and_outlives_its_core(path):
    async def scenario():
        args = EngineArgs(model=str(path), dtype="float32", max_model_len=192, num_gpu_blocks_override=64)
        engine = AsyncEngine.from_engine_args(args, restart_core=True)

        async def generate():
            params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
            return [output async for output in engine.generate({"prompt_token_ids": [5, 6, 7]}, params)]

        try:
            with engine.watched() as meter:
                await generate()
                assert meter.sample(0.0).num_steps >= 10
                os.kill(engine._client.process.pid, signal.SIGKILL)
                while engine.is_ready:
                    await asyncio.sleep(0.01)
                assert meter.sample(0.0).num_running == 0
                await generate()
                sample = meter.sample(0.0)
                assert sample.num_steps >= 10 and sample.num_generation_tokens == 10
        finally:
            await engine.shutdown()

    asyncio.run(asyncio.wait_for(scenario(), 120))
