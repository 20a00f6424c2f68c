"""How a model is split over ranks: the frozen `ParallelLayout` that layers are built with and the loader reads by."""

from __future__ import annotations

from dataclasses import dataclass

from ..ops.rank_group import RankGroup
from .expert_placement import ExpertPlacement


@dataclass(frozen=True)
class ParallelLayout:
    """Sizes, this rank's places, and the names of the groups, which only running needs.

    Over the tensor group attention heads and the rows and columns of dense layers are split, and its ranks compute the
    same tokens. Over the expert group whole routed experts are split; it holds tensor groups whole, so its size is a
    multiple of theirs, and ranks of different tensor groups have tokens of their own. Without an expert group each
    expert is split like a dense layer.
    """

    tensor_size: int = 1
    tensor_rank: int = 0
    expert_size: int = 1
    expert_rank: int = 0
    tensor_group: str = ""  # names of torch's process groups
    expert_group: str = ""
    expert_communicator: str = ""  # HCCL's name of the expert group
    placement: ExpertPlacement | None = None  # of experts; None: evenly, in order

    def __post_init__(self) -> None:
        if self.tensor_size < 1 or not 0 <= self.tensor_rank < self.tensor_size:
            raise ValueError(f"tensor rank must be in [0, tensor size): {self.tensor_rank} of {self.tensor_size}")
        if self.expert_size < 1 or not 0 <= self.expert_rank < self.expert_size:
            raise ValueError(f"expert rank must be in [0, expert size): {self.expert_rank} of {self.expert_size}")
        if self.expert_size > 1 and self.expert_size % self.tensor_size:
            raise ValueError(
                f"the expert parallel size must be a multiple of the tensor parallel size {self.tensor_size}: "
                f"{self.expert_size}"
            )
        if self.expert_size > 1 and self.expert_rank % self.tensor_size != self.tensor_rank:
            raise ValueError(
                f"expert ranks must count tensor group after tensor group, so that of tensor rank {self.tensor_rank} "
                f"of {self.tensor_size} cannot be: {self.expert_rank}"
            )
        if self.placement is not None and len(self.placement.experts) != self.expert_size:
            raise ValueError(
                f"the expert placement must be of the {self.expert_size} ranks of the expert group: "
                f"{len(self.placement.experts)}"
            )

    @property
    def tensor(self) -> RankGroup:
        return RankGroup(self.tensor_size, self.tensor_rank, self.tensor_group)

    @property
    def expert(self) -> RankGroup:
        return RankGroup(self.expert_size, self.expert_rank, self.expert_group, self.expert_communicator)

    def share(self, total: int, what: str) -> tuple[int, int]:
        """This rank's half-open range of `total` equal units; refuses what does not divide."""
        if total % self.tensor_size:
            raise ValueError(f"{what} must be divisible by the tensor parallel size {self.tensor_size}: {total}")
        size = total // self.tensor_size
        return self.tensor_rank * size, (self.tensor_rank + 1) * size

    def experts(self, num_experts: int, layer: int) -> tuple[int, ...]:
        """The experts that this rank holds whole of a layer, counted among the routed ones; refuses what does not
        divide, and a placement of another number of experts or of fewer layers."""
        if self.placement is None:
            if num_experts % self.expert_size:
                raise ValueError(
                    f"the number of experts must be divisible by the expert parallel size {self.expert_size}: "
                    f"{num_experts}"
                )
            size = num_experts // self.expert_size
            return tuple(range(self.expert_rank * size, (self.expert_rank + 1) * size))
        if self.placement.num_experts != num_experts:
            raise ValueError(
                f"the expert placement must be of the model's {num_experts} experts: {self.placement.num_experts}"
            )
        num_layers = len(self.placement.experts[0])
        if layer >= num_layers:
            raise ValueError(f"the expert placement has {num_layers} routed layers and the model more: {layer + 1}")
        return self.placement.local(self.expert_rank, layer)


ONE_RANK = ParallelLayout()  # which holds everything
