"""The device side of the persistent batch: what a decode step reads and writes of every row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..models.forward_context import ForwardContext
from ..scheduler.plan import NewRow

NO_DRAFT = -1  # equal to no token


class RowState(NamedTuple):
    """Tensors with one entry per row of the batch, and a last one, the null row, that padding points at.

    A decode step needs nothing else from the host than which rows it computes: token, position and lengths of a row
    come from here, and the step leaves here what the next one starts from. The null row stays at position 0 with a
    block table of null blocks, so padding writes to the null block only.
    """

    last_token: Tensor  # int64 [rows + 1]: the newest token of the row, whose KV is not stored yet
    position: Tensor  # int64 [rows + 1]: its position
    block_table: Tensor  # int32 [rows + 1, max_blocks], padded with the null block
    temperature: Tensor  # float32 [rows + 1]; 1 for a greedy row
    noise_scale: Tensor  # float32 [rows + 1]: 0 for a greedy row, 1 for one that samples
    seed: Tensor  # int64 [rows + 1]
    drafts: Tensor  # int64 [rows + 1, most drafts]: what may follow the newest token, NO_DRAFT where nothing is guessed


class RowTable:
    """The rows' state on the device, and the block table again on the host, where prefill computes slots from it."""

    def __init__(self, num_rows: int, max_blocks: int, device: torch.device, num_drafts: int = 0) -> None:
        count = num_rows + 1
        self.device = device
        self.block_table = np.zeros((num_rows, max_blocks), np.int32)
        self.num_blocks = np.zeros(num_rows, np.int64)
        self.state = RowState(
            last_token=torch.zeros(count, dtype=torch.int64, device=device),
            position=torch.zeros(count, dtype=torch.int64, device=device),
            block_table=torch.zeros((count, max_blocks), dtype=torch.int32, device=device),
            temperature=torch.ones(count, dtype=torch.float32, device=device),
            noise_scale=torch.zeros(count, dtype=torch.float32, device=device),
            seed=torch.zeros(count, dtype=torch.int64, device=device),
            drafts=torch.full((count, num_drafts), NO_DRAFT, dtype=torch.int64, device=device),
        )

    def admit(self, new_rows: list[NewRow]) -> None:
        """Take in requests at their rows, without blocks and drafts."""
        if not new_rows:
            return
        params = [new.params for new in new_rows]
        rows = [new.row for new in new_rows]
        index = self._to_device(rows, torch.int64)
        temperatures = [1.0 if each.is_greedy else each.temperature for each in params]
        state = self.state
        state.last_token[index] = self._to_device([new.token_ids[-1] for new in new_rows], torch.int64)
        state.position[index] = self._to_device([len(new.token_ids) - 1 for new in new_rows], torch.int64)
        state.temperature[index] = self._to_device(temperatures, torch.float32)
        state.noise_scale[index] = self._to_device([float(not each.is_greedy) for each in params], torch.float32)
        state.seed[index] = self._to_device([each.seed for each in params], torch.int64)
        state.drafts[index] = NO_DRAFT
        # A block of whoever had the row before would be written to by drafts that have none of their own.
        state.block_table[index] = 0
        self.block_table[rows] = 0
        self.num_blocks[rows] = 0

    def append_blocks(self, rows: list[int], new_block_ids: list[list[int]]) -> None:
        """More blocks for some of the rows, behind those they have."""
        of_row, columns, block_ids = [], [], []
        for row, added in zip(rows, new_block_ids, strict=True):
            if added:
                start = int(self.num_blocks[row])
                stop = start + len(added)
                self.block_table[row, start:stop] = added
                self.num_blocks[row] = stop
                of_row += [row] * len(added)
                columns += range(start, stop)
                block_ids += added
        if block_ids:
            index = (self._to_device(of_row, torch.int64), self._to_device(columns, torch.int64))
            self.state.block_table.index_put_(index, self._to_device(block_ids, torch.int32))

    def _to_device(self, values: Sequence[float | None], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(self.device)


def commit_tokens(state: RowState, rows: Tensor, token_ids: Tensor, counts: Tensor | int = 1) -> None:
    """Make `token_ids` (int64 [n]) the newest tokens of their rows (int64 [n], padded with the null row), each so many
    positions on.

    Mutates `last_token` and `position`. Several padding entries write the same values to the null row.
    """
    null_row = state.position.shape[0] - 1
    positions = torch.where(rows == null_row, 0, state.position[rows] + counts)
    # scatter_ and not index_put_, of which TorchAir has no form
    state.last_token.scatter_(0, rows, token_ids)
    state.position.scatter_(0, rows, positions)


def decode_context(
    state: RowState, rows: Tensor, positions: Tensor, tokens_per_request: int, block_size: int
) -> ForwardContext:
    """The context of a step in which each of `rows` (int64 [n]) computes `tokens_per_request` tokens from `positions`
    (int64 [n]) on. What has no block goes to the null block. Reads nothing on the host."""
    block_table = state.block_table[rows]  # [n, max_blocks]
    width = block_table.shape[1]
    all_positions = positions.unsqueeze(1)
    if tokens_per_request > 1:
        all_positions = all_positions + torch.arange(tokens_per_request, device=rows.device)  # [n, tokens]
    columns = all_positions // block_size
    blocks = block_table.gather(1, columns.clamp(max=width - 1)).to(torch.int64)
    blocks = torch.where(columns < width, blocks, 0)
    return ForwardContext(
        positions=all_positions.flatten(),
        slots=(blocks * block_size + all_positions % block_size).flatten(),
        block_table=block_table,
        context_lens=(positions + tokens_per_request).to(torch.int32),
        num_decode=rows.shape[0],
        tokens_per_request=tokens_per_request,
    )
