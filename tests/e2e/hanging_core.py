"""A core process whose loop hangs in its tenth step, while its other threads live: for tests of the front."""

from __future__ import annotations

import sys
import time

from omni_engine.engine import core
from omni_engine.engine.core_process import main

STEPS_BEFORE = 9


class HangingCore(core.EngineCore):
    """Steps as often as it may, then never comes back."""

    num_steps = 0

    def step(self):
        self.num_steps += 1
        while self.num_steps > STEPS_BEFORE:
            time.sleep(60)
        return super().step()


if __name__ == "__main__":
    core.EngineCore = HangingCore
    sys.exit(main(sys.argv[1:]))
