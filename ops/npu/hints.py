"""Hints as a graph of CANN's graph engine has them; torch-npu's captured calls and eager steps ignore them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

PREFETCH_STREAM = "prefetch"
MOST_PREFETCHED = 64 * 2**20  # bytes, so that what runs keeps most of the level 2 cache; chosen, not measured


def side_stream(name: str) -> AbstractContextManager[object]:
    """As `ops.hints.side_stream`: the nodes made inside carry the name as the label of a stream of their own. The graph
    engine waits between streams where one node reads what another makes."""
    if not torch.compiler.is_compiling():
        return nullcontext()
    from torchair.scope import npu_stream_switch  # pyright: ignore[reportMissingImports]

    return npu_stream_switch(name)


def prefetch(weight: Tensor, after: Tensor) -> None:
    """As `ops.hints.prefetch`, of at most 64 MiB: npu_prefetch, a node Cmo on a stream of its own that waits for
    `after`."""
    if not torch.compiler.is_compiling():
        return
    with side_stream(PREFETCH_STREAM):
        torch.ops.npu.npu_prefetch(weight, after, min(weight.nbytes, MOST_PREFETCHED))
