"""With speculation the output is that without it, token for token, whatever drafts and however it is scheduled."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

import omni_engine
from omni_engine import Engine, SamplingParams
from omni_engine.engine.row_state import NO_DRAFT, RowTable
from omni_engine.engine.speculation import verification
from omni_engine.ops.sampling import gumbel_noise

DEMO = Path(omni_engine.__file__).parent / "models" / "demo"
SHARED = [7 + index % 50 for index in range(40)]
PROMPTS = [[*SHARED[: 40 - 7 * index], 100 + index] for index in range(5)] + [[9 + index] * 3 for index in range(3)]
# What a request may ask for. bad_words and stop strings need text, so a tokenizer, which the demos have.
PARAMS = {
    "greedy": {"temperature": 0.0},
    "gumbel": {"temperature": 0.9},
    "split": {
        "temperature": 0.8, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.2, "presence_penalty": 0.3,
        "frequency_penalty": 0.2, "min_tokens": 12, "logprobs": 2, "logit_bias": {11: 2.0},
    },
    "greedy split": {"temperature": 0.0, "logprobs": 1, "repetition_penalty": 1.3, "min_tokens": 9},
    "allowed": {"temperature": 1.0, "allowed_token_ids": list(range(5, 1900))},
}  # fmt: skip


def folder(model, make_checkpoint, make_predicting_checkpoint):
    if model in ("demo", "sparse demo"):
        return DEMO / ("deepseek" if model == "demo" else "deepseek-v32")
    make = make_checkpoint if model == "Qwen3ForCausalLM" else make_predicting_checkpoint
    return make(model)


def speculative(path, method, num_drafts):
    config = {"method": method, "num_speculative_tokens": num_drafts, "adaptive_depth": False}
    if method == "draft_model":  # a model that drafts for itself: all drafts are accepted as far as they go
        config["model"] = str(path)
    if method == "ngram":
        config |= {"prompt_lookup_max": 3, "prompt_lookup_min": 1}
    return config


def make_engine(path, config, **options):
    """Three rows for eight requests, chunks of prompts, and a pool too small for three long ones."""
    settings = {
        "dtype": "float32", "max_num_seqs": 3, "max_model_len": 128, "max_num_batched_tokens": 24,
        "num_gpu_blocks_override": 11, "enforce_eager": True, "generation_config": "vllm",
    }  # fmt: skip
    return Engine(str(path), speculative_config=config, **(settings | options))


def params_of(kind, num_tokens=30):
    return [
        SamplingParams(seed=index, max_tokens=num_tokens + 6 * index, ignore_eos=True, **PARAMS[kind])
        for index in range(len(PROMPTS))
    ]


def run(engine, params, prompts=PROMPTS):
    before = engine._core.stats()
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
    engine.check_integrity()
    after = engine._core.stats()
    assert after.prefix_cache_hits > before.prefix_cache_hits
    results = []
    for output in outputs:
        for one in output.outputs:
            ranks = None
            if one.logprobs is not None:
                ranks = [{token: entry.rank for token, entry in place.items()} for place in one.logprobs]
            results.append((one.token_ids, one.finish_reason, one.stop_reason, ranks))
    return results


@pytest.fixture(scope="module")
def plain(make_checkpoint, make_predicting_checkpoint):
    """Results without speculation, graphs or overlap, and with room for everybody."""
    known = {}

    def results(model, kind):
        if (model, kind) not in known:
            path = folder(model, make_checkpoint, make_predicting_checkpoint)
            options = {"num_gpu_blocks_override": 100, "max_num_batched_tokens": 512, "async_scheduling": False}
            known[model, kind] = run(make_engine(path, {}, **options), params_of(kind))
        return known[model, kind]

    return results


CASES = [
    ("demo", "mtp", 1, "greedy"),
    ("demo", "mtp", 3, "greedy"),
    ("demo", "mtp", 5, "gumbel"),
    ("demo", "mtp", 3, "split"),
    ("demo", "mtp", 2, "greedy split"),
    ("demo", "mtp", 2, "allowed"),
    ("demo", "ngram", 4, "greedy"),
    ("demo", "ngram", 3, "split"),
    ("demo", "draft_model", 3, "gumbel"),
    ("sparse demo", "mtp", 2, "greedy"),
    ("sparse demo", "mtp", 3, "split"),
    ("DeepseekV3ForCausalLM", "mtp", 2, "gumbel"),
    ("DeepseekV32ForCausalLM", "mtp", 2, "greedy"),
    ("GlmMoeDsaForCausalLM", "mtp", 3, "gumbel"),
    ("Qwen3ForCausalLM", "ngram", 4, "greedy"),
    ("Qwen3ForCausalLM", "draft_model", 4, "greedy"),
    ("Qwen3ForCausalLM", "draft_model", 3, "gumbel"),
    ("Qwen3ForCausalLM", "draft_model", 2, "split"),
]
IN_EVERY_RUN = {  # the others are in the full tier
    (("demo", "mtp", 3, "greedy"), False),
    (("demo", "mtp", 5, "gumbel"), True),
    (("demo", "mtp", 3, "split"), True),
    (("sparse demo", "mtp", 3, "split"), True),
    (("Qwen3ForCausalLM", "ngram", 4, "greedy"), True),
    (("Qwen3ForCausalLM", "draft_model", 3, "gumbel"), True),
    (("Qwen3ForCausalLM", "draft_model", 2, "split"), False),
}


@pytest.mark.parametrize(
    ("case", "padded"),
    [
        pytest.param(
            case,
            padded,
            id="-".join(map(str, case)) + "-padded" * padded,
            marks=() if (case, padded) in IN_EVERY_RUN else pytest.mark.full,
        )
        for case in CASES
        for padded in (False, True)
    ],
)
def test_output_is_that_without_speculation(make_checkpoint, make_predicting_checkpoint, plain, case, padded):
    """Joins, leaves, chunks, prefix hits, preemption, two steps in flight."""
    model, method, num_drafts, kind = case
    path = folder(model, make_checkpoint, make_predicting_checkpoint)
    graphs = {"enforce_eager": False, "graph_backend": "eager", "cudagraph_capture_sizes": [2, 3]} if padded else {}
    engine = make_engine(path, speculative(path, method, num_drafts), **graphs)
    assert run(engine, params_of(kind)) == plain(model, kind)
    stats = engine._core.stats()
    assert stats.num_preemptions, "nobody was preempted, so this is not what it says"
    assert stats.drafts.num_drafts > 20
    if ("demo" in model and method == "mtp") or method == "draft_model":
        assert stats.drafts.num_accepted_tokens > 20, "nothing was accepted, so this shows little"
    if padded:
        assert engine._core.runner.graphs.num_eager == 0


@pytest.mark.full
@pytest.mark.parametrize("num_drafts", range(1, 6))
def test_every_depth_of_mtp_gives_the_same(make_checkpoint, make_predicting_checkpoint, plain, num_drafts):
    engine = make_engine(DEMO / "deepseek", speculative(None, "mtp", num_drafts))
    assert run(engine, params_of("gumbel")) == plain("demo", "gumbel")
    assert len(engine._core.stats().drafts.num_accepted_per_position) == num_drafts


def test_adaptive_depth_changes_no_token(make_checkpoint, make_predicting_checkpoint, plain, monkeypatch):
    """Each step verifies another number of drafts, none included."""
    engine = make_engine(DEMO / "deepseek", {"method": "mtp", "num_speculative_tokens": 3})
    depth = engine._core.scheduler.draft_depth
    assert depth.depths == (0, 2, 3)
    chosen = itertools.cycle([3, 0, 2, 1, 3, 3, 2, 0, 0, 1])
    monkeypatch.setattr(depth, "choose", lambda num_requests: next(chosen))
    for kind in ("greedy", "gumbel", "split"):
        engine.reset_prefix_cache()
        assert run(engine, params_of(kind)) == plain("demo", kind)
    assert engine._core.stats().drafts.num_accepted_tokens > 100


@pytest.mark.full
def test_overlap_changes_no_token(make_checkpoint, make_predicting_checkpoint, plain):
    engine = make_engine(DEMO / "deepseek", speculative(None, "mtp", 3), async_scheduling=False)
    assert run(engine, params_of("gumbel")) == plain("demo", "gumbel")


@pytest.mark.parametrize("wrong", [
    "one too many",
    pytest.param("everything is accepted", marks=pytest.mark.full),
    pytest.param("nobody's noise", marks=pytest.mark.full),
])  # fmt: skip
def test_the_comparison_sees_wrong_verification(monkeypatch, make_checkpoint, make_predicting_checkpoint, plain, wrong):
    """The control: break acceptance, and output differs."""
    accept = verification.accept_equal

    def broken(drafts, sampled, seeds, positions):
        accepted = accept(drafts, sampled, seeds, positions)
        if wrong == "everything is accepted":
            return (drafts != NO_DRAFT).to(torch.int64).sum(dim=1)
        return torch.minimum(accepted + 1, (drafts != NO_DRAFT).to(torch.int64).sum(dim=1))

    engine = make_engine(DEMO / "deepseek", speculative(None, "mtp", 3), async_scheduling=False)
    if wrong == "nobody's noise":
        # Drafts and samples of a position have their noise from it; one off, and the tokens are others.
        shifted = lambda seeds, positions, size: gumbel_noise(seeds, positions + 1, size)  # noqa: E731
        monkeypatch.setattr(omni_engine.engine.graphs.decode_step, "gumbel_noise", shifted)
    else:
        drafting = engine._core.runner.drafting
        object.__setattr__(drafting, "acceptance", broken)
    assert run(engine, params_of("gumbel")) != plain("demo", "gumbel")


# --- endings ---------------------------------------------------------------------------------------------------------


def texts(engine, params, prompts):
    return [
        (one.text, one.token_ids, one.finish_reason, one.stop_reason)
        for output in engine.generate(prompts, params)
        for one in output.outputs
    ]


@pytest.fixture(scope="module")
def demos():
    options = {"dtype": "float32", "enforce_eager": True, "generation_config": "vllm"}
    return Engine(str(DEMO / "deepseek"), **options), Engine(
        str(DEMO / "deepseek"), speculative_config=speculative(None, "mtp", 4), **options
    )


@pytest.mark.parametrize("fields", [
    {"stop": ["the", "LORD"], "max_tokens": 60},
    {"stop": [" of"], "max_tokens": 60, "include_stop_str_in_output": True},
    {"bad_words": ["the", "God", "and the"], "max_tokens": 50},
    {"stop_token_ids": [13, 300, 301, 302, 303, 304, 305, 306, 307, 308, 309, 310], "max_tokens": 60},
    {"stop_token_ids": list(range(250, 600)), "min_tokens": 17, "max_tokens": 60},
    {"n": 3, "max_tokens": 40},
    {"max_tokens": 1},
    {"max_tokens": 2},
    pytest.param({"max_tokens": 1024, "ignore_eos": True}, marks=pytest.mark.full),
], ids=lambda fields: "-".join(fields))  # fmt: skip
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_request_ends_where_it_would(demos, fields, temperature):
    """Stops inside accepted drafts, max_tokens, and the end of the context, which drafts would run over."""
    if fields.get("n") and not temperature:
        pytest.skip("n greedy sequences are refused")
    prompts = ["In the beginning God created", "And the LORD said unto Moses, Speak", "The king of Israel"]
    params = SamplingParams(temperature=temperature, seed=3, **fields)
    plain, speculating = (texts(engine, params, prompts) for engine in demos)
    assert speculating == plain
    if fields["max_tokens"] == 1024:
        lengths = [len(tokens) + len(output.prompt_token_ids) for (_, tokens, _, _), output in zip(
            speculating, demos[1].generate(prompts, SamplingParams(max_tokens=1)), strict=True)]  # fmt: skip
        assert lengths == [1024] * 3, "the end of the context was not reached"


def test_eos_inside_accepted_drafts_ends_the_request(demos):
    """A made-up EOS that the model draws often: what was accepted behind it appears nowhere."""
    plain, speculating = demos
    prompt = {"prompt_token_ids": [5, 6, 7, 8]}
    free = plain.generate(prompt, SamplingParams(temperature=0, max_tokens=60))[0].outputs[0].token_ids
    for ending in list(dict.fromkeys(free))[3:15:2]:
        params = SamplingParams(temperature=0, max_tokens=60, stop_token_ids=[ending])
        expected, got = (engine.generate(prompt, params)[0].outputs[0] for engine in demos)
        assert got.token_ids == expected.token_ids == free[: free.index(ending) + 1]
        assert (got.finish_reason, got.stop_reason) == ("stop", ending)
    speculating.check_integrity()


def test_logprobs_are_the_models_own(demos):
    params = SamplingParams(temperature=0.7, seed=1, max_tokens=50, logprobs=3, prompt_logprobs=1)
    plain, speculating = (engine.generate("And it came to pass", params)[0] for engine in demos)
    assert speculating.outputs[0].token_ids == plain.outputs[0].token_ids
    assert speculating.outputs[0].cumulative_logprob == pytest.approx(plain.outputs[0].cumulative_logprob, abs=1e-3)
    for mine, theirs in zip(speculating.outputs[0].logprobs, plain.outputs[0].logprobs, strict=True):
        assert list(mine) == list(theirs)
        for token in mine:
            assert mine[token].logprob == pytest.approx(theirs[token].logprob, abs=1e-4)


# --- what prefix blocks depend on ------------------------------------------------------------------------------------


def blocks_of(engine, prompt):
    """The cache of every layer over the full blocks of `prompt`, found as a new request with it would."""
    manager = engine._core.scheduler.kv
    found = manager.find_prefix(manager.new_blocks(None), prompt)
    caches = engine._core.runner.caches
    return found, [part[found] for cache in caches for part in cache]


@pytest.mark.parametrize("lookahead", [1, 0], ids=["as it is", "control"])
def test_a_prefix_block_depends_on_its_own_prefix_only(lookahead):
    """Two prompts that part right behind a block: the second finds nothing of the first in the prediction layer."""
    block = list(range(20, 52))  # two blocks of 16 tokens
    first, second = [*block, 60, *range(70, 90)], [*block, 61, *range(90, 110)]
    options = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 2, "max_model_len": 128}
    config = speculative(None, "mtp", 2)
    fresh, warm = (Engine(str(DEMO / "deepseek"), speculative_config=config, **options) for _ in range(2))
    if not lookahead:  # the rule switched off
        manager = warm._core.scheduler.kv
        manager.lookahead = manager.hasher.lookahead = 0
    params = SamplingParams(temperature=0, max_tokens=8)
    warm.generate({"prompt_token_ids": first}, params)
    for engine in (warm, fresh):
        engine.generate({"prompt_token_ids": second}, params)
    ids, mine = blocks_of(warm, second)
    _, theirs = blocks_of(fresh, second)
    assert len(ids) == 3
    equal = all(torch.allclose(one, other, atol=1e-5) for one, other in zip(mine, theirs, strict=True))
    assert equal is bool(lookahead)


def test_rejected_drafts_are_in_no_prefix_block():
    """Whatever was drafted, the published blocks hold what prefilling their tokens gives."""
    options = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 4, "max_model_len": 256}
    config = speculative(None, "mtp", 4)
    engine, fresh = (Engine(str(DEMO / "deepseek"), speculative_config=config, **options) for _ in range(2))
    prompts = ["In the beginning", "And Moses said unto", "The son of", "Blessed is the man"]
    outputs = engine.generate(prompts, SamplingParams(temperature=1.0, seed=4, max_tokens=120, ignore_eos=True))
    assert engine._core.stats().drafts.num_draft_tokens > 2 * engine._core.stats().drafts.num_accepted_tokens
    for output in outputs:
        tokens = output.prompt_token_ids + output.outputs[0].token_ids
        fresh.generate({"prompt_token_ids": tokens}, SamplingParams(max_tokens=1))
        ids, mine = blocks_of(engine, tokens)
        _, theirs = blocks_of(fresh, tokens)
        assert len(ids) >= 7
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-3)


# --- verification by itself ------------------------------------------------------------------------------------------


def window(drafts, sampled, positions=(5, 9), block_size=4, blocks=4):
    table = RowTable(2, 8, torch.device("cpu"), num_drafts=len(drafts[0]))
    state = table.state
    state.position[:2] = torch.tensor(positions)
    state.block_table[:2, :blocks] = torch.arange(1, 1 + 2 * blocks).view(2, blocks)
    state.drafts[:2] = torch.tensor(drafts)
    rows = torch.tensor([0, 1, 2])  # and the null row
    num_drafts = len(drafts[0])
    context = omni_engine.engine.row_state.decode_context(state, rows, state.position[rows], 1 + num_drafts, block_size)
    own = verification.draft_window(state, rows, context, num_drafts, block_size)
    return state, own, verification.verify(state, rows, own, torch.tensor([*sampled, [1] * (1 + num_drafts)]))


def test_drafts_are_accepted_up_to_the_first_wrong_one():
    state, _, (output, accepted) = window([[3, 4, 5], [3, 9, 5]], [[3, 4, 5, 6], [3, 4, 5, 6]])
    assert accepted.tolist()[:2] == [3, 1]
    assert output.tolist()[:2] == [[3, 4, 5, 6, 3], [3, 4, -1, -1, 3]]
    assert state.last_token.tolist()[:2] == [6, 4]
    assert state.position.tolist() == [9, 11, 0]


def test_missing_drafts_are_not_counted_and_never_accepted():
    _, _, (output, accepted) = window([[3, -1, -1], [-1, -1, -1]], [[3, 4, 5, 6], [3, 4, 5, 6]])
    assert accepted.tolist()[:2] == [1, 0]
    assert output.tolist()[:2] == [[3, 4, -1, -1, 1], [3, -1, -1, -1, 0]]


def test_a_draft_without_a_block_is_not_accepted():
    """Row 0 stands at the last place but one of its last block, row 1 at the very end of the table."""
    _, own, (output, _) = window([[3, 4, 5], [3, 4, 5]], [[3, 4, 5, 6], [3, 4, 5, 6]], positions=(14, 31), blocks=4)
    assert own.tolist()[:2] == [[3, -1, -1], [-1, -1, -1]]
    assert output.tolist()[:2] == [[3, 4, -1, -1, 1], [3, -1, -1, -1, 0]]


def test_what_is_drawn_behind_accepted_drafts_follows_the_softmax():
    """χ² over 20,000 rows: tokens that come out, at the first place and behind an accepted draft, are distributed as
    the softmax of their logits; drafts come from other logits with the same noise."""
    generator = torch.Generator().manual_seed(0)
    count, vocab = 20_000, 12
    logits = torch.randn(2, vocab, generator=generator)
    guess = logits[0] + 0.7 * torch.randn(vocab, generator=generator)
    seeds = torch.arange(count)
    noise = [gumbel_noise(seeds, torch.full((count,), 100 + place), vocab) for place in range(2)]
    drafts = (guess + noise[0]).argmax(dim=-1, keepdim=True)
    sampled = torch.stack([(logits[place] + noise[place]).argmax(dim=-1) for place in range(2)], dim=1)
    accepted = verification.accept_equal(drafts, sampled, seeds, seeds)
    assert 0.4 < accepted.float().mean() < 0.95
    kept = accepted == 1
    for tokens, place in ((sampled[:, 0], 0), (sampled[kept, 1], 1)):
        assert chi_squared(tokens, logits[place]) < 31.3  # 11 degrees of freedom, p = 0.001
    # The control: accepting by the draft biases what comes out.
    assert chi_squared(sampled[kept, 0], logits[0]) > 31.3


def chi_squared(tokens, logits):
    counts = torch.bincount(tokens, minlength=len(logits)).double()
    expected = logits.double().softmax(-1) * len(tokens)
    return float(((counts - expected) ** 2 / expected).sum())


def test_synthetic_acceptance_has_the_rates_asked_for():
    rates = (0.8, 0.5, 0.3)
    acceptance = verification.SyntheticAcceptance(rates)
    drafts = torch.zeros(20_000, 3, dtype=torch.int64)
    seeds = torch.arange(20_000)
    accepted = acceptance(drafts, torch.ones(20_000, 4, dtype=torch.int64), seeds, seeds * 7)
    for place, rate in enumerate(rates):
        assert (accepted > place).float().mean().item() == pytest.approx(rate, abs=0.015)
    with pytest.raises(ValueError, match="at most the one before"):
        verification.SyntheticAcceptance((0.3, 0.5))
