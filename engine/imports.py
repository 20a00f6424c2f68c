"""Importing much at once, as a process does that starts."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """For a process of our own: modules imported within are not searched for garbage, now or later.

    Nearly all that an import makes stays, so collections find nothing, and they are a tenth of the time of `import
    torch`. A full one afterwards would look through all modules again, and take as long as several decode steps.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
