"""An engine that holds prompts back: the times it measures are what the next prompt waits for, and no token changes."""

from __future__ import annotations

import pytest

from omni_engine import Engine, SamplingParams

SHARE = 0.2


@pytest.mark.parametrize("async_scheduling", [True, False])
def test_prompts_wait_until_the_others_had_their_time(make_checkpoint, async_scheduling):
    path = str(make_checkpoint("LlamaForCausalLM"))
    prompts = [[5, 6, 7], list(range(10, 50)), list(range(60, 100))]
    params = [SamplingParams(max_tokens=count, temperature=0, ignore_eos=True) for count in (240, 20, 20)]
    options = {"dtype": "float32", "max_model_len": 256, "enforce_eager": True, "enable_prefix_caching": False}
    engine = Engine(path, max_prefill_share=SHARE, async_scheduling=async_scheduling, **options)
    core = engine._core
    core.watch(True)
    engine.add_request("0", prompts[0], params[0])
    for _ in range(5):
        engine.step()
    engine.add_request("1", prompts[1], params[1])
    engine.add_request("2", prompts[2], params[2])
    found = {}
    while engine.has_unfinished_requests():
        found |= {output.request_id: output.outputs[0].token_ids for output in engine.step() if output.finished}
    steps = core.take_load().steps
    first, second = (index for index, step in enumerate(steps) if step.num_decode < step.num_requests and index > 1)
    assert steps[first].num_decode == 1 and steps[first].num_tokens == 1 + len(prompts[1])
    rest = sum(step.seconds for step in steps[first + 1 : second])
    # All others may have ended meanwhile, where a machine paused within the step with the prompt.
    assert rest >= 0.999 * steps[first].seconds * (1 - SHARE) / SHARE or steps[second].num_decode == 0
    assert second > first + 1
    plain = Engine(path, **options)
    outputs = plain.generate(prompts, params)
    assert [found[str(index)] for index in range(3)] == [output.outputs[0].token_ids for output in outputs]
