"""The team of OpenMP threads that a thread which computes has; torch's operators and our kernels share it."""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Callable
from pathlib import Path

_RUNTIME = re.compile(r"\S*/libgomp[^/\s]*\.so\S*")  # GNU's, which torch's wheels for Linux bring
_SOFT = 1  # omp_pause_soft (OpenMP 5.0, 3.2.44): what is given up comes back when it is needed


def release_team() -> None:
    """Give up the calling thread's team; its next parallel loop makes a new one. Nothing, with another runtime.

    A waiting thread of GNU's runtime spins only while all teams of the process together have no more threads than there
    are CPUs. With a second team, of whoever loaded the weights, every loop of a step would end with threads put to
    sleep and woken up again, and steps of small models take twice as long (docs/log.md).
    """
    for pause in runtimes():
        pause(_SOFT)


@functools.cache
def runtimes() -> tuple[Callable[[int], int], ...]:
    """`omp_pause_resource_all` of each GNU runtime in the process: mostly one, none before torch is imported."""
    try:
        paths = set(_RUNTIME.findall(Path("/proc/self/maps").read_text()))
        libraries = [ctypes.CDLL(path) for path in paths]
    except OSError:
        return ()
    return tuple(each.omp_pause_resource_all for each in libraries if hasattr(each, "omp_pause_resource_all"))
