"""engine/imports.py: no collections while modules are imported, and none that look at them later."""

from __future__ import annotations

import gc
import subprocess
import sys

from omni_engine.engine.imports import quick_imports

COLLECTIONS = """
import gc
from omni_engine.engine.imports import quick_imports
runs = []
gc.callbacks.append(lambda phase, info: runs.append(phase))
with quick_imports():
    import torch
within = len(runs)
gc.collect()
print(within, len(runs), gc.get_freeze_count(), len(gc.get_objects()))
"""


def test_modules_are_imported_without_collections_and_stay_out_of_later_ones():
    done = subprocess.run([sys.executable, "-c", COLLECTIONS], capture_output=True, text=True, check=True)
    within, after, frozen, searched = map(int, done.stdout.split())
    assert within == 0 and after == 2  # the start and the stop of the one that was asked for
    assert frozen > 100_000 > 10 * searched


def test_collections_are_as_they_were_afterwards():
    try:
        with quick_imports():
            assert not gc.isenabled()
        assert gc.isenabled()
        gc.disable()
        with quick_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
        gc.unfreeze()
