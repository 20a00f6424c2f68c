"""Memory that a step has freed stays with the process, so that the next step finds it in place."""

from __future__ import annotations

import subprocess
import sys

import pytest

ALLOCATE = """
import resource, sys
import torch
from omni_engine.ops.cpu.malloc import keep_freed_memory
if sys.argv[1] == "kept" and not keep_freed_memory():
    print(-1)
    sys.exit()
for _ in range(4):  # what glibc learns by itself, it has learnt then
    torch.ones(24 << 20, dtype=torch.uint8), torch.ones(24 << 20, dtype=torch.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    parts = [torch.ones(12 << 20, dtype=torch.uint8) for _ in range(8)]
    del parts
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(kept: str) -> int:
    """How often the system had to find a page of memory, in ten rounds that use 96 MB and free it."""
    ended = subprocess.run([sys.executable, "-c", ALLOCATE, kept], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    return int(ended.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="a C library of its own")
def test_a_second_round_finds_its_memory_in_place():
    kept = faults("kept")
    if kept == -1:
        pytest.skip("the C library has no mallopt")
    assert kept < faults("given back") // 4
