"""Hints of a model to its compiler, without any arithmetic: what may run side by side, what will be read next.

A backend that has no use for a hint takes these bodies, which do nothing.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor


def side_stream(name: str) -> AbstractContextManager[object]:
    """What is computed inside depends on nothing that follows outside, and may run beside it: `with` this."""
    return nullcontext()


def prefetch(weight: Tensor, after: Tensor) -> None:
    """`weight` is read soon; it may be brought near once `after` has been computed. Mutates nothing."""
