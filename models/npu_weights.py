"""Brings loaded weights into the layouts of the NPU's ops, once, so that no step does."""

from __future__ import annotations

from torch import nn

from ..ops.npu.weights import pack_experts
from .layers.mla import MLAAttention
from .layers.moe import MoE


def pack_for_npu(model: nn.Module) -> None:
    """Packs every layer of a model, or of a drafter, that is on an NPU and has its weights: experts as the grouped
    product takes them, [experts, inputs, outputs] in NZ, and what absorbed attention multiplies with, contiguous. The
    weight slots of packed layers are void. Calling it twice does what calling it once does."""
    for module in model.modules():
        if isinstance(module, MoE):
            module.pack(pack_experts)
        elif isinstance(module, MLAAttention):
            module.pack_up_projection()
