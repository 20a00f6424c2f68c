"""The least time of each workload on a machine of given rates, from a checkpoint's config.json alone.

    bound = max(weight and key-value bytes / bandwidth, FLOP / rate), summed over the steps of the workload

Counted as a rival could at best: weights that a step touches once, of routed experts the number that is hit on average
if tokens choose at random, stored keys and values once, multiplications of projections, attention and head. Latent
attention is absorbed when it decodes and expanded when it prefills; a prompt's attention is counted at half its length.
This is coarser than `omni_engine.engine.floor`, which counts what one engine's own step moves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from workloads import Workload

WEIGHT_BYTES = 2  # bfloat16
_MEAN_CONTEXT = 64  # of a W2 step: 32 tokens in, about 64 out


@dataclass(frozen=True)
class Rates:
    """What the machine reaches: bytes per second from memory, FLOP per second of a large matrix product."""

    bytes_per_second: float
    flops_per_second: float


@dataclass(frozen=True)
class Shape:
    """What the bound needs to know of a model; sizes in elements, all layers together unless they say otherwise."""

    layers: int
    dense_weights: float  # that every token meets, without the head
    head_weights: float
    expert_weights: float  # of one expert in one layer
    expert_layers: int
    experts: int
    experts_per_token: int
    cache_elements: float  # per token and layer
    decode_attention: float  # FLOP per token, layer and token of context
    prefill_attention: float

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Shape:
        """Read config.json of a llama, qwen3, qwen3_moe or deepseek_v3; raises ValueError for another model type."""
        kind = config["model_type"]
        hidden, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
        dense_mlp = 3 * hidden * config["intermediate_size"]
        expert = 3 * hidden * config.get("moe_intermediate_size", 0)
        if kind == "deepseek_v3":
            rank, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
            nope, value, query_rank = config["qk_nope_head_dim"], config["v_head_dim"], config["q_lora_rank"]
            attention = hidden * query_rank + query_rank * heads * (nope + rope) + hidden * (rank + rope)
            attention += rank * heads * (nope + value) + heads * value * hidden
            experts, chosen, shared = (
                config[key] for key in ("n_routed_experts", "num_experts_per_tok", "n_shared_experts")
            )
            dense_layers = config["first_k_dense_replace"]
            cache, decode, prefill = rank + rope, 2 * heads * (2 * rank + rope), 2 * heads * (nope + rope + value)
        elif kind in ("llama", "qwen3", "qwen3_moe"):
            dim, kv_heads = config.get("head_dim") or hidden // heads, config["num_key_value_heads"]
            attention = hidden * dim * (2 * heads + 2 * kv_heads)
            experts = config.get("num_experts", config.get("num_local_experts", 0))  # as transformers 5 writes it
            chosen, shared = config.get("num_experts_per_tok", 0), 0
            dense_layers = 0 if experts else layers
            cache, decode = 2 * kv_heads * dim, 4 * heads * dim
            prefill = decode
        else:
            raise ValueError(f"the bound is known for llama, qwen3, qwen3_moe and deepseek_v3: {kind}")
        expert_layers = layers - dense_layers
        return cls(
            layers=layers,
            dense_weights=layers * attention + dense_layers * dense_mlp + expert_layers * shared * expert,
            head_weights=config["vocab_size"] * hidden,
            expert_weights=expert,
            expert_layers=expert_layers,
            experts=experts,
            experts_per_token=chosen,
            cache_elements=cache,
            decode_attention=decode,
            prefill_attention=prefill,
        )

    def weight_bytes(self, tokens: int) -> float:
        """Of a step of so many tokens, with the head."""
        hit = self.experts * (1 - (1 - self.experts_per_token / self.experts) ** tokens) if self.experts else 0.0
        return WEIGHT_BYTES * (self.dense_weights + self.head_weights + self.expert_layers * hit * self.expert_weights)

    @property
    def flops_per_token(self) -> float:
        """Without attention and head."""
        return 2 * (self.dense_weights + self.expert_layers * self.experts_per_token * self.expert_weights)

    @property
    def cache_bytes_per_token(self) -> float:
        return WEIGHT_BYTES * self.layers * self.cache_elements


def decode_seconds(shape: Shape, batch: int, context: float, rates: Rates) -> float:
    """The least time of one decode step."""
    moved = shape.weight_bytes(batch) + batch * context * shape.cache_bytes_per_token
    attention = shape.layers * context * shape.decode_attention
    flops = batch * (shape.flops_per_token + 2 * shape.head_weights + attention)
    return max(moved / rates.bytes_per_second, flops / rates.flops_per_second)


def bound(shape: Shape, workload: Workload, rates: Rates) -> float:
    """The workload's metric at its bound: milliseconds, or output tokens per second."""
    requests, output = workload.requests, workload.output
    if workload.metric == "tpot_ms":
        return decode_seconds(shape, requests, _MEAN_CONTEXT, rates) * 1e3
    length = workload.shared + workload.own
    computed = workload.shared + requests * workload.own
    # Only the prompt alone counts the head (one token); attention of a shared prefix is left out.
    attention = 0.0 if workload.shared else shape.layers * length / 2 * shape.prefill_attention
    prefill = computed * (shape.flops_per_token + attention) / rates.flops_per_second
    if workload.metric == "ttft_ms":
        return (prefill + 2 * shape.head_weights / rates.flops_per_second) * 1e3
    decode = sum(decode_seconds(shape, requests, length + step, rates) for step in range(output - 1))
    return requests * output / (prefill + decode)
