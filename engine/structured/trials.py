"""The process that tries grammars out, as its parent sees it: `TrialProcess`, and `Trial`, one grammar in it."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import threading
import time

import msgspec

from .grammar_request import GrammarRequest
from .worker import BEGUN, JOB_BYTES, WorkerAnswer, WorkerJob

START_SECONDS = 60.0  # for the process, on a busy machine
SEND_SECONDS = 1.0  # for what it reads at once, unless it hangs
KILL_SECONDS = 0.5  # from asking for a trial's end to that end; a process that has not managed is given up


class TrialProcess:
    """Begins trials, each in a child of one process, which is started when it is needed. May be called from several
    threads."""

    def __init__(self, job: WorkerJob) -> None:
        self.job = job
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._is_ready = False
        self._num_begun = 0

    @property
    def pid(self) -> int | None:
        """Its id, None where there is no process."""
        process = self._process
        return None if process is None else process.pid

    def begin(self, request: GrammarRequest) -> Trial:
        """Have a grammar tried out; RuntimeError if there can be no process."""
        with self._lock:
            try:
                return self._begin(request)
            except OSError:  # it died between two, which is nobody's fault
                self._stop()
                return self._begin(request)

    def start(self) -> None:
        """Have the process ready. Waits for it; RuntimeError if there can be none."""
        with self._lock:
            self._running()

    def close(self) -> None:
        """End the process and its children. Another trial starts a new one."""
        with self._lock:
            self._stop()

    def kill(self, number: int) -> None:
        """Have the trial of this number end."""
        with self._lock:
            if self._control is not None:
                try:
                    self._control.send(b"%d" % number)
                except OSError:
                    self._stop()

    def replace(self, pid: int | None) -> None:
        """Give up the process of this id, which hangs, and have the next one get ready meanwhile."""
        with self._lock:
            if pid == self.pid:
                self._stop()
                self._start()

    def _begin(self, request: GrammarRequest) -> Trial:
        control = self._running()
        ours, theirs = socket.socketpair()
        self._num_begun += 1
        with theirs:
            socket.send_fds(control, [b"%d" % self._num_begun], [theirs.fileno()])
        return Trial(self, self._num_begun, ours, request)

    def _running(self) -> socket.socket:
        """The socket of a process that is ready; RuntimeError if there can be none."""
        if self._process is not None and self._process.poll() is not None:  # the thread that started it may have ended
            self._stop()
        control = self._control or self._start()
        if not self._is_ready:
            ready = self._first_answer(control)
            if ready is None or ready.error is not None:
                self._stop()
                raise RuntimeError(
                    f"the process for grammars does not start: {'its log says why' if ready is None else ready.error}"
                )
            self._is_ready = True
        return control

    def _first_answer(self, control: socket.socket) -> WorkerAnswer | None:
        readable, _, _ = select.select([control], [], [], START_SECONDS)
        try:
            data = control.recv(JOB_BYTES) if readable else b""
        except OSError:
            return None
        return msgspec.json.decode(data, type=WorkerAnswer) if data else None

    def _start(self) -> socket.socket:
        self._is_ready = False
        # Messages keep their bounds, and bring a trial's socket along.
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(SEND_SECONDS)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"{__package__}.worker"],
                stdin=theirs.fileno(),
                stdout=sys.stderr if _has_descriptor(sys.stderr) else subprocess.DEVNULL,
                start_new_session=True,
                # A thread of the library's would not come along into a child, which would wait for it for ever.
                env={**os.environ, "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            )
        self._control.send(msgspec.json.encode(self.job))
        return self._control

    def _stop(self) -> None:
        process, self._process = self._process, None
        control, self._control = self._control, None
        if control is not None:
            control.close()
        if process is not None:
            process.kill()
            process.wait()


class Trial:
    """One grammar that is tried out; to be used by one thread, and closed."""

    def __init__(self, process: TrialProcess, number: int, connection: socket.socket, request: GrammarRequest) -> None:
        self.began = time.monotonic()
        self.ended = False
        self._process = process
        self._pid = process.pid
        self._number = number
        self._connection = connection
        self._received = bytearray()
        connection.settimeout(SEND_SECONDS)
        try:
            connection.sendall(msgspec.json.encode(request))
            connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # dead or hanging: there will be no answer

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.began

    def wait(self, seconds: float) -> bool:
        """Whether it has ended, after this time at most."""
        deadline = time.monotonic() + seconds
        while not self.ended and (left := deadline - time.monotonic()) > 0:
            if not select.select([self._connection], [], [], left)[0]:
                break
            try:
                piece = self._connection.recv(1 << 16)
            except OSError:  # it left with something unread
                piece = b""
            self._received += piece
            self.ended = not piece
        return self.ended

    @property
    def has_begun(self) -> bool:
        """Whether its own process has been there; else its end says nothing of the grammar."""
        return self._received.startswith(BEGUN)

    @property
    def answer(self) -> WorkerAnswer | None:
        """What it told before its end; None if it was killed, by whomever."""
        text = self._received[len(BEGUN) :]
        return msgspec.json.decode(text, type=WorkerAnswer) if text.endswith(b"\n") else None

    def close(self) -> None:
        """End it, if it has not ended; a process that does not do so is given up."""
        if not self.ended:
            self._process.kill(self._number)
            if not self.wait(KILL_SECONDS):
                self._process.replace(self._pid)
        self._connection.close()


def _has_descriptor(stream: object) -> bool:
    try:
        return stream.fileno() >= 0  # type: ignore[attr-defined]
    except (AttributeError, OSError, ValueError):
        return False
