"""The constrained rows of the batch, and the masks of a step, made while its forward runs: `ConstrainedRows`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from ..scheduler.plan import NewRow
from .row_state import RowState
from .structured.constraint import RowConstraint
from .structured.store import GrammarStore


class StepMasks:
    """The masks of one step: made by `result`, or while others work if `start` has been called."""

    def __init__(self, parts: list[tuple[RowConstraint, int]], num_drafts: int, num_words: int) -> None:
        self._parts = parts  # the constraint, and the place of its first logits; first those that decode
        self._num_drafts = num_drafts
        self._num_words = num_words
        self._read_drafts: Callable[[], list[list[int]]] = list  # those of the parts that decode
        self._result: Callable[[], tuple[np.ndarray, np.ndarray]] | None = None

    def take_drafts(self, state: RowState, rows: list[int]) -> None:
        """Begin to bring the drafts of the parts that decode to the host: those are the rows."""
        if not self._num_drafts or not rows:
            return
        drafts = state.drafts[torch.tensor(rows, device=state.drafts.device), : self._num_drafts]
        if drafts.device.type != "cuda":
            self._read_drafts = drafts.tolist
            return
        host = torch.empty(drafts.shape, dtype=drafts.dtype, pin_memory=True)
        host.copy_(drafts, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

        def read() -> list[list[int]]:
            copied.synchronize()
            return host.tolist()

        self._read_drafts = read

    def start(self, thread: ThreadPoolExecutor) -> None:
        """Make the masks in `thread`; the tokens before must all have been accepted."""
        self._result = thread.submit(self._make).result

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the logits, int64 [m], and their masks, int32 [m, words]."""
        return self._make() if self._result is None else self._result()

    def _make(self) -> tuple[np.ndarray, np.ndarray]:
        all_drafts = self._read_drafts()
        rows: list[int] = []
        masks: list[np.ndarray] = []
        for index, (constraint, first) in enumerate(self._parts):
            drafts = all_drafts[index] if index < len(all_drafts) else []
            own = np.empty((1 + len(drafts), self._num_words), np.int32)
            constraint.fill_masks(drafts, own)
            rows += range(first, first + len(own))
            masks.append(own)
        return np.asarray(rows, np.int64), np.concatenate(masks)


class ConstrainedRows:
    """Keeps the constraint of every row that has one. Rows are places in the runner's batch."""

    def __init__(self, store: GrammarStore | None, device: torch.device) -> None:
        self._store = store
        self._device = device
        self._rows: dict[int, RowConstraint] = {}
        self._thread: ThreadPoolExecutor | None = None

    def __bool__(self) -> bool:
        return bool(self._rows)

    def add_row(self, new: NewRow) -> None:
        """Take in a request at its row; what it wrote before a preemption is in `token_ids`."""
        self._rows.pop(new.row, None)
        if new.params.is_constrained:
            assert self._store is not None, "constrained requests are let in by an engine core with a store only"
            self._rows[new.row] = self._store.constraint(new)

    def remove_row(self, row: int) -> None:
        self._rows.pop(row, None)

    def accept(self, row: int, token_ids: Sequence[int]) -> str | None:
        """Tell what was read for a row; returns why its request cannot go on, if so."""
        constraint = self._rows.get(row)
        if constraint is None:
            return None
        constraint.accept(token_ids)
        return constraint.error

    def begin(
        self, state: RowState, decode_rows: np.ndarray, num_drafts: int, chunk_rows: np.ndarray, *, is_settled: bool
    ) -> StepMasks | None:
        """The masks of a step in which rows decode, each with so many drafts, and chunks of others sample behind them;
        None where no row has a constraint. Called before the forward, so that its host need not wait.

        `is_settled`: all tokens before have been accepted. Then the masks are made at once, in a thread where the
        forward would keep this one busy; else they are made when they are asked for.
        """
        rows = self._rows
        if not rows:
            return None
        width = 1 + num_drafts
        decoding = [(row, width * place) for place, row in enumerate(decode_rows.tolist()) if row in rows]
        start = width * len(decode_rows)
        chunks = [(row, start + place) for place, row in enumerate(chunk_rows.tolist()) if row in rows]
        if not decoding and not chunks:
            return None
        assert self._store is not None
        parts = [(rows[row], first) for row, first in (*decoding, *chunks)]
        masks = StepMasks(parts, num_drafts, -(-self._store.vocab_size // 32))
        masks.take_drafts(state, [row for row, _ in decoding])
        if is_settled and self._device.type == "cpu":
            if self._thread is None:
                self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="masks")
            masks.start(self._thread)
        return masks

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown()
