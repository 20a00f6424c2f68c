"""BERT, RoBERTa and XLM-RoBERTa: encoders with learned positions, whose layers normalise behind each sublayer."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..ops.attention import bidirectional_attention
from .config import EncoderConfig, ModelConfig
from .forward_context import ForwardContext
from .layers.embedding import Embedding
from .layers.linear import ColumnLinear, RowLinear, Rows
from .layers.norm import LayerNorm
from .layers.placement import Placement
from .parallel import ParallelLayout
from .weights import WeightSlot


class EncoderLayer(nn.Module):
    """Attention and feed-forward, each with its residual connection and the norm behind it (arXiv:1810.04805)."""

    def __init__(self, config: ModelConfig, encoder: EncoderConfig, placement: Placement) -> None:
        super().__init__()
        heads, dim, hidden = config.num_heads, config.head_dim, config.hidden_size
        self.head_dim = dim
        self.scale = dim**-0.5
        self.activation = encoder.activation
        parts = tuple(Rows(name, heads, dim) for name in ("query", "key", "value"))
        self.qkv = ColumnLinear(hidden, parts, placement, bias=True)
        self.attention_output = RowLinear("dense", heads, dim, hidden, placement, bias=True)
        self.attention_norm = LayerNorm(hidden, encoder.layer_norm_eps, placement)
        self.up = ColumnLinear(hidden, (Rows("dense", config.intermediate_size),), placement, bias=True)
        self.down = RowLinear("dense", config.intermediate_size, 1, hidden, placement, bias=True)
        self.norm = LayerNorm(hidden, encoder.layer_norm_eps, placement)

    def forward(self, hidden: Tensor, lens: tuple[int, ...]) -> Tensor:
        """hidden [tokens, hidden], sequences of `lens` tokens one after another -> the same one layer on."""
        query, key, value = (
            part.unflatten(-1, (-1, self.head_dim)) for part in self.qkv(hidden).split(self.qkv.sizes, dim=-1)
        )
        attended = bidirectional_attention(query, key, value, lens, self.scale).flatten(1)
        hidden = self.attention_norm(self.attention_output(attended) + hidden)
        return self.norm(self.down(self._activate(self.up(hidden))) + hidden)

    def _activate(self, hidden: Tensor) -> Tensor:
        if self.activation == "relu":
            return functional.relu(hidden)
        return functional.gelu(hidden, approximate="tanh" if self.activation == "gelu_tanh" else "none")

    def weight_slots(self, prefix: str) -> Iterator[WeightSlot]:
        """Slots of the layer's tensors; `prefix` ends in a dot, e.g. `encoder.layer.0.`."""
        yield from self.qkv.weight_slots(f"{prefix}attention.self.")
        yield from self.attention_output.weight_slots(f"{prefix}attention.output.")
        yield from self.attention_norm.weight_slots(f"{prefix}attention.output.LayerNorm")
        yield from self.up.weight_slots(f"{prefix}intermediate.")
        yield from self.down.weight_slots(f"{prefix}output.")
        yield from self.norm.weight_slots(f"{prefix}output.LayerNorm")


class BertEncoder(nn.Module):
    """The body of an encoder, for whole sequences: nothing of it is cached, so nothing of it may be computed in pieces.

    Parameters are allocated and not initialised: `weight_slots` names what fills them.
    """

    def __init__(
        self, config: ModelConfig, layout: ParallelLayout, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        if config.encoder is None:
            raise ValueError(f"an encoder needs an EncoderConfig: {config.architecture}")
        self.config = config
        self.encoder = config.encoder
        placement = Placement(layout, dtype, device)
        self.ops = placement.ops
        self.words = Embedding(config.vocab_size, config.hidden_size, placement)
        self.positions = Embedding(config.max_position_embeddings, config.hidden_size, placement)
        self.token_types = Embedding(config.encoder.num_token_types, config.hidden_size, placement)
        self.norm = LayerNorm(config.hidden_size, config.encoder.layer_norm_eps, placement)
        self.layers = nn.ModuleList(EncoderLayer(config, config.encoder, placement) for _ in range(config.num_layers))

    def forward(self, input_ids: Tensor, context: ForwardContext, caches: list[tuple[Tensor, ...]]) -> Tensor:
        """input_ids int64 [tokens] of whole sequences -> [tokens, hidden]; `caches` is empty."""
        types = context.token_types
        hidden = self.words(input_ids) + self.positions(context.positions + self.encoder.first_position)
        hidden = self.norm(hidden + (self.token_types.weight[0] if types is None else self.token_types(types)))
        for layer in self.layers:
            hidden = layer(hidden, context.prefill_query_lens)
        return hidden

    def weight_slots(self) -> Iterator[WeightSlot]:
        """Every tensor of the checkpoint that the body needs, with its place."""
        yield from self.words.weight_slots("embeddings.word_embeddings")
        yield from self.positions.weight_slots("embeddings.position_embeddings")
        yield from self.token_types.weight_slots("embeddings.token_type_embeddings")
        yield from self.norm.weight_slots("embeddings.LayerNorm")
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, EncoderLayer)
            yield from layer.weight_slots(f"encoder.layer.{index}.")

    def ignored_weights(self, name: str) -> bool:
        """Tensors that files may hold and nobody reads: positions counted out, and the pooler of a body whose states
        are pooled otherwise."""
        return name == "embeddings.position_ids" or name.startswith("pooler.dense.")
