"""Multi-token prediction: the layer behind a decoder's own that drafts the token after the next (arXiv:2412.19437)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..forward_context import ForwardContext
from ..speculation import check_multi_token_prediction
from ..weights import WeightSlot
from .decoder import CausalDecoder
from .linear import ColumnLinear, Rows
from .mla import MLAAttention
from .norm import RMSNorm
from .placement import Placement

COPIES = ("embed_tokens.weight", "shared_head.head.weight")  # published beside the layer, equal to the decoder's own


class MultiTokenPredictor(nn.Module):
    """The multi-token prediction layer of a checkpoint (DeepSeek-V3, section 2.2), sharing embedding, head and rotary
    table with its decoder.

    It joins the state at a position with the embedding of the token that follows, and runs one more layer of the
    decoder's family over the entries of all positions: from token i + 1 and the state at i comes the state that
    predicts token i + 2. An entry's rope position is i, its state's own. A deeper draft is the same layer again, on its
    own output and the token drafted before: where a checkpoint has more than one such layer (num_nextn_predict_layers),
    the first one is used for every depth and the others are not read.

    `placement` is the one the decoder was built with, in that its `ops` are the decoder's own, so that both run the
    same bodies. Raises ValueError where the config has no such layer.
    """

    def __init__(self, model: CausalDecoder, placement: Placement) -> None:
        super().__init__()
        config = model.config
        check_multi_token_prediction(config)
        assert placement.ops is model.ops
        self.ops = placement.ops
        self.index = config.num_layers
        self.embedding, self.head, self.rotary = model.embedding, model.head, model.rotary
        self.token_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, placement)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, placement)
        joined = Rows("eh_proj", config.hidden_size, split=False)
        self.join_proj = ColumnLinear(2 * config.hidden_size, (joined,), placement)
        self.layer = model.build_layer(self.index, placement)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, placement)

    def forward(
        self, hidden: Tensor, next_ids: Tensor, context: ForwardContext, caches: list[tuple[Tensor, ...]]
    ) -> Tensor:
        """hidden [tokens, hidden]: the decoder's states behind its final norm, or this layer's own output, one draft
        deeper; next_ids int64 [tokens]: the token that follows each -> [tokens, hidden] behind the layer's norm, what
        the head reads and what the next draft starts from. Writes the tokens' entries into the one cache in `caches`.
        """
        (cache,) = caches
        cos, sin = self.rotary(context.positions)
        output, residual = self.layer(self.join(hidden, next_ids), None, cos, sin, context, cache)
        return self.norm.add(output, residual)[0]

    def store(
        self, hidden: Tensor, next_ids: Tensor, context: ForwardContext, caches: list[tuple[Tensor, ...]]
    ) -> None:
        """Writes the cache as `forward` does, and computes nothing else: for a step that drafts nothing."""
        (cache,) = caches
        attention = self.layer.attention
        assert isinstance(attention, MLAAttention)
        cos, sin = self.rotary(context.positions)
        attention.store(self.layer.input_norm(self.join(hidden, next_ids)), cos, sin, context, cache)

    def join(self, hidden: Tensor, next_ids: Tensor) -> Tensor:
        """hidden [tokens, hidden], next_ids int64 [tokens] -> the layer's input [tokens, hidden]."""
        token = self.token_norm(self.embedding(next_ids))
        return self.join_proj(torch.cat((token, self.hidden_norm(hidden)), dim=-1))

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [n, hidden] -> float32 [n, vocab], by the decoder's head."""
        return self.head.logits(hidden)

    def weight_slots(self) -> Iterator[WeightSlot]:
        """Every tensor of the layer's own, with its place."""
        prefix = f"model.layers.{self.index}."
        yield from self.token_norm.weight_slots(f"{prefix}enorm")
        yield from self.hidden_norm.weight_slots(f"{prefix}hnorm")
        yield from self.join_proj.weight_slots(prefix)
        yield from self.layer.weight_slots(prefix)
        yield from self.norm.weight_slots(f"{prefix}shared_head.norm")

    def ignored_weights(self, name: str) -> bool:
        """All that is not this layer's: the decoder's tensors, further prediction layers, and in the layer the copies
        of embedding and head, rope frequencies, and experts of other ranks."""
        prefix = f"model.layers.{self.index}."
        if not name.startswith(prefix):
            return True
        own = name.removeprefix(prefix)
        return own in COPIES or name.endswith("rotary_emb.inv_freq") or self.layer.is_elsewhere(own)
