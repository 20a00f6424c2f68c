"""Seeded random weights for a model without a checkpoint (load format dummy)."""

from __future__ import annotations

import hashlib

import torch

from .weights import LoadableModel, WeightSlot

CHUNK_ELEMENTS = 2**22


@torch.no_grad()
def initialise_dummy_weights(model: LoadableModel, seed: int = 0) -> None:
    """Fills every slot from its tensor's name and `seed` alone: the same on every rank, in any order and sharding.

    Weights of two and more dimensions are normal with 1/sqrt(fan in), so that activations keep their size; norm weights
    are near 1, biases near 0. float32 on the host, rounded to the target's dtype.
    """
    for slot in model.weight_slots():
        _fill(slot, seed)


def _fill(slot: WeightSlot, seed: int) -> None:
    shape = slot.stored_shape
    ranges = slot.ranges
    scale, shift = _distribution(slot.name, shape)
    row_elements = torch.Size(shape[1:]).numel()
    # chunks of whole stored rows, each with a seed of its own: a shard makes only the chunks it needs
    step = max(1, CHUNK_ELEMENTS // max(1, row_elements))
    for first in range(0, shape[0], step):
        start, stop = max(first, ranges[0].start), min(first + step, ranges[0].stop)
        if start >= stop:
            continue
        generator = torch.Generator().manual_seed(_seed(seed, slot.name, first))
        rows = min(step, shape[0] - first)
        values = torch.randn((rows, *shape[1:]), generator=generator).mul_(scale).add_(shift)
        values = values[(slice(start - first, stop - first), *ranges[1:])]
        slot.target[start - ranges[0].start : stop - ranges[0].start].copy_(values)


def _distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """(standard deviation, mean) of a tensor's elements."""
    if len(shape) >= 2:
        return shape[-1] ** -0.5, 0.0
    return (0.02, 0.0) if name.endswith("bias") else (0.02, 1.0)


def _seed(seed: int, name: str, chunk: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}/{chunk}".encode()).digest()[:8], "little")
