"""Large tensors lie in huge pages where the system lets programs choose."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
ALLOCATE = """
import re, sys
from pathlib import Path
import torch
from omni_engine.ops.cpu.huge_pages import ask_for_huge_pages
if sys.argv[1] == "asked":
    ask_for_huge_pages()
torch.empty(64 << 20, dtype=torch.uint8).fill_(1)
tensor = torch.empty(64 << 20, dtype=torch.uint8).fill_(1)
print(re.search(r"AnonHugePages:\\s+(\\d+) kB", Path("/proc/self/smaps_rollup").read_text())[1])
"""


def huge_kilobytes(asked: str, **environment: str) -> int:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("THP_")}
    command = [sys.executable, "-c", ALLOCATE, asked]
    ended = subprocess.run(command, capture_output=True, text=True, env=inherited | environment, timeout=120)
    assert ended.returncode == 0, ended.stderr
    return int(ended.stdout)


@pytest.mark.skipif(not MODE.exists() or "[madvise]" not in MODE.read_text(), reason="programs have no choice here")
def test_large_tensors_lie_in_huge_pages_unless_the_user_wants_none():
    assert huge_kilobytes("not asked") < 4 << 10
    assert huge_kilobytes("asked", THP_MEM_ALLOC_ENABLE="0") < 4 << 10
    assert huge_kilobytes("asked") > 32 << 10
