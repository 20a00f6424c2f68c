"""Seeded random weights for a model without a checkpoint (load format dummy)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .weights import LoadableModel

CHUNK_ELEMENTS = 2**20
# A prime, so that rows of no length begin at the same place of the block again before that many rows.
PERIOD = 2_097_143
FACTORS = 1 << 16


@torch.no_grad()
def initialise_dummy_weights(model: LoadableModel, seed: int = 0) -> None:
    """Fills every slot from its tensor's name and `seed` alone: the same on every rank, in any order and sharding, and
    on every device but for rounding.

    Weights of two and more dimensions are normal with 1/sqrt(fan in), so that activations keep their size; norm weights
    are near 1, biases near 0.

    To draw the 11e9 numbers of a large layer takes minutes. So one block of PERIOD float32 numbers is drawn on the
    host, rounded once to each dtype on each device, and tensors are filled from it, chunk by chunk, at the speed of the
    memory: element i of a stored tensor is number (i + offset) % PERIOD of the block, times a factor, where offset and
    factor hang on the name. Each row is thus the block from another place on, and two tensors are not equal even where
    their offsets are. They are random enough to run and to compare runs, not for statistics across rows.
    """
    blocks = _Blocks(seed)
    for slot in model.weight_slots():
        scale, mean = _distribution(slot.name, slot.stored_shape)
        digest = _digest(seed, slot.name)
        # at most 1 % from the scale: a factor, not an order of magnitude
        scale *= 0.99 + 0.02 * (digest // PERIOD % FACTORS) / FACTORS
        source = blocks.of(slot.target.dtype, slot.target.device)
        _fill(slot.target, slot.stored_shape, slot.ranges, digest % PERIOD, source, scale, mean)


@dataclass
class _Blocks:
    """The random numbers, PERIOD of them and then the first CHUNK_ELEMENTS again, so that each chunk is one slice."""

    seed: int
    blocks: dict[tuple[torch.dtype, torch.device], Tensor] = field(default_factory=dict)

    def of(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        block = self.blocks.get((dtype, device))
        if block is None:
            generator = torch.Generator().manual_seed(_digest(self.seed, ""))
            values = torch.randn(PERIOD, generator=generator)
            block = torch.cat((values, values[:CHUNK_ELEMENTS])).to(device, dtype)
            self.blocks[dtype, device] = block
        return block


def _fill(
    target: Tensor,
    shape: tuple[int, ...],
    ranges: tuple[slice, ...],
    position: int,
    source: Tensor,
    scale: float,
    mean: float,
) -> None:
    """Fill `target`, the `ranges` of a stored tensor of `shape` whose first element is number `position`."""
    row_elements = torch.Size(shape[1:]).numel()
    wanted = range(ranges[0].start, ranges[0].stop)
    if row_elements > CHUNK_ELEMENTS:
        for index, row in enumerate(wanted):
            _fill(target[index], shape[1:], ranges[1:], position + row * row_elements, source, scale, mean)
        return
    step = max(1, CHUNK_ELEMENTS // max(1, row_elements))
    for index in range(0, len(wanted), step):
        rows = wanted[index : index + step]
        first = (position + rows.start * row_elements) % PERIOD
        values = source[first : first + len(rows) * row_elements].view(len(rows), *shape[1:])
        part = target[index : index + step]
        torch.mul(values[(slice(None), *ranges[1:])], scale, out=part)
        if mean:
            part.add_(mean)


def _distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """(standard deviation, mean) of a tensor's elements."""
    if len(shape) >= 2:
        return shape[-1] ** -0.5, 0.0
    return (0.02, 0.0) if name.endswith("bias") else (0.02, 1.0)


def _digest(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")
