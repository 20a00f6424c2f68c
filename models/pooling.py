"""A decoder or encoder whose hidden states are pooled: `PoolingModel`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from .bert import BertEncoder
from .config import ModelConfig
from .forward_context import ForwardContext
from .layers.decoder import CausalDecoder
from .layers.placement import Placement
from .layers.pooling import PoolingHead
from .parallel import ParallelLayout
from .pooling_config import PoolingConfig
from .registry import resolve
from .weights import WeightSlot

_DECODER_PREFIX = "model."  # of a decoder's slots
_PREFIXES = ("model.", "bert.", "roberta.", "")  # of the body's tensors in files; a body that was saved alone has none


class PoolingModel(nn.Module):
    """The body, as it stands in a model that generates but without its head, and the head that pools need."""

    def __init__(
        self,
        config: ModelConfig,
        pooling: PoolingConfig,
        layout: ParallelLayout,
        *,
        dtype: torch.dtype,
        device: torch.device,
        stored_names: Mapping[str, object],
    ) -> None:
        """`stored_names`: those of the checkpoint's tensors, by which the body's prefix is found."""
        super().__init__()
        self.config = config
        # A decoder without a head of its own: what it would have is not pooled.
        bare = replace(config, tie_word_embeddings=True)
        self.body: CausalDecoder | BertEncoder = resolve(config.architecture).load_class()(
            bare, layout, dtype=dtype, device=device
        )
        self.ops = self.body.ops
        self.head = PoolingHead(pooling, config.hidden_size, Placement(layout, dtype, device, self.ops))
        probe = "embed_tokens.weight" if config.encoder is None else "embeddings.word_embeddings.weight"
        self.prefix = next((prefix for prefix in _PREFIXES if f"{prefix}{probe}" in stored_names), "")
        self.head_name = f"{self.prefix}{probe}" if config.tie_word_embeddings else "lm_head.weight"

    def forward(self, input_ids: Tensor, context: ForwardContext, caches: list[tuple[Tensor, ...]]) -> Tensor:
        """input_ids int64 [tokens] -> [tokens, hidden]; writes `caches`, of which an encoder has none."""
        return self.body(input_ids, context, caches)

    def weight_slots(self) -> Iterator[WeightSlot]:
        """Every tensor of the checkpoint's own files that is needed; those of dense layers are `DenseWeights`'."""
        for slot in self.body.weight_slots():
            yield replace(slot, name=self.prefix + slot.name.removeprefix(_DECODER_PREFIX))
        if self.head.classifier is not None:
            yield from self.head.classifier.weight_slots(self.prefix, self.head_name, self.config.vocab_size)

    def ignored_weights(self, name: str) -> bool:
        """Tensors that files may hold and nobody reads: heads that generate, and what the body ignores."""
        if name.startswith(("lm_head.", "cls.")):
            return True
        if not name.startswith(self.prefix):
            return False
        own = name.removeprefix(self.prefix)
        return self.body.ignored_weights(_DECODER_PREFIX + own if self.config.encoder is None else own)


class DenseWeights:
    """The tensors of one dense layer, in a folder of its own."""

    def __init__(self, model: PoolingModel, index: int) -> None:
        self.layer = model.head.dense.layers[index]

    def weight_slots(self) -> Iterator[WeightSlot]:
        yield from self.layer.weight_slots("linear")  # type: ignore[operator]

    def ignored_weights(self, name: str) -> bool:
        return False
