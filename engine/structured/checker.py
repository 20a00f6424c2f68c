"""Grammars checked before their requests are let in, in a process that can be ended: `GrammarChecker`."""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import subprocess
import sys
import threading
import time
from collections import OrderedDict

import msgspec

from ...scheduler.sampling_params import ValidationError
from ...scheduler.structured_outputs import StructuredOutputsParams
from .grammar_request import GrammarRequest, grammar_request
from .worker import WorkerAnswer, WorkerJob

logger = logging.getLogger(__name__)
CHECK_SECONDS = 1.0  # for one grammar, on the wall; a usual one takes a hundredth
START_SECONDS = 60.0  # for the process, on a busy machine; counted apart
MAX_KNOWN = 1024  # verdicts that are kept
MAX_KNOWN_CHARACTERS = 32 << 20  # of their grammars together
_READ_BYTES = 1 << 16


class GrammarChecker:
    """Tells of constraints whether they can be served, and what they are in the grammar library's format.

    A grammar is compiled and tried out in a process of its own, one after another; what takes longer than
    `CHECK_SECONDS` costs that process and not the engine. The process starts with the first constraint. Verdicts, good
    and bad, are remembered, those used last. May be called from several threads.
    """

    def __init__(self, job: WorkerJob) -> None:
        self.job = job
        self.num_checked = 0  # grammars that the process was asked about
        self.num_killed = 0  # processes that had to be ended
        self._known: OrderedDict[GrammarRequest, WorkerAnswer] = OrderedDict()
        self._num_characters = 0
        self._lock = threading.Lock()  # of the process
        self._known_lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._is_ready = False

    def known(self, params: StructuredOutputsParams) -> str | None:
        """The grammar of a constraint that has been checked before, without waiting. Raises as `check` does."""
        return self._verdict(self._recall(grammar_request(params)))

    def check(self, params: StructuredOutputsParams) -> str:
        """The grammar of a constraint, `ValidationError` if it is refused. Waits for it, and for others before it."""
        request = grammar_request(params)
        with self._lock:
            answer = self._recall(request)
            if answer is None:
                answer = self._ask(request)
                self._remember(request, answer)
        grammar = self._verdict(answer)
        assert grammar is not None
        return grammar

    def start(self) -> None:
        """Have the process ready before the first constraint comes. Waits for it; RuntimeError if there can be none."""
        with self._lock:
            self._running()

    def close(self) -> None:
        """End the process. Another check starts a new one."""
        with self._lock:
            self._stop()

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

    def _ask(self, request: GrammarRequest) -> WorkerAnswer:
        """The process's answer, or what its end means."""
        self.num_checked += 1
        process = self._running()
        start = time.monotonic()
        answer = self._exchange(process, request, CHECK_SECONDS)
        if answer is not None:
            return answer
        seconds = time.monotonic() - start
        self.num_killed += 1
        crashed = process.poll() is not None
        self._stop()
        self._start()  # for the next one; it gets ready meanwhile
        logger.warning("a grammar of %d characters was given up after %.2f s", len(request.text), seconds)
        if crashed:
            return WorkerAnswer(error="the grammar is too large or too deep, its compilation needs too much memory")
        return WorkerAnswer(error=f"the grammar takes too long to compile, the limit in seconds is: {CHECK_SECONDS:g}")

    def _running(self) -> subprocess.Popen[bytes]:
        """A process that is ready; RuntimeError if there can be none."""
        process = self._process
        if process is not None and process.poll() is not None:  # the thread that started it may have ended
            self._stop()
        process = self._process or self._start()
        if not self._is_ready:
            ready = self._exchange(process, self.job, START_SECONDS)
            if ready is None or ready.error is not None:
                self._stop()
                raise RuntimeError(
                    f"the process for grammars does not start: {'its log says why' if ready is None else ready.error}"
                )
            self._is_ready = True
        return process

    def _start(self) -> subprocess.Popen[bytes]:
        self._is_ready = False
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
            env={**os.environ, "RAYON_NUM_THREADS": "1"},  # its threads would each reserve address space
        )
        return self._process

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.close()
            process.stdout.close()
            process.kill()
            process.wait()

    def _exchange(
        self, process: subprocess.Popen[bytes], message: msgspec.Struct, timeout: float
    ) -> WorkerAnswer | None:
        """Send a line, wait for one; None after `timeout` seconds, or once the process has ended."""
        assert process.stdin is not None and process.stdout is not None
        deadline = time.monotonic() + timeout
        data = memoryview(msgspec.json.encode(message) + b"\n")
        received = bytearray()
        os.set_blocking(process.stdin.fileno(), False)
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            selector.register(process.stdin, selectors.EVENT_WRITE)
            while (left := deadline - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    if key.fileobj is process.stdin:
                        with contextlib.suppress(BlockingIOError, BrokenPipeError):
                            data = data[os.write(process.stdin.fileno(), data) :]
                        if not data or process.poll() is not None:
                            selector.unregister(process.stdin)
                        continue
                    piece = os.read(process.stdout.fileno(), _READ_BYTES)
                    if not piece:
                        process.wait()
                        return None
                    received += piece
                    if received.endswith(b"\n"):
                        return msgspec.json.decode(received, type=WorkerAnswer)
        return None


def _size(request: GrammarRequest, answer: WorkerAnswer) -> int:
    return len(request.text) + len(answer.grammar or "") + len(answer.error or "")
