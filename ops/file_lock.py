"""A lock between the processes of one machine, so that two of them do not compile the same code at once."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

_POLL_SECONDS = 0.05


@contextlib.contextmanager
def file_lock(path: Path, timeout: float = float("inf")) -> Iterator[None]:
    """Hold the lock named by the file `path`, which exists only as long as it is held or after its holder was killed.

    The kernel frees the lock of a process that dies. It holds between threads too. TimeoutError, naming the holder,
    after `timeout` seconds of waiting; another OSError where the file cannot be made.
    """
    descriptor = _acquire(path, timeout)
    try:
        with contextlib.suppress(OSError):  # only for the message of those who wait
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        # Removed while it is held: who waits for this file sees that its name is gone, and begins again.
        path.unlink(missing_ok=True)
        # Unlocked by name, since a forked child may have inherited the descriptor.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _acquire(path: Path, timeout: float) -> int:
    deadline = time.monotonic() + timeout
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            while not _try_lock(descriptor):
                if time.monotonic() >= deadline:
                    holder = os.pread(descriptor, 32, 0).decode("ascii", "replace") or "another one"
                    raise TimeoutError(f"process {holder} has not freed a lock for {timeout:g} s: {path}")
                time.sleep(_POLL_SECONDS)
            if _is_same_file(path, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_same_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
