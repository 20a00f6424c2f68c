"""The pages of a cache in a CPU's memory, brought in before a step needs them."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor

MADV_POPULATE_WRITE = 23  # madvise(2), Linux 5.14: pages are brought in as if written, and keep what they hold
LARGE_PIECE_BYTES = 32 << 20
PIECE_BYTES = 1 << 20  # some milliseconds in a guest whose host must find the memory too


class CachePages:
    """Memory for the blocks that are given out next.

    A cache takes memory only where it has been written, and the system finds and clears that memory at the first write:
    within a step, which waits for it. Whoever has nothing to compute can do it before. Not thread-safe.

    Args:
        caches: a layer's tensors each, [num_blocks, ...].
    """

    def __init__(self, caches: Iterable[tuple[Tensor, ...]]) -> None:
        parts = [part for cache in caches for part in cache if part.device.type == "cpu"]
        self._parts = parts if sys.platform == "linux" else []
        self._brought = [0] * len(self._parts)  # bytes, from the first block
        self._num_blocks = 0  # so many have all their pages

    def bring(self, num_blocks: int) -> bool:
        """Bring in a piece of the pages of the first `num_blocks` blocks; whether one was missing.

        False for ever where the system refuses, such as a Linux before 5.14: pages then come as they are written.
        """
        if num_blocks <= self._num_blocks:
            return False
        for index, part in enumerate(self._parts):
            begin, end = self._brought[index], min(num_blocks, len(part)) * (part.nbytes // len(part))
            if begin < end:
                end = min(begin + PIECE_BYTES, end)
                if not _populate(part.data_ptr() + begin, end - begin):
                    self._parts = []
                    return False
                self._brought[index] = end
                return True
        self._num_blocks = num_blocks
        return False

    def bring_all(self) -> None:
        """Bring in the pages of all blocks at once, on all processors."""
        if not self._parts:
            return
        pieces = [
            (part.data_ptr() + at, min(LARGE_PIECE_BYTES, part.nbytes - at))
            for part in self._parts
            for at in range(0, part.nbytes, LARGE_PIECE_BYTES)
        ]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="cache pages") as pool:
            if not all(pool.map(lambda piece: _populate(*piece), pieces)):
                self._parts = []
        self._brought = [part.nbytes for part in self._parts]


def _populate(address: int, size: int) -> bool:
    """Bring in all pages of which `size` bytes from `address` have a part; whether the system did."""
    begin = address // mmap.PAGESIZE * mmap.PAGESIZE
    libc = ctypes.CDLL(None)
    return libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(address + size - begin), MADV_POPULATE_WRITE) == 0
