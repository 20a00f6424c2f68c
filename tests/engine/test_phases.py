"""The phases of a start: timed without gaps, shown as a table and as records."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from omni_engine.engine.phases import Phase, PhaseTimer, phase_records, phase_table, process_age

PROCESSES = [
    ("front", [Phase("imports", 0.5), Phase("tokenizer", 12.344)]),
    ("core", [Phase("weights", 1.0, 3 * 2**20)]),
]


def test_phases_follow_each_other_without_a_gap():
    started = time.monotonic()
    timer = PhaseTimer(elapsed=2.0)
    timer.done("first")
    time.sleep(0.05)
    timer.done("second", 7)
    assert [(phase.name, phase.num_bytes) for phase in timer.phases] == [("first", None), ("second", 7)]
    assert 2.0 <= timer.phases[0].seconds < 2.04
    assert timer.phases[1].seconds >= 0.05
    assert sum(phase.seconds for phase in timer.phases) == pytest.approx(2 + time.monotonic() - started, abs=0.01)


def test_the_table_has_a_line_per_phase_in_columns():
    assert phase_table(PROCESSES).splitlines() == [
        "front  imports     0.50 s",
        "front  tokenizer  12.34 s",
        "core   weights     1.00 s  3.00 MiB",
    ]
    assert phase_table([]) == ""


def test_records_say_the_same():
    assert phase_records(PROCESSES)[1:] == [
        {"process": "front", "phase": "tokenizer", "seconds": 12.344, "bytes": None},
        {"process": "core", "phase": "weights", "seconds": 1.0, "bytes": 3 * 2**20},
    ]


def test_the_age_of_a_process_counts_from_its_start():
    script = "import time; time.sleep(0.3); from omni_engine.engine.phases import process_age; print(process_age())"
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 0.28 < float(done.stdout) < time.monotonic() - started + 0.02
    assert process_age() > float(done.stdout)
