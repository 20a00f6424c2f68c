"""The ops that have more than one body, as a value that layers bind when they are built."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from . import activation, attention, dsa, hints, mla, moe, norm, rope, rows, sampling
from . import linear as plain_linear


@dataclass(frozen=True)
class OpTable:
    """One body per op. Every body of an op has the signature and the meaning of the plain one, its reference. What one
    op hands to another, angles, expert ids, selected tokens, is in the form that the table's own bodies agree on."""

    linear: Callable[..., Tensor]
    head_linear: Callable[..., Tensor]
    rms_norm: Callable[..., Tensor]
    add_rms_norm: Callable[..., tuple[Tensor, Tensor]]
    swiglu: Callable[..., Tensor]
    rotary_angles: Callable[..., tuple[Tensor, Tensor]]
    rotate: Callable[..., Tensor]
    write_kv_cache: Callable[..., None]
    paged_decode_attention: Callable[..., Tensor]
    causal_attention: Callable[..., Tensor]
    write_latent_cache: Callable[..., None]
    mla_decode_attention: Callable[..., Tensor]
    write_index_keys: Callable[..., None]
    lightning_indexer: Callable[..., Tensor]
    sparse_mla_decode_attention: Callable[..., Tensor]
    gate_topk: Callable[..., tuple[Tensor, Tensor]]
    routed_experts: Callable[..., Tensor]
    dispatched_experts: Callable[..., Tensor]
    likeliest: Callable[[Tensor], Tensor]
    put_rows: Callable[..., None]
    side_stream: Callable[[str], AbstractContextManager[object]]
    prefetch: Callable[[Tensor, Tensor], None]


PLAIN = OpTable(
    linear=plain_linear.linear,
    head_linear=plain_linear.head_linear,
    rms_norm=norm.rms_norm,
    add_rms_norm=norm.add_rms_norm,
    swiglu=activation.swiglu,
    rotary_angles=rope.rotary_angles,
    rotate=rope.rotate,
    write_kv_cache=attention.write_kv_cache,
    paged_decode_attention=attention.paged_decode_attention,
    causal_attention=attention.causal_attention,
    write_latent_cache=mla.write_latent_cache,
    mla_decode_attention=mla.mla_decode_attention,
    write_index_keys=dsa.write_index_keys,
    lightning_indexer=dsa.lightning_indexer,
    sparse_mla_decode_attention=dsa.sparse_mla_decode_attention,
    gate_topk=moe.gate_topk,
    routed_experts=moe.routed_experts,
    dispatched_experts=moe.dispatched_experts,
    likeliest=sampling.likeliest,
    put_rows=rows.put_rows,
    side_stream=hints.side_stream,
    prefetch=hints.prefetch,
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

    return replace(
        PLAIN,
        linear=kernels.linear,
        head_linear=kernels.head_linear,
        rms_norm=kernels.rms_norm,
        add_rms_norm=kernels.add_rms_norm,
        swiglu=kernels.swiglu,
        rotate=kernels.rotate,
        write_kv_cache=partial(attention.write_kv_cache, write=kernels.write_rows),
        write_latent_cache=partial(
            mla.write_latent_cache, norm=kernels.rms_norm, rotation=kernels.rotate, write=kernels.write_rows
        ),
        paged_decode_attention=kernels.paged_decode_attention,
        causal_attention=kernels.causal_attention,
        mla_decode_attention=kernels.mla_decode_attention,
        sparse_mla_decode_attention=partial(dsa.sparse_mla_decode_attention, attention=kernels.mla_decode_attention),
        routed_experts=kernels.routed_experts,
        likeliest=sampling.likeliest_by_loops,
    )


def npu_table(with_hints: bool = True) -> OpTable:
    """torch-npu's operators, with the weights of `ops.npu.weights`. Needs `ops.npu.library.load` before anything is
    traced. Hints are for what TorchAir lowers to the graph engine, and must be left out of what is captured."""
    from .npu import activation, attention, cache, dispatch, dsa, linear, moe, norm, rope
    from .npu import hints as npu_hints

    return OpTable(
        linear=linear.linear,
        head_linear=linear.head_linear,
        rms_norm=norm.rms_norm,
        add_rms_norm=norm.add_rms_norm,
        swiglu=activation.swiglu,
        rotary_angles=rope.rotary_angles,
        rotate=rope.rotate,
        write_kv_cache=cache.write_kv_cache,
        paged_decode_attention=attention.paged_decode_attention,
        causal_attention=PLAIN.causal_attention,
        write_latent_cache=cache.write_latent_cache,
        mla_decode_attention=attention.mla_decode_attention,
        write_index_keys=cache.write_index_keys,
        lightning_indexer=dsa.lightning_indexer,
        sparse_mla_decode_attention=dsa.sparse_mla_decode_attention,
        gate_topk=moe.gate_topk,
        routed_experts=moe.routed_experts,
        dispatched_experts=dispatch.dispatched_experts,
        likeliest=PLAIN.likeliest,
        put_rows=cache.put_rows,
        side_stream=npu_hints.side_stream if with_hints else hints.side_stream,
        prefetch=npu_hints.prefetch if with_hints else hints.prefetch,
    )
