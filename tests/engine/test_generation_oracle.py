"""Greedy generation against transformers: every architecture, continuous batching, chunks, preemption, prefix hits."""

from __future__ import annotations

import math
import random
import warnings
from contextlib import contextmanager

import msgspec
import pytest
import torch

from omni_engine import Engine, SamplingParams
from omni_engine.engine.model_runner import ModelRunner
from omni_engine.ops.dsa import indexer_scores
from omni_engine.ops.rope import rotate
from omni_engine.scheduler.plan import StepOutput, StepPlan

ARCHITECTURES = [
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "DeepseekV32ForCausalLM",
    "GlmMoeDsaForCausalLM",
]
NUM_TOKENS = 64
TIE = 1e-5  # top two logits closer than this (in logits) may swap in another order of summation
# An indexer whose last selected score is closer than this to the next may select another token, and go on differently.
SELECTION_TIE = 1e-5


def make_prompts(vocab_size, count=16, seed=0):
    """Ragged: from one token to several chunks."""
    rng = random.Random(seed)
    lengths = [1, 2, 15, 16, 17, 90, *(rng.randint(3, 70) for _ in range(count - 6))]
    return [[rng.randrange(4, vocab_size) for _ in range(length)] for length in lengths]


def make_engine(path, **options):
    settings = {"dtype": "float32", "max_num_batched_tokens": 48, "max_num_seqs": 16, "max_model_len": 192}
    engine = Engine(str(path), **{**settings, **options})
    engine._core.runner = CheckedRunner(engine._core.runner)
    return engine


class CheckedRunner:
    """The real runner; every plan and output goes through msgpack, as it would between processes."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self.graphs = runner.graphs
        self.plans: list[StepPlan] = []

    def execute(self, plan: StepPlan) -> StepOutput:
        copy = msgspec.msgpack.decode(msgspec.msgpack.encode(plan), type=StepPlan)
        assert copy == plan
        self.plans.append(plan)
        output = self.runner.execute(copy)
        decoded = msgspec.msgpack.decode(msgspec.msgpack.encode(output), type=StepOutput)
        assert decoded == output
        return decoded

    def close(self) -> None:
        self.runner.close()


def greedy(**fields):
    return SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, **fields)


def generate(engine, prompts, params=None):
    outputs = engine.generate([{"prompt_token_ids": p} for p in prompts], params or greedy())
    engine.check_integrity()
    assert not engine.has_unfinished_requests()
    return [output.outputs[0].token_ids for output in outputs]


def differences(reference, prompts, generated):
    """Places where transformers, given our tokens so far, would have chosen another: (request, position, margin of the
    logits, smallest margin of any selection of tokens up to there)."""
    found = []
    for index, (prompt, tokens) in enumerate(zip(prompts, generated, strict=True)):
        assert len(tokens) == NUM_TOKENS
        with torch.no_grad(), selection_margins(reference) as margins:
            logits = reference(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].float()
        best = logits.max(-1)
        for position, token in enumerate(tokens):
            if int(best.indices[position]) != token:
                margin = float(best.values[position] - logits[position, token])
                selection = min((float(each[: len(prompt) + position].min()) for each in margins), default=math.inf)
                found.append((index, position, margin, selection))
    return found


@contextmanager
def selection_margins(reference):
    """Yields a list that a forward pass fills: by layer float [tokens], how far the last score that the indexer selects
    is from the first it does not."""
    margins = []

    def record(indexer, inputs, _output):
        hidden, low_rank, (cos, sin) = inputs[:3]
        count, heads = hidden.shape[1], indexer.n_heads
        interleaved = "Glm" in type(indexer).__name__
        cos, sin = (angles[0, :, : angles.shape[-1] // 2] for angles in (cos, sin))
        query = rotate(indexer.wq_b(low_rank)[0].view(count, heads, -1), cos, sin, interleaved)
        keys = rotate(indexer.k_norm(indexer.wk(hidden))[0].unsqueeze(1), cos, sin, interleaved)[:, 0]
        weights = indexer.weights_proj(hidden) * (heads * indexer.head_dim) ** -0.5
        scores = indexer_scores(query.unsqueeze(0), weights, keys.unsqueeze(0))[0]
        future = torch.ones(count, count, dtype=torch.bool).triu(1)
        ranked = scores.masked_fill(future, -math.inf).sort(descending=True).values
        if count > indexer.index_topk:
            gap = ranked[:, indexer.index_topk - 1] - ranked[:, indexer.index_topk]
            margins.append(gap.nan_to_num(math.inf))  # fewer tokens than are selected: -inf less -inf

    indexers = [module for name, module in reference.named_modules() if name.endswith(".indexer")]
    hooks = [indexer.register_forward_hook(record) for indexer in indexers]
    yield margins
    for hook in hooks:
        hook.remove()


def test_layers_without_an_indexer_attend_to_what_the_layer_before_selects(make_checkpoint, reference_model):
    """GLM-5.2: batched, in chunks, with prefix hits and preemption."""
    path = make_checkpoint(
        "GlmMoeDsaForCausalLM", num_hidden_layers=4, indexer_types=["full", "shared", "shared", "full"]
    )
    prompts = make_prompts(515, count=10)
    engine = make_engine(path, max_model_len=160, num_gpu_blocks_override=20)
    generated = generate(engine, prompts)
    assert engine._core.stats().num_preemptions > 0
    assert_equal_but_for_ties(reference_model(path), prompts, generated)
    assert [len(cache) for cache in engine._core.runner.runner.caches] == [3, 2, 2, 3]
    for _ in range(2):
        assert generate(engine, prompts[5:6]) == generated[5:6]
    assert engine._core.stats().prefix_cache_hits > 0


def assert_equal_but_for_ties(reference, prompts, generated):
    found = differences(reference, prompts, generated)
    ties = [difference for difference in found if difference[2] < TIE or difference[3] < SELECTION_TIE]
    if ties:
        warnings.warn(f"{len(ties)} tokens differ where logits or selections tie: {ties}", stacklevel=2)
    assert len({index for index, _, margin, _ in ties if margin >= TIE}) <= 1, "ties of selections are rare"
    assert found == ties


MORE_SEEDS = [
    pytest.param(architecture, seed, marks=pytest.mark.full) for architecture in ARCHITECTURES for seed in range(1, 6)
]


@pytest.mark.parametrize(("architecture", "seed"), [*((name, 0) for name in ARCHITECTURES), *MORE_SEEDS])
def test_sixteen_concurrent_requests_equal_transformers(architecture, seed, make_checkpoint, reference_model):
    path = make_checkpoint(architecture, seed=seed)
    reference = reference_model(path)
    engine = make_engine(path)
    prompts = make_prompts(reference.config.vocab_size, seed=seed)
    generated = generate(engine, prompts)
    assert_equal_but_for_ties(reference, prompts, generated)
    plans = engine._core.runner.plans
    assert any(max(plan.num_tokens) > 1 and 1 in plan.num_tokens for plan in plans), "nothing was batched"
    assert any(plan.is_decode_only for plan in plans)

    # Negative control: with one token of one request exchanged, the comparison must notice.
    generated[3][5] = (generated[3][5] + 1) % reference.config.vocab_size
    assert differences(reference, prompts, generated)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_cache_of_a_tenth_of_the_need_gives_the_same_tokens(architecture, make_checkpoint, reference_model):
    path = make_checkpoint(architecture)
    prompts = make_prompts(515)
    need = sum(-(-(len(prompt) + NUM_TOKENS) // 16) for prompt in prompts)
    engine = make_engine(path, max_model_len=160, num_gpu_blocks_override=max(11, need // 10 + 1))
    generated = generate(engine, prompts)
    assert engine._core.stats().num_preemptions > 0
    assert_equal_but_for_ties(reference_model(path), prompts, generated)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_prefix_hits_give_the_same_tokens(architecture, make_checkpoint, reference_model):
    path = make_checkpoint(architecture)
    engine = make_engine(path)
    shared = make_prompts(515)[5][:70]
    prompts = [shared + tail for tail in make_prompts(515, count=8, seed=1)]
    prompts = [prompt[:128] for prompt in prompts] + [shared, shared[:64]]
    first = generate(engine, prompts)
    assert_equal_but_for_ties(reference_model(path), prompts, first)
    hits = engine._core.stats().prefix_cache_hits
    assert hits >= 64 * (len(prompts) - 2), "requests of one batch must share the prefix"
    second = generate(engine, prompts)
    assert second == first
    assert engine._core.stats().prefix_cache_hits > hits + 64 * len(prompts) - 64

    unshared = generate(make_engine(path, enable_prefix_caching=False), prompts)
    assert unshared == first


def test_salted_requests_share_nothing(make_checkpoint):
    engine = make_engine(make_checkpoint("LlamaForCausalLM"))
    prompt = make_prompts(515)[5]
    for salt in ("a", "b", None):
        engine.generate({"prompt_token_ids": prompt, "cache_salt": salt} if salt else prompt, greedy())
    assert engine._core.stats().prefix_cache_hits == 0
    engine.generate({"prompt_token_ids": prompt, "cache_salt": "a"}, greedy())
    assert engine._core.stats().prefix_cache_hits == len(prompt) // 16 * 16


SAMPLED = [
    SamplingParams(temperature=1.0, seed=11, max_tokens=40, ignore_eos=True),
    SamplingParams(temperature=0.7, top_p=0.8, seed=12, max_tokens=40, ignore_eos=True),
    SamplingParams(temperature=1.2, top_k=20, seed=13, max_tokens=40, ignore_eos=True, presence_penalty=0.8),
    SamplingParams(temperature=1.0, min_p=0.05, seed=14, max_tokens=40, ignore_eos=True, repetition_penalty=1.3),
    SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, frequency_penalty=0.5, logit_bias={7: 2.0}),
    SamplingParams(temperature=1.0, seed=15, max_tokens=40, min_tokens=40, stop_token_ids=[5, 6, 9]),
]


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "DeepseekV3ForCausalLM", "DeepseekV32ForCausalLM"])
def test_sampled_tokens_do_not_depend_on_company_chunks_hits_or_preemption(architecture, make_checkpoint):
    path = make_checkpoint(architecture)
    prompts = [{"prompt_token_ids": prompt} for prompt in make_prompts(515, count=12)]
    params = [SAMPLED[index % len(SAMPLED)] for index in range(12)]

    def tokens(engine, chosen=range(12)):
        outputs = engine.generate([prompts[i] for i in chosen], [params[i] for i in chosen])
        engine.check_integrity()
        return [output.outputs[0].token_ids for output in outputs]

    plain = make_engine(path, max_num_batched_tokens=2048)
    together = tokens(plain)
    assert [tokens(plain, [i])[0] for i in range(12)] == together, "alone, with prefix hits"
    assert tokens(make_engine(path, max_num_batched_tokens=17)) == together, "in small chunks"
    small = make_engine(path, max_model_len=144, num_gpu_blocks_override=12)
    assert tokens(small) == together, "preempted"
    assert small._core.stats().num_preemptions > 0
    assert len({tuple(t) for t in together}) == 12
