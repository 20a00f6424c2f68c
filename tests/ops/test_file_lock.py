"""The lock between processes: one holder at a time, freed by death, no file left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from omni_engine.ops import file_lock as file_lock_module
from omni_engine.ops.file_lock import file_lock


def test_a_lock_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with file_lock(path):
        assert path.read_text() == str(os.getpid())
    assert not path.exists()


def test_a_lock_holds_against_another_process_until_that_dies(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    code = (
        "import sys, time; from pathlib import Path; from omni_engine.ops.file_lock import file_lock\n"
        "with file_lock(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with (
        pytest.raises(TimeoutError, match=rf"process {process.pid} has not freed .* for 0 s: {path}"),
        file_lock(path, 0),
    ):
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with file_lock(path, timeout=5):
        pass
    assert not path.exists()


def test_no_two_threads_hold_a_lock_whose_file_comes_and_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_lock_module, "_POLL_SECONDS", 0.0001)
    inside: list[int] = []
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(100):
            with file_lock(tmp_path / "lock"):
                inside.append(number)
                if len(inside) != 1:
                    wrong.append(number)
                inside.pop()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and not (tmp_path / "lock").exists()
