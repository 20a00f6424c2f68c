"""Rows of a tensor that is written in place."""

from __future__ import annotations

from torch import Tensor


def put_rows(target: Tensor, rows: Tensor, values: Tensor) -> None:
    """target[rows] = values: target [n, …], rows int64 [m], values [m, …]; of equal rows any one stays. Mutates target.

    Graph compilers write these rows in place. A `scatter_` would say the same, and Inductor copies the whole target for
    it, before and after.
    """
    target.index_put_((rows,), values)
