"""The decode step as one pure function of tensors: the program that a graph backend captures, gear by gear."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from ..models.forward_context import ForwardContext
from ..ops.sampling import gumbel_noise
from ..ops.table import BoundOps
from .row_state import RowState, commit_tokens

SAMPLERS = ("greedy", "gumbel", "split")


class Decoder(Protocol):
    """What the runner asks of a model."""

    ops: BoundOps  # what its layers call through

    def forward(self, input_ids: Tensor, context: ForwardContext, caches: list[tuple[Tensor, ...]]) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...


class DecodeStep(nn.Module):
    """One token for each of `n` rows, from embedding to the next step's inputs.

    Everything that changes from step to step is a tensor of fixed shape, and nothing is read on the host. `sampler`
    says what stands behind the logits: `greedy` takes the likeliest token; `gumbel` draws with the row's temperature
    and seed; `split` ends at the logits, for rows with masks, penalties, truncation or log probabilities, whose tokens
    are chosen outside and handed to `RowTable.commit`.
    """

    def __init__(self, model: Decoder, sampler: str) -> None:
        super().__init__()
        assert sampler in SAMPLERS
        self.model = model
        self.sampler = sampler

    def forward(self, rows: Tensor, tensors: tuple[Tensor, ...], caches: list[tuple[Tensor, ...]]) -> Tensor:
        """rows int64 [n], padded with the null row -> token ids int64 [n], or with `split` logits float32 [n, vocab].
        `tensors` are those of a `RowState`, as the plain tuple that exporters know.

        Mutates the caches and, unless `split`, `last_token` and `position` of the rows.
        """
        state = RowState(*tensors)
        positions = state.position[rows]  # [n]
        block_table = state.block_table[rows]  # [n, max_blocks]
        block_size = caches[0][0].shape[1]
        blocks = block_table.gather(1, (positions // block_size)[:, None]).squeeze(1).to(torch.int64)
        context = ForwardContext(
            positions=positions,
            slots=blocks * block_size + positions % block_size,
            block_table=block_table,
            context_lens=(positions + 1).to(torch.int32),
            num_decode=rows.shape[0],
        )
        hidden = self.model.forward(state.last_token[rows], context, caches)
        logits = self.model.logits(hidden)
        if self.sampler == "split":
            return logits
        if self.sampler == "gumbel":
            noise = gumbel_noise(state.seed[rows], positions + 1, logits.shape[-1])
            logits = logits / state.temperature[rows, None] + noise * state.noise_scale[rows, None]
        token_ids = logits.argmax(dim=-1)
        commit_tokens(state, rows, token_ids)
        return token_ids
