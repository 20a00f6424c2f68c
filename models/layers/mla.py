"""Multi-head latent attention with its paged cache of latents (DeepSeek-V2, arXiv:2405.04434)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ...ops.mla import mla_prefill_attention, write_latent_cache
from ...ops.rope import rotate
from ..config import MLAConfig, ModelConfig
from ..forward_context import ForwardContext
from ..weights import WeightSlot
from .linear import ColumnLinear, RowLinear, Rows
from .norm import RMSNorm
from .placement import Placement
from .rope import mla_softmax_scale


class MLAAttention(nn.Module):
    """Low-rank queries and one shared latent per token.

    The cache of a layer is (latents [blocks, block_size, 1, rank], rope keys [blocks, block_size, 1, rope_dim]), whole
    on every rank; heads are split. Decoding absorbs the up-projections into query and output, prefill expands the
    latents; both read the one `kv_b_proj` weight.
    """

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
        self.o_proj = RowLinear(
            "o_proj", config.num_heads, mla.v_head_dim, config.hidden_size, placement, bias=config.o_bias
        )

    @property
    def up_projection(self) -> Tensor:
        """The view [heads, nope_dim + value_dim, rank] of `kv_b_proj`: per head the key's rows, then the value's."""
        return self.kv_b_proj.weight.unflatten(0, (-1, self.mla.qk_nope_head_dim + self.mla.v_head_dim))

    def forward(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, context: ForwardContext, cache: tuple[Tensor, ...]
    ) -> Tensor:
        """hidden [tokens, hidden] -> [tokens, hidden]; writes the tokens' latents and rope keys into `cache`."""
        down = self.down_proj(hidden).split(self.down_proj.sizes, dim=-1)
        query = self.q_proj(hidden if self.q_norm is None else self.q_norm(down[0]))
        nope_dim, rope_dim = self.mla.qk_nope_head_dim, self.mla.qk_rope_head_dim
        query_nope, query_rope = query.unflatten(-1, (-1, nope_dim + rope_dim)).split((nope_dim, rope_dim), dim=-1)
        query_rope = rotate(query_rope, cos, sin, self.interleaved)
        latent_cache, rope_key_cache = cache
        write_latent_cache(
            down[-1],
            self.kv_norm.weight,
            self.kv_norm.epsilon,
            cos,
            sin,
            self.interleaved,
            latent_cache,
            rope_key_cache,
            context.slots,
        )
        return self.o_proj(self.attend(query_nope, query_rope, latent_cache, rope_key_cache, context).flatten(1))

    def attend(
        self,
        query_nope: Tensor,
        query_rope: Tensor,
        latent_cache: Tensor,
        rope_key_cache: Tensor,
        context: ForwardContext,
    ) -> Tensor:
        """query_nope [tokens, heads, nope_dim], query_rope [tokens, heads, rope_dim] -> [tokens, heads, value_dim]."""
        decoding = context.num_decode
        outputs = []
        if decoding:
            key_up, value_up = self.up_projection.split((self.mla.qk_nope_head_dim, self.mla.v_head_dim), dim=1)
            ops = self.ops.table
            attended = ops.mla_decode_attention(
                ops.head_linear(query_nope[:decoding], key_up, True),  # [n, heads, rank]
                query_rope[:decoding],
                latent_cache,
                rope_key_cache,
                context.block_table[:decoding],
                context.context_lens[:decoding],
                self.scale,
            )
            outputs.append(ops.head_linear(attended, value_up))
        if context.prefill_query_lens:
            expanded = mla_prefill_attention(
                query_nope[decoding:],
                query_rope[decoding:],
                self.up_projection,
                latent_cache,
                rope_key_cache,
                context.block_table[decoding:],
                context.prefill_query_lens,
                context.prefill_context_lens,
                self.scale,
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
