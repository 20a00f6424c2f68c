"""Questions to a core in its own process: traces of its steps, and a prefix cache that is emptied."""

from __future__ import annotations

import asyncio
import gzip
import json

import pytest

from omni_engine import AsyncEngine, EngineArgs, SamplingParams
from omni_engine.engine.errors import EngineDeadError

PROMPT = [(5 * i) % 400 + 4 for i in range(40)]
PARAMS = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


async def answer(engine):
    async for output in engine.generate({"prompt_token_ids": PROMPT}, PARAMS):
        final = output
    return final


@pytest.mark.parametrize("overlap", [True, False])
def test_a_trace_holds_the_steps_between_start_and_stop(make_checkpoint, tmp_path, overlap):
    path = make_checkpoint("LlamaForCausalLM")
    config = {"profiler": "torch", "torch_profiler_dir": str(tmp_path / "new"), "torch_profiler_with_stack": False}

    async def scenario():
        engine = AsyncEngine.from_engine_args(
            EngineArgs(
                model=str(path), max_model_len=128, enforce_eager=True, profiler_config=config, async_scheduling=overlap
            )
        )
        try:
            await engine.wait_ready()
            with pytest.raises(RuntimeError, match="start it first"):
                await engine.stop_profile()
            await engine.start_profile()
            with pytest.raises(RuntimeError, match="runs already"):
                await engine.start_profile()
            await answer(engine)
            await engine.stop_profile()
            await engine.start_profile()
            await engine.stop_profile()
        finally:
            await engine.shutdown()

    asyncio.run(scenario())
    first, second = sorted((tmp_path / "new").iterdir(), key=lambda found: found.stat().st_mtime_ns)
    assert first.name.endswith(".pt.trace.json.gz")
    names = [
        {event.get("name") for event in json.loads(gzip.decompress(found.read_bytes()))["traceEvents"]}
        for found in (first, second)
    ]
    assert any(name and name.startswith("aten::") for name in names[0])
    assert not any(name and name.startswith("aten::") for name in names[1])  # no step, nothing seen


def test_the_prefix_cache_is_emptied_and_says_so(make_checkpoint):
    path = make_checkpoint("LlamaForCausalLM")

    async def scenario():
        engine = AsyncEngine.from_engine_args(EngineArgs(model=str(path), max_model_len=128, enforce_eager=True))
        try:
            await engine.wait_ready()
            assert not (await answer(engine)).num_cached_tokens
            assert (await answer(engine)).num_cached_tokens
            assert await engine.reset_prefix_cache() is True
            assert not (await answer(engine)).num_cached_tokens
            with pytest.raises(RuntimeError, match="--profiler-config"):
                await engine.start_profile()
        finally:
            await engine.shutdown()
        with pytest.raises(EngineDeadError):
            await engine.reset_prefix_cache()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({}, "must be torch: None"),
        ({"profiler": "cuda"}, "must be torch: cuda"),
        ({"profiler": "torch"}, "must be a folder: None"),
        ({"profiler": "torch", "torch_profiler_dir": "gs://a"}, "must be a folder: gs://a"),
        ({"profiler": "torch", "torch_profiler_dir": "a", "delay_iterations": 1}, "and not: delay_iterations"),
        ({"profiler": "torch", "torch_profiler_dir": "a", "torch_profiler_with_stack": 1}, "true or false: 1"),
    ],
)
def test_a_wrong_configuration_is_refused(config, text):
    with pytest.raises(ValueError, match=text):
        EngineArgs(model="m", profiler_config=config)
