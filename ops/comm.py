"""Collectives as functions of tensors: they compile into a graph, with the name of their group.

Each takes the tensor of this rank and returns a new one; nothing is mutated. Tensors have the same shape and dtype on
every rank. In a group of one they return the tensor itself. A group of more ranks is one of torch's process groups, by
its name; on an NPU TorchAir asks that group for HCCL's name when it lowers a graph.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .rank_group import RankGroup


def all_reduce(tensor: Tensor, group: RankGroup) -> Tensor:
    """The sum over the ranks: [...] -> [...]."""
    if group.size == 1:
        return tensor
    return _wait(_operators().all_reduce(tensor.contiguous(), "sum", _named(group)))


def all_gather(tensor: Tensor, group: RankGroup) -> Tensor:
    """The ranks' tensors one after another: [n, ...] -> [size * n, ...]."""
    if group.size == 1:
        return tensor
    return _wait(_operators().all_gather_into_tensor(tensor.contiguous(), group.size, _named(group)))


def reduce_scatter(tensor: Tensor, group: RankGroup) -> Tensor:
    """This rank's part of the sum over the ranks: [size * n, ...] -> [n, ...]. Raises ValueError where that does not
    divide."""
    _need_equal_parts("reduce_scatter", tensor, group)
    if group.size == 1:
        return tensor
    return _wait(_operators().reduce_scatter_tensor(tensor.contiguous(), "sum", group.size, _named(group)))


def all_to_all(tensor: Tensor, group: RankGroup) -> Tensor:
    """Part r goes to rank r, and what comes from rank r is part r of the result: [size * n, ...] -> [size * n, ...].
    Raises ValueError where that does not divide."""
    _need_equal_parts("all_to_all", tensor, group)
    if group.size == 1:
        return tensor
    parts = [tensor.shape[0] // group.size] * group.size
    return _wait(_operators().all_to_all_single(tensor.contiguous(), parts, parts, _named(group)))


def _wait(tensor: Tensor) -> Tensor:
    return _operators().wait_tensor(tensor)


def _operators() -> Any:
    # Gives the operators their shapes for tracing. Half a second, which a process of one rank does not spend.
    import torch.distributed._functional_collectives

    return torch.ops._c10d_functional


def _named(group: RankGroup) -> str:
    if not group.name:
        raise ValueError(f"a group of ranks needs the name of its process group to communicate: {group}")
    return group.name


def _need_equal_parts(collective: str, tensor: Tensor, group: RankGroup) -> None:
    if tensor.shape[0] % group.size:
        raise ValueError(
            f"{collective} needs a first size that is a multiple of its {group.size} ranks: {tensor.shape[0]}"
        )
