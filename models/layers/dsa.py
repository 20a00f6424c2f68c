"""Latent attention to the tokens that a lightning indexer selects: DSA (DeepSeek-V3.2, arXiv:2512.02556)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ...ops.dsa import lightning_indexer_prefill
from ..config import IndexerConfig, MLAConfig, ModelConfig
from ..forward_context import ForwardContext
from ..weights import WeightSlot
from .linear import ColumnLinear, Rows
from .mla import MLAAttention, Selection
from .norm import LayerNorm
from .placement import Placement


class Indexer(nn.Module):
    """Scores cached tokens with small heads of its own, which share one key per token; whole on every rank.

    The weights of the heads are kept and computed in float32: a choice of tokens must not hang on the rounding of the
    model's dtype. The published code also turns queries and keys by one Hadamard matrix before it rounds both to fp8.
    That matrix is orthogonal, so it changes no product, and keys are cached unrounded here: it is left out, as in
    transformers.
    """

    def __init__(self, config: ModelConfig, indexer: IndexerConfig, low_rank: int, placement: Placement) -> None:
        super().__init__()
        self.ops = placement.ops
        self.indexer = indexer
        heads, dim = indexer.num_heads, indexer.head_dim
        self.query_proj = ColumnLinear(low_rank, (Rows("wq_b", heads, dim, split=False),), placement)
        self.key_proj = ColumnLinear(config.hidden_size, (Rows("wk", dim, split=False),), placement)
        self.key_norm = LayerNorm(dim, indexer.norm_eps, placement)
        self.weights_proj = placement.empty(heads, config.hidden_size, dtype=torch.float32)
        self.scale = (heads * dim) ** -0.5

    def queries(self, hidden: Tensor, low_rank: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [tokens, hidden], low_rank [tokens, q_lora_rank] -> rotated queries [tokens, heads, dim] and weights
        of the heads float32 [tokens, heads]."""
        query = self.query_proj(low_rank).unflatten(-1, (-1, self.indexer.head_dim))
        weights = self.ops.table.linear(hidden.float(), self.weights_proj) * self.scale
        return self.ops.table.rotate(query, cos, sin, self.indexer.interleaved), weights

    def keys(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """hidden [tokens, hidden] -> [tokens, 1, dim]."""
        key = self.key_norm(self.key_proj(hidden)).unsqueeze(1)
        return self.ops.table.rotate(key, cos, sin, self.indexer.interleaved)

    def weight_slots(self, prefix: str) -> Iterator[WeightSlot]:
        """Slots of the indexer's tensors; `prefix` ends in a dot, e.g. `model.layers.0.self_attn.indexer.`."""
        yield from self.query_proj.weight_slots(prefix)
        yield from self.key_proj.weight_slots(prefix)
        yield from self.key_norm.weight_slots(f"{prefix}k_norm")
        yield WeightSlot(f"{prefix}weights_proj.weight", self.weights_proj)


SELECTION = "selection"  # of the newest layer with an indexer; None: everything


class SparseMLAAttention(MLAAttention):
    """MLA over the `topk` tokens of the context that the layer's indexer scores highest.

    The cache of a layer has a third part, the indexer's keys [blocks, block_size, 1, index_head_dim].
    """

    def __init__(self, config: ModelConfig, mla: MLAConfig, indexer: IndexerConfig, placement: Placement) -> None:
        super().__init__(config, mla, placement)
        if mla.q_lora_rank is None:
            raise ValueError(f"{config.architecture} needs a low-rank query for its indexer (q_lora_rank): None")
        self.topk = indexer.topk
        self.indexer = Indexer(config, indexer, mla.q_lora_rank, placement)

    def forward(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, context: ForwardContext, cache: tuple[Tensor, ...]
    ) -> Tensor:
        """hidden [tokens, hidden] -> [tokens, hidden]; writes latents, rope keys and indexer keys into `cache`."""
        low_rank, query_nope, query_rope = self.project(hidden, cos, sin, context, cache)
        ops = self.ops.table
        with ops.side_stream("indexer"):  # of what `project` made it reads the low-rank query alone
            ops.write_index_keys(self.indexer.keys(hidden, cos, sin), cache[2], context.slots)
            selection = self.select(hidden, low_rank, cos, sin, context, cache[2])
        context.handed_on[SELECTION] = selection
        return self.o_proj(self.attend(query_nope, query_rope, context, cache, selection).flatten(1))

    def store(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, context: ForwardContext, cache: tuple[Tensor, ...]
    ) -> None:
        super().store(hidden, cos, sin, context, cache)
        self.ops.table.write_index_keys(self.indexer.keys(hidden, cos, sin), cache[2], context.slots)

    def select(
        self,
        hidden: Tensor,
        low_rank: Tensor,
        cos: Tensor,
        sin: Tensor,
        context: ForwardContext,
        index_key_cache: Tensor,
    ) -> Selection | None:
        """What this step's tokens attend to; None where no context can be longer than the selection."""
        requests, decoding = context.num_decode, context.num_decode_tokens
        block_size = index_key_cache.shape[1]
        # By the width of the table, not by any length: a static step must not depend on what is in its tensors.
        sparse_decode = decoding > 0 and context.block_table.shape[1] * block_size > self.topk
        sparse_prefill = any(length > self.topk for length in context.prefill_context_lens)
        if not sparse_decode and not sparse_prefill:
            return None
        query, weights = self.indexer.queries(hidden, low_rank, cos, sin)
        positions = None
        if sparse_decode:
            positions = self.ops.table.lightning_indexer(
                query[:decoding],
                weights[:decoding],
                index_key_cache,
                context.block_table[:requests],
                context.context_lens[:requests],
                self.topk,
            )
        masks = lightning_indexer_prefill(
            query[decoding:],
            weights[decoding:],
            index_key_cache,
            context.block_table[requests:],
            context.prefill_query_lens,
            context.prefill_context_lens,
            self.topk,
        )
        return Selection(positions, masks)

    def weight_slots(self, prefix: str) -> Iterator[WeightSlot]:
        yield from super().weight_slots(prefix)
        yield from self.indexer.weight_slots(f"{prefix}indexer.")


class SharingMLAAttention(MLAAttention):
    """MLA over the tokens that the indexer of an earlier layer has selected in the same step (GLM-5.2,
    arXiv:2603.12201). It has no indexer and caches no indexer keys."""

    def forward(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, context: ForwardContext, cache: tuple[Tensor, ...]
    ) -> Tensor:
        """hidden [tokens, hidden] -> [tokens, hidden]; writes latents and rope keys into `cache`."""
        _, query_nope, query_rope = self.project(hidden, cos, sin, context, cache)
        selection = context.handed_on[SELECTION]
        return self.o_proj(self.attend(query_nope, query_rope, context, cache, selection).flatten(1))
