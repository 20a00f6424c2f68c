"""The tensors of speculation that outlive a step: a drafter's memory, and what `split` hands to the drafting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .drafting import Drafter
from .verification import Acceptance, accept_equal


class Handoff(NamedTuple):
    """What a step that ends at its logits leaves for the program that drafts, once the tokens are chosen: buffers, of
    which a gear uses the first `n * tokens` entries, or the first `n`."""

    hidden: Tensor  # [most tokens of a step, hidden]
    input_ids: Tensor  # int64 [most tokens of a step]
    sampled: Tensor  # int64 [most tokens of a step]
    accepted: Tensor  # int64 [most rows of a step]

    def view(self, num_rows: int, tokens_per_request: int) -> Handoff:
        tokens = num_rows * tokens_per_request
        return Handoff(self.hidden[:tokens], self.input_ids[:tokens], self.sampled[:tokens], self.accepted[:num_rows])


@dataclass(frozen=True)
class Drafting:
    """What a runner needs to speculate; `memory` and `handoff` have room for every row."""

    drafter: Drafter
    depths: tuple[int, ...]  # numbers of drafts that steps may verify, ascending
    memory: tuple[Tensor, ...]
    handoff: Handoff
    acceptance: Acceptance = accept_equal

    @property
    def num_drafts(self) -> int:
        """Most drafts of a row."""
        return self.depths[-1]


def allocate_drafting(
    drafter: Drafter,
    depths: tuple[int, ...],
    *,
    max_num_seqs: int,
    max_model_len: int,
    hidden_size: int,
    dtype: torch.dtype,
    device: torch.device,
    acceptance: Acceptance = accept_equal,
) -> Drafting:
    """The buffers for steps of at most `max_num_seqs` rows; `dtype` is the model's."""
    tokens = max_num_seqs * (1 + depths[-1])
    handoff = Handoff(
        hidden=torch.zeros((tokens, hidden_size), dtype=dtype, device=device),
        input_ids=torch.zeros(tokens, dtype=torch.int64, device=device),
        sampled=torch.zeros(tokens, dtype=torch.int64, device=device),
        accepted=torch.zeros(max_num_seqs, dtype=torch.int64, device=device),
    )
    memory = drafter.make_memory(max_num_seqs, max_model_len, device)
    return Drafting(drafter, depths, memory, handoff, acceptance)
