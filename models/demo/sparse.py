"""The sparse demo model: DeepSeek-V3.2, whose lightning indexers choose the tokens that attention reads.

The recipe is that of the model's report (DeepSeek-V3.2-Exp, section 2.1): the trained dense model gets indexers, which
first learn the attention of the frozen model, and then, with attention reading their choice only, all is trained on.
Body and layers are transformers'; its indexer cannot be trained, so this file has one that can.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from model import CONFIG, LAYERS, DemoModel, Prediction
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, DeepseekV32Config, DeepseekV32ForCausalLM
from transformers.models.deepseek_v32.modeling_deepseek_v32 import (
    DeepseekV32DecoderLayer,
    DeepseekV32Indexer,
    apply_rotary_pos_emb,
)

INDEX_CONFIG: dict[str, Any] = {"index_n_heads": 8, "index_head_dim": 32, "index_topk": 64}


class Indexer(DeepseekV32Indexer):
    """Scores I[t, s] = Σ_heads w[t] ReLU(q[t] · k[s]), learned from the attention that they stand in for.

    `topk` is the number of tokens to choose. In the mode "learn" a call leaves its `divergence`, to be trained on: the
    Kullback-Leibler divergence, in nats, of the softmax of the scores from the attention weights, which are summed over
    the heads and brought to sum 1; both over what attention could read. No gradient leaves the indexer. In the mode
    "measure" a call leaves the `shares` of `captured`.
    """

    def __init__(self, config: DeepseekV32Config, layer_index: int) -> None:
        super().__init__(config, layer_index)
        for projection in (self.wq_b, self.wk, self.weights_proj):
            nn.init.normal_(projection.weight, 0, config.initializer_range)
        self.topk = self.index_topk
        self.mode: Literal["run", "learn", "measure"] = "run"
        self.divergence: Tensor
        self.shares: dict[str, float] = {}
        self.scores: Tensor

    def forward(
        self, hidden: Tensor, low_rank_query: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor, *_: Any, **__: Any
    ) -> Tensor:
        """The chosen positions, int64 [batch, tokens, topk]; where there are fewer, some of the future fill up."""
        with torch.set_grad_enabled(self.mode == "learn"):
            self.scores = self._score(hidden.detach(), low_rank_query.detach(), rotary)
        scores = self.scores.detach().masked_fill(~mask, float("-inf"))
        return scores.topk(min(self.topk, scores.shape[-1]), dim=-1).indices

    def _score(self, hidden: Tensor, low_rank_query: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """float32 [batch, tokens, tokens]. The first dimensions of a head are rotated, its halves against each other:
        not the pairs side by side that the main attention rotates."""
        batch, tokens, _ = hidden.shape
        sizes = [self.qk_rope_head_dim, self.head_dim - self.qk_rope_head_dim]
        query = self.wq_b(low_rank_query).view(batch, tokens, self.n_heads, self.head_dim).split(sizes, dim=-1)
        key = self.k_norm(self.wk(hidden))[:, :, None].split(sizes, dim=-1)
        turned_query, turned_key = apply_rotary_pos_emb(query[0], key[0], *rotary, unsqueeze_dim=2)
        queries = torch.cat([turned_query, query[1]], dim=-1).flatten(1, 2)
        keys = torch.cat([turned_key, key[1]], dim=-1).squeeze(2)
        products = functional.relu(queries @ keys.mT).view(batch, tokens, self.n_heads, tokens)
        weights = self.weights_proj(hidden) * (self.n_heads * self.head_dim) ** -0.5
        return (weights[:, :, None] @ products).squeeze(2)

    def observe(self, weights: Tensor, readable: Tensor) -> None:
        """`weights` [batch, tokens, tokens], sum 1, of the attention; `readable` says which of them it computed."""
        with torch.enable_grad():
            logarithms = functional.log_softmax(self.scores.masked_fill(~readable, float("-inf")), dim=-1)
            cross_entropy = -(weights * logarithms.masked_fill(~readable, 0.0)).sum(-1)
            self.divergence = (cross_entropy + torch.xlogy(weights, weights).sum(-1)).mean()


@torch.no_grad()
def captured(indexer: Indexer, weights: Tensor, topk: int) -> dict[str, float]:
    """Shares of the attention weights [batch, tokens, tokens] on `topk` tokens, means over the rows with more tokens.

    On the tokens of the highest scores, on those of the heaviest weights, on the last ones; and the share of rows in
    which the last score chosen and the first one left out are equal.
    """
    tokens = weights.shape[-1]
    position = torch.arange(tokens)
    scores = indexer.scores.detach().masked_fill(position > position[:, None], float("-inf"))[:, topk:]
    weights = weights[:, topk:]
    ranked = scores.topk(topk + 1, dim=-1)
    recent = (position <= position[topk:, None]) & (position > position[topk:, None] - topk)
    return {
        "indexer": weights.gather(-1, ranked.indices[..., :-1]).sum(-1).mean().item(),
        "heaviest": weights.topk(topk, dim=-1).values.sum(-1).mean().item(),
        "last": weights.masked_fill(~recent, 0.0).sum(-1).mean().item(),
        "ties": (ranked.values[..., -1] == ranked.values[..., -2]).float().mean().item(),
    }


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, indices: Tensor, **_: Any
) -> tuple[Tensor, None]:
    """Attention to the indexer's choice for transformers, which the indexer observes. `mask` is the causal one."""
    scores = (query @ key.mT) * scaling
    readable = mask
    if indices.shape[-1] < key.shape[2]:
        readable = mask & torch.zeros_like(scores[:, 0], dtype=torch.bool).scatter_(-1, indices, True)[:, None]
    weights = scores.masked_fill(~readable, float("-inf")).softmax(-1)
    if module.indexer.mode == "learn":
        module.indexer.observe(weights.detach().mean(1), readable[:, 0])
    elif module.indexer.mode == "measure":
        whole = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        module.indexer.shares = captured(module.indexer, whole.mean(1), module.indexer.index_topk)
    return (weights @ value).transpose(1, 2), None


class SparsePrediction(Prediction, DeepseekV32DecoderLayer):
    pass


class SparseModel(DemoModel):
    def mask(self, tokens: int) -> Tensor:
        """bool [1, 1, tokens, tokens], true where attention may read."""
        return torch.ones(1, 1, tokens, tokens, dtype=torch.bool).tril()

    def hidden(self, tokens: Tensor) -> Tensor:
        masks = {"indexed_attention": self.mask(tokens.shape[1])}
        return self.body.model(tokens, masks, use_cache=False).last_hidden_state

    def indexers(self) -> list[Indexer]:
        return [layer.self_attn.indexer for layer in self.decoder_layers()]

    def set_indexers(self, mode: Literal["run", "learn", "measure"], topk: int) -> None:
        for indexer in self.indexers():
            indexer.mode, indexer.topk = mode, topk

    def divergence(self) -> Tensor:
        """Of the last call, a mean over the layers."""
        return torch.stack([indexer.divergence for indexer in self.indexers()]).mean()


def sparse_model() -> SparseModel:
    AttentionInterface.register("indexed", attend)
    config = DeepseekV32Config(**CONFIG, **INDEX_CONFIG)
    config._attn_implementation = "indexed"
    config._experts_implementation = "grouped_mm"
    # the configuration knows the body's layers only; the prediction layer is like the last of them
    model = SparseModel(DeepseekV32ForCausalLM(config), SparsePrediction(config, LAYERS - 1))
    for layer in model.decoder_layers():
        layer.self_attn.indexer = Indexer(config, layer.self_attn.layer_idx)
    return model
