"""The next step is launched before the last one is read, and nobody can tell from the tokens."""

from __future__ import annotations

import pytest

from omni_engine import Engine, SamplingParams
from omni_engine.engine.core import EngineCore
from omni_engine.engine.model_runner import ModelRunner

KINDS = {
    "greedy": {"temperature": 0.0},
    "drawn": {"temperature": 1.0, "logprobs": 2},
    "truncated": {"temperature": 1.0, "top_p": 0.7, "top_k": 30},
    "penalised": {"temperature": 0.8, "presence_penalty": 1.0, "repetition_penalty": 1.2},
    "stopping": {"temperature": 1.0, "stop_token_ids": list(range(4, 60)), "min_tokens": 3},
    "limited": {"temperature": 1.0, "max_tokens": 2},
    "avoiding": {"temperature": 1.0, "bad_words": ["a", "the harbour", "e"]},
    "reporting": {"temperature": 0.0, "prompt_logprobs": 1},
}


def make_engine(path, *, overlap, stream=False, **options):
    """`stream`: as on a device that computes asynchronously, launched and read by one thread."""
    settings = {"dtype": "float32", "max_num_seqs": 4, "max_model_len": 128, "max_num_batched_tokens": 48}
    engine = Engine(str(path), async_scheduling=overlap, num_gpu_blocks_override=10, **(settings | options))
    core = engine._core
    assert (core._thread is not None) == overlap
    if stream:
        core._thread.shutdown()
        core._thread = None
    return engine


def run(engine, seed=0):
    prompts, params = [], []
    for index, fields in enumerate([*KINDS.values(), *KINDS.values()]):
        prompts.append({"prompt_token_ids": [5 + (index * 7 + i * i) % 300 for i in range(3 + 9 * (index % 6))]})
        params.append(SamplingParams(**({"max_tokens": 30, "seed": seed + index} | fields)))
    outputs = engine.generate(prompts, params)
    engine.check_integrity()
    return [
        (out.outputs[0].token_ids, out.outputs[0].finish_reason, out.outputs[0].stop_reason) for out in outputs
    ], outputs


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint):
    return make_checkpoint("Qwen3MoeForCausalLM")


@pytest.fixture(scope="module")
def one_after_another(checkpoint):
    return run(make_engine(checkpoint, overlap=False))


@pytest.mark.parametrize("stream", [False, True], ids=["thread", "stream"])
def test_tokens_and_reports_are_those_of_steps_one_after_another(checkpoint, one_after_another, stream):
    engine = make_engine(checkpoint, overlap=True, stream=stream)
    told, outputs = run(engine)
    assert told == one_after_another[0]
    assert engine._core.stats().num_preemptions > 0, "a pool this small must preempt"
    for mine, theirs in zip(outputs, one_after_another[1], strict=True):
        assert [list(step) for step in mine.outputs[0].logprobs or []] == [
            list(step) for step in theirs.outputs[0].logprobs or []
        ]
        assert len(mine.prompt_logprobs or []) == len(theirs.prompt_logprobs or [])


class Recorder:
    """Notes in which order steps are dispatched and read."""

    def __init__(self, runner: ModelRunner) -> None:
        self.events: list[tuple[str, int]] = []
        dispatch, read = runner.dispatch, runner.read

        def noted_dispatch(plan):
            self.events.append(("launched", plan.step))
            return dispatch(plan)

        def noted_read(step):
            self.events.append(("read", step.plan.step))
            return read(step)

        runner.dispatch, runner.read = noted_dispatch, noted_read


@pytest.mark.parametrize("overlap", [False, True])
def test_step_n_plus_1_is_launched_before_step_n_is_read(checkpoint, overlap):
    engine = make_engine(checkpoint, overlap=overlap, stream=overlap)
    events = Recorder(engine._core.runner).events
    engine.generate({"prompt_token_ids": [5, 6, 7]}, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
    launched_first = [events.index(("launched", n + 1)) < events.index(("read", n)) for n in range(10)]
    assert launched_first == [overlap] * 10


def test_a_step_that_fails_in_flight_ends_the_engine(checkpoint):
    engine = make_engine(checkpoint, overlap=True)
    core = engine._core
    assert isinstance(core, EngineCore)
    execute = core.runner.execute

    def fail_at_the_third(plan):
        if plan.step == 2:
            raise ArithmeticError("a broken kernel")
        return execute(plan)

    core.runner.execute = fail_at_the_third
    with pytest.raises(RuntimeError, match="a step failed: ArithmeticError: a broken kernel"):
        engine.generate({"prompt_token_ids": [5, 6, 7]}, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
