"""How a model is split over ranks: the frozen `ParallelLayout` that layers are built with and the loader reads by."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ParallelLayout:
    """Sizes and this rank's place. Only size 1 is built so far; layers already ask it for their share."""

    tensor_size: int = 1
    tensor_rank: int = 0

    def __post_init__(self) -> None:
        if self.tensor_size < 1 or not 0 <= self.tensor_rank < self.tensor_size:
            raise ValueError(f"tensor rank must be in [0, tensor size): {self.tensor_rank} of {self.tensor_size}")

    def share(self, total: int, what: str) -> tuple[int, int]:
        """This rank's half-open range of `total` equal units; refuses what does not divide."""
        if total % self.tensor_size:
            raise ValueError(f"{what} must be divisible by the tensor parallel size {self.tensor_size}: {total}")
        size = total // self.tensor_size
        return self.tensor_rank * size, (self.tensor_rank + 1) * size
