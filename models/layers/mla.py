"""Multi-head latent attention with its paged cache of latents (DeepSeek-V2, arXiv:2405.04434)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...ops.mla import mla_prefill_attention
from ..config import MLAConfig, ModelConfig
from ..forward_context import ForwardContext
from ..weights import WeightSlot
from .linear import ColumnLinear, RowLinear, Rows
from .norm import RMSNorm
from .placement import Placement
from .rope import mla_softmax_scale


@dataclass(frozen=True)
class Selection:
    """The tokens that attention reads where it is sparse."""

    positions: Tensor | None  # of the decoding tokens, as the op `lightning_indexer` tells them; None: all
    masks: tuple[Tensor | None, ...]  # per prefilling request bool [query_len, context_len]; None: what came before


class MLAAttention(nn.Module):
    """Low-rank queries and one shared latent per token.

    The cache of a layer is (latents [blocks, block_size, 1, rank], rope keys [blocks, block_size, 1, rope_dim]), whole
    on every rank; heads are split. Decoding absorbs the up-projections into query and output, prefill expands the
    latents; both read the one `kv_b_proj` weight.
    """

    key_up: nn.Parameter | None
    value_up: nn.Parameter | None

    def __init__(self, config: ModelConfig, mla: MLAConfig, placement: Placement) -> None:
        super().__init__()
        self.ops = placement.ops
        self.mla = mla
        self.interleaved = config.rope.interleaved
        query_dim = mla.qk_nope_head_dim + mla.qk_rope_head_dim
        self.scale = mla_softmax_scale(config.rope, query_dim)
        down = Rows("kv_a_proj_with_mqa", mla.kv_lora_rank + mla.qk_rope_head_dim, split=False)
        if mla.q_lora_rank is None:
            self.down_proj = ColumnLinear(config.hidden_size, (down,), placement, bias=config.qkv_bias)
            self.q_norm = None
            self.q_proj = ColumnLinear(config.hidden_size, (Rows("q_proj", config.num_heads, query_dim),), placement)
        else:
            query_down = Rows("q_a_proj", mla.q_lora_rank, split=False)
            self.down_proj = ColumnLinear(config.hidden_size, (query_down, down), placement, bias=config.qkv_bias)
            self.q_norm = RMSNorm(mla.q_lora_rank, mla.norm_eps, placement)
            self.q_proj = ColumnLinear(mla.q_lora_rank, (Rows("q_b_proj", config.num_heads, query_dim),), placement)
        self.kv_norm = RMSNorm(mla.kv_lora_rank, mla.norm_eps, placement)
        up = Rows("kv_b_proj", config.num_heads, mla.qk_nope_head_dim + mla.v_head_dim)
        self.kv_b_proj = ColumnLinear(mla.kv_lora_rank, (up,), placement)
        self.register_parameter("key_up", None)
        self.register_parameter("value_up", None)
        self.o_proj = RowLinear(
            "o_proj", config.num_heads, mla.v_head_dim, config.hidden_size, placement, bias=config.o_bias
        )

    @property
    def up_projection(self) -> Tensor:
        """The view [heads, nope_dim + value_dim, rank] of `kv_b_proj`: per head the key's rows, then the value's."""
        return self.kv_b_proj.weight.unflatten(0, (-1, self.mla.qk_nope_head_dim + self.mla.v_head_dim))

    def pack_up_projection(self) -> None:
        """Keep what decoding absorbs a second time, contiguous: [heads, nope_dim, rank] and [heads, rank, value_dim].
        For devices that would copy the views of `kv_b_proj` at every step. Called once, when the weights are there."""
        key_up, value_up = self.up_projection.split((self.mla.qk_nope_head_dim, self.mla.v_head_dim), dim=1)
        self.key_up = nn.Parameter(key_up.contiguous(), requires_grad=False)
        self.value_up = nn.Parameter(value_up.mT.contiguous(), requires_grad=False)

    def absorb(self, query: Tensor) -> Tensor:
        """query [n, heads, nope_dim] -> [n, heads, rank]: the key's up-projection on the query's side."""
        key_up = self.up_projection[:, : self.mla.qk_nope_head_dim] if self.key_up is None else self.key_up
        return self.ops.table.head_linear(query, key_up, True)

    def expand(self, attended: Tensor) -> Tensor:
        """attended [n, heads, rank] -> [n, heads, value_dim]."""
        if self.value_up is not None:
            return self.ops.table.head_linear(attended, self.value_up, True)
        return self.ops.table.head_linear(attended, self.up_projection[:, self.mla.qk_nope_head_dim :])

    def forward(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, context: ForwardContext, cache: tuple[Tensor, ...]
    ) -> Tensor:
        """hidden [tokens, hidden] -> [tokens, hidden]; writes the tokens' latents and rope keys into `cache`."""
        _, query_nope, query_rope = self.project(hidden, cos, sin, context, cache)
        return self.o_proj(self.attend(query_nope, query_rope, context, cache).flatten(1))

    def project(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, context: ForwardContext, cache: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [tokens, hidden] -> what the queries are made of [tokens, q_lora_rank] (or `hidden` itself), and the
        queries [tokens, heads, nope_dim], [tokens, heads, rope_dim], rotated; writes latents and rope keys."""
        down = self.down_proj(hidden).split(self.down_proj.sizes, dim=-1)
        low_rank = hidden if self.q_norm is None else self.q_norm(down[0])
        nope_dim, rope_dim = self.mla.qk_nope_head_dim, self.mla.qk_rope_head_dim
        query = self.q_proj(low_rank).unflatten(-1, (-1, nope_dim + rope_dim))
        query_nope, query_rope = query.split((nope_dim, rope_dim), dim=-1)
        self.write(down[-1], cos, sin, context, cache)
        return low_rank, query_nope, self.ops.table.rotate(query_rope, cos, sin, self.interleaved)

    def store(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, context: ForwardContext, cache: tuple[Tensor, ...]
    ) -> None:
        """hidden [tokens, hidden]: writes what `forward` writes into `cache`, and computes nothing else."""
        self.write(self.down_proj.last(hidden), cos, sin, context, cache)

    def write(
        self, latent_and_key: Tensor, cos: Tensor, sin: Tensor, context: ForwardContext, cache: tuple[Tensor, ...]
    ) -> None:
        """latent_and_key [tokens, rank + rope_dim], as projected -> normalised and rotated in `cache`."""
        latent_cache, rope_key_cache = cache[:2]
        self.ops.table.write_latent_cache(
            latent_and_key,
            self.kv_norm.weight,
            self.kv_norm.epsilon,
            cos,
            sin,
            self.interleaved,
            latent_cache,
            rope_key_cache,
            context.slots,
        )

    def attend(
        self,
        query_nope: Tensor,
        query_rope: Tensor,
        context: ForwardContext,
        cache: tuple[Tensor, ...],
        selection: Selection | None = None,
    ) -> Tensor:
        """query_nope [tokens, heads, nope_dim], query_rope [tokens, heads, rope_dim] -> [tokens, heads, value_dim]."""
        latent_cache, rope_key_cache = cache[:2]
        requests, decoding = context.num_decode, context.num_decode_tokens
        outputs = []
        if decoding:
            ops = self.ops.table
            ops.prefetch(self.o_proj.weight, query_rope)
            arguments = (
                self.absorb(query_nope[:decoding]),
                query_rope[:decoding],
                latent_cache,
                rope_key_cache,
                context.block_table[:requests],
            )
            if selection is None or selection.positions is None:
                attended = ops.mla_decode_attention(*arguments, context.attention_lengths, self.scale)
            else:
                lengths = context.context_lens[:requests]
                attended = ops.sparse_mla_decode_attention(*arguments, lengths, selection.positions, self.scale)
            outputs.append(self.expand(attended))
        if context.prefill_query_lens:
            expanded = mla_prefill_attention(
                query_nope[decoding:],
                query_rope[decoding:],
                self.up_projection,
                latent_cache,
                rope_key_cache,
                context.block_table[requests:],
                context.prefill_query_lens,
                context.prefill_context_lens,
                self.scale,
                None if selection is None else selection.masks,
                self.ops.table.causal_attention,
            )
            outputs.append(expanded)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def weight_slots(self, prefix: str) -> Iterator[WeightSlot]:
        """Slots of the layer's tensors; `prefix` ends in a dot, e.g. `model.layers.0.self_attn.`."""
        yield from self.down_proj.weight_slots(prefix)
        if self.q_norm is not None:
            yield from self.q_norm.weight_slots(f"{prefix}q_a_layernorm")
        yield from self.q_proj.weight_slots(prefix)
        yield from self.kv_norm.weight_slots(f"{prefix}kv_a_layernorm")
        yield from self.kv_b_proj.weight_slots(prefix)
        yield from self.o_proj.weight_slots(prefix)
