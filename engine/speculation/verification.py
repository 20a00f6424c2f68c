"""Which drafts become tokens: the window a step verifies, what counts as accepted, and what that leaves in the rows."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from ...models.forward_context import ForwardContext
from ...ops.sampling import gumbel_noise
from ..row_state import NO_DRAFT, RowState, commit_tokens


class Acceptance(Protocol):
    """How many of the leading drafts count as accepted."""

    def __call__(self, drafts: Tensor, sampled: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
        """drafts int64 [n, k], sampled int64 [n, 1 + k], seeds and positions int64 [n] -> int64 [n], at most k."""
        ...


def accept_equal(drafts: Tensor, sampled: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """A draft is accepted if it is what the model itself samples there, and all before it are: so speculation changes
    no token. Shapes as in `Acceptance`."""
    accepted = torch.zeros_like(seeds)
    unbroken = torch.ones_like(seeds)
    for place in range(drafts.shape[1]):
        unbroken = unbroken * (drafts[:, place] == sampled[:, place])
        accepted = accepted + unbroken
    return accepted


class SyntheticAcceptance:
    """Accepts by lot, for benchmarks of a model whose drafts are worth nothing: the draft at place i of `rates` in that
    share of the steps. Which tokens come out means nothing then."""

    def __init__(self, rates: tuple[float, ...]) -> None:
        if not all(0 < rate < 1 for rate in rates) or list(rates) != sorted(rates, reverse=True):
            raise ValueError(f"acceptance rates must be between 0 and 1, each at most the one before: {rates}")
        self.rates = rates

    def __call__(self, drafts: Tensor, sampled: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
        if drafts.shape[1] > len(self.rates):
            raise ValueError(f"there are acceptance rates for {len(self.rates)} drafts only: {drafts.shape[1]}")
        noise = gumbel_noise(seeds, positions, 1).squeeze(1)  # [n]; below -log(-log(rate)) with the probability `rate`
        accepted = torch.zeros_like(seeds)
        for rate in self.rates[
            : drafts.shape[1]
        ]:  # numbers, as a compiled step takes no tensor that is not its model's
            accepted = accepted + (noise < -math.log(-math.log(rate)))
        return torch.minimum(accepted, (drafts != NO_DRAFT).to(torch.int64).sum(dim=1))


def draft_window(state: RowState, rows: Tensor, context: ForwardContext, num_drafts: int, block_size: int) -> Tensor:
    """The drafts that a step of `rows` verifies, int64 [n, num_drafts]: those of the state, but for what stands where
    the row has no block. Its KV would be lost, so it must not be accepted."""
    drafts = state.drafts[rows, :num_drafts]
    slots = context.slots.view(-1, 1 + num_drafts)[:, 1:]
    return torch.where(slots >= block_size, drafts, NO_DRAFT)  # block 0 is the null block


def window_ids(state: RowState, rows: Tensor, drafts: Tensor) -> Tensor:
    """The tokens a step of `rows` computes: the newest one of each, and its drafts -> int64 [n * (1 + k)]."""
    return torch.cat((state.last_token[rows].unsqueeze(1), drafts.clamp(min=0)), dim=1).flatten()


def verify(
    state: RowState, rows: Tensor, drafts: Tensor, sampled: Tensor, acceptance: Acceptance = accept_equal
) -> tuple[Tensor, Tensor]:
    """Make the sampled tokens of a step those of their rows, as far as the drafts before them are accepted.

    drafts int64 [n, k], sampled int64 [n, 1 + k] -> what the host reads, and how many drafts were accepted, int64 [n].
    The host reads int64 [n, 1 + k], the tokens and NO_DRAFT behind them, and if k > 0 one more column, the number of
    drafts that were there. Mutates `last_token` and `position`.
    """
    num_drafts = drafts.shape[1]
    if num_drafts == 0:
        commit_tokens(state, rows, sampled[:, 0])
        return sampled, torch.zeros_like(rows)
    accepted = acceptance(drafts, sampled, state.seed[rows], state.position[rows])
    commit_tokens(state, rows, sampled.gather(1, accepted.unsqueeze(1)).squeeze(1), accepted + 1)
    places = torch.arange(1 + num_drafts, device=rows.device)
    tokens = torch.where(places <= accepted.unsqueeze(1), sampled, NO_DRAFT)
    there = (drafts != NO_DRAFT).to(torch.int64).sum(dim=1, keepdim=True)
    return torch.cat((tokens, there), dim=1), accepted
