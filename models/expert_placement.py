"""Which rank holds which experts: a pattern over ranks, layers and experts, some of them in several copies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ExpertPlacement:
    """Per rank and routed layer the experts it holds, ascending: `experts[rank][layer]`, all of one length in a layer.

    The experts of all ranks, one rank's after another's, are a layer's *physical* experts, redundant copies included;
    the checkpoint's are its *logical* ones. Layers are counted among the routed ones only, those of multi-token
    prediction behind the decoder's.
    """

    experts: tuple[tuple[tuple[int, ...], ...], ...]
    num_experts: int  # logical

    @classmethod
    def from_pattern(cls, pattern: Sequence[Sequence[Sequence[int]]]) -> ExpertPlacement:
        """From [ranks][layers][experts], 1 where the rank holds the expert and else 0. Raises ValueError where a layer
        lacks an expert, or ranks hold unequal numbers of them, which dispatch to ranks does not allow."""
        if not len(pattern) or not len(pattern[0]):
            raise ValueError(f"an expert placement must have ranks and layers: {len(pattern)} ranks")
        num_layers, num_experts = len(pattern[0]), len(pattern[0][0])
        for rank, layers in enumerate(pattern):
            if len(layers) != num_layers or any(len(row) != num_experts for row in layers):
                raise ValueError(
                    f"an expert placement must have the same layers and experts on every rank: rank {rank}"
                )
        held = tuple(
            tuple(tuple(expert for expert, holds in enumerate(row) if holds) for row in layers) for layers in pattern
        )
        for layer in range(num_layers):
            counts = {len(layers[layer]) for layers in held}
            if len(counts) > 1:
                raise ValueError(f"layer {layer} must have equally many experts on every rank: {sorted(counts)}")
            missing = set(range(num_experts)).difference(*(layers[layer] for layers in held))
            if missing:
                raise ValueError(f"layer {layer} must have every expert on some rank, it lacks: {sorted(missing)}")
        return cls(held, num_experts)

    def local(self, rank: int, layer: int) -> tuple[int, ...]:
        """The logical experts of a rank, in order of their physical place."""
        return self.experts[rank][layer]

    def selection(self, rank: int, layer: int) -> tuple[int, ...]:
        """For each logical expert the physical one that tokens of `rank` go to. An expert's copies take turns among the
        ranks, so that each serves its share of them."""
        copies: list[list[int]] = [[] for _ in range(self.num_experts)]
        physical = 0
        for layers in self.experts:
            for expert in layers[layer]:
                copies[expert].append(physical)
                physical += 1
        return tuple(places[rank % len(places)] for places in copies)
