"""From pooled hidden states to embeddings and scores: the head in the place of a sampler."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..pooling_config import ClassifierConfig, DenseConfig, PoolingConfig
from ..weights import Shard, WeightSlot
from .placement import Placement

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "identity": lambda values: values,
    "relu": functional.relu,
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
    "softmax": lambda values: torch.softmax(values, dim=-1),
    "tanh": torch.tanh,
}


class FloatLinear(nn.Module):
    """`x @ W.T + b` in float32, whatever the model's dtype: a head is small, and its rounding is what callers see."""

    def __init__(self, in_features: int, out_features: int, placement: Placement, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = placement.empty(out_features, in_features, dtype=torch.float32)
        self.bias = placement.empty(out_features, dtype=torch.float32) if bias else None

    def forward(self, vectors: Tensor) -> Tensor:
        return functional.linear(vectors, self.weight, self.bias)

    def weight_slots(self, prefix: str) -> Iterator[WeightSlot]:
        yield WeightSlot(f"{prefix}.weight", self.weight)
        if self.bias is not None:
            yield WeightSlot(f"{prefix}.bias", self.bias)


class DenseStack(nn.Module):
    """sentence-transformers' Dense modules, one after another: float32 [n, in] -> [n, out]."""

    def __init__(self, layers: tuple[DenseConfig, ...], placement: Placement) -> None:
        super().__init__()
        self.configs = layers
        self.layers = nn.ModuleList(
            FloatLinear(layer.in_features, layer.out_features, placement, bias=layer.bias) for layer in layers
        )

    def forward(self, vectors: Tensor) -> Tensor:
        for config, layer in zip(self.configs, self.layers, strict=True):
            vectors = _FUNCTIONS[config.activation](layer(vectors))
        return vectors


class Classifier(nn.Module):
    """Logits of a state: float32 [n, hidden] -> [n, labels]; see `ClassifierConfig.kind`."""

    def __init__(self, config: ClassifierConfig, hidden_size: int, placement: Placement) -> None:
        super().__init__()
        self.kind = config.kind
        self.token_ids = config.token_ids
        # Of two answers the difference is the logit of the second one: softmax over both is the sigmoid of it.
        self.reads_difference = config.kind == "tokens" and len(config.token_ids) == 2 and config.num_labels == 1
        between = {"bert": "tanh", "roberta": "tanh", "reward": "relu"}.get(config.kind)
        self.between = None if between is None else _FUNCTIONS[between]
        self.dense = None if between is None else FloatLinear(hidden_size, hidden_size, placement)
        if config.kind == "tokens":
            self.output = FloatLinear(hidden_size, len(config.token_ids), placement, bias=False)
        else:
            self.output = FloatLinear(hidden_size, config.num_labels, placement, bias=config.kind != "score")

    def forward(self, vectors: Tensor) -> Tensor:
        if self.dense is not None and self.between is not None:
            vectors = self.between(self.dense(vectors))
        logits = self.output(vectors)
        if self.reads_difference:
            return logits[:, 1:] - logits[:, :1]
        return logits

    def weight_slots(self, prefix: str, head_name: str, vocab_size: int) -> Iterator[WeightSlot]:
        """Slots; `prefix` is that of the body's tensors, `head_name` the language model's head of kind tokens."""
        if self.kind == "tokens":
            for row, token_id in enumerate(self.token_ids):
                shard = Shard(0, token_id, token_id + 1, vocab_size)
                yield WeightSlot(head_name, self.output.weight[row : row + 1], shard)
            return
        first, last = {
            "bert": (f"{prefix}pooler.dense", "classifier"),
            "roberta": ("classifier.dense", "classifier.out_proj"),
            "reward": ("score.0", "score.2"),
            "score": ("", "score"),
        }[self.kind]
        if self.dense is not None:
            yield from self.dense.weight_slots(first)
        yield from self.output.weight_slots(last)


class PoolingHead(nn.Module):
    """What follows pooling; float32 throughout."""

    def __init__(self, config: PoolingConfig, hidden_size: int, placement: Placement) -> None:
        super().__init__()
        self.config = config
        self.dense = DenseStack(config.dense, placement)
        self.classifier: Classifier | None = None
        if config.classifier is not None:
            self.classifier = Classifier(config.classifier, hidden_size, placement)

    def embed(self, states: Tensor, dimensions: int | None, use_activation: bool | None) -> Tensor:
        """states float32 [n, hidden] -> [n, elements]: through the dense layers, cut to `dimensions`, and of length 1
        unless that is not wanted (None: as the model's files say)."""
        vectors = self.dense(states)[:, :dimensions]
        normalize = self.config.normalize if use_activation is None else use_activation
        return functional.normalize(vectors, dim=-1) if normalize else vectors

    def classify(self, states: Tensor, use_activation: bool | None) -> Tensor:
        """states float32 [n, hidden] -> [n, labels]: scores, or logits where no activation is wanted."""
        assert self.classifier is not None and self.config.classifier is not None
        logits = self.classifier(states)
        return logits if use_activation is False else _FUNCTIONS[self.config.classifier.activation](logits)
