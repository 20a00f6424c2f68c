"""Huge pages for weights and caches, so that reading them in order misses the address cache less often."""

from __future__ import annotations

import os

_VARIABLE = "THP_MEM_ALLOC_ENABLE"  # of torch's allocator (c10/core/impl/alloc_cpu.cpp)


def ask_for_huge_pages() -> None:
    """Let torch ask the system for huge pages wherever it allocates 2 MB or more on the CPU.

    torch looks once, at the first tensor of the process, so this must come before it; later it changes nothing. A
    variable that is set already counts: 0 means none. Only where Linux lets programs choose
    (/sys/kernel/mm/transparent_hugepage/enabled: madvise) is there a difference.
    """
    os.environ.setdefault(_VARIABLE, "1")
