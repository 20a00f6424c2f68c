"""From logits to tokens: the sampler, and what it keeps per row of the persistent batch."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..ops import sampling
from ..scheduler.plan import NewRow, TokenLogprobs


@dataclass
class _RowState:
    """What a row needs beyond temperature, top-k, top-p and min-p. Most rows have none."""

    bias: tuple[Tensor, Tensor] | None = None  # token ids int64, values float32
    allowed: Tensor | None = None  # token ids int64
    min_tokens: int = 0
    ending: Tensor | None = None  # ids masked while fewer than min_tokens are out
    bad_words: list[list[int]] = field(default_factory=list)
    seen: Tensor | None = None  # bool [vocab]: in prompt or output; only with penalties
    output_counts: Tensor | None = None  # float32 [vocab]
    penalties: tuple[float, float, float] = (1.0, 0.0, 0.0)  # repetition, frequency, presence


class Sampler:
    """Chooses one token per row. Rows are places in the runner's batch, in [0, max_num_seqs).

    The order of operations is vLLM's: log probabilities of the raw logits; allowed ids; bad words; min_tokens and
    biases; penalties; temperature; min-p; top-k and top-p; the draw. A draw is argmax(logits / T + noise), the noise
    a hash of (seed, position, token id), so nothing but the request decides its tokens.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device, logprobs_mode: str) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self.logprobs_mode = logprobs_mode
        self.temperature = np.zeros(max_num_seqs, np.float32)  # 0: greedy
        self.top_k = np.full(max_num_seqs, vocab_size, np.int64)
        self.top_p = np.ones(max_num_seqs, np.float32)
        self.min_p = np.zeros(max_num_seqs, np.float32)
        self.seed = np.zeros(max_num_seqs, np.int64)
        self.num_logprobs = np.full(max_num_seqs, -1, np.int64)  # -1: none asked for
        self.num_prompt = np.zeros(max_num_seqs, np.int64)
        self.states: dict[int, _RowState] = {}

    def add_row(self, new: NewRow) -> None:
        """Take in a request at its row; its earlier output, if it was preempted, is in `token_ids`."""
        row, params = new.row, new.params
        self.temperature[row] = 0.0 if params.is_greedy else params.temperature
        self.top_k[row] = min(params.top_k, self.vocab_size) if params.top_k > 0 else self.vocab_size
        self.top_p[row] = params.top_p
        self.min_p[row] = params.min_p
        assert params.seed is not None, "a request is given a seed at admission"
        self.seed[row] = params.seed
        count = params.logprobs
        self.num_logprobs[row] = -1 if count is None else self.vocab_size if count == -1 else count
        self.num_prompt[row] = new.num_prompt_tokens
        state = self._row_state(new)
        if state is None:
            self.states.pop(row, None)
        else:
            self.states[row] = state

    def remove_row(self, row: int) -> None:
        self.states.pop(row, None)

    def _row_state(self, new: NewRow) -> _RowState | None:
        params = new.params
        state = _RowState()
        needed = False
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias), dtype=torch.int64, device=self.device)
            values = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32, device=self.device)
            state.bias, needed = (ids, values), True
        if params.allowed_token_ids is not None:
            state.allowed = torch.tensor(params.allowed_token_ids, dtype=torch.int64, device=self.device)
            needed = True
        ending = [*new.eos_token_ids, *(params.stop_token_ids or ())]
        if params.min_tokens > 0 and ending:
            state.min_tokens = params.min_tokens
            state.ending = torch.tensor(ending, dtype=torch.int64, device=self.device)
            needed = True
        if new.bad_words_token_ids:
            state.bad_words, needed = new.bad_words_token_ids, True
        if params.has_penalties:
            tokens = torch.tensor(new.token_ids, dtype=torch.int64, device=self.device)
            state.seen = torch.zeros(self.vocab_size, dtype=torch.bool, device=self.device)
            state.seen[tokens] = True
            output = tokens[new.num_prompt_tokens :]
            state.output_counts = output.bincount(minlength=self.vocab_size).to(torch.float32)
            state.penalties = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
            needed = True
        return state if needed else None

    def sample(
        self, logits: Tensor, rows: np.ndarray, lengths: np.ndarray, history: np.ndarray
    ) -> tuple[list[int], dict[int, TokenLogprobs]]:
        """One token per row.

        logits: float32 [n, vocab], may be changed in place; rows: int64 [n]; lengths: int64 [n], tokens known so
        far, which is also the position of the token to be sampled; history: int64 [max_num_seqs, width], the known
        tokens of every row. Returns the tokens, and by index in [0, n) the log probabilities asked for.
        """
        wanted = [index for index, row in enumerate(rows) if self.num_logprobs[row] >= 0]
        raw = logits[wanted].clone() if wanted and self.logprobs_mode.startswith("raw") else None
        special = [(index, row, self.states[row]) for index, row in enumerate(rows.tolist()) if row in self.states]
        for index, row, state in special:
            self._apply_row_state(logits[index], state, int(lengths[index]) - int(self.num_prompt[row]), history[row],
                                  int(lengths[index]))  # fmt: skip
        if (self.temperature[rows] > 0).any():
            tokens, logits = self._draw(logits, rows, lengths)
        else:
            tokens = logits.argmax(dim=-1)
        for index, _, state in special:
            if state.seen is not None and state.output_counts is not None:
                state.seen[tokens[index]] = True
                state.output_counts[tokens[index]] += 1
        token_ids = tokens.tolist()
        if not wanted:
            return token_ids, {}
        scores = raw if raw is not None else logits[wanted]
        if self.logprobs_mode.endswith("logprobs"):
            scores = scores.log_softmax(dim=-1)
        counts = [int(self.num_logprobs[rows[index]]) for index in wanted]
        entries = gather_logprobs(scores, tokens[wanted], counts)
        return token_ids, dict(zip(wanted, entries, strict=True))

    def _apply_row_state(
        self, logits: Tensor, state: _RowState, num_output: int, history: np.ndarray, length: int
    ) -> None:
        """Masks, biases and penalties of one row, in place. logits: float32 [vocab]."""
        if state.allowed is not None:
            kept = logits[state.allowed]
            logits.fill_(-torch.inf)
            logits[state.allowed] = kept
        for words in state.bad_words:
            prefix = words[:-1]
            if num_output >= len(prefix) and history[length - len(prefix) : length].tolist() == prefix:
                logits[words[-1]] = -torch.inf
        if state.ending is not None and num_output < state.min_tokens:
            logits[state.ending] = -torch.inf
        if state.bias is not None:
            logits.index_add_(0, *state.bias)
        if state.seen is not None and state.output_counts is not None:
            repetition, frequency, presence = (logits.new_full((1,), value) for value in state.penalties)
            logits.copy_(
                sampling.apply_penalties(
                    logits[None], state.seen[None], state.output_counts[None], repetition, frequency, presence
                )[0]
            )

    def _draw(self, logits: Tensor, rows: np.ndarray, lengths: np.ndarray) -> tuple[Tensor, Tensor]:
        """Tokens int64 [n] where some rows are not greedy, and the logits they were drawn from."""
        temperature = self.temperature[rows]
        greedy = temperature == 0
        logits = logits / self._column(np.where(greedy, 1.0, temperature).astype(np.float32))[:, None]
        if (self.min_p[rows] > 0).any():
            logits = sampling.mask_min_p(logits, self._column(self.min_p[rows]))
        masked = ((self.top_k[rows] < self.vocab_size) | (self.top_p[rows] < 1)).nonzero()[0]
        if len(masked):
            some = rows[masked]
            index = self._column(masked)
            logits[index] = sampling.mask_top_k_top_p(
                logits[index], self._column(self.top_k[some]), self._column(self.top_p[some])
            )
        noise = sampling.gumbel_noise(self._column(self.seed[rows]), self._column(lengths), self.vocab_size)
        noise.masked_fill_(self._column(greedy)[:, None], 0.0)
        return (logits + noise).argmax(dim=-1), logits

    def _column(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)


def gather_logprobs(scores: Tensor, token_ids: Tensor, counts: list[int]) -> list[TokenLogprobs]:
    """Per row: the token's own score and rank, then the `counts[row]` highest, best first.

    scores: float32 [rows, vocab], normally log probabilities; token_ids: int64 [rows].
    """
    chosen, ranks = sampling.token_ranks(scores, token_ids)
    widest = max(counts, default=0)
    values, ids = scores.topk(widest, dim=-1) if widest else (scores[:, :0], token_ids[:, None][:, :0])
    entries = []
    for token, own, rank, top_ids, top_values, count in zip(
        token_ids.tolist(), chosen.tolist(), ranks.tolist(), ids.tolist(), values.tolist(), counts, strict=True
    ):
        entries.append(TokenLogprobs([token, *top_ids[:count]], [own, *top_values[:count]], rank))
    return entries
