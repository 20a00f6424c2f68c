"""The floor of a step: the least time that its bytes and its arithmetic take on a machine of measured rates.

    floor = max(all bytes / bandwidth, all FLOP / peak) + communication that cannot hide

Counted is what no implementation can leave out: every weight that the tokens touch, once; the stored KV that they
attend to, once, and their own KV, written; the multiplications of projections, attention and head. Of a step that
drafts, each pass of the drafter counts like that, since it begins with the token of the one before. Not counted is what
a fused implementation keeps in registers and caches (activations, logits) and what is small beside it (norms, rotary
embedding, softmax, sampling). A model that fits into the processor's own caches may therefore beat the floor of memory.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..kvcache.spec import DTYPE_BYTES
from ..models.config import IndexerConfig, MLAConfig, ModelConfig, MoEConfig
from ..models.kv_spec import kv_cache_spec
from ..models.parallel import ParallelLayout

ROUTER_BYTES = 4  # routers and their bias are float32 whatever the model's dtype


@dataclass(frozen=True)
class MachineRates:
    """What a device reached when it was measured, with `num_threads` threads (on an accelerator 0)."""

    bytes_per_second: float  # reading from memory
    flops_per_second: float  # of a large matrix product in `dtype`; a multiplication with its addition is two
    dtype: str
    device: str
    num_threads: int


@dataclass(frozen=True)
class StepCost:
    """What a step must move and compute. Bytes of experts are an expectation, hence not whole numbers."""

    weight_bytes: float
    kv_bytes: float  # read and written
    other_bytes: float  # rows of an embedding table that is not the head as well
    flops: float
    communication_seconds: float = 0.0  # that no computation can hide

    @property
    def bytes(self) -> float:
        return self.weight_bytes + self.kv_bytes + self.other_bytes

    def __add__(self, other: StepCost) -> StepCost:
        """Of both, one after the other."""
        return StepCost(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


@dataclass(frozen=True)
class Floor:
    """The least time of a step, and which of its parts it is: `bound` is memory or compute."""

    seconds: float
    bound: str
    memory_seconds: float
    compute_seconds: float
    communication_seconds: float

    def share(self, measured_seconds: float) -> float:
        """How much of the possible speed a step of `measured_seconds` has: 1 at the floor, 0.5 at twice its time."""
        return self.seconds / measured_seconds


def floor_seconds(cost: StepCost, rates: MachineRates) -> Floor:
    """The floor of a step on a machine."""
    memory = cost.bytes / rates.bytes_per_second
    compute = cost.flops / rates.flops_per_second
    return Floor(
        seconds=max(memory, compute) + cost.communication_seconds,
        bound="memory" if memory >= compute else "compute",
        memory_seconds=memory,
        compute_seconds=compute,
        communication_seconds=cost.communication_seconds,
    )


def decode_cost(
    config: ModelConfig,
    num_requests: int,
    context_len: float,
    tokens_per_request: int = 1,
    *,
    dtype: str | None = None,
    kv_dtype: str | None = None,
    communication_seconds: float = 0.0,
) -> StepCost:
    """One decode step: each request has `context_len` tokens stored (a mean over steps will do) and computes
    `tokens_per_request` more (1, and one for each draft), all with logits. Requests share no blocks. dtype: of the
    weights, by default the model's own; kv_dtype: by default that of the weights."""
    num_logits = num_requests * tokens_per_request
    return _cost(
        config, num_requests, context_len, tokens_per_request, num_logits, dtype, kv_dtype, communication_seconds
    )


def prediction_cost(
    config: ModelConfig,
    num_requests: int,
    context_len: float,
    num_drafts: int,
    num_accepted: float = 0.0,
    *,
    dtype: str | None = None,
    kv_dtype: str | None = None,
) -> StepCost:
    """What the layer for multi-token prediction takes to draft `num_drafts` tokens behind a decode step with as many:
    it takes in all the tokens of that step, and after the `num_accepted` (a mean will do) each draft but the last. A
    pass of it reads the layer and, for one token per request, the model's head. Lengths and types as in `decode_cost`.
    """
    first = _prediction_pass(config, num_requests, context_len, 1 + num_drafts, dtype, kv_dtype)
    newest = context_len + num_accepted + 1  # its position
    later = (
        _prediction_pass(config, num_requests, newest + place, 1, dtype, kv_dtype) for place in range(num_drafts - 1)
    )
    return sum(later, first)


def draft_model_cost(
    draft: ModelConfig,
    num_requests: int,
    context_len: float,
    num_drafts: int,
    num_accepted: float = 0.0,
    *,
    dtype: str | None = None,
    kv_dtype: str | None = None,
) -> StepCost:
    """What a draft model takes to draft `num_drafts` tokens behind a decode step: a pass over two tokens, the newest
    one and the one before, and one over each draft but the last. As in `prediction_cost` otherwise."""

    def cost(stored: float, num_tokens: int) -> StepCost:
        return _cost(draft, num_requests, stored, num_tokens, num_requests, dtype, kv_dtype, 0.0)

    newest = context_len + num_accepted + 1
    return sum((cost(newest + place, 1) for place in range(1, num_drafts)), cost(newest - 1, 2))


def prefill_cost(
    config: ModelConfig,
    num_tokens: int,
    num_requests: int = 1,
    num_cached: int = 0,
    *,
    dtype: str | None = None,
    kv_dtype: str | None = None,
    communication_seconds: float = 0.0,
) -> StepCost:
    """One step that computes `num_tokens` prompt tokens of each request behind `num_cached` stored ones, and the logits
    of the last of each. The types as in `decode_cost`."""
    return _cost(config, num_requests, num_cached, num_tokens, num_requests, dtype, kv_dtype, communication_seconds)


def expected_experts(num_experts: int, experts_per_token: int, num_tokens: int) -> float:
    """Expected number of distinct experts that `num_tokens` tokens hit if each takes its own at random, evenly."""
    return num_experts * (1 - (1 - experts_per_token / num_experts) ** num_tokens)


def _cost(
    config: ModelConfig,
    num_requests: int,
    context_len: float,
    tokens_per_request: int,
    num_logits: int,
    dtype: str | None,
    kv_dtype: str | None,
    communication_seconds: float,
) -> StepCost:
    dtype = dtype or config.dtype
    size = DTYPE_BYTES[dtype]
    num_tokens = num_requests * tokens_per_request
    layers = range(config.num_layers)
    weight_bytes, flops = _layers_cost(config, layers, num_requests, context_len, tokens_per_request, size)
    head = config.vocab_size * config.hidden_size
    weight_bytes += size * (config.hidden_size + head)
    flops += 2 * num_logits * head
    return StepCost(
        weight_bytes=weight_bytes,
        kv_bytes=num_requests * _kv_bytes(config, layers, context_len, tokens_per_request, kv_dtype or dtype),
        other_bytes=_embedding_bytes(config, num_tokens, size),
        flops=flops,
        communication_seconds=communication_seconds,
    )


def _prediction_pass(
    config: ModelConfig,
    num_requests: int,
    context_len: float,
    tokens_per_request: int,
    dtype: str | None,
    kv_dtype: str | None,
) -> StepCost:
    """One pass of the layer for multi-token prediction, the logits of one token of each request included."""
    dtype = dtype or config.dtype
    size = DTYPE_BYTES[dtype]
    num_tokens = num_requests * tokens_per_request
    layers = range(config.num_layers, config.num_layers + 1)
    weight_bytes, flops = _layers_cost(config, layers, num_requests, context_len, tokens_per_request, size)
    join, norms = 2 * config.hidden_size**2, 3 * config.hidden_size
    head = config.vocab_size * config.hidden_size
    return StepCost(
        weight_bytes=weight_bytes + size * (join + norms + head),
        kv_bytes=num_requests * _kv_bytes(config, layers, context_len, tokens_per_request, kv_dtype or dtype),
        other_bytes=_embedding_bytes(config, num_tokens, size),
        flops=flops + 2 * num_tokens * join + 2 * num_requests * head,
    )


def _embedding_bytes(config: ModelConfig, num_tokens: int, size: int) -> float:
    """Of the rows that are read; a tied table has been read whole, as the head."""
    return 0.0 if config.tie_word_embeddings else float(size * num_tokens * config.hidden_size)


def _layers_cost(
    config: ModelConfig,
    layers: range,
    num_requests: int,
    context_len: float,
    tokens_per_request: int,
    size: int,
) -> tuple[float, float]:
    """(bytes of weights, FLOP) of some layers."""
    num_tokens = num_requests * tokens_per_request
    attention = _attention_weights(config)
    norms = 2 * config.hidden_size
    weight_bytes = flops = 0.0
    for layer in layers:
        attended = _attended(config, layer, context_len, tokens_per_request)
        moe = config.moe if config.moe is not None and layer in config.moe.layers else None
        mlp = _dense_weights(config) if moe is None else _shared_weights(config, moe)
        weight_bytes += size * (attention.elements + norms + mlp.elements)
        flops += 2 * num_tokens * (attention.multiplied + mlp.multiplied)
        flops += num_requests * _attention_flops(config, context_len, tokens_per_request, attended)
        if config.mla is not None and config.indexer is not None and layer not in config.indexer.sharing_layers:
            indexing = _indexer_cost(config, config.mla, config.indexer, context_len, tokens_per_request, size)
            weight_bytes += indexing.weight_bytes
            flops += num_requests * indexing.flops_per_request
        if moe is not None:
            expert = 3 * config.hidden_size * moe.intermediate_size
            router = moe.num_experts * config.hidden_size
            bias = moe.num_experts if moe.has_correction_bias else 0
            weight_bytes += size * expert * expected_experts(moe.num_experts, moe.experts_per_token, num_tokens)
            weight_bytes += ROUTER_BYTES * (router + bias)
            flops += 2 * num_tokens * (moe.experts_per_token * expert + router)
    return weight_bytes, flops


@dataclass(frozen=True)
class _Weights:
    """Elements of some weights: those that every token is multiplied with, and vectors, which are only added."""

    multiplied: int
    vectors: int = 0

    @property
    def elements(self) -> int:
        return self.multiplied + self.vectors


def _attention_weights(config: ModelConfig) -> _Weights:
    hidden, heads = config.hidden_size, config.num_heads
    if config.mla is not None:
        return _latent_attention_weights(config, config.mla)
    fused = (heads + 2 * config.num_kv_heads) * config.head_dim
    vectors = fused * config.qkv_bias + hidden * config.o_bias + 2 * config.head_dim * config.qk_norm
    return _Weights(hidden * fused + heads * config.head_dim * hidden, vectors)


def _latent_attention_weights(config: ModelConfig, mla: MLAConfig) -> _Weights:
    """Without the up-projection of the latents among the multiplied ones: how often that is used is a matter of the
    attention (`_attention_flops`)."""
    hidden, heads = config.hidden_size, config.num_heads
    down = mla.kv_lora_rank + mla.qk_rope_head_dim + (mla.q_lora_rank or 0)
    query = (mla.q_lora_rank or hidden) * heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
    vectors = mla.kv_lora_rank + (mla.q_lora_rank or 0) + down * config.qkv_bias + hidden * config.o_bias
    return _Weights(hidden * down + query + heads * mla.v_head_dim * hidden, vectors + _up_projection(config, mla))


def _up_projection(config: ModelConfig, mla: MLAConfig) -> int:
    return config.num_heads * (mla.qk_nope_head_dim + mla.v_head_dim) * mla.kv_lora_rank


@dataclass(frozen=True)
class _IndexerCost:
    weight_bytes: float
    flops_per_request: float


def _indexer_cost(
    config: ModelConfig, mla: MLAConfig, indexer: IndexerConfig, context_len: float, num_tokens: int, size: int
) -> _IndexerCost:
    """Of one layer with an indexer: keys are always computed, scores where there is anything to leave out. Its norm
    and the weights of its heads are float32 whatever the model's dtype."""
    heads, dim = indexer.num_heads, indexer.head_dim
    keys = config.hidden_size * dim
    if not _selects(indexer, context_len, num_tokens):
        return _IndexerCost(size * keys + ROUTER_BYTES * 2 * dim, 2 * num_tokens * keys)
    queries, weights = (mla.q_lora_rank or 0) * heads * dim, config.hidden_size * heads
    pairs = num_tokens * context_len + num_tokens * (num_tokens + 1) // 2
    return _IndexerCost(
        size * (keys + queries) + ROUTER_BYTES * (2 * dim + weights),
        2 * num_tokens * (keys + queries + weights) + 2 * heads * (dim + 1) * pairs,
    )


def _selects(indexer: IndexerConfig, context_len: float, num_tokens: int) -> bool:
    return context_len + num_tokens > indexer.topk


def _gated(hidden: int, intermediate: int, bias: bool) -> _Weights:
    return _Weights(3 * hidden * intermediate, (2 * intermediate + hidden) * bias)


def _dense_weights(config: ModelConfig) -> _Weights:
    return _gated(config.hidden_size, config.intermediate_size, config.mlp_bias)


def _shared_weights(config: ModelConfig, moe: MoEConfig) -> _Weights:
    """Of the experts that see every token; they are one feed-forward layer."""
    size = moe.num_shared_experts * moe.intermediate_size
    return _gated(config.hidden_size, size, config.mlp_bias) if size else _Weights(0)


def _attended(config: ModelConfig, layer: int, context_len: float, num_tokens: int) -> float:
    """Pairs of a new token and a token it attends to, itself included, of one request in one layer."""
    window = _window(config, layer)
    last = context_len + num_tokens
    pairs = num_tokens * context_len + num_tokens * (num_tokens + 1) // 2
    if window is None or last <= window:
        return pairs
    # Tokens at position window and beyond miss one each, two, and so on.
    first_missing = max(context_len + 1 - window, 1)
    last_missing = last - window
    return pairs - (first_missing + last_missing) * (last_missing - first_missing + 1) // 2


def _attention_flops(config: ModelConfig, context_len: float, num_tokens: int, attended: float) -> float:
    """Of one request in one layer: scores and weighted sums, and for latents the cheaper of two ways.

    Absorbed, each new token's query and output pass the up-projection and attention is over latents; expanded, each
    attended token's latent passes it and attention is over heads (DeepSeek-V2, arXiv:2405.04434, section 2.1).
    """
    heads, mla = config.num_heads, config.mla
    if mla is None:
        return 4 * heads * config.head_dim * attended
    up = 2 * _up_projection(config, mla)
    absorbed = num_tokens * up + 2 * heads * attended * (2 * mla.kv_lora_rank + mla.qk_rope_head_dim)
    per_head = mla.qk_nope_head_dim + mla.qk_rope_head_dim + mla.v_head_dim
    expanded = (context_len + num_tokens) * up + 2 * heads * attended * per_head
    return min(absorbed, expanded)


def _kv_bytes(config: ModelConfig, layers: range, context_len: float, num_tokens: int, kv_dtype: str) -> float:
    """Of one request and these layers: stored tokens read once for all heads and all new tokens, and the new tokens
    written."""
    elements = 0.0
    for group in kv_cache_spec(config, ParallelLayout(), kv_dtype, num_extra_layers=config.num_mtp_layers).groups:
        per_layer = sum(part.heads * part.dim for part in group.parts)
        for layer in group.layers:
            if layer not in layers:
                continue
            window = _window(config, layer)
            read = context_len if window is None else min(context_len, window - 1)
            elements += per_layer * (read + num_tokens)
            if (
                config.indexer is not None and layer not in config.indexer.sharing_layers
            ):  # whose keys are read all or not at all
                all_keys = context_len if _selects(config.indexer, context_len, num_tokens) else 0
                elements += config.indexer.head_dim * (all_keys - read)
    return elements * DTYPE_BYTES[kv_dtype]


def _window(config: ModelConfig, layer: int) -> int | None:
    """How many tokens a token attends to at most, itself included; None: all."""
    if config.indexer is not None:
        return config.indexer.topk
    return config.sliding_windows[layer] if layer < len(config.sliding_windows) else None
