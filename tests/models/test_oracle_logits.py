"""Logits of every architecture against transformers: ragged chunks, then decoding, over shuffled cache blocks."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from omni_engine.kvcache.tensors import allocate_kv_tensors
from omni_engine.models.config import ModelConfig, MoEConfig
from omni_engine.models.config_parser import parse_config
from omni_engine.models.forward_context import ForwardContext
from omni_engine.models.kv_spec import kv_cache_spec
from omni_engine.models.layers.attention import Attention
from omni_engine.models.layers.decoder import CausalDecoder
from omni_engine.models.layers.dsa import Indexer, SparseMLAAttention
from omni_engine.models.layers.mla import MLAAttention
from omni_engine.models.layers.moe import MoE
from omni_engine.models.parallel import ParallelLayout
from omni_engine.models.registry import resolve
from omni_engine.models.weights import load_weights

BOUND = 1e-4  # of the standard deviation of the logits
MARGIN = 1e-5  # a router whose k-th choice is closer than this may choose differently
BLOCK_SIZE = 4
CHUNK = 13
PROMPTS = ((33, 40), (1, 9), (26, 29), (14, 30), (52, 55))  # (tokens prefilled in chunks, tokens in all) per request


# What a fault in each part looks like: the loaded model with that part taken away.


def without_rope(model: CausalDecoder) -> None:
    model.rotary.cos.fill_(1.0)
    model.rotary.sin.zero_()


def without_rope_scaling(model: CausalDecoder) -> None:
    rope = model.config.rope
    table = model.rotary.cos
    plain = rope.theta ** -(torch.arange(0, rope.dim, 2) / rope.dim)
    angles = torch.arange(table.shape[0]).unsqueeze(1) * plain
    table.copy_(angles.cos())
    model.rotary.sin.copy_(angles.sin())


def without_qkv_bias(model: CausalDecoder) -> None:
    for attention in parts(model, Attention):
        assert attention.qkv_proj.bias is not None
        attention.qkv_proj.bias.zero_()


def without_mlp_bias(model: CausalDecoder) -> None:
    for layer in model.layers:
        layer.get_submodule("mlp.down_proj").bias.zero_()  # type: ignore[union-attr]


def without_down_bias(model: CausalDecoder) -> None:
    for attention in parts(model, MLAAttention):
        assert attention.down_proj.bias is not None
        attention.down_proj.bias.zero_()


def without_shared_expert(model: CausalDecoder) -> None:
    for moe in parts(model, MoE):
        moe.shared_experts = None


def without_correction_bias(model: CausalDecoder) -> None:
    for moe in parts(model, MoE):
        assert moe.correction_bias is not None
        moe.correction_bias.zero_()


def without_groups(model: CausalDecoder) -> None:
    for moe in parts(model, MoE):
        moe.moe = MoEConfig(**{**vars(moe.moe), "num_groups": 1})


def without_qk_norm(model: CausalDecoder) -> None:
    for attention in parts(model, Attention):
        attention.q_norm = attention.k_norm = None


def without_window(model: CausalDecoder) -> None:
    for attention in parts(model, Attention):
        attention.window = None


def without_softmax_mscale(model: CausalDecoder) -> None:
    for attention in parts(model, MLAAttention):
        attention.scale = (attention.mla.qk_nope_head_dim + attention.mla.qk_rope_head_dim) ** -0.5


def with_halved_pairs(model: CausalDecoder) -> None:
    for attention in parts(model, MLAAttention):
        attention.interleaved = False


def without_selection(model: CausalDecoder) -> None:
    for attention in parts(model, SparseMLAAttention):
        attention.topk = 10_000


def with_the_first_tokens_selected(model: CausalDecoder) -> None:
    for indexer in parts(model, Indexer):
        indexer.weights_proj.zero_()  # all scores tie


def with_other_index_pairs(model: CausalDecoder) -> None:
    for indexer in parts(model, Indexer):
        indexer.indexer = replace(indexer.indexer, interleaved=not indexer.indexer.interleaved)


def without_index_key_bias(model: CausalDecoder) -> None:
    for indexer in parts(model, Indexer):
        indexer.key_norm.bias.zero_()


def with_equal_index_heads(model: CausalDecoder) -> None:
    for indexer in parts(model, Indexer):
        indexer.weights_proj.copy_(indexer.weights_proj.mean(0, keepdim=True).expand_as(indexer.weights_proj))


def with_the_first_selection_for_all(model: CausalDecoder) -> None:
    first, second = parts(model, SparseMLAAttention)
    kept: list[Any] = []

    def select(*arguments: Any) -> Any:
        kept.append(SparseMLAAttention.select(first, *arguments))
        return kept[-1]

    first.select = select
    second.select = lambda *_: kept[-1]


def parts(model: CausalDecoder, kind: type[Any]) -> Iterator[Any]:
    found = [module for module in model.modules() if isinstance(module, kind)]
    assert found
    return iter(found)


Fault = Callable[[CausalDecoder], None]


@dataclass(frozen=True)
class Case:
    """One shape of one architecture, and the faults that the comparison must notice in it."""

    name: str
    architecture: str
    overrides: dict[str, Any] = field(default_factory=dict)
    faults: tuple[Fault, ...] = ()


def rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


LLAMA3 = rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=64)
YARN_EXPLICIT = rope(
    "yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=8, attention_factor=1.2, truncate=False
)
DEEPSEEK_YARN = rope(
    "yarn",
    factor=8.0,
    original_max_position_embeddings=32,
    beta_fast=32,
    beta_slow=1,
    mscale=1.0,
    mscale_all_dim=0.7,
)
ALL_BIASES = {"attention_bias": True, "mlp_bias": True}
SLIDING = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}

INDEXER_FAULTS = (
    without_selection,
    with_the_first_tokens_selected,
    with_other_index_pairs,
    without_index_key_bias,
    with_equal_index_heads,
)

CASES = (
    Case("llama", "LlamaForCausalLM", {}, (without_rope,)),
    Case("llama-biases", "LlamaForCausalLM", ALL_BIASES, (without_qkv_bias, without_mlp_bias)),
    Case("llama-odd-head-tied", "LlamaForCausalLM", {"head_dim": 24, "tie_word_embeddings": True}),
    Case(
        "llama-gqa-1-to-7",
        "LlamaForCausalLM",
        {"hidden_size": 70, "num_attention_heads": 7, "num_key_value_heads": 1, "head_dim": 12},
    ),
    Case("llama-llama3", "LlamaForCausalLM", LLAMA3, (without_rope_scaling,)),
    Case("llama-linear", "LlamaForCausalLM", rope("linear", factor=3.0), (without_rope_scaling,)),
    Case("llama-dynamic-within", "LlamaForCausalLM", rope("dynamic", factor=3.0)),
    Case("llama-yarn", "LlamaForCausalLM", YARN, (without_rope_scaling,)),
    Case("llama-yarn-explicit", "LlamaForCausalLM", YARN_EXPLICIT),
    Case("mistral-window", "MistralForCausalLM", {}, (without_rope, without_window)),
    Case("mistral-no-window", "MistralForCausalLM", {"sliding_window": None}),
    Case("qwen2", "Qwen2ForCausalLM", {}, (without_rope, without_qkv_bias)),
    Case("qwen2-window-tied", "Qwen2ForCausalLM", {**SLIDING, "tie_word_embeddings": True}, (without_window,)),
    Case("qwen3", "Qwen3ForCausalLM", {}, (without_rope, without_qk_norm)),
    Case("qwen3-biases", "Qwen3ForCausalLM", {"attention_bias": True}, (without_qkv_bias,)),
    Case("qwen3-moe", "Qwen3MoeForCausalLM", {}, (without_rope, without_qk_norm)),
    Case("qwen3-moe-mixed", "Qwen3MoeForCausalLM", {"mlp_only_layers": [0], "norm_topk_prob": False}),
    Case("deepseek-v2", "DeepseekV2ForCausalLM", {}, (without_rope, without_shared_expert, without_groups)),
    Case("deepseek-v2-lite", "DeepseekV2ForCausalLM", {"q_lora_rank": None, "topk_method": "greedy"}),
    Case("deepseek-v2-yarn", "DeepseekV2ForCausalLM", DEEPSEEK_YARN, (without_softmax_mscale,)),
    Case(
        "deepseek-v3",
        "DeepseekV3ForCausalLM",
        {},
        (without_rope, without_shared_expert, without_correction_bias, without_groups, with_halved_pairs),
    ),
    Case(
        "deepseek-v3-all-routed", "DeepseekV3ForCausalLM", {"first_k_dense_replace": 0, "n_group": 1, "topk_group": 1}
    ),
    Case("deepseek-v3-two-dense", "DeepseekV3ForCausalLM", {"first_k_dense_replace": 2, "q_lora_rank": None}),
    Case("deepseek-v3-biases", "DeepseekV3ForCausalLM", {"attention_bias": True}, (without_down_bias,)),
    Case("deepseek-v3-yarn", "DeepseekV3ForCausalLM", DEEPSEEK_YARN, (without_softmax_mscale, without_rope_scaling)),
    Case("deepseek-v32", "DeepseekV32ForCausalLM", {}, (without_rope, *INDEXER_FAULTS)),
    Case("deepseek-v32-yarn", "DeepseekV32ForCausalLM", DEEPSEEK_YARN, (without_softmax_mscale, without_rope_scaling)),
    Case("deepseek-v32-select-all", "DeepseekV32ForCausalLM", {"index_topk": 64}),
    Case("deepseek-v32-biases", "DeepseekV32ForCausalLM", {"attention_bias": True}, (without_down_bias,)),
    Case("glm-moe-dsa", "GlmMoeDsaForCausalLM", {}, (without_rope, *INDEXER_FAULTS)),
    Case(
        "glm-moe-dsa-sharing",
        "GlmMoeDsaForCausalLM",
        {"num_hidden_layers": 4, "indexer_types": ["full", "shared", "full", "shared"]},
        (*INDEXER_FAULTS, with_the_first_selection_for_all),
    ),
    Case("deepseek-v3-halves", "DeepseekV3ForCausalLM", {"rope_interleave": False, "tie_word_embeddings": True}),
)
FAULTS = [pytest.param(case, fault, id=f"{case.name}-{fault.__name__}") for case in CASES for fault in case.faults]


class PagedRun:
    """Requests computed step by step through one paged cache whose blocks are dealt out in random order."""

    def __init__(self, model: CausalDecoder, prompts: list[Tensor], seed: int = 0) -> None:
        self.model, self.prompts = model, prompts
        config = model.config
        needed = [-(-len(prompt) // BLOCK_SIZE) for prompt in prompts]
        shuffled = torch.randperm(sum(needed), generator=torch.Generator().manual_seed(seed)) + 1  # 0: the null block
        self.tables = torch.zeros(len(prompts), max(needed), dtype=torch.int32)
        for row, blocks in enumerate(shuffled.split(needed)):
            self.tables[row, : len(blocks)] = blocks
        dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
        spec = kv_cache_spec(config, ParallelLayout(), dtype)
        self.caches = allocate_kv_tensors(spec, sum(needed) + 1, BLOCK_SIZE, torch.device("cpu"))
        for cache in self.caches:
            for part in cache:
                part.fill_(30.0)  # whoever reads a slot that was not written is seen
        self.computed = [0] * len(prompts)
        self.logits: list[list[Tensor]] = [[] for _ in prompts]

    def step(self, counts: dict[int, int], as_decode: bool = True) -> None:
        """Computes the next `counts[request]` tokens; single tokens decode, first in the batch, if `as_decode`."""
        decoding = [request for request, count in counts.items() if count == 1 and as_decode]
        chunks = [request for request in counts if request not in decoding]
        order = decoding + chunks
        starts = {request: self.computed[request] for request in order}
        positions = torch.cat([torch.arange(starts[r], starts[r] + counts[r]) for r in order])
        rows = torch.cat([torch.full((counts[r],), r) for r in order])
        context = ForwardContext(
            positions=positions,
            slots=self.tables[rows, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE,
            block_table=self.tables[order],
            context_lens=torch.tensor([starts[r] + counts[r] for r in order], dtype=torch.int32),
            num_decode=len(decoding),
            prefill_query_lens=tuple(counts[r] for r in chunks),
            prefill_context_lens=tuple(starts[r] + counts[r] for r in chunks),
        )
        input_ids = torch.cat([self.prompts[r][starts[r] : starts[r] + counts[r]] for r in order])
        hidden = self.model(input_ids, context, self.caches)
        for request, logits in zip(order, self.model.logits(hidden).split([counts[r] for r in order]), strict=True):
            self.logits[request].append(logits)
            self.computed[request] += counts[request]

    def run(self, prefilled: list[int], as_decode: bool = True) -> list[Tensor]:
        """Request i joins at step i, prefills in chunks, then advances by one token: float32 [tokens, vocab] each."""
        step = 0
        while any(done < len(prompt) for done, prompt in zip(self.computed, self.prompts, strict=True)):
            counts = {}
            for request, done in enumerate(self.computed[: step + 1]):
                if done < prefilled[request]:
                    counts[request] = min(CHUNK, prefilled[request] - done)
                elif done < len(self.prompts[request]):
                    counts[request] = 1
            self.step(counts, as_decode)
            step += 1
        return [torch.cat(logits) for logits in self.logits]


def random_prompts(vocab_size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(vocab_size, (total,), generator=generator) for _, total in PROMPTS]


def load_ours(directory: Path, dtype: torch.dtype = torch.float32) -> CausalDecoder:
    config = parse_config(json.loads((directory / "config.json").read_text()))
    decoder = resolve(config.architecture).load_class()
    model = decoder(config, ParallelLayout(), dtype=dtype, device=torch.device("cpu"))
    load_weights(model, directory, progress=False)
    return model


def router_margins(logits: Tensor, moe: MoEConfig, bias: Tensor | None) -> Tensor:
    """How far each token is from another choice of experts or groups: logits [tokens, experts] -> [tokens]."""
    choice = logits.softmax(-1) if moe.scoring == "softmax" else logits.sigmoid()
    if bias is not None:
        choice = choice + bias
    margin = torch.full((len(choice),), float("inf"))
    if moe.num_groups > 1:
        grouped = choice.unflatten(1, (moe.num_groups, -1))
        groups = grouped.topk(2 if moe.group_score == "top2" else 1).values.sum(-1)
        ranked = groups.sort(descending=True)
        if moe.groups_per_token < moe.num_groups:
            margin = ranked.values[:, moe.groups_per_token - 1] - ranked.values[:, moe.groups_per_token]
        kept = torch.zeros_like(groups).scatter(1, ranked.indices[:, : moe.groups_per_token], 1.0)
        choice = grouped.masked_fill(kept.unsqueeze(-1) == 0, float("-inf")).flatten(1)
    ranked = choice.sort(descending=True).values
    return torch.minimum(margin, ranked[:, moe.experts_per_token - 1] - ranked[:, moe.experts_per_token])


@dataclass(frozen=True)
class Expected:
    """transformers' logits per request, and from which position on a near tie of a router excuses a difference."""

    logits: list[Tensor]
    comparable: list[int]
    near_ties: int


@pytest.fixture(scope="module")
def expected(reference_model: Callable[[Path], Any]) -> Callable[[Path, ModelConfig], Expected]:
    computed: dict[Path, Expected] = {}

    def compute(directory: Path, config: ModelConfig) -> Expected:
        if directory not in computed:
            computed[directory] = reference_logits(reference_model(directory), config)
        return computed[directory]

    return compute


def reference_logits(model: Any, config: ModelConfig) -> Expected:
    margins: list[Tensor] = []

    def record_margin(router: Any, _inputs: Any, output: Any) -> None:
        assert config.moe is not None
        margins.append(router_margins(output[0], config.moe, getattr(router, "e_score_correction_bias", None)))

    routers = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    hooks = [router.register_forward_hook(record_margin) for router in routers]
    result = Expected([], [], 0)
    near_ties = 0
    for prompt in random_prompts(config.vocab_size):
        margins.clear()
        with torch.inference_mode():
            result.logits.append(model(prompt.unsqueeze(0)).logits[0])
        assert len(margins) == len(routers)
        near = torch.stack(margins).amin(0) < MARGIN if margins else torch.zeros(len(prompt), dtype=torch.bool)
        near_ties += int(near.sum())
        result.comparable.append(int(near.int().argmax()) if near.any() else len(prompt))
    for hook in hooks:
        hook.remove()
    return Expected(result.logits, result.comparable, near_ties)


def worst_difference(ours: list[Tensor], theirs: Expected) -> float:
    """Largest difference of any logit, in standard deviations of transformers' logits."""
    pairs = zip(ours, theirs.logits, theirs.comparable, strict=True)
    worst = max(float((mine[:stop] - its[:stop]).abs().max()) for mine, its, stop in pairs if stop)
    return worst / float(torch.cat(theirs.logits).std())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@torch.inference_mode()
def test_logits_equal_transformers_over_ragged_chunks_and_decoding(
    case: Case,
    make_checkpoint: Callable[..., Path],
    expected: Callable[[Path, ModelConfig], Expected],
    record_property: Callable[[str, object], None],
) -> None:
    directory = make_checkpoint(case.architecture, **case.overrides)
    model = load_ours(directory)
    theirs = expected(directory, model.config)
    ours = PagedRun(model, random_prompts(model.config.vocab_size)).run([prefilled for prefilled, _ in PROMPTS])
    record_property("router_near_ties", theirs.near_ties)
    if theirs.near_ties:
        warnings.warn(f"{case.name}: {theirs.near_ties} tokens at a near tie of the router, not compared", stacklevel=1)
    assert sum(theirs.comparable) > 0.9 * sum(total for _, total in PROMPTS)
    assert worst_difference(ours, theirs) <= BOUND


@pytest.mark.parametrize(("case", "fault"), FAULTS)
@torch.inference_mode()
def test_comparison_fails_when_a_part_is_missing(
    case: Case,
    fault: Fault,
    make_checkpoint: Callable[..., Path],
    expected: Callable[[Path, ModelConfig], Expected],
) -> None:
    directory = make_checkpoint(case.architecture, **case.overrides)
    model = load_ours(directory)
    fault(model)
    ours = PagedRun(model, random_prompts(model.config.vocab_size)).run([prefilled for prefilled, _ in PROMPTS])
    assert worst_difference(ours, expected(directory, model.config)) > 100 * BOUND


@torch.inference_mode()
def test_absorbed_decoding_equals_expanded_prefill(make_checkpoint: Callable[..., Path]) -> None:
    model = load_ours(make_checkpoint("DeepseekV3ForCausalLM", **DEEPSEEK_YARN))
    prompts = random_prompts(model.config.vocab_size)
    prefilled = [1] * len(prompts)
    absorbed = PagedRun(model, prompts).run(prefilled)
    expanded = PagedRun(model, prompts).run(prefilled, as_decode=False)
    for one, other in zip(absorbed, expanded, strict=True):
        assert float((one - other).abs().max()) <= BOUND * float(other.std())


@torch.inference_mode()
def test_dynamic_rope_equals_transformers_generating_across_the_original_length(
    make_checkpoint: Callable[..., Path], reference_model: Callable[[Path], Any]
) -> None:
    """Token by token with its cache, transformers also rotates each key with the base of its own position."""
    directory = make_checkpoint("LlamaForCausalLM", max_position_embeddings=24, **rope("dynamic", factor=3.0))
    model, theirs = load_ours(directory), reference_model(directory)
    prompt = random_prompts(model.config.vocab_size)[0]
    assert len(prompt) > 24 > PROMPTS[1][1]
    output = theirs(prompt[None, :20], use_cache=True)
    logits = [output.logits[0]]
    for token in prompt[20:]:
        output = theirs(token.view(1, 1), past_key_values=output.past_key_values, use_cache=True)
        logits.append(output.logits[0])
    reference = torch.cat(logits)
    (ours,) = PagedRun(model, [prompt]).run([20])
    assert float((ours - reference).abs().max()) <= BOUND * float(reference.std())
    without_rope_scaling(model)
    (broken,) = PagedRun(model, [prompt]).run([20])
    assert float((broken - reference).abs().max()) > 100 * BOUND * float(reference.std())


@torch.inference_mode()
def test_dynamic_rope_does_not_depend_on_chunking(make_checkpoint: Callable[..., Path]) -> None:
    model = load_ours(make_checkpoint("LlamaForCausalLM", max_position_embeddings=24, **rope("dynamic", factor=3.0)))
    prompt = random_prompts(model.config.vocab_size)[0]
    (chunked,) = PagedRun(model, [prompt]).run([len(prompt)])
    (generated,) = PagedRun(model, [prompt]).run([1])
    assert float((chunked - generated).abs().max()) <= BOUND * float(generated.std())


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "DeepseekV2ForCausalLM"])
@torch.inference_mode()
def test_half_precision_stays_near_float32(architecture: str, make_checkpoint: Callable[..., Path]) -> None:
    # every expert chosen: rounding must not be able to change the choice
    everything = {"topk_method": "greedy", "num_experts_per_tok": 12} if architecture.startswith("Deepseek") else {}
    directory = make_checkpoint(architecture, **everything)
    prefilled = [count for count, _ in PROMPTS]
    results = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = load_ours(directory, dtype)
        results[dtype] = torch.cat(PagedRun(model, random_prompts(model.config.vocab_size)).run(prefilled))
        assert results[dtype].dtype == torch.float32
    exact = results[torch.float32]
    assert float((results[torch.bfloat16] - exact).abs().mean()) < 0.05 * float(exact.std())
    assert float((results[torch.float16] - exact).abs().mean()) < 0.008 * float(exact.std())


def test_a_tie_of_the_router_has_no_margin() -> None:
    moe = MoEConfig(4, 2, 8, "softmax", norm_topk_prob=False)
    margins = router_margins(torch.tensor([[3.0, 1.0, 1.0, 0.0], [3.0, 2.0, 1.0, 0.0]]), moe, None)
    assert margins[0] < MARGIN < margins[1]


def test_a_tie_between_groups_has_no_margin() -> None:
    moe = MoEConfig(4, 1, 8, "sigmoid", norm_topk_prob=False, num_groups=2, groups_per_token=1, group_score="top2")
    margins = router_margins(torch.tensor([[2.0, 1.0, 1.0, 2.0], [2.0, 1.0, 1.0, 1.0]]), moe, None)
    assert margins[0] < MARGIN < margins[1]
