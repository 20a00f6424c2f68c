"""Who guesses the tokens that a step verifies: the interface `Drafter` and its kinds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from ...models.forward_context import ForwardContext
from ...models.layers.decoder import CausalDecoder
from ...models.layers.mtp import MultiTokenPredictor
from ...ops.ngram import propose_ngram
from ..row_state import NO_DRAFT, RowState, decode_context

Choose = Callable[[Tensor, Tensor], Tensor]  # logits [n, vocab], positions int64 [n] -> tokens int64 [n]
Caches = list[tuple[Tensor, ...]]
Memory = tuple[Tensor, ...]
# Tokens of a row that may be remembered: so many that taking them in is a large product, and as many more as a little
# memory holds, since those of a request that ends before its window is full are often not needed at all.
FEWEST_REMEMBERED, MOST_REMEMBERED, MEMORY_BYTES = 32, 256, 16 << 20


@dataclass(frozen=True)
class StepTokens:
    """The tokens of a step, after sampling: of requests that decode, their drafts included, and of chunks."""

    rows: Tensor  # int64 [n]: the rows that have sampled
    token_rows: Tensor  # int64 [tokens]: the row of each token
    context: ForwardContext  # in which they were computed
    input_ids: Tensor  # int64 [tokens]
    next_ids: Tensor  # int64 [tokens]: what follows each; made up behind a draft that was not accepted
    hidden: Tensor  # [tokens, hidden]: the model's states behind its last norm
    last: Tensor  # int64 [n]: which of the tokens is the last before the row's newest one


def tokens_to_remember(num_rows: int, row_bytes: int) -> int:
    """The window of a drafter for so many rows, whose hidden states take `row_bytes` each."""
    affordable = MEMORY_BYTES // ((num_rows + 1) * row_bytes)
    return min(max(affordable, FEWEST_REMEMBERED), MOST_REMEMBERED)


class Drafter(Protocol):
    """Guesses tokens on the device, inside the step's graph: nothing is read on the host, no shape depends on a value.

    It may have KV caches, which hold every token in the blocks of the model's own, and tensors of its `memory`.
    """

    num_caches: int  # layers behind the model's own
    window: int  # newest tokens of a row that may only be remembered, in steps without drafts; 0: none are

    def make_memory(self, num_rows: int, max_model_len: int, device: torch.device) -> Memory:
        """Tensors with an entry per row, the null row the last; they change in place."""
        ...

    def admit(self, memory: Memory, row: int, token_ids: Sequence[int]) -> None:
        """Hear of a request's tokens before its first step."""
        ...

    def draft(
        self, tokens: StepTokens, state: RowState, caches: Caches, memory: Memory, num_drafts: int,
        choose: Choose,
    ) -> Tensor:  # fmt: skip
        """Take in a step's tokens; then the state holds the newest ones already -> what follows these, int64
        [n, num_drafts], NO_DRAFT where nothing is guessed. With no drafts asked for, whatever later drafts need of this
        step's tokens is kept all the same; with a `window`, those of requests that decode are only remembered."""
        ...


class MTPDrafter(nn.Module):
    """Drafts with the checkpoint's own layer for multi-token prediction, applied again for each further token.

    Its cache entry at a slot joins the state of the token there to the token behind it. Entries of drafts hold the
    layer's own output for that state; the step that verifies the drafts computes them anew from the model's.

    With a `window` the state of a token and what follows it wait in the memory, at the token's position modulo the
    window, while steps have no drafts.
    """

    num_caches = 1

    def __init__(self, predictor: MultiTokenPredictor, window: int = 0) -> None:
        super().__init__()
        self.predictor = predictor
        self.window = window

    def make_memory(self, num_rows: int, max_model_len: int, device: torch.device) -> Memory:
        if not self.window:
            return ()
        places, weight = (num_rows + 1) * self.window, self.predictor.norm.weight
        hidden = torch.zeros((places, weight.shape[0]), dtype=weight.dtype, device=device)
        return hidden, torch.zeros(places, dtype=torch.int64, device=device)

    def admit(self, memory: Memory, row: int, token_ids: Sequence[int]) -> None:
        pass

    def draft(
        self, tokens: StepTokens, state: RowState, caches: Caches, memory: Memory, num_drafts: int,
        choose: Choose,
    ) -> Tensor:  # fmt: skip
        num_rows = tokens.rows.shape[0]
        if not num_drafts or not num_rows:  # nothing is asked for, or no chunk reaches its prompt's end
            if not num_drafts and self.window:
                self._remember(tokens, memory)
                tokens = _chunks(tokens)
            if tokens.input_ids.shape[0]:
                self.predictor.store(tokens.hidden, tokens.next_ids, tokens.context, caches)
            return tokens.rows.new_empty((num_rows, num_drafts))
        hidden = self.predictor(tokens.hidden, tokens.next_ids, tokens.context, caches)[tokens.last]
        newest = state.position[tokens.rows]
        drafts: list[Tensor] = []
        for place in range(num_drafts):
            if place:
                context = decode_context(state, tokens.rows, newest + (place - 1), 1, caches[0][0].shape[1])
                hidden = self.predictor(hidden, drafts[-1], context, caches)
            drafts.append(choose(self.predictor.logits(hidden), newest + (place + 1)))
        return torch.stack(drafts, dim=1)

    def _remember(self, tokens: StepTokens, memory: Memory) -> None:
        """Keep what the entries of the decoding requests' tokens are made of. Mutates the memory."""
        hidden, next_ids = memory
        count = tokens.context.num_decode_tokens
        if count:
            places = self._places(tokens.token_rows[:count], tokens.context.positions[:count])
            put_rows = self.predictor.ops.table.put_rows
            put_rows(hidden, places, tokens.hidden[:count])
            put_rows(next_ids, places, tokens.next_ids[:count])

    def _places(self, rows: Tensor, positions: Tensor) -> Tensor:
        return rows * self.window + positions % self.window

    def catch_up(self, rows: Tensor, distances: Tensor, state: RowState, caches: Caches, memory: Memory) -> None:
        """Take in remembered tokens: int64 [n] each, the row of a token, and how far it stands before the row's newest
        one."""
        hidden, next_ids = memory
        positions = state.position[rows] - distances
        places = self._places(rows, positions)
        block_size = caches[0][0].shape[1]
        slots = state.block_table[rows, positions // block_size].to(torch.int64) * block_size + positions % block_size
        none = state.block_table[:0]  # nothing attends
        context = ForwardContext(positions, slots, none, none[:, 0], num_decode=0)
        self.predictor.store(hidden[places], next_ids[places], context, caches)


class ModelDrafter(nn.Module):
    """Drafts with a smaller model of the same vocabulary.

    Its caches hold every token before the newest one. Of the drafts that a step accepts all but the last were computed
    when they were made; so it starts from two tokens: the newest one, and the one before.
    """

    window = 0

    def __init__(self, model: CausalDecoder) -> None:
        super().__init__()
        self.model = model
        self.num_caches = len(model.layers)

    def make_memory(self, num_rows: int, max_model_len: int, device: torch.device) -> Memory:
        return ()

    def admit(self, memory: Memory, row: int, token_ids: Sequence[int]) -> None:
        pass

    def draft(
        self, tokens: StepTokens, state: RowState, caches: Caches, memory: Memory, num_drafts: int,
        choose: Choose,
    ) -> Tensor:  # fmt: skip
        block_size = caches[0][0].shape[1]
        if tokens.context.prefill_query_lens:
            chunks = _chunks(tokens)
            self.model.forward(chunks.input_ids, chunks.context, caches)
        rows = tokens.rows
        if not rows.shape[0]:  # chunks that do not reach their prompt's end
            return rows.new_empty((0, num_drafts))
        newest = state.position[rows]
        before = (newest - 1).clamp(min=0)  # the null row's newest stands at 0
        input_ids = tokens.input_ids[tokens.last]
        if not num_drafts:
            self.model.forward(input_ids, decode_context(state, rows, before, 1, block_size), caches)
            return rows.new_empty((rows.shape[0], 0))
        both = torch.stack((input_ids, state.last_token[rows]), dim=1).flatten()
        hidden = self.model.forward(both, decode_context(state, rows, before, 2, block_size), caches)[1::2]
        drafts: list[Tensor] = []
        for place in range(num_drafts):
            if place:
                context = decode_context(state, rows, newest + place, 1, block_size)
                hidden = self.model.forward(drafts[-1], context, caches)
            drafts.append(choose(self.model.logits(hidden), newest + (place + 1)))
        return torch.stack(drafts, dim=1)


class NgramDrafter(nn.Module):
    """Drafts what followed the newest tokens when they last occurred in the request itself (prompt lookup decoding)."""

    num_caches = 0
    window = 0

    def __init__(self, min_n: int, max_n: int) -> None:
        super().__init__()
        self.min_n = min_n
        self.max_n = max_n

    def make_memory(self, num_rows: int, max_model_len: int, device: torch.device) -> Memory:
        """The history: int32 [rows + 1, max_model_len + 1]. In the last column go tokens that have no place."""
        return (torch.full((num_rows + 1, max_model_len + 1), NO_DRAFT, dtype=torch.int32, device=device),)

    def admit(self, memory: Memory, row: int, token_ids: Sequence[int]) -> None:
        (history,) = memory
        history[row, : len(token_ids)] = torch.tensor(token_ids, dtype=history.dtype, device=history.device)

    def draft(
        self, tokens: StepTokens, state: RowState, caches: Caches, memory: Memory, num_drafts: int,
        choose: Choose,
    ) -> Tensor:  # fmt: skip
        (history,) = memory
        capacity = history.shape[1] - 1
        places = (tokens.context.positions + 1).clamp(max=capacity)
        history.index_put_((tokens.token_rows, places), tokens.next_ids.to(torch.int32))
        if not num_drafts:
            return tokens.rows.new_empty((tokens.rows.shape[0], 0))
        lengths = (state.position[tokens.rows] + 1).clamp(max=capacity)
        return propose_ngram(history[tokens.rows], lengths, self.min_n, self.max_n, num_drafts)


def _chunks(tokens: StepTokens) -> StepTokens:
    """A step without the requests that decode; its `rows` and `last` are the whole step's."""
    context = tokens.context
    first, start = context.num_decode, context.num_decode_tokens
    chunks = ForwardContext(
        positions=context.positions[start:],
        slots=context.slots[start:],
        block_table=context.block_table[first:],
        context_lens=context.context_lens[first:],
        num_decode=0,
        prefill_query_lens=context.prefill_query_lens,
        prefill_context_lens=context.prefill_context_lens,
    )
    return replace(
        tokens,
        token_rows=tokens.token_rows[start:],
        context=chunks,
        input_ids=tokens.input_ids[start:],
        next_ids=tokens.next_ids[start:],
        hidden=tokens.hidden[start:],
    )
