"""What the C library does with memory that a step has freed."""

from __future__ import annotations

import ctypes
import sys

# Parameters of mallopt(3), glibc's
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
KEPT_BYTES = 256 << 20
LARGEST_KEPT_BYTES = 32 << 20  # the largest threshold that glibc takes


def keep_freed_memory() -> bool:
    """Let this process keep up to 256 MiB that it has freed, for its next allocations; whether the C library does.

    Otherwise results of some MB go back to the system as soon as they are freed, and a prompt's every product waits for
    the system to find and clear its memory anew. For all threads that begin later there is one heap, so that they share
    what is kept. A variable that sets the same (MALLOC_TRIM_THRESHOLD_, GLIBC_TUNABLES) is overruled.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_MMAP_THRESHOLD, LARGEST_KEPT_BYTES), (_TRIM_THRESHOLD, KEPT_BYTES), (_ARENA_MAX, 1))
    return [mallopt(parameter, value) for parameter, value in settings] == [1, 1, 1]
