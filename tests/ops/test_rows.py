"""Rows that are written in place, and stay in place where a graph compiler writes them."""

from __future__ import annotations

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from omni_engine.ops.npu.cache import put_rows as put_rows_by_scatter
from omni_engine.ops.rows import put_rows

BODIES = pytest.mark.parametrize("body", [put_rows, put_rows_by_scatter], ids=["plain", "npu"])


@BODIES
@pytest.mark.parametrize("shape", [(40,), (40, 6), (40, 3, 5)], ids=str)
def test_rows_are_written_and_no_others(body, shape):
    target = torch.randn(shape)
    before, rows, values = target.clone(), torch.tensor([7, 0, 39]), torch.randn(3, *shape[1:])
    body(target, rows, values)
    expected = before.clone()
    for row, value in zip(rows.tolist(), values, strict=True):
        expected[row] = value
    assert torch.equal(target, expected) and not torch.equal(target, before)


@pytest.mark.parametrize("body", [put_rows, pytest.param(put_rows_by_scatter, id="control")])
def test_inductor_copies_nothing_else(body):
    target, rows = torch.zeros(4099, 64), torch.tensor([3, 4098])

    def step(target: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        body(target, rows, values * 2)
        return values + 1

    with torch.inference_mode():
        _, code = run_and_get_code(torch.compile(step, dynamic=False), target, rows, torch.ones(2, 64))
    assert target[4098].eq(2).all() and target.count_nonzero() == 128
    is_copied = str(4099 * 64) in "".join(code).replace("L", "")
    assert is_copied == (body is put_rows_by_scatter)
