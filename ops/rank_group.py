"""The ranks that one collective is among."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RankGroup:
    """This rank's place in a group of ranks. Size 1: no communication."""

    size: int = 1
    rank: int = 0
    name: str = ""  # of torch's process group, which collectives in a graph carry
    communicator: str = ""  # the backend's own name of it, which fused operators want: HCCL's; "": that of torch

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 <= self.rank < self.size:
            raise ValueError(f"a rank must be in [0, size of its group): {self.rank} of {self.size}")

    @property
    def communicator_name(self) -> str:
        return self.communicator or self.name
