"""The decoder-only stack that every family shares: embedding, pre-norm layers, final norm, head."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..forward_context import ForwardContext
from ..parallel import ParallelLayout
from ..weights import WeightSlot
from .attention import Attention
from .embedding import Embedding, OutputHead
from .mla import MLAAttention
from .mlp import GatedMLP
from .moe import MoE
from .norm import RMSNorm
from .placement import Placement
from .rope import RotaryTable


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each after a norm and inside a residual connection."""

    def __init__(
        self, config: ModelConfig, attention: Attention | MLAAttention, mlp: GatedMLP | MoE, placement: Placement
    ) -> None:
        super().__init__()
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, placement)
        self.attention = attention
        self.post_attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, placement)
        self.mlp = mlp

    def forward(
        self,
        hidden: Tensor,
        residual: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        context: ForwardContext,
        cache: tuple[Tensor, ...],
        wanted: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(hidden, residual) -> the same pair one layer on, both [tokens, hidden]. Their sum is the residual stream:
        the addition is left to the next norm, where it is fused. No residual: hidden is the whole stream. `wanted`
        int64 [n]: the tokens that are fed forward, and returned; None for all."""
        if residual is None:
            hidden, residual = self.input_norm(hidden), hidden
        else:
            hidden, residual = self.input_norm.add(hidden, residual)
        hidden = self.attention(hidden, cos, sin, context, cache)
        if wanted is not None:
            hidden, residual = hidden[wanted], residual[wanted]
        hidden, residual = self.post_attention_norm.add(hidden, residual)
        return self.mlp(hidden), residual

    def weight_slots(self, prefix: str) -> Iterator[WeightSlot]:
        """Slots of the layer's tensors; `prefix` ends in a dot, e.g. `model.layers.0.`."""
        yield from self.input_norm.weight_slots(f"{prefix}input_layernorm")
        yield from self.attention.weight_slots(f"{prefix}self_attn.")
        yield from self.post_attention_norm.weight_slots(f"{prefix}post_attention_layernorm")
        yield from self.mlp.weight_slots(f"{prefix}mlp.")

    def is_elsewhere(self, name: str) -> bool:
        """Whether a tensor of this layer, named without the layer's prefix, is read by other ranks only."""
        return isinstance(self.mlp, MoE) and name.startswith("mlp.") and self.mlp.is_elsewhere(name[len("mlp.") :])


class CausalDecoder(nn.Module):
    """A causal language model; a family says in `build_layer` what its layers are made of.

    Parameters are allocated and not initialised: `weight_slots` names what fills them.
    """

    def __init__(
        self, config: ModelConfig, layout: ParallelLayout, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.config = config
        placement = Placement(layout, dtype, device)
        self.ops = placement.ops
        self.embedding = Embedding(config.vocab_size, config.hidden_size, placement)
        positions = max(config.derived_max_model_len, config.max_position_embeddings)
        self.rotary = RotaryTable(config.rope, positions, placement)
        self.layers = nn.ModuleList(self.build_layer(index, placement) for index in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, placement)
        tied = config.tie_word_embeddings
        self.head = self.embedding if tied else OutputHead(config.vocab_size, config.hidden_size, placement)

    def build_layer(self, index: int, placement: Placement) -> DecoderLayer:
        """Layer `index` of the family."""
        raise TypeError(f"a decoder family must define build_layer: {type(self).__name__}")

    def forward(
        self,
        input_ids: Tensor,
        context: ForwardContext,
        caches: list[tuple[Tensor, ...]],
        wanted: Tensor | None = None,
    ) -> Tensor:
        """input_ids int64 [tokens] -> [tokens, hidden] after the final norm; writes each layer's part of `caches`.

        `wanted` int64 [n], n at least 1: the tokens whose states somebody reads -> [n, hidden]. The last layer feeds
        forward these alone: of the others nothing comes after its attention. None for all.
        """
        hidden, residual = self.embedding(input_ids), None
        cos, sin = self.rotary(context.positions)
        last = len(self.layers) - 1
        for index, (layer, cache) in enumerate(zip(self.layers, caches, strict=True)):
            hidden, residual = layer(hidden, residual, cos, sin, context, cache, wanted if index == last else None)
        return self.norm(hidden) if residual is None else self.norm.add(hidden, residual)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [n, hidden] -> float32 [n, vocab]."""
        return self.head.logits(hidden)

    def weight_slots(self) -> Iterator[WeightSlot]:
        """Every tensor of the checkpoint that the model needs, with its place."""
        yield from self.embedding.weight_slots("model.embed_tokens")
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, DecoderLayer)
            yield from layer.weight_slots(f"model.layers.{index}.")
        yield from self.norm.weight_slots("model.norm")
        if self.head is not self.embedding:
            yield from self.head.weight_slots("lm_head")

    def ignored_weights(self, name: str) -> bool:
        """Tensors that files may hold and this rank does not read: rope frequencies, which are computed; a tied head;
        the multi-token prediction layers stored behind the decoder's own; experts of other ranks."""
        if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and self.config.tie_word_embeddings):
            return True
        match = re.match(r"model\.layers\.(\d+)\.", name)
        if match is None:
            return False
        index, first = int(match[1]), self.config.num_layers
        if index < first:
            layer = self.layers[index]
            assert isinstance(layer, DecoderLayer)
            return layer.is_elsewhere(name.removeprefix(match[0]))
        return index < first + self.config.num_mtp_layers
