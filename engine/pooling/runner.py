"""One step of a pooling engine on the device: a `StepPlan` of prompts, or pieces of them, into vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Thread
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from ...models.forward_context import ForwardContext
from ...models.pooling import PoolingModel
from ...scheduler.plan import NewRow, StepOutput, StepPlan
from ...scheduler.pooling_params import TOKEN_TASKS, Pooled, PoolingParams
from ..model_runner import StepTimer


@dataclass(frozen=True)
class Pool:
    """Vectors of entries that end alike: one row each, or the rows of a single entry's tokens."""

    entries: Sequence[int]
    by_token: bool
    read: Callable[[], np.ndarray]  # float32 [rows, elements]; waits for the device


@dataclass(frozen=True)
class PooledStep:
    """A step that the device has been given."""

    plan: StepPlan
    pools: list[Pool]
    seconds: Callable[[], float]


class PoolingRunner:
    """Owns a pooling model's weights, its KV tensors, and what has been pooled of prompts that are not computed whole.

    Used as `ModelRunner` is. Nothing is sampled, so a step needs nothing of the one before it but the caches.
    """

    def __init__(
        self,
        model: PoolingModel,
        caches: list[tuple[Tensor, ...]],
        *,
        block_size: int,
        max_num_seqs: int,
        max_model_len: int,
        device: torch.device,
        kernels: Thread | None = None,
    ) -> None:
        self.model = model
        self.caches = caches
        self.block_size = block_size
        self.device = device
        self._kernels = kernels
        self._kind = model.head.config.kind
        self._has_types = model.config.encoder is not None and model.config.encoder.num_token_types > 1
        self._prompts = np.zeros((max_num_seqs, max_model_len), np.int64)
        self._block_table = np.zeros((max_num_seqs, -(-max_model_len // block_size)), np.int32)
        self._num_blocks = np.zeros(max_num_seqs, np.int64)
        self._segment_starts = np.zeros(max_num_seqs, np.int64)
        self._rows: dict[int, NewRow] = {}
        # Of prompts under way: the first token's state, or the sum of all so far; and every state where all are wanted.
        self._partial = torch.zeros((max_num_seqs, model.config.hidden_size), dtype=torch.float32, device=device)
        self._states: dict[int, list[Tensor]] = {}

    def execute(self, plan: StepPlan) -> StepOutput:
        """Run one step and wait for it."""
        return self.read(self.dispatch(plan))

    @torch.inference_mode()
    def dispatch(self, plan: StepPlan) -> PooledStep:
        """Take in the plan's changes, forward, and pool the prompts that end."""
        self._apply(plan)
        timer = StepTimer(self.device)
        rows = np.asarray(plan.rows, np.int64)
        hidden = self.model(*self._inputs(plan, rows), self.caches)
        pools = self._pool(plan, rows, hidden)
        return PooledStep(plan, pools, timer.stop())

    def read(self, step: PooledStep) -> StepOutput:
        """Wait for a step and bring its vectors to the host."""
        pooled: dict[int, Pooled] = {}
        for pool in step.pools:
            values = pool.read()
            if pool.by_token:
                pooled[pool.entries[0]] = Pooled(list(values.shape), values.tobytes())
            else:
                pooled.update(
                    {
                        entry: Pooled([values.shape[1]], row.tobytes())
                        for entry, row in zip(pool.entries, values, strict=True)
                    }
                )
        plan = step.plan
        return StepOutput(plan.step, [[] for _ in plan.rows], {}, {}, seconds=step.seconds(), pooled=pooled)

    def close(self) -> None:
        """Wait for what works in the background."""
        if self._kernels is not None:
            self._kernels.join()

    @property
    def graphs(self) -> NoReturn:
        """For whoever asks a core for its graphs."""
        raise ValueError(f"a pooling model has no decode steps, and so no graphs: {self.model.config.architecture}")

    def _apply(self, plan: StepPlan) -> None:
        for row in plan.released_rows:
            del self._rows[row]
            self._states.pop(row, None)
        for new in plan.new_rows:
            self._rows[new.row] = new
            length = len(new.token_ids)
            self._prompts[new.row, :length] = new.token_ids
            self._segment_starts[new.row] = length if new.segment_start is None else new.segment_start
            self._num_blocks[new.row] = 0
        for row, block_ids in zip(plan.rows, plan.new_block_ids, strict=True):
            start = self._num_blocks[row]
            self._block_table[row, start : start + len(block_ids)] = block_ids
            self._num_blocks[row] += len(block_ids)

    def _inputs(self, plan: StepPlan, rows: np.ndarray) -> tuple[Tensor, ForwardContext]:
        """Token ids int64 [tokens], one prompt's piece after another, and where they stand."""
        num_computed, num_tokens = np.asarray(plan.num_computed, np.int64), np.asarray(plan.num_tokens, np.int64)
        ends = num_tokens.cumsum()
        token_rows = rows.repeat(num_tokens)
        positions = np.arange(ends[-1]) + (num_computed - ends + num_tokens).repeat(num_tokens)
        columns, offsets = positions // self.block_size, positions % self.block_size
        slots = self._block_table[token_rows, columns].astype(np.int64) * self.block_size + offsets
        width = int(self._num_blocks[rows].max())
        context_lens = num_computed + num_tokens
        types = None
        if self._has_types and any(self._rows[row].segment_start is not None for row in plan.rows):
            types = self._to_device((positions >= self._segment_starts[token_rows]).astype(np.int64))
        context = ForwardContext(
            positions=self._to_device(positions),
            slots=self._to_device(slots),
            block_table=self._to_device(self._block_table[rows, :width]),
            context_lens=self._to_device(context_lens.astype(np.int32)),
            num_decode=0,
            prefill_query_lens=tuple(plan.num_tokens),
            prefill_context_lens=tuple(context_lens.tolist()),
            token_types=types,
        )
        return self._to_device(self._prompts[token_rows, positions]), context

    def _pool(self, plan: StepPlan, rows: np.ndarray, hidden: Tensor) -> list[Pool]:
        """What the prompts that end come to; the states of the others are kept as far as they will be needed."""
        pieces = hidden.split(plan.num_tokens)
        alike: dict[PoolingParams, list[int]] = {}
        pools: list[Pool] = []
        for entry, (row, piece) in enumerate(zip(plan.rows, pieces, strict=True)):
            params = self._rows[row].pooling
            assert params is not None, "a pooling engine gets requests to pool"
            if params.task in TOKEN_TASKS:
                self._states.setdefault(row, []).append(piece.float())
                if plan.samples[entry]:
                    states = torch.cat(self._states.pop(row))
                    pools.append(Pool([entry], True, self._begin_copy(self._finish(states, params))))
                continue
            self._accumulate(row, piece, plan.num_computed[entry])
            if plan.samples[entry]:
                alike.setdefault(params, []).append(entry)
        for params, entries in alike.items():
            states = self._partial[self._to_device(rows[entries])]
            if self._kind == "mean":
                lengths = [plan.num_computed[entry] + plan.num_tokens[entry] for entry in entries]
                states = states / torch.tensor(lengths, dtype=torch.float32, device=self.device).unsqueeze(1)
            pools.append(Pool(entries, False, self._begin_copy(self._finish(states, params))))
        return pools

    def _accumulate(self, row: int, piece: Tensor, num_computed: int) -> None:
        """piece [tokens, hidden], the states of a prompt's next tokens."""
        partial = self._partial[row]
        if self._kind == "last":
            partial.copy_(piece[-1])
        elif num_computed == 0:
            partial.copy_(piece[0] if self._kind == "cls" else piece.sum(0, dtype=torch.float32))
        elif self._kind == "mean":
            partial.add_(piece.sum(0, dtype=torch.float32))

    def _finish(self, states: Tensor, params: PoolingParams) -> Tensor:
        head = self.model.head
        if params.task in ("embed", "token_embed"):
            return head.embed(states, params.dimensions, params.use_activation)
        return head.classify(states, params.use_activation)

    def _begin_copy(self, values: Tensor) -> Callable[[], np.ndarray]:
        """Start bringing values to the host; the result waits for them, and not for steps launched behind them."""
        if self.device.type != "cuda":
            return values.numpy
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

        def read() -> np.ndarray:
            copied.synchronize()
            return host.numpy()

        return read

    def _to_device(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)
