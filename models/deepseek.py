"""DeepSeek-V2, V3 and V3.2: latent attention, sparse in the last, and experts with shared ones beside them."""

from __future__ import annotations

from .layers.decoder import CausalDecoder, DecoderLayer
from .layers.dsa import SharingMLAAttention, SparseMLAAttention
from .layers.mla import MLAAttention
from .layers.mlp import GatedMLP
from .layers.moe import MoE
from .layers.placement import Placement


class DeepseekV2ForCausalLM(CausalDecoder):
    """DeepSeek-V2 (arXiv:2405.04434): softmax routing, limited to groups by their best expert."""

    def build_layer(self, index: int, placement: Placement) -> DecoderLayer:
        config = self.config
        if config.moe is not None and index in config.moe.layers:
            mlp = MoE(config.hidden_size, config.moe, index, placement, bias=config.mlp_bias)
        else:
            mlp = GatedMLP(config.hidden_size, config.intermediate_size, placement, bias=config.mlp_bias)
        return DecoderLayer(config, self.build_attention(index, placement), mlp, placement)

    def build_attention(self, index: int, placement: Placement) -> MLAAttention:
        config = self.config
        if config.mla is None:
            raise ValueError(f"{config.architecture} needs latent attention in its config (kv_lora_rank): None")
        return MLAAttention(config, config.mla, placement)


class DeepseekV3ForCausalLM(DeepseekV2ForCausalLM):
    """DeepSeek-V3, R1 (arXiv:2412.19437), Kimi-K2: sigmoid routing with a correction bias, groups by their top two."""


class DeepseekV32ForCausalLM(DeepseekV3ForCausalLM):
    """DeepSeek-V3.2 (arXiv:2512.02556): V3 with sparse attention, an indexer of its own in every layer."""

    def build_attention(self, index: int, placement: Placement) -> MLAAttention:
        config = self.config
        if config.mla is None or config.indexer is None:
            raise ValueError(f"{config.architecture} needs an indexer in its config (index_topk): None")
        if index in config.indexer.sharing_layers:
            return SharingMLAAttention(config, config.mla, placement)
        return SparseMLAAttention(config, config.mla, config.indexer, placement)
