"""Traces of the steps by torch's profiler: what `profiler_config` asks for, and the profiler itself."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProfilerChoice:
    """vLLM's keys of `profiler_config`, those that are built; `torch_profiler_dir` is made if it is not there."""

    torch_profiler_dir: Path
    torch_profiler_with_stack: bool = True
    torch_profiler_with_flops: bool = False
    torch_profiler_record_shapes: bool = False
    torch_profiler_with_memory: bool = False
    torch_profiler_use_gzip: bool = True


def choose_profiler(config: Mapping[str, Any]) -> ProfilerChoice:
    """What `profiler_config` comes to; raises ValueError with the key that is wrong."""
    given = dict(config)
    if (kind := given.pop("profiler", None)) != "torch":
        raise ValueError(f"profiler in profiler_config must be torch: {kind}")
    folder = given.pop("torch_profiler_dir", None)
    if not isinstance(folder, str) or not folder or "://" in folder:
        raise ValueError(f"torch_profiler_dir in profiler_config must be a folder: {folder}")
    known = {field.name for field in fields(ProfilerChoice)}
    for key, value in given.items():
        if key not in known:
            raise ValueError(f"profiler_config knows {', '.join(sorted(known | {'profiler'}))}, and not: {key}")
        if not isinstance(value, bool):
            raise ValueError(f"{key} in profiler_config must be true or false: {value}")
    return ProfilerChoice(Path(folder).expanduser().absolute(), **given)


class StepProfiler:
    """Records what runs in the thread that starts it; `stop` writes one trace, which Chrome and Perfetto show."""

    def __init__(self, choice: ProfilerChoice) -> None:
        self._choice = choice
        self._running: Any = None

    def start(self) -> None:
        """Raises RuntimeError if it runs already."""
        import torch.profiler

        if self._running is not None:
            raise RuntimeError("the profiler runs already; stop it first")
        choice = self._choice
        profiler = torch.profiler.profile(
            with_stack=choice.torch_profiler_with_stack,
            with_flops=choice.torch_profiler_with_flops,
            record_shapes=choice.torch_profiler_record_shapes,
            profile_memory=choice.torch_profiler_with_memory,
        )
        profiler.start()
        self._running = profiler

    def stop(self) -> Path:
        """The file of the trace. Raises RuntimeError if nothing runs, OSError if the file cannot be written."""
        profiler, self._running = self._running, None
        if profiler is None:
            raise RuntimeError("the profiler does not run; start it first")
        profiler.stop()
        folder = self._choice.torch_profiler_dir
        folder.mkdir(parents=True, exist_ok=True)
        ending = "json.gz" if self._choice.torch_profiler_use_gzip else "json"
        path = folder / f"core-{os.getpid()}-{time.strftime('%Y%m%d-%H%M%S')}-{time.monotonic_ns()}.pt.trace.{ending}"
        profiler.export_chrome_trace(str(path))
        logger.info("profile written: %s", path)
        return path
