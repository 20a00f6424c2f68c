"""Random requests, arrivals and aborts on a cache far too small: nothing leaks, and survivors' tokens do not change."""

from __future__ import annotations

import random

import pytest

from omni_engine import Engine, SamplingParams


def random_request(rng):
    prompt = [rng.randrange(4, 400) for _ in range(rng.choice([1, 5, 16, 33, 64, 100]))]
    if rng.random() < 0.4:
        prompt = [7] * 32 + prompt  # shared prefixes
    greedy = rng.random() < 0.4
    params = SamplingParams(
        n=1 if greedy else rng.choice([1, 1, 3]),
        temperature=0 if greedy else rng.choice([0.7, 1.0]),
        top_p=1.0 if greedy else rng.choice([1.0, 0.8]),
        seed=rng.randrange(1000),
        max_tokens=rng.randint(1, 30),
        ignore_eos=True,
        presence_penalty=rng.choice([0.0, 0.0, 1.0]),
        logprobs=rng.choice([None, None, 2]),
        prompt_logprobs=rng.choice([None, None, None, 0]),
        min_tokens=1,
    )
    return prompt, params


def shape(output):
    """What must not depend on the company: tokens, text, reasons."""
    return [(c.index, c.token_ids, c.text, c.finish_reason) for c in output.outputs]


LONG = [
    pytest.param(architecture, seed, marks=pytest.mark.full)
    for architecture in (
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Qwen3MoeForCausalLM",
        "DeepseekV3ForCausalLM",
        "DeepseekV32ForCausalLM",
    )
    for seed in range(10, 25)
]


@pytest.mark.parametrize(("architecture", "seed"), [*(("LlamaForCausalLM", seed) for seed in range(3)), *LONG])
def test_aborts_in_every_phase_leak_nothing_and_change_no_other_request(make_checkpoint, architecture, seed):
    path = str(make_checkpoint(architecture))
    rng = random.Random(seed)
    requests = [random_request(rng) for _ in range(120)]
    engine = Engine(
        path, dtype="float32", max_model_len=192, max_num_seqs=8, max_num_batched_tokens=40, num_gpu_blocks_override=16
    )
    waiting, aborted, finished, partial = list(range(len(requests))), set(), {}, set()
    while waiting or engine.has_unfinished_requests():
        for _ in range(rng.choice([0, 1, 1, 6])):
            if waiting:
                index = waiting.pop(0)
                engine.add_request(str(index), *requests[index])
        if rng.random() < 0.25:
            running = [s.request_id for s in engine._front.outputs.requests.values()]
            for request_id in rng.sample(running, min(len(running), rng.choice([1, 2]))):
                aborted.add(request_id)
                engine.abort_request(request_id)
        for output in engine.step():
            assert output.request_id not in finished
            if output.finished:
                finished[output.request_id] = output
            else:
                partial.add(output.request_id)
        engine.check_integrity()
    assert finished.keys() == {str(index) for index in range(len(requests))}, "every request ends, exactly once"
    stats = engine._core.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_cache_usage) == (0, 0, 0.0)
    assert stats.num_preemptions > 0
    assert 10 < len(aborted) < 110
    assert aborted & partial, "some were aborted while they generated"
    assert aborted - partial, "and some before"

    survivors = [index for index in range(len(requests)) if str(index) not in aborted]
    calm = Engine(path, dtype="float32", max_model_len=192)
    alone = calm.generate([requests[i][0] for i in survivors], [requests[i][1] for i in survivors])
    for index, expected in zip(survivors, alone, strict=True):
        assert shape(finished[str(index)]) == shape(expected), index
        if requests[index][1].prompt_logprobs is not None:
            assert len(finished[str(index)].prompt_logprobs) == len(requests[index][0])
    for request_id in aborted:
        reasons = {completion.finish_reason for completion in finished[request_id].outputs}
        assert "abort" in reasons
