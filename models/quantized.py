"""Block-scaled fp8 weights, as DeepSeek-V3 publishes them (arXiv:2412.19437, section 3.3), back to floats."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import Fp8BlockConfig


def scale_shape(weight_shape: tuple[int, ...], block: Fp8BlockConfig) -> tuple[int, int]:
    """[block rows, block columns] of the scales of a weight [rows, columns]; the last blocks may be cut."""
    rows, columns = weight_shape
    return -(-rows // block.block_rows), -(-columns // block.block_columns)


def dequantized_rows(
    stored: Tensor, scales: Tensor, block: Fp8BlockConfig, *, first_row: int, first_column: int
) -> Tensor:
    """A part of a weight in float32: each element times the scale of the block it lies in.

    stored float8_e4m3fn [rows, columns], the part of the weight that begins at (first_row, first_column), which need
    not be a block's corner; scales [block rows, block columns] of the whole weight, any float dtype. The product is
    taken in float32, as in the published conversion script; the caller rounds it to the target's dtype.
    """
    rows = torch.arange(first_row, first_row + stored.shape[0]) // block.block_rows
    columns = torch.arange(first_column, first_column + stored.shape[1]) // block.block_columns
    return stored.float().mul_(scales.float()[rows][:, columns])
