"""From logits to tokens: the sampler, and what it keeps per row of the persistent batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..ops import sampling
from ..scheduler.plan import NewRow, TokenLogprobs
from .graphs.decode_step import SAMPLERS


@dataclass
class _Extras:
    """What a row needs beyond temperature, top-k, top-p and min-p. Most rows have none."""

    bias: tuple[Tensor, Tensor] | None = None  # token ids int64, values float32
    allowed: Tensor | None = None  # token ids int64
    min_length: int = 0  # tokens, prompt and output, before which `ending` is masked
    ending: Tensor | None = None  # token ids int64; only with min_tokens
    bad_words: list[list[int]] = field(default_factory=list)
    history: list[int] = field(default_factory=list)  # the known tokens; kept with bad words only
    num_prompt: int = 0
    prompt_tokens: Tensor | None = None  # bool [vocab]: in the prompt; only with penalties
    output_counts: Tensor | None = None  # float32 [vocab]
    penalties: tuple[float, float, float] = (1.0, 0.0, 0.0)  # repetition, frequency, presence


@dataclass(frozen=True)
class Sampled:
    """Tokens that were chosen and may still be on their way: nothing here has waited for the device."""

    token_ids: Tensor  # int64 [n]: one for each row of logits
    wanted: list[int]  # indices in [0, n) whose log probabilities are asked for
    scores: Tensor | None  # float32 [wanted, vocab]
    counts: list[int]  # how many of the most likely, per wanted index

    def read_logprobs(self) -> dict[int, TokenLogprobs]:
        """By index in [0, n); waits for the device."""
        if self.scores is None:
            return {}
        entries = gather_logprobs(self.scores, self.token_ids[self.wanted], self.counts)
        return dict(zip(self.wanted, entries, strict=True))


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
        self.kind = np.zeros(max_num_seqs, np.int8)  # index in SAMPLERS: what the row's decode steps need
        self.extras: dict[int, _Extras] = {}

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
        extras = self._make_extras(new)
        if extras is None:
            self.extras.pop(row, None)
        else:
            self.extras[row] = extras
        truncates = not params.is_greedy and (
            self.top_k[row] < self.vocab_size or self.top_p[row] < 1 or self.min_p[row] > 0
        )
        plain = "greedy" if params.is_greedy else "gumbel"
        needs_logits = truncates or extras is not None or count is not None or params.is_constrained
        self.kind[row] = SAMPLERS.index("split" if needs_logits else plain)

    def remove_row(self, row: int) -> None:
        self.extras.pop(row, None)

    def kind_of(self, rows: np.ndarray) -> str:
        """What the decode step of these rows ends in: the one of SAMPLERS that serves them all."""
        return SAMPLERS[self.kind[rows].max()]

    @property
    def reads_history(self) -> bool:
        """Whether some row's next token depends on tokens that the host must have read."""
        return any(extras.bad_words for extras in self.extras.values())

    def append_history(self, row: int, token_ids: list[int]) -> None:
        """Tell what was read for a row."""
        extras = self.extras.get(row)
        if extras is not None and extras.bad_words:
            extras.history += token_ids

    def _make_extras(self, new: NewRow) -> _Extras | None:
        params = new.params
        extras = _Extras()
        needed = False
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias), dtype=torch.int64, device=self.device)
            values = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32, device=self.device)
            extras.bias, needed = (ids, values), True
        if params.allowed_token_ids is not None:
            extras.allowed = torch.tensor(params.allowed_token_ids, dtype=torch.int64, device=self.device)
            needed = True
        ending = [*new.eos_token_ids, *(params.stop_token_ids or ())]
        if params.min_tokens > 0 and ending and new.grammar is None:  # a grammar may leave nothing but the end
            extras.min_length = new.num_prompt_tokens + params.min_tokens
            extras.ending = torch.tensor(ending, dtype=torch.int64, device=self.device)
            needed = True
        if new.bad_words_token_ids:
            extras.bad_words, extras.history, needed = new.bad_words_token_ids, list(new.token_ids), True
            extras.num_prompt = new.num_prompt_tokens
        if params.has_penalties:
            tokens = torch.tensor(new.token_ids, dtype=torch.int64, device=self.device)
            extras.prompt_tokens = torch.zeros(self.vocab_size, dtype=torch.bool, device=self.device)
            extras.prompt_tokens[tokens[: new.num_prompt_tokens]] = True
            output = tokens[new.num_prompt_tokens :]
            extras.output_counts = output.bincount(minlength=self.vocab_size).to(torch.float32)
            extras.penalties = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
            needed = True
        return extras if needed else None

    def sample(self, logits: Tensor, rows: np.ndarray, positions: Tensor, drafts: Tensor | None = None) -> Sampled:
        """A token per row of logits, and none is taken for granted: `accept` tells which were.

        logits: float32 [n, vocab], may be changed in place; rows: int64 [n], ascending in place of each other where a
        row has several; positions: int64 [n], of the tokens to be sampled. drafts: int64 [m, k], where the first
        m * (1 + k) logits are of m rows, each behind its newest token and behind its first, second, … draft; a token is
        sampled as if the drafts before it were the row's.
        """
        wanted = (self.num_logprobs[rows] >= 0).nonzero()[0].tolist()
        raw = logits[wanted].clone() if wanted and self.logprobs_mode.startswith("raw") else None
        for start, stop, extras, behind in self._special(rows, drafts):
            self._apply_extras(logits[start:stop], extras, positions[start:stop], behind)
        if (self.temperature[rows] > 0).any():
            tokens, logits = self._draw(logits, rows, positions)
        else:
            tokens = logits.argmax(dim=-1)
        if not wanted:
            return Sampled(tokens, [], None, [])
        scores = raw if raw is not None else logits[wanted]
        if self.logprobs_mode.endswith("logprobs"):
            scores = scores.log_softmax(dim=-1)
        return Sampled(tokens, wanted, scores, [int(self.num_logprobs[rows[index]]) for index in wanted])

    def accept(self, rows: np.ndarray, token_ids: Tensor) -> None:
        """Tell what became of a step's samples: token_ids int64 [n, t] are the tokens of each row (int64 [n]), a
        negative number behind the last one."""
        if not self.extras:
            return
        for index, row in enumerate(rows.tolist()):
            extras = self.extras.get(row)
            if extras is not None and extras.output_counts is not None:
                tokens = token_ids[index]
                extras.output_counts.index_add_(0, tokens.clamp(min=0), (tokens >= 0).to(torch.float32))

    def _special(self, rows: np.ndarray, drafts: Tensor | None) -> Iterator[tuple[int, int, _Extras, Tensor | None]]:
        """For each row that needs more: where its logits begin and end, what it needs, and its drafts int64 [k]."""
        if not self.extras:
            return
        start = 0
        if drafts is not None and drafts.shape[1]:
            for own in drafts:
                extras, stop = self.extras.get(int(rows[start])), start + 1 + len(own)
                if extras is not None:
                    yield start, stop, extras, own
                start = stop
        for index in range(start, len(rows)):
            extras = self.extras.get(int(rows[index]))
            if extras is not None:
                yield index, index + 1, extras, None

    def _apply_extras(self, logits: Tensor, extras: _Extras, positions: Tensor, drafts: Tensor | None) -> None:
        """Masks, biases and penalties of one row, in place. logits: float32 [1 + k, vocab]; positions: int64 [1 + k];
        drafts: int64 [k], None for none."""
        if extras.allowed is not None:
            kept = logits[:, extras.allowed]
            logits.fill_(-torch.inf)
            logits[:, extras.allowed] = kept
        if extras.bad_words:
            known = extras.history if drafts is None else extras.history + drafts.tolist()
            for index in range(len(logits)):
                length = len(extras.history) + index
                for words in extras.bad_words:
                    prefix = words[:-1]
                    if length - extras.num_prompt >= len(prefix) and known[length - len(prefix) : length] == prefix:
                        logits[index, words[-1]] = -torch.inf
        if extras.ending is not None:
            is_early = (positions < extras.min_length).unsqueeze(1)
            logits[:, extras.ending] = logits[:, extras.ending].masked_fill(is_early, -torch.inf)
        if extras.bias is not None:
            ids, values = extras.bias
            logits.index_add_(1, ids, values.expand(len(logits), -1))
        if extras.prompt_tokens is not None and extras.output_counts is not None:
            counts = extras.output_counts.expand(len(logits), -1)
            if drafts is not None:
                once = torch.zeros_like(counts[1:]).scatter_(1, drafts.clamp(min=0).unsqueeze(1), 1.0)
                counts = counts.clone()
                counts[1:] += once.cumsum(dim=0)
            repetition, frequency, presence = (logits.new_full((len(logits),), value) for value in extras.penalties)
            seen = extras.prompt_tokens | (counts > 0)
            logits.copy_(sampling.apply_penalties(logits, seen, counts, repetition, frequency, presence))

    def _draw(self, logits: Tensor, rows: np.ndarray, positions: Tensor) -> tuple[Tensor, Tensor]:
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
        noise = sampling.gumbel_noise(self._column(self.seed[rows]), positions, self.vocab_size)
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
