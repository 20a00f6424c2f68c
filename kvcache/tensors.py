"""The cache's memory on a device."""

from __future__ import annotations

import math

import numpy as np
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
                _zeros((num_blocks, block_size, part.heads, part.dim), TORCH_DTYPES[spec.dtype], device)
                for part in group.parts
            )
    return caches


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.zeros; on a CPU through calloc, whose pages take memory only once they are written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
