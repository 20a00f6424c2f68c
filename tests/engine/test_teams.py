"""An engine at rest holds no OpenMP team, so that others in its process can spin."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import omni_engine
from omni_engine import Engine, SamplingParams
from omni_engine.engine import core
from omni_engine.ops.cpu import threads

DEMO = Path(omni_engine.__file__).parent / "models" / "demo" / "deepseek"


@pytest.mark.parametrize("speculative_config", [{}, {"method": "mtp", "num_speculative_tokens": 2}], ids=["", "drafts"])
def test_teams_are_given_up_by_the_loader_and_after_the_last_step(monkeypatch, speculative_config):
    """With drafts a step may still be under way when the last request has ended."""
    engine = Engine(str(DEMO), enforce_eager=True, max_model_len=64, speculative_config=speculative_config)
    given_up = []
    monkeypatch.setattr(core, "release_team", lambda: given_up.append(threading.current_thread().name))
    for _ in range(2):
        engine.generate("In the beginning", SamplingParams(max_tokens=9, temperature=0.0))
        engine._core._thread.submit(int).result()  # behind whatever waits there
    main = threading.main_thread().name
    names = [name if name == main else "step" for name in given_up]
    assert names == [main, "step"] * 2


AT_REST = """
import sys
import time
from pathlib import Path

import torch

from omni_engine import Engine, SamplingParams
from omni_engine.engine import core


def num_threads():
    return len(list(Path("/proc/self/task").iterdir()))



if sys.argv[2] == "kept":
    core.release_team = lambda: None
torch.set_num_threads(3)
engine = Engine(sys.argv[1], enforce_eager=True, max_model_len=64)
before = num_threads()
engine.generate("In the beginning " * 12, SamplingParams(max_tokens=4, temperature=0.0))
engine._core._thread.submit(int).result()
end = time.monotonic() + 30  # what is given up ends by itself, a little later
while sys.argv[2] != "kept" and num_threads() >= before and time.monotonic() < end:
    time.sleep(0.01)
print(num_threads() - before)
"""


@pytest.mark.skipif(not threads.runtimes(), reason="torch here has another runtime than GNU's")
def test_the_team_of_the_steps_ends():
    """At rest there is neither the loader's team nor that of the steps, two threads each beside its master."""

    def left(release):
        command = [sys.executable, "-c", AT_REST, str(DEMO), release]
        environment = {**os.environ, "OMP_NUM_THREADS": "3"}
        ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert ended.returncode == 0, ended.stderr
        return int(ended.stdout)

    assert left("kept") - left("given up") == 4
