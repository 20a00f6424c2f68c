"""Steps that have no room for all drafts: fewer are verified, by graphs where there are some, and no token changes."""

from __future__ import annotations

import pytest

from omni_engine import Engine, SamplingParams

PROMPT = [5, 6, 7, 8] * 3
PARAMS = [SamplingParams(max_tokens=14, temperature=0, ignore_eos=True), SamplingParams(max_tokens=14, seed=3)] * 2


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("max_num_batched_tokens", [4, 8, 13, 20])
def test_a_small_token_budget_changes_no_token(make_checkpoint, adaptive, max_num_batched_tokens):
    path = str(make_checkpoint("LlamaForCausalLM"))
    prompts = [[index, *PROMPT] for index in range(4)]

    def tokens(**args):
        engine = Engine(path, dtype="float32", max_model_len=64, num_gpu_blocks_override=64, max_num_seqs=4, **args)
        outputs = engine.generate(prompts, PARAMS)
        engine.check_integrity()
        return [output.outputs[0].token_ids for output in outputs], engine

    expected, _ = tokens()
    found, engine = tokens(
        max_num_batched_tokens=max_num_batched_tokens,
        graph_backend="eager",
        cudagraph_capture_sizes=[2, 4],
        spec_method="ngram",
        spec_tokens=4,
        speculative_config={"prompt_lookup_max": 2, "adaptive_depth": adaptive},
    )
    assert found == expected
    runner = engine._core.runner
    assert runner.graphs.num_replayed or not adaptive
    assert {key.tokens_per_request - 1 for key in runner.graphs.num_replayed} <= set(runner.drafting.depths)
