"""Grouped-query attention with its paged cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ...ops.attention import paged_prefill_attention
from ..config import ModelConfig
from ..forward_context import ForwardContext
from ..weights import WeightSlot
from .linear import ColumnLinear, RowLinear, Rows
from .norm import RMSNorm
from .placement import Placement


class Attention(nn.Module):
    """Fused QKV projection, optional norm of each head's query and key, rope, paged attention, output projection.

    The cache of a layer is (keys, values), each [blocks, block_size, kv_heads, head_dim].
    """

    def __init__(self, config: ModelConfig, layer: int, placement: Placement) -> None:
        super().__init__()
        self.ops = placement.ops
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        self.interleaved = config.rope.interleaved
        self.window = config.sliding_windows[layer] if config.sliding_windows else None
        parts = (
            Rows("q_proj", config.num_heads, config.head_dim),
            Rows("k_proj", config.num_kv_heads, config.head_dim),
            Rows("v_proj", config.num_kv_heads, config.head_dim),
        )
        self.qkv_proj = ColumnLinear(config.hidden_size, parts, placement, bias=config.qkv_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, placement) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, placement) if config.qk_norm else None
        self.o_proj = RowLinear(
            "o_proj", config.num_heads, config.head_dim, config.hidden_size, placement, bias=config.o_bias
        )

    def forward(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, context: ForwardContext, cache: tuple[Tensor, ...]
    ) -> Tensor:
        """hidden [tokens, hidden] -> [tokens, hidden]; writes the tokens' keys and values into `cache`."""
        query, key, value = (
            part.unflatten(-1, (-1, self.head_dim)) for part in self.qkv_proj(hidden).split(self.qkv_proj.sizes, dim=-1)
        )
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        ops = self.ops.table
        query, key = ops.rotate(query, cos, sin, self.interleaved), ops.rotate(key, cos, sin, self.interleaved)
        key_cache, value_cache = cache
        ops.write_kv_cache(key, value, key_cache, value_cache, context.slots)
        return self.o_proj(self.attend(query, key_cache, value_cache, context).flatten(1))

    def attend(self, query: Tensor, key_cache: Tensor, value_cache: Tensor, context: ForwardContext) -> Tensor:
        """query [tokens, heads, dim] -> [tokens, heads, dim]: decoding requests as one batch, then the chunks."""
        requests, decoding = context.num_decode, context.num_decode_tokens
        outputs = []
        if decoding:
            self.ops.table.prefetch(self.o_proj.weight, query)
            decoded = self.ops.table.paged_decode_attention(
                query[:decoding],
                key_cache,
                value_cache,
                context.block_table[:requests],
                context.attention_lengths,
                self.scale,
                self.window,
            )
            outputs.append(decoded)
        if context.prefill_query_lens:
            prefilled = paged_prefill_attention(
                query[decoding:],
                key_cache,
                value_cache,
                context.block_table[requests:],
                context.prefill_query_lens,
                context.prefill_context_lens,
                self.scale,
                self.window,
                self.ops.table.causal_attention,
            )
            outputs.append(prefilled)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def weight_slots(self, prefix: str) -> Iterator[WeightSlot]:
        """Slots of the layer's tensors; `prefix` ends in a dot, e.g. `model.layers.0.self_attn.`."""
        yield from self.qkv_proj.weight_slots(prefix)
        if self.q_norm is not None and self.k_norm is not None:
            yield from self.q_norm.weight_slots(f"{prefix}q_norm")
            yield from self.k_norm.weight_slots(f"{prefix}k_norm")
        yield from self.o_proj.weight_slots(prefix)
