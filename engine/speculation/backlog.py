"""Which rows have tokens that their drafter has only remembered, and when it must take them in."""

from __future__ import annotations

import numpy as np


class Backlog:
    """Counts, row by row, the newest tokens that a drafter with a `window` has only remembered.

    They are taken in many at a time, which costs a fraction of taking in each in its own step: when the window is full,
    before a step that has drafts, and when the row is given up, if its blocks may stay in the cache as a prefix.
    """

    def __init__(self, num_rows: int, window: int) -> None:
        self.window = window
        self._counts = np.zeros(num_rows, np.int64)

    def due(self, rows: np.ndarray, num_drafts: int) -> np.ndarray:
        """Those of `rows` (int64 [n]) to catch up before they decode with so many drafts: int64."""
        counts = self._counts[rows]
        if num_drafts or counts.max(initial=0) >= self.window:
            return rows[counts > 0]
        return rows[:0]

    def add(self, rows: np.ndarray) -> None:
        """`rows` have decoded without drafts: one more token of each."""
        self._counts[rows] += 1

    def drop(self, rows: np.ndarray) -> None:
        """Nobody will read the entries of these rows."""
        self._counts[rows] = 0

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of `rows` that are to be taken in, which are none afterwards: int64 [tokens], the row of each, and
        how far it stands before the row's newest token, 1 at the least."""
        counts = self._counts[rows]
        self._counts[rows] = 0
        ends = counts.cumsum()
        return rows.repeat(counts), ends.repeat(counts) - np.arange(counts.sum())
