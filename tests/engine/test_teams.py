"""An engine at rest holds no OpenMP team, so that others in its process can spin."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

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


@pytest.mark.skipif(not threads.runtimes(), reason="torch here has another runtime than GNU's")
def test_the_team_of_the_steps_ends(monkeypatch):
    engine = Engine(str(DEMO), enforce_eager=True, max_model_len=64)
    torch.rand(1 << 20).exp().sum()  # a team of this thread's own
    engine.generate("In the beginning", SamplingParams(max_tokens=4, temperature=0.0))
    engine._core._thread.submit(int).result()
    before = threading.active_count(), _num_threads()
    torch.rand(1 << 20).exp().sum()
    assert _num_threads() - before[1] == max(0, torch.get_num_threads() - 1)


def _num_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))
