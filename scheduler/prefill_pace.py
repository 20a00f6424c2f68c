"""How much of the time prompts may take while other requests decode: `PrefillPace`."""

from __future__ import annotations

import sys
from collections import deque

NO_LIMIT = sys.maxsize  # requests whose prompts one step may compute


class PrefillPace:
    """Holds prompts back so that they take at most `share` of the time while other requests decode, in (0, 1].

    A step that computes a piece of a prompt keeps those who decode waiting. One that took t seconds leaves them
    t * (1 - share) / share seconds of steps without prompts before the next piece is computed, and holds a piece of one
    prompt only, so that prompts that come together do not stall them together. What is left of that time ends with the
    last request that decodes. A prompt that comes to requests which nothing has stalled begins at once.

    So tokens come more evenly, and the first tokens of prompts that come close together later. Small pieces beside
    decoding requests (Sarathi-Serve, arXiv 2403.02310) even out single tokens only: where few tokens already keep the
    processor busy, the pieces of a prompt stall the others as long as the whole.
    """

    def __init__(self, share: float) -> None:
        self._rest = (1 - share) / share  # seconds per second of a step with a prompt
        self._owed = 0.0  # seconds of steps without prompts, until the next piece
        self._is_decoding = False
        self._in_flight: deque[float] = deque()  # what is owed for each second of these steps

    def num_prompts(self, is_decoding: bool) -> int:
        """Requests whose prompts the next step may compute. `is_decoding`: there are some that decode."""
        self._is_decoding = is_decoding
        if not is_decoding:
            self._owed = 0.0
            return NO_LIMIT
        return int(self._owed <= 0 and not any(each > 0 for each in self._in_flight))

    def plan(self, num_decode: int, num_prompts: int) -> None:
        """Take note of the step that has been planned now: of its entries, those that decode and those that do not."""
        if num_prompts:
            self._in_flight.append(self._rest if self._is_decoding else 0.0)
        else:
            self._in_flight.append(-1.0 if num_decode else 0.0)

    def observe(self, seconds: float) -> None:
        """Take in how long the oldest step in flight took."""
        self._owed = max(0.0, self._owed + self._in_flight.popleft() * seconds)
