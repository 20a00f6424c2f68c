"""The ops that have more than one body, as a value that layers bind when they are built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from . import attention, dsa, mla, moe
from . import linear as plain_linear


@dataclass(frozen=True)
class OpTable:
    """One body per op. Every body of an op has the signature and the meaning of the plain one, its reference."""

    linear: Callable[..., Tensor]
    head_linear: Callable[..., Tensor]
    paged_decode_attention: Callable[..., Tensor]
    mla_decode_attention: Callable[..., Tensor]
    sparse_mla_decode_attention: Callable[..., Tensor]
    routed_experts: Callable[..., Tensor]


PLAIN = OpTable(
    linear=plain_linear.linear,
    head_linear=plain_linear.head_linear,
    paged_decode_attention=attention.paged_decode_attention,
    mla_decode_attention=mla.mla_decode_attention,
    sparse_mla_decode_attention=dsa.sparse_mla_decode_attention,
    routed_experts=moe.routed_experts,
)


class BoundOps:
    """What the layers of one model call through. Faster bodies may take the place of the plain ones between steps."""

    __slots__ = ("table",)

    def __init__(self, table: OpTable = PLAIN) -> None:
        self.table = table


def cuda_table() -> OpTable:
    """The plain bodies, but for those that cannot stand in a CUDA graph."""
    from .cuda.experts import routed_experts

    return replace(PLAIN, routed_experts=routed_experts)


def cpu_table() -> OpTable:
    """The C++ kernels, which are built where no earlier run left them. Raises KernelsUnavailable."""
    from .cpu import kernels

    return OpTable(
        linear=kernels.linear,
        head_linear=kernels.head_linear,
        paged_decode_attention=kernels.paged_decode_attention,
        mla_decode_attention=kernels.mla_decode_attention,
        sparse_mla_decode_attention=partial(dsa.sparse_mla_decode_attention, attention=kernels.mla_decode_attention),
        routed_experts=kernels.routed_experts,
    )
