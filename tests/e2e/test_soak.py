"""benchmarks/soak.py runs, and fails when what it watches is over the limit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parents[2] / "benchmarks" / "soak.py"


@pytest.mark.full
@pytest.mark.parametrize(("max_slope", "status"), [("10000", 0), ("-10000", 1)])
def test_a_short_soak_leaves_nothing_and_judges_the_slope(max_slope, status):
    arguments = [
        "--minutes",
        "0.5",
        "--warm-up",
        "0.1",
        "--concurrency",
        "24",
        "--max-slope",
        max_slope,
        "--enforce-eager",
    ]
    done = subprocess.run([sys.executable, str(SOAK), *arguments], capture_output=True, text=True, timeout=400)
    assert done.returncode == status, done.stdout[-2000:] + done.stderr[-2000:]
    assert "failures: 0" in done.stdout and "left in the engine: 0\n" in done.stdout
