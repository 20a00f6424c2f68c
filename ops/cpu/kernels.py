"""The C++ kernels with the names and signatures of the plain bodies.

They take tensors on the CPU in float32, bfloat16 or float16, add up in float32, and read nothing that their result does
not depend on. A row's result does not depend on the other rows of a call, nor on the number of threads; only large
calls of `linear` and `routed_experts` go to the library where that is faster, and its order of summation is its own.
Importing this module loads the library: see `build.load_kernels` for what that can raise.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from .. import activation, attention, moe, norm, rope
from ..attention import per_token
from . import build

_FORM = build.loaded().form
_ops = torch.ops.omni
_Given = ParamSpec("_Given")
_Made = TypeVar("_Made")

# Tokens per call and rows per expert from which AVX-512 machines leave experts to the library, whose kernels for many
# rows are made for them. More tokens than a compiled graph has: the plain body cannot stand in one.
_PREFILL_TOKENS, _PREFILL_ROWS = 512, 64


@torch.library.register_fake("omni::linear")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("omni::head_linear")
def _(x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], weight.shape[2 if transposed else 1]))


@torch.library.register_fake("omni::paged_decode_attention")
def _(query: Tensor, key_cache: Tensor, value_cache: Tensor, *rest: object) -> Tensor:
    return query.new_empty((query.shape[0], query.shape[1], value_cache.shape[3]))


@torch.library.register_fake("omni::mla_decode_attention")
def _(query_latent: Tensor, *rest: object) -> Tensor:
    return query_latent.new_empty(query_latent.shape)


@torch.library.register_fake("omni::routed_experts")
def _(hidden: Tensor, *rest: object) -> Tensor:
    return hidden.new_empty(hidden.shape)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `ops.linear.linear`."""
    return _ops.linear(x, weight, bias)


def head_linear(x: Tensor, weight: Tensor, transposed: bool = False) -> Tensor:
    """As `ops.linear.head_linear`."""
    return _ops.head_linear(x, weight, transposed)


def paged_decode_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """As `ops.attention.paged_decode_attention`; a row that sees nothing (context_len 0) comes out as zeros."""
    block_table, context_lens = per_token(block_table, context_lens, query.shape[0], key_cache.shape[1])
    return _ops.paged_decode_attention(
        query, key_cache, value_cache, block_table, context_lens, scale, -1 if window is None else window
    )


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None = None,
    selected: Tensor | None = None,
) -> Tensor:
    """As `ops.attention.causal_attention`. Sparse selections go to the library, and bfloat16 where that has the
    instructions for it and we do not use the matrix unit; its fast path takes values of the size of keys only."""
    library = _FORM == "avx512_bf16" and query.dtype == torch.bfloat16 and query.shape[2] == value.shape[2]
    if selected is not None or library:
        return attention.causal_attention(query, key, value, scale, window, selected)
    return _ops.causal_attention(query, key, value, scale, -1 if window is None else window)


def mla_decode_attention(
    query_latent: Tensor,
    query_rope: Tensor,
    latent_cache: Tensor,
    rope_key_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    scale: float,
) -> Tensor:
    """As `ops.mla.mla_decode_attention`; a row that sees nothing (context_len 0) comes out as zeros."""
    block_table, context_lens = per_token(block_table, context_lens, query_latent.shape[0], latent_cache.shape[1])
    return _ops.mla_decode_attention(
        query_latent, query_rope, latent_cache, rope_key_cache, block_table, context_lens, scale
    )


def routed_experts(hidden: Tensor, weights: Tensor, expert_ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """As `ops.moe.routed_experts`."""
    tokens, experts_per_token = expert_ids.shape
    if (
        tokens >= _PREFILL_TOKENS
        and tokens * experts_per_token > _PREFILL_ROWS * gate_up.shape[0]
        and (_FORM == "avx512_bf16" or (_FORM == "avx512" and hidden.dtype == torch.float32))
        and hidden.dtype != torch.float16
    ):
        return moe.routed_experts(hidden, weights, expert_ids, gate_up, down)
    return _ops.routed_experts(hidden, weights, expert_ids, gate_up, down)


def _without_a_graph(plain: Callable[_Given, _Made]) -> Callable[[Callable[_Given, _Made]], Callable[_Given, _Made]]:
    """For kernels that only steps without a graph use: a graph gets `plain`, which its compiler fuses with what is
    before and behind it."""

    def choose(kernel: Callable[_Given, _Made]) -> Callable[_Given, _Made]:
        @wraps(kernel)
        def body(*args: _Given.args, **kwargs: _Given.kwargs) -> _Made:
            return plain(*args, **kwargs) if torch.compiler.is_compiling() else kernel(*args, **kwargs)

        return body

    return choose


@_without_a_graph(norm.rms_norm)
def rms_norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """As `ops.norm.rms_norm`."""
    return _ops.rms_norm(hidden, weight, epsilon)


@_without_a_graph(norm.add_rms_norm)
def add_rms_norm(hidden: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """As `ops.norm.add_rms_norm`."""
    return _ops.add_rms_norm(hidden, residual, weight, epsilon)


@_without_a_graph(activation.swiglu)
def swiglu(gate_up: Tensor) -> Tensor:
    """As `ops.activation.swiglu`."""
    return _ops.swiglu(gate_up)


@_without_a_graph(rope.rotate)
def rotate(heads: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """As `ops.rope.rotate`."""
    return _ops.rotate(heads, cos, sin, interleaved)


@_without_a_graph(attention.write_rows)
def write_rows(rows: Tensor, cache: Tensor, slots: Tensor) -> None:
    """As `ops.attention.write_rows`; slots must not be negative."""
    _ops.write_cache(rows, cache, slots)
