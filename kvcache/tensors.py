"""The cache's memory on a device."""

from __future__ import annotations

import torch
from torch import Tensor

from .spec import KVCacheSpec

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def allocate_kv_tensors(
    spec: KVCacheSpec, num_blocks: int, block_size: int, device: torch.device
) -> list[tuple[Tensor, ...]]:
    """Per layer, one tensor [num_blocks, block_size, heads, dim] for each part of its group.

    Zeroed: attention reads whole blocks and gives the unwritten tokens weight 0, which a NaN in fresh memory would
    turn into NaN.
    """
    caches: list[tuple[Tensor, ...]] = [()] * sum(len(group.layers) for group in spec.groups)
    for group in spec.groups:
        for layer in group.layers:
            caches[layer] = tuple(
                torch.zeros(num_blocks, block_size, part.heads, part.dim, dtype=TORCH_DTYPES[spec.dtype], device=device)
                for part in group.parts
            )
    return caches
