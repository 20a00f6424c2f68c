"""The decode step as one pure function of tensors: the program that a graph backend captures, gear by gear."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from ...models.forward_context import ForwardContext
from ...ops.sampling import gumbel_noise
from ...ops.table import BoundOps, OpTable
from ..row_state import NO_DRAFT, RowState, decode_context
from ..speculation.buffers import Handoff
from ..speculation.drafting import Drafter, StepTokens
from ..speculation.verification import Acceptance, accept_equal, draft_window, verify, window_ids

SAMPLERS = ("greedy", "gumbel", "split")
DRAFT = "draft"  # the program behind `split`, where tokens are drafted


class Decoder(Protocol):
    """What the runner asks of a model."""

    ops: BoundOps  # what its layers call through

    def forward(
        self,
        input_ids: Tensor,
        context: ForwardContext,
        caches: list[tuple[Tensor, ...]],
        wanted: Tensor | None = None,
    ) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...


def choose_tokens(
    logits: Tensor, state: RowState, rows: Tensor, positions: Tensor, sampler: str, table: OpTable
) -> Tensor:
    """The tokens at `positions` (int64 [tokens]) of rows (int64 [tokens]) from float32 logits [tokens, vocab]: the
    likeliest, or by `gumbel` with the row's temperature and noise -> int64 [tokens]."""
    if sampler == "gumbel":
        noise = gumbel_noise(state.seed[rows], positions, logits.shape[-1])
        logits = logits / state.temperature[rows, None] + noise * state.noise_scale[rows, None]
    return table.likeliest(logits)


def repeated(rows: Tensor, times: int) -> Tensor:
    """Each of `rows` (int64 [n]) so many times, one after another: int64 [n * times]. As `repeat_interleave`, of which
    TorchAir has no form."""
    return rows if times == 1 else rows.unsqueeze(1).expand(-1, times).flatten()


def store_drafts(state: RowState, rows: Tensor, drafts: Tensor) -> None:
    """Keep drafts int64 [n, k] for the next step of their rows. Mutates `drafts` of the state."""
    missing = state.drafts.shape[1] - drafts.shape[1]
    values = nn.functional.pad(drafts, (0, missing), value=NO_DRAFT)
    state.drafts.scatter_(0, rows.unsqueeze(1).expand_as(values), values)


class DecodeStep(nn.Module):
    """The newest token of each of `n` rows and `num_drafts` drafts behind it, from embedding to the next step's inputs.

    Everything that changes from step to step is a tensor of fixed shape, and nothing is read on the host. `sampler`
    says what stands behind the logits: `greedy` takes the likeliest token; `gumbel` draws with the row's temperature
    and seed; `split` ends at the logits, for rows with masks, penalties, truncation or log probabilities, whose tokens
    are chosen outside. With a drafter, the drafts are verified then and the next ones made; behind `split` that is the
    program `draft`.
    """

    def __init__(
        self,
        model: Decoder,
        sampler: str,
        num_drafts: int = 0,
        drafter: Drafter | None = None,
        acceptance: Acceptance = accept_equal,
    ) -> None:
        super().__init__()
        assert sampler in SAMPLERS
        self.model = model
        self.sampler = sampler
        self.num_drafts = num_drafts
        self.drafter = drafter
        self.acceptance = acceptance

    def forward(
        self,
        rows: Tensor,
        tensors: tuple[Tensor, ...],
        caches: list[tuple[Tensor, ...]],
        handoff: tuple[Tensor, ...] = (),
        memory: tuple[Tensor, ...] = (),
        lengths: list[int] | None = None,
    ) -> Tensor:
        """rows int64 [n], padded with the null row -> what `verify` gives the host, or with `split` logits float32
        [n * (1 + num_drafts), vocab]. `tensors` are those of a `RowState`, as the plain tuple that exporters know,
        `handoff` those of a `Handoff`, which `split` with a drafter writes, and `memory` the drafter's own. `lengths`
        as in `decode_context`.

        Mutates the caches and, unless `split`, `last_token`, `position` and `drafts` of the rows.
        """
        state = RowState(*tensors)
        block_size = caches[0][0].shape[1]
        tokens_per_request = 1 + self.num_drafts
        context = decode_context(state, rows, state.position[rows], tokens_per_request, block_size, lengths)
        drafts = draft_window(state, rows, context, self.num_drafts, block_size)
        input_ids = window_ids(state, rows, drafts)
        own = caches if self.drafter is None else caches[: len(caches) - self.drafter.num_caches]
        hidden = self.model.forward(input_ids, context, own)
        logits = self.model.logits(hidden)
        if self.sampler == "split":
            if handoff:
                buffers = Handoff(*handoff)
                buffers.hidden.copy_(hidden)
                buffers.input_ids.copy_(input_ids)
            return logits
        token_rows = repeated(rows, tokens_per_request)
        table = self.model.ops.table
        sampled = choose_tokens(logits, state, token_rows, context.positions + 1, self.sampler, table)
        output, accepted = verify(state, rows, drafts, sampled.view(-1, tokens_per_request), self.acceptance)
        if self.drafter is not None:
            last = torch.arange(rows.shape[0], device=rows.device) * tokens_per_request + accepted
            tokens = StepTokens(rows, token_rows, context, input_ids, sampled, hidden, last)
            draft(self.drafter, tokens, state, caches, memory, self.num_drafts, self.sampler, table)
        return output


class DraftStep(nn.Module):
    """What stands behind `split`: the drafts of n rows whose tokens have been chosen and verified outside."""

    def __init__(self, model: Decoder, num_drafts: int, drafter: Drafter) -> None:
        super().__init__()
        self.model = model  # whose weights the drafter shares
        self.num_drafts = num_drafts
        self.drafter = drafter

    def forward(
        self,
        rows: Tensor,
        tensors: tuple[Tensor, ...],
        caches: list[tuple[Tensor, ...]],
        handoff: tuple[Tensor, ...],
        memory: tuple[Tensor, ...],
        lengths: list[int] | None = None,
    ) -> Tensor:
        """As `DecodeStep.forward` -> the drafts, int64 [n, num_drafts]. Mutates the drafter's caches, and `drafts`."""
        state, buffers = RowState(*tensors), Handoff(*handoff)
        tokens_per_request = 1 + self.num_drafts
        first = (state.position[rows] - buffers.accepted - 1).clamp(min=0)  # 0 for the null row
        context = decode_context(state, rows, first, tokens_per_request, caches[0][0].shape[1], lengths)
        token_rows = repeated(rows, tokens_per_request)
        last = torch.arange(rows.shape[0], device=rows.device) * tokens_per_request + buffers.accepted
        tokens = StepTokens(rows, token_rows, context, buffers.input_ids, buffers.sampled, buffers.hidden, last)
        table = self.model.ops.table
        return draft(self.drafter, tokens, state, caches, memory, self.num_drafts, "gumbel", table)


def draft(
    drafter: Drafter,
    tokens: StepTokens,
    state: RowState,
    caches: list[tuple[Tensor, ...]],
    memory: tuple[Tensor, ...],
    num_drafts: int,
    sampler: str,
    table: OpTable,
) -> Tensor:
    """Let the drafter take in a step's tokens and guess what follows, by the rows' own noise with the sampler `gumbel`
    -> int64 [n, num_drafts], which the state keeps too."""

    def choose(logits: Tensor, positions: Tensor) -> Tensor:
        return choose_tokens(logits, state, tokens.rows, positions, sampler, table)

    own = caches[len(caches) - drafter.num_caches :]
    drafts = drafter.draft(tokens, state, own, memory, num_drafts, choose)
    store_drafts(state, tokens.rows, drafts)
    return drafts
