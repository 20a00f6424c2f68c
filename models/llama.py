"""Llama and Mistral: grouped-query attention and a gated feed-forward layer."""

from __future__ import annotations

from .layers.attention import Attention
from .layers.decoder import CausalDecoder, DecoderLayer
from .layers.mlp import GatedMLP
from .layers.placement import Placement


class LlamaForCausalLM(CausalDecoder):
    """Llama 2 and 3 (arXiv:2407.21783); projections may have biases, rope may be scaled."""

    def build_layer(self, index: int, placement: Placement) -> DecoderLayer:
        config = self.config
        attention = Attention(config, index, placement)
        mlp = GatedMLP(config.hidden_size, config.intermediate_size, placement, bias=config.mlp_bias)
        return DecoderLayer(config, attention, mlp, placement)


class MistralForCausalLM(LlamaForCausalLM):
    """Mistral 7B (arXiv:2310.06825): Llama's layers, with a sliding window where the config has one."""
