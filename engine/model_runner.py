"""One step on the device: the model runner turns a `StepPlan` into tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..models.forward_context import ForwardContext
from ..scheduler.plan import NewRow, StepOutput, StepPlan, TokenLogprobs
from .sampler import Sampler, gather_logprobs

# Prompt positions whose logits are held at once: 256 x 150k x 4 bytes = 150 MB.
PROMPT_LOGPROBS_CHUNK = 256


class Decoder(Protocol):
    """What the runner asks of a model."""

    def forward(self, input_ids: Tensor, context: ForwardContext, caches: list[tuple[Tensor, ...]]) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class StepInput:
    """The device side of one step. `logit_index`: int64 [sampling entries], their last token in the batch."""

    input_ids: Tensor  # int64 [tokens]
    context: ForwardContext
    logit_index: Tensor


class ModelRunner:
    """Owns a rank's weights, KV tensors and the persistent batch: tokens and block table of every row."""

    def __init__(
        self,
        model: Decoder,
        caches: list[tuple[Tensor, ...]],
        *,
        vocab_size: int,
        block_size: int,
        max_num_seqs: int,
        max_model_len: int,
        device: torch.device,
        logprobs_mode: str = "raw_logprobs",
    ) -> None:
        self.model = model
        self.caches = caches
        self.block_size = block_size
        self.device = device
        self.vocab_size = vocab_size
        # Pages of these arrays are committed when first written, so their size is an upper bound.
        self.tokens = np.zeros((max_num_seqs, max_model_len + 1), np.int64)  # known tokens of each row
        self.num_known = np.zeros(max_num_seqs, np.int64)
        self.block_table = np.zeros((max_num_seqs, -(-max_model_len // block_size)), np.int32)
        self.num_blocks = np.zeros(max_num_seqs, np.int64)
        self.rows: dict[int, NewRow] = {}
        self.sampler = Sampler(max_num_seqs, vocab_size, device, logprobs_mode)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepOutput:
        """Run one step: take in the plan's changes, forward, sample, remember the sampled tokens."""
        self._apply(plan)
        rows = np.asarray(plan.rows, np.int64)
        step = self._step_input(plan, rows)
        hidden = self.model.forward(step.input_ids, step.context, self.caches)
        sampled, logprobs = self._sample(plan, rows, hidden, step.logit_index)
        return StepOutput(plan.step, sampled, logprobs, self._prompt_logprobs(plan, hidden))

    def _apply(self, plan: StepPlan) -> None:
        for row in plan.released_rows:
            del self.rows[row]
            self.sampler.remove_row(row)
        for new in plan.new_rows:
            self.rows[new.row] = new
            self.tokens[new.row, : len(new.token_ids)] = new.token_ids
            self.num_known[new.row] = len(new.token_ids)
            self.num_blocks[new.row] = 0
            self.sampler.add_row(new)
        for row, block_ids in zip(plan.rows, plan.new_block_ids, strict=True):
            if block_ids:
                start = self.num_blocks[row]
                self.block_table[row, start : start + len(block_ids)] = block_ids
                self.num_blocks[row] = start + len(block_ids)

    def _step_input(self, plan: StepPlan, rows: np.ndarray) -> StepInput:
        num_computed = np.asarray(plan.num_computed, np.int64)
        num_tokens = np.asarray(plan.num_tokens, np.int64)
        ends = num_tokens.cumsum()
        token_rows = rows.repeat(num_tokens)  # [tokens]
        positions = np.arange(ends[-1]) + (num_computed - ends + num_tokens).repeat(num_tokens)
        slots = self.block_table[token_rows, positions // self.block_size].astype(np.int64) * self.block_size
        slots += positions % self.block_size
        context_lens = num_computed + num_tokens
        width = int(-(-context_lens.max() // self.block_size))
        # Entries of one token come first in a plan; a one-token chunk that does not sample decodes just the same.
        prefill = (num_tokens > 1).nonzero()[0]
        num_decode = int(prefill[0]) if len(prefill) else len(rows)
        context = ForwardContext(
            positions=self._to_device(positions),
            slots=self._to_device(slots),
            block_table=self._to_device(self.block_table[rows, :width]),
            context_lens=self._to_device(context_lens.astype(np.int32)),
            num_decode=num_decode,
            prefill_query_lens=tuple(num_tokens[num_decode:].tolist()),
            prefill_context_lens=tuple(context_lens[num_decode:].tolist()),
        )
        return StepInput(
            input_ids=self._to_device(self.tokens[token_rows, positions]),
            context=context,
            logit_index=self._to_device(ends[np.asarray(plan.samples, bool)] - 1),
        )

    def _sample(
        self, plan: StepPlan, rows: np.ndarray, hidden: Tensor, logit_index: Tensor
    ) -> tuple[list[list[int]], dict[int, list[TokenLogprobs]]]:
        entries = np.asarray(plan.samples, bool).nonzero()[0]
        sampled: list[list[int]] = [[] for _ in plan.rows]
        if not len(entries):
            return sampled, {}
        sampling_rows = rows[entries]
        lengths = self.num_known[sampling_rows]
        logits = self.model.logits(hidden[logit_index])
        token_ids, logprobs = self.sampler.sample(logits, sampling_rows, lengths, self.tokens)
        self.tokens[sampling_rows, lengths] = token_ids
        self.num_known[sampling_rows] = lengths + 1
        for entry, token_id in zip(entries.tolist(), token_ids, strict=True):
            sampled[entry] = [token_id]
        return sampled, {int(entries[index]): [value] for index, value in logprobs.items()}

    def _prompt_logprobs(self, plan: StepPlan, hidden: Tensor) -> dict[int, list[TokenLogprobs]]:
        """By entry: the prompt positions this step can tell, each from the hidden state one position before it."""
        reports: dict[int, list[TokenLogprobs]] = {}
        start = 0  # of the entry's tokens in `hidden`
        for entry, (row, computed, count) in enumerate(zip(plan.rows, plan.num_computed, plan.num_tokens, strict=True)):
            new = self.rows[row]
            if new.params.prompt_logprobs is not None:
                first = max(computed + 1, new.prompt_logprobs_start)
                stop = min(computed + count + 1, new.num_prompt_tokens)
                if first < stop:
                    states = hidden[start + first - 1 - computed : start + stop - 1 - computed]
                    reports[entry] = self._position_logprobs(states, self.tokens[row, first:stop], new)
            start += count
        return reports

    def _position_logprobs(self, states: Tensor, token_ids: np.ndarray, new: NewRow) -> list[TokenLogprobs]:
        wanted = new.params.prompt_logprobs or 0
        count = self.vocab_size if wanted == -1 else wanted
        targets = self._to_device(token_ids)
        report: list[TokenLogprobs] = []
        for start in range(0, len(token_ids), PROMPT_LOGPROBS_CHUNK):
            part = slice(start, start + PROMPT_LOGPROBS_CHUNK)
            scores = self.model.logits(states[part])
            if self.sampler.logprobs_mode.endswith("logprobs"):
                scores = scores.log_softmax(dim=-1)
            report += gather_logprobs(scores, targets[part], [count] * len(scores))
        return report

    def _to_device(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)
