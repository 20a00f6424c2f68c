"""One step on the device: the model runner turns a `StepPlan` into tokens."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..models.forward_context import ForwardContext
from ..ops.sampling import apply_token_bitmask
from ..scheduler.plan import NewRow, StepOutput, StepPlan, TokenLogprobs
from .constrained_rows import ConstrainedRows, StepMasks
from .graphs.decode_step import DRAFT, Decoder, draft
from .graphs.runner import GraphRunner
from .row_state import RowTable, commit_tokens, decode_context, table_width
from .sampler import Sampled, Sampler, gather_logprobs
from .speculation.backlog import Backlog
from .speculation.buffers import Drafting
from .speculation.drafting import MTPDrafter, StepTokens
from .speculation.verification import accept_equal, draft_window, verify, window_ids
from .structured.store import GrammarStore

# Prompt positions whose logits are held at once: 256 x 150k x 4 bytes = 150 MB.
PROMPT_LOGPROBS_CHUNK = 256


@dataclass(frozen=True)
class StepInput:
    """The device side of a step with prompts: the requests that decode, then the chunks."""

    input_ids: Tensor  # int64 [tokens]
    context: ForwardContext
    drafts: Tensor  # int64 [requests that decode, drafts]
    decode_rows: Tensor  # int64 [requests that decode]
    chunk_rows: Tensor  # int64 [chunks that sample]
    chunk_ends: Tensor  # int64 [chunks that sample]: the last token of each
    token_rows: np.ndarray  # int64 [tokens of chunks]
    positions: np.ndarray  # int64 [tokens of chunks]


class StepTimer:
    """Measures what a step takes on its device, from here to `stop`, and does not wait for it."""

    def __init__(self, device: torch.device) -> None:
        self.events = None
        if device.type != "cpu":
            module = torch.get_device_module(device)
            self.events = (module.Event(enable_timing=True), module.Event(enable_timing=True))
            self.events[0].record()
        self.start = time.perf_counter()

    def stop(self) -> Callable[[], float]:
        """Returns what tells the seconds, and waits for them where the device goes its own way."""
        if self.events is None:
            seconds = time.perf_counter() - self.start
            return lambda: seconds
        first, last = self.events
        last.record()

        def read() -> float:
            last.synchronize()
            return first.elapsed_time(last) / 1000

        return read


class DispatchedStep:
    """A step that the device has been given; its output may not be there yet."""

    def __init__(self, plan: StepPlan, entries: Sequence[int]) -> None:
        self.plan = plan
        self.entries = entries  # those that sample; first those that decode
        self.rows: list[NewRow] = []  # whose rows those are; told only where some row's tokens must be known here
        self.sampled: Sampled | None = None  # where log probabilities may be asked for
        self.read_tokens: Callable[[], list[int]] | None = None  # waits for what `verify` says of each entry
        self.prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
        self.seconds: Callable[[], float] = float  # that the device took; waits for it
        self.gear = 0  # of its graph; 0: it runs without one
        self.output: StepOutput | None = None


class ModelRunner:
    """Owns a rank's weights, KV tensors and the persistent batch.

    `dispatch` gives a step to the device without waiting for it, `read` waits and brings the tokens to the host. The
    next step may be dispatched before the last one is read: its tokens are taken from the device's own row state. Steps
    are read in the order in which they were dispatched. One thread calls both.
    """

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
        drafting: Drafting | None = None,
        grammars: GrammarStore | None = None,
        caches_prefixes: bool = True,
    ) -> None:
        self.model = model
        self.caches = caches
        self.block_size = block_size
        self.device = device
        self.vocab_size = vocab_size
        # Pages of this array are committed when first written, so its size is an upper bound.
        self.prompts = np.zeros((max_num_seqs, max_model_len + 1), np.int64)  # what was known when the row came
        self.drafting = drafting
        num_drafts = 0 if drafting is None else drafting.num_drafts
        self.table = RowTable(max_num_seqs, table_width(max_model_len, num_drafts, block_size), device, num_drafts)
        self.rows: dict[int, NewRow] = {}
        self._reporting: set[int] = set()  # rows whose prompt logprobs are asked for
        self.sampler = Sampler(max_num_seqs, vocab_size, device, logprobs_mode)
        self.constraints = ConstrainedRows(grammars, device)
        self.graphs = GraphRunner(model, self.table.state, caches, self.drafting)
        window = 0 if drafting is None else drafting.drafter.window
        self._backlog = Backlog(max_num_seqs, window) if window else None
        self._caches_prefixes = caches_prefixes
        self._unread: deque[DispatchedStep] = deque()

    def execute(self, plan: StepPlan) -> StepOutput:
        """Run one step and wait for it."""
        return self.read(self.dispatch(plan))

    @torch.inference_mode()
    def dispatch(self, plan: StepPlan) -> DispatchedStep:
        """Take in the plan's changes, forward, sample, and leave the tokens where the next step finds them."""
        if self._backlog is not None and plan.released_rows:  # before anybody else computes in their blocks
            released = np.asarray(plan.released_rows, np.int64)
            if self._caches_prefixes:
                self._catch_up(released, self._backlog)
            else:
                self._backlog.drop(released)
        self._apply(plan)
        rows = np.asarray(plan.rows, np.int64)
        if self._backlog is not None and plan.num_decode:
            decoding = rows[: plan.num_decode]
            self._catch_up(self._backlog.due(decoding, plan.num_drafts), self._backlog)
            if not plan.num_drafts:
                self._backlog.add(decoding)
        is_decode = plan.is_decode_only and not self._reports_prompt(plan)
        entries = range(len(rows)) if is_decode else [entry for entry, samples in enumerate(plan.samples) if samples]
        step = DispatchedStep(plan, entries)
        timer = StepTimer(self.device)
        tokens = self._decode(plan, rows, step) if is_decode else self._prefill(plan, rows, step)
        step.seconds = timer.stop()
        if entries:
            step.read_tokens = self._begin_copy(tokens)
        if self.sampler.reads_history or self.constraints:
            step.rows = [self.rows[plan.rows[entry]] for entry in step.entries]
        self._unread.append(step)
        return step

    @torch.inference_mode()
    def read(self, step: DispatchedStep) -> StepOutput:
        """Wait for a dispatched step, the oldest that is not read."""
        if step.output is None:
            assert self._unread[0] is step, "steps must be read in the order in which they were dispatched"
            self._settle(self._unread.popleft())
        assert step.output is not None
        return step.output

    def close(self) -> None:
        """Stop whatever goes on in the background."""
        self.constraints.close()
        self.graphs.close()

    def _settle(self, step: DispatchedStep) -> None:
        plan = step.plan
        token_ids: list[list[int]] = [[] for _ in plan.rows]
        num_drafts: list[int] = []
        logprobs: dict[int, list[TokenLogprobs]] = {}
        failures: dict[int, str] = {}
        if step.read_tokens is not None:
            flat = step.read_tokens()
            start = 0
            if plan.num_drafts:
                width = 2 + plan.num_drafts  # the tokens, and how many drafts there were
                for entry in range(plan.num_decode):
                    part = flat[start : start + width]
                    num_drafts.append(part.pop())
                    token_ids[entry] = [token_id for token_id in part if token_id >= 0]
                    start += width
            for entry, token_id in zip(step.entries[len(num_drafts) :], flat[start:], strict=True):
                token_ids[entry] = [token_id]
            for entry, new in zip(step.entries, step.rows, strict=False):
                if self.rows.get(new.row) is new:  # nobody else has the row by now
                    self.sampler.append_history(new.row, token_ids[entry])
                    failure = self.constraints.accept(new.row, token_ids[entry])
                    if failure is not None:
                        failures[entry] = failure
        if step.sampled is not None and (found := step.sampled.read_logprobs()):
            index = 0  # of the entry's first row of logits
            for entry in step.entries:
                if index in found:
                    logprobs[entry] = [found[index + place] for place in range(len(token_ids[entry]))]
                index += 1 + (plan.num_drafts if entry < plan.num_decode else 0)
        step.output = StepOutput(
            plan.step, token_ids, logprobs, step.prompt_logprobs, num_drafts, step.seconds(), failures, step.gear
        )

    def _begin_copy(self, token_ids: Tensor) -> Callable[[], list[int]]:
        """Start bringing tokens (int64) to the host, flat. The result waits for them, and not for a step that has been
        launched behind them: a copy asked for later would queue up behind that step."""
        token_ids = token_ids.flatten()
        if self.device.type == "cpu":
            return token_ids.tolist
        host = torch.empty(token_ids.shape, dtype=token_ids.dtype, pin_memory=True)
        host.copy_(token_ids, non_blocking=True)
        copied = torch.get_device_module(self.device).Event()
        copied.record()

        def read() -> list[int]:
            copied.synchronize()
            return host.tolist()

        return read

    def _catch_up(self, rows: np.ndarray, backlog: Backlog) -> None:
        """Let the drafter take in what it has only remembered of these rows."""
        if not len(rows):
            return
        token_rows, distances = backlog.take(rows)
        if len(token_rows):
            drafting = self.drafting
            assert drafting is not None and isinstance(drafting.drafter, MTPDrafter), "others have no window"
            drafter, index, distances = drafting.drafter, self._to_device(token_rows), self._to_device(distances)
            caches = self.caches[len(self.caches) - drafter.num_caches :]
            drafter.catch_up(index, distances, self.table.state, caches, drafting.memory)

    def _apply(self, plan: StepPlan) -> None:
        for row in plan.released_rows:
            del self.rows[row]
            self._reporting.discard(row)
            self.sampler.remove_row(row)
            self.constraints.remove_row(row)
        for new in plan.new_rows:
            self.rows[new.row] = new
            self.prompts[new.row, : len(new.token_ids)] = new.token_ids
            self.sampler.add_row(new)
            self.constraints.add_row(new)
            if new.params.prompt_logprobs is not None:
                self._reporting.add(new.row)
            if self.drafting is not None:
                self.drafting.drafter.admit(self.drafting.memory, new.row, new.token_ids)
        self.table.admit(plan.new_rows)
        self.table.append_blocks(plan.rows, plan.new_block_ids)

    def _decode(self, plan: StepPlan, rows: np.ndarray, step: DispatchedStep) -> Tensor:
        """A step in which every row decodes: the step the graphs hold. Returns what `verify` gives the host."""
        kind = self.sampler.kind_of(rows)
        num_blocks = int(self.table.num_blocks[rows].max())
        replay = self.graphs.replay
        if self.device.type == "npu" and self.graphs.takes_lengths(len(rows), kind, plan.num_drafts):
            replay = partial(replay, lengths=self._lengths(plan, rows))
        masks = self._begin_masks(rows, plan.num_drafts, rows[:0])
        output = replay(kind, rows, num_blocks, plan.num_drafts)
        step.gear = self.graphs.last_gear
        if kind != "split":
            return output
        state, index = self.table.state, self._to_device(rows)
        context = decode_context(state, index, state.position[index], 1 + plan.num_drafts, self.block_size)
        drafts = draft_window(state, index, context, plan.num_drafts, self.block_size)
        step.sampled = self._sample(output, rows.repeat(1 + plan.num_drafts), context.positions + 1, drafts, masks)
        tokens, accepted = self._verify(rows, index, drafts, step.sampled.token_ids)
        if self.drafting is not None:
            handoff = self.drafting.handoff
            handoff.sampled[: len(output)] = step.sampled.token_ids
            handoff.accepted[: len(rows)] = accepted
            handoff.accepted[len(rows) :] = 0  # of the rows that pad the graph
            replay(DRAFT, rows, num_blocks, plan.num_drafts)
        return tokens

    def _lengths(self, plan: StepPlan, rows: np.ndarray) -> list[int]:
        """Of the requests that decode, as in `decode_context`. With drafts only the device knows how many were
        accepted, so this waits for the last step."""
        decoding = rows[: plan.num_decode]
        if self.drafting is None:
            return [computed + 1 for computed in plan.num_computed[: plan.num_decode]]
        positions = self.table.state.position[self._to_device(decoding)]
        return [position + 1 + plan.num_drafts for position in positions.tolist()]

    def _prefill(self, plan: StepPlan, rows: np.ndarray, step: DispatchedStep) -> Tensor:
        """A step with prompts in it, their chunks behind the rows that decode; always eager. Returns flat what `verify`
        gives the host of those that decode, and the tokens of the chunks that sample."""
        inputs = self._step_input(plan, rows)
        context, num_decode = inputs.context, plan.num_decode
        drafting, state = self.drafting, self.table.state
        caches = self.caches if drafting is None else self.caches[: len(self.caches) - drafting.drafter.num_caches]
        sampling_rows = rows[list(step.entries[num_decode:])]
        masks = self._begin_masks(rows[:num_decode], plan.num_drafts, sampling_rows)
        decoded = torch.arange(context.num_decode_tokens, device=self.device)
        index = torch.cat((decoded, inputs.chunk_ends))
        wanted = None  # every token's state
        if drafting is None and not self._reports_prompt(plan):
            # One where nobody samples: ranks that share experts expect a part from each.
            wanted = index if step.entries else decoded.new_zeros(1)
        hidden = self.model.forward(inputs.input_ids, context, caches, wanted)
        step.prompt_logprobs = self._prompt_logprobs(plan, hidden)
        tokens, last = decoded, inputs.chunk_ends
        if step.entries:
            logit_rows = np.concatenate((rows[:num_decode].repeat(1 + plan.num_drafts), sampling_rows))
            logits = self.model.logits(hidden[index] if wanted is None else hidden)
            sampled = self._sample(logits, logit_rows, context.positions[index] + 1, inputs.drafts, masks)
            step.sampled = sampled
            tokens = sampled.token_ids[context.num_decode_tokens :]  # of the chunks
            commit_tokens(state, inputs.chunk_rows, tokens)
            self.sampler.accept(sampling_rows, tokens.unsqueeze(1))
            if num_decode:
                own = sampled.token_ids[: context.num_decode_tokens]
                verified, accepted = self._verify(rows[:num_decode], inputs.decode_rows, inputs.drafts, own)
                tokens = torch.cat((verified.flatten(), tokens))
                last = torch.cat((decoded[:: 1 + plan.num_drafts] + accepted, last))
        if drafting is not None:
            self._draft(plan, inputs, hidden, index, last, step)
        return tokens

    def _draft(
        self, plan: StepPlan, inputs: StepInput, hidden: Tensor, index: Tensor, last: Tensor, step: DispatchedStep
    ) -> None:
        """Let the drafter take in a step with prompts. `index` int64: the tokens behind which others were sampled;
        `last` as in `StepTokens`."""
        drafting = self.drafting
        assert drafting is not None
        decode_rows = inputs.decode_rows.repeat_interleave(1 + plan.num_drafts)
        next_ids = torch.cat(
            (decode_rows, self._to_device(self.prompts[inputs.token_rows, inputs.positions + 1]))
        )  # the first are only room for what has been sampled
        if step.sampled is not None:
            next_ids[index] = step.sampled.token_ids
        tokens = StepTokens(
            rows=torch.cat((inputs.decode_rows, inputs.chunk_rows)),
            token_rows=torch.cat((decode_rows, self._to_device(inputs.token_rows))),
            context=inputs.context,
            input_ids=inputs.input_ids,
            next_ids=next_ids,
            hidden=hidden,
            last=last,
        )
        state, memory = self.table.state, drafting.memory
        draft(drafting.drafter, tokens, state, self.caches, memory, plan.num_drafts, "gumbel", self.model.ops.table)

    def _begin_masks(self, decode_rows: np.ndarray, num_drafts: int, chunk_rows: np.ndarray) -> StepMasks | None:
        """The masks of the step that is about to be computed, None for none; see `ConstrainedRows.begin`."""
        is_settled = not self._unread
        return self.constraints.begin(self.table.state, decode_rows, num_drafts, chunk_rows, is_settled=is_settled)

    def _sample(
        self, logits: Tensor, rows: np.ndarray, positions: Tensor, drafts: Tensor, masks: StepMasks | None
    ) -> Sampled:
        """As `Sampler.sample`. Where a row's next token depends on those before it, this waits for them, with the
        forward under way."""
        while self._unread and (masks is not None or self.sampler.reads_history):
            self._settle(self._unread.popleft())
        if masks is not None:
            masked_rows, bitmask = (self._to_device(part) for part in masks.result())
            apply_token_bitmask(logits, masked_rows, bitmask)
        return self.sampler.sample(logits, rows, positions, drafts)

    def _verify(self, rows: np.ndarray, index: Tensor, drafts: Tensor, sampled: Tensor) -> tuple[Tensor, Tensor]:
        """As `verify`, for rows that decode and whose tokens were sampled outside the graph."""
        acceptance = accept_equal if self.drafting is None else self.drafting.acceptance
        tokens, accepted = verify(self.table.state, index, drafts, sampled.view(len(rows), -1), acceptance)
        self.sampler.accept(rows, tokens[:, : 1 + drafts.shape[1]])
        return tokens, accepted

    def _step_input(self, plan: StepPlan, rows: np.ndarray) -> StepInput:
        """The requests that decode, from the rows' state; the chunks, from what the host knows."""
        num_decode, tokens_per_request = plan.num_decode, 1 + plan.num_drafts
        lengths = self._lengths(plan, rows) if self.device.type == "npu" else None
        width = int(self.table.num_blocks[rows].max())
        if lengths is not None and plan.num_drafts:
            width = min(width + 1, self.table.block_table.shape[1])  # as in `GraphRunner.run_eager`
        state = self.table.state._replace(block_table=self.table.state.block_table[:, :width])
        decode_rows = self._to_device(rows[:num_decode])
        decoding = decode_context(
            state,
            decode_rows,
            state.position[decode_rows],
            tokens_per_request,
            self.block_size,
            lengths,
        )
        drafts = draft_window(state, decode_rows, decoding, plan.num_drafts, self.block_size)
        num_computed = np.asarray(plan.num_computed[num_decode:], np.int64)
        num_tokens = np.asarray(plan.num_tokens[num_decode:], np.int64)
        ends = num_tokens.cumsum()
        total = int(num_tokens.sum())
        token_rows = rows[num_decode:].repeat(num_tokens)  # [tokens of chunks]
        positions = np.arange(total) + (num_computed - ends + num_tokens).repeat(num_tokens)
        block_table = self.table.block_table
        slots = block_table[token_rows, positions // self.block_size].astype(np.int64) * self.block_size
        slots += positions % self.block_size
        context_lens = num_computed + num_tokens
        context = ForwardContext(
            positions=torch.cat((decoding.positions, self._to_device(positions))),
            slots=torch.cat((decoding.slots, self._to_device(slots))),
            block_table=self._to_device(block_table[rows, :width]),
            context_lens=torch.cat((decoding.context_lens, self._to_device(context_lens.astype(np.int32)))),
            num_decode=num_decode,
            prefill_query_lens=tuple(num_tokens.tolist()),
            prefill_context_lens=tuple(context_lens.tolist()),
            tokens_per_request=tokens_per_request,
            decode_lengths=decoding.decode_lengths,
        )
        samples = np.asarray(plan.samples[num_decode:], bool)
        prompts = self._to_device(self.prompts[token_rows, positions])
        return StepInput(
            input_ids=torch.cat((window_ids(state, decode_rows, drafts), prompts)),
            context=context,
            drafts=drafts,
            decode_rows=decode_rows,
            chunk_rows=self._to_device(rows[num_decode:][samples]),
            chunk_ends=self._to_device(ends[samples] - 1 + num_decode * tokens_per_request),
            token_rows=token_rows,
            positions=positions,
        )

    def _reports_prompt(self, plan: StepPlan) -> bool:
        """Whether some entry has prompt positions to report, which takes the hidden states."""
        return bool(self._reporting) and any(
            row in self._reporting and computed + 1 < self.rows[row].num_prompt_tokens
            for row, computed in zip(plan.rows, plan.num_computed, strict=True)
        )

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
                    reports[entry] = self._position_logprobs(states, self.prompts[row, first:stop], new)
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
