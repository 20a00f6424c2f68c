"""Qwen2 and Qwen3, dense and mixture of experts."""

from __future__ import annotations

from .layers.attention import Attention
from .layers.decoder import CausalDecoder, DecoderLayer
from .layers.mlp import GatedMLP
from .layers.moe import MoE
from .layers.placement import Placement


class Qwen2ForCausalLM(CausalDecoder):
    """Qwen2 and Qwen2.5 (arXiv:2407.10671): biases on Q, K and V; a sliding window on some layers."""

    def build_layer(self, index: int, placement: Placement) -> DecoderLayer:
        config = self.config
        attention = Attention(config, index, placement)
        mlp = GatedMLP(config.hidden_size, config.intermediate_size, placement)
        return DecoderLayer(config, attention, mlp, placement)


class Qwen3ForCausalLM(Qwen2ForCausalLM):
    """Qwen3 (arXiv:2505.09388): a norm on every head's query and key instead of the biases."""


class Qwen3MoeForCausalLM(CausalDecoder):
    """Qwen3 with routed experts in the layers that `config.moe` names."""

    def build_layer(self, index: int, placement: Placement) -> DecoderLayer:
        config = self.config
        attention = Attention(config, index, placement)
        if config.moe is not None and index in config.moe.layers:
            mlp = MoE(config.hidden_size, config.moe, index, placement)
        else:
            mlp = GatedMLP(config.hidden_size, config.intermediate_size, placement)
        return DecoderLayer(config, attention, mlp, placement)
