"""A thread's team of OpenMP threads can be given up, and comes back."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch  # noqa: F401  its runtime is the one

from omni_engine.ops.cpu import threads

SCRIPT = """
import os, time, torch
from omni_engine.ops.cpu.threads import release_team

def count(wanted=None):  # a thread that was given up ends by itself, a little later
    end = time.monotonic() + 30
    while (found := len(os.listdir("/proc/self/task"))) != wanted is not None and time.monotonic() < end:
        time.sleep(0.001)
    return found

torch.set_num_threads(3)
value = torch.rand(1 << 20)
expected = value.exp().sum()
kept = count()
counts = []
for release in (False, True, True, False):
    if release:
        release_team()
    counts.append(count(kept - 2 if release else None))
    assert torch.equal(value.exp().sum(), expected)
    counts.append(count())
print(*counts)
"""


@pytest.mark.skipif(not threads.runtimes(), reason="torch here has another runtime than GNU's")
def test_the_threads_are_gone_until_the_next_loop():
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=True)
    kept, kept_after, gone, back, gone_again, back_again, still, still_after = map(int, run.stdout.split())
    assert kept == kept_after == back == back_again == still == still_after
    assert gone == gone_again == kept - 2
