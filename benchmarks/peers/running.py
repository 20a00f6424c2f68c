"""An engine that runs in a process of its own, stopped whenever nothing is asked of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


@dataclass
class Worker:
    """A running engine, stopped whenever it is not asked for anything."""

    name: str
    version: str
    process: subprocess.Popen[str]

    @classmethod
    def start(cls, name: str, python: str, engine: str, model: Path, environment: dict[str, str], extra: str) -> Worker:
        """Load the engine; raises RuntimeError if it ends before it is ready. What it prints goes to `MODEL.NAME.log`
        beside the checkpoint."""
        command = [python, str(HERE / "worker.py"), "--engine", engine, "--model", str(model), "--extra", extra]
        with (model.parent / f"{model.name}.{name}.log").open("w") as log:
            process = subprocess.Popen(
                command,
                env={**os.environ, "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1", **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        worker = cls(name, "", process)
        ready = worker._answer()
        worker.version = ready["version"]
        print(f"{name} {worker.version}: loaded in {ready['load_seconds']:.1f} s", file=sys.stderr, flush=True)
        process.send_signal(signal.SIGSTOP)
        return worker

    @property
    def pid(self) -> int:
        return self.process.pid

    def runs(self, workload: str) -> bool:
        return True

    def sample(self, workload: str, seed: int) -> dict[str, Any]:
        """Of the workload, new for every seed. Raises RuntimeError if the engine has ended."""
        return self._ask({"workload": workload, "seed": seed})

    def tokens(self, workload: str, seed: int) -> list[list[int]]:
        """What the engine answers to the prompts of that sample. Raises RuntimeError if it has ended."""
        return self._ask({"workload": workload, "seed": seed, "tokens": True})["tokens"]

    def end(self) -> None:
        self.process.kill()
        self.process.wait()

    def _ask(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        self.process.send_signal(signal.SIGSTOP)
        return answer

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with status {self.process.wait()}; see its log beside the model")
        return json.loads(line)
