"""Grammars checked before their requests are let in, in processes that can be ended: `GrammarChecker`."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import closing, contextmanager

from ...scheduler.sampling_params import ValidationError
from ...scheduler.structured_outputs import StructuredOutputsParams
from ..errors import RequestRejectedError
from .grammar_request import GrammarRequest, grammar_request
from .trials import Trial, TrialProcess
from .worker import WorkerAnswer, WorkerJob

logger = logging.getLogger(__name__)
CHECK_SECONDS = 1.0  # for one grammar, on the wall; a usual one takes a hundredth
MAX_AT_ONCE = 4  # grammars that are tried out side by side, each of which may take the worker's EXTRA_BYTES
SHARE_SECONDS = 0.25  # that a grammar has for sure while others wait for its place
WAIT_SECONDS = 1.0  # for a place
MAX_KNOWN = 1024  # verdicts that are kept
MAX_KNOWN_CHARACTERS = 32 << 20  # of their grammars together
MAX_TRIES = 3  # of a process that dies by itself
_LOOK_SECONDS = 0.02  # between two looks at who else waits
_BUSY = "other grammars are being checked, more than this server takes at once; send the request again in seconds: 1"


class GrammarChecker:
    """Tells of constraints whether they can be served, and what they are in the grammar library's format.

    A grammar is compiled and tried out in a process of its own; what takes longer than `CHECK_SECONDS` costs that
    process and not the engine. `MAX_AT_ONCE` run side by side. Who comes then waits in line, and whoever has had
    `SHARE_SECONDS` by then loses its place, the oldest first: costly grammars delay others by their share, and not by
    their whole time. Verdicts, good and bad, are remembered, those used last; that there was no time is no verdict.
    May be called from several threads.
    """

    def __init__(self, job: WorkerJob) -> None:
        self.job = job
        self.num_checked = 0  # grammars that were tried out
        self.num_killed = 0  # trials that had to be ended, or died
        self.num_busy = 0  # that were told to come again
        self._process = TrialProcess(job)
        self._known: OrderedDict[GrammarRequest, WorkerAnswer] = OrderedDict()
        self._num_characters = 0
        self._known_lock = threading.Lock()
        self._changed = threading.Condition()  # guards the next two
        self._running: dict[GrammarRequest, float] = {}  # since when, oldest first
        self._waiting: dict[object, GrammarRequest] = {}  # in the order in which they came

    def known(self, params: StructuredOutputsParams) -> str | None:
        """The grammar of a constraint that has been checked before, without waiting. Raises as `check` does."""
        return self._verdict(self._recall(grammar_request(params)))

    def check(self, params: StructuredOutputsParams, since: float | None = None) -> str:
        """The grammar of a constraint. Waits for it: `WAIT_SECONDS` for a place, counted from `since` (as
        `time.monotonic` tells it, by default now), and `CHECK_SECONDS` for the verdict.

        Raises `ValidationError` where the constraint is refused and `RequestRejectedError` where there was no place.
        """
        request = grammar_request(params)
        deadline = (time.monotonic() if since is None else since) + WAIT_SECONDS
        with self._place(request, deadline) as has_place:
            answer = self._recall(request)
            if answer is None:
                assert has_place
                answer = self._try_out(request)
                self._remember(request, answer)
        grammar = self._verdict(answer)
        assert grammar is not None
        return grammar

    def start(self) -> None:
        """Have the process ready before the first constraint comes. Waits for it; RuntimeError if there can be none."""
        self._process.start()

    def close(self) -> None:
        """End the process. Another check starts a new one."""
        self._process.close()

    @contextmanager
    def _place(self, request: GrammarRequest, deadline: float) -> Iterator[bool]:
        """Within it nobody else tries out this grammar, or its verdict is known, which is told by False."""
        ticket = object()
        with self._changed:
            self._waiting[ticket] = request
            try:
                while self._recall(request) is None and not self._is_next(ticket):
                    left = deadline - time.monotonic()
                    if left <= 0:
                        raise self._busy()
                    self._changed.wait(left)
                has_place = self._recall(request) is None
                if has_place:
                    self._running[request] = time.monotonic()
            finally:
                del self._waiting[ticket]
                self._changed.notify_all()
        try:
            yield has_place
        finally:
            if has_place:
                with self._changed:
                    del self._running[request]
                    self._changed.notify_all()

    def _first_in_line(self) -> object | None:
        """The ticket of who waits for a place and not only for the verdict of a grammar that is tried out already."""
        return next((ticket for ticket, request in self._waiting.items() if request not in self._running), None)

    def _is_next(self, ticket: object) -> bool:
        return len(self._running) < MAX_AT_ONCE and ticket is self._first_in_line()

    def _must_go(self, request: GrammarRequest) -> bool:
        """Whether the one that is tried out has had its share, is the oldest, and others have no place."""
        with self._changed:
            if len(self._running) < MAX_AT_ONCE or self._first_in_line() is None:
                return False
            oldest = next(iter(self._running))
            return oldest == request and time.monotonic() - self._running[oldest] > SHARE_SECONDS

    def _busy(self) -> RequestRejectedError:
        self.num_busy += 1
        return RequestRejectedError(_BUSY)

    def _verdict(self, answer: WorkerAnswer | None) -> str | None:
        if answer is not None and answer.error is not None:
            raise ValidationError(f"structured_outputs: {answer.error}", parameter="structured_outputs")
        return None if answer is None else answer.grammar

    def _recall(self, request: GrammarRequest) -> WorkerAnswer | None:
        with self._known_lock:
            answer = self._known.get(request)
            if answer is not None:
                self._known.move_to_end(request)
            return answer

    def _remember(self, request: GrammarRequest, answer: WorkerAnswer) -> None:
        with self._known_lock:
            self._known[request] = answer
            self._num_characters += _size(request, answer)
            while len(self._known) > MAX_KNOWN or self._num_characters > MAX_KNOWN_CHARACTERS:
                self._num_characters -= _size(*self._known.popitem(last=False))

    def _try_out(self, request: GrammarRequest) -> WorkerAnswer:
        """The trial's answer, or what its end means."""
        self.num_checked += 1
        for _ in range(MAX_TRIES):
            answer = self._begin(request)
            if answer is not None:
                return answer
        raise RuntimeError(f"the process for grammars ends before it begins, tries: {MAX_TRIES}")

    def _begin(self, request: GrammarRequest) -> WorkerAnswer | None:
        """As `_try_out`; None where the process died before it had begun, which is not the grammar's fault."""
        with closing(self._process.begin(request)) as trial:
            with self._changed:
                self._running[request] = trial.began  # its share begins here
            while not trial.wait(_LOOK_SECONDS):
                if trial.seconds > CHECK_SECONDS:
                    self._give_up(request, trial)
                    limit = f"the limit in seconds is: {CHECK_SECONDS:g}"
                    return WorkerAnswer(error=f"the grammar takes too long to compile, {limit}")
                if self._must_go(request):
                    self._give_up(request, trial)
                    raise self._busy()
            if trial.answer is not None or not trial.has_begun:
                return trial.answer
            self._give_up(request, trial)
            return WorkerAnswer(error="the grammar is too large or too deep, its compilation needs too much memory")

    def _give_up(self, request: GrammarRequest, trial: Trial) -> None:
        self.num_killed += 1
        logger.warning("a grammar of %d characters was given up after %.2f s", len(request.text), trial.seconds)


def _size(request: GrammarRequest, answer: WorkerAnswer) -> int:
    return len(request.text) + len(answer.grammar or "") + len(answer.error or "")
