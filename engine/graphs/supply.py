"""The backend `inductor`: graphs from the cache, and a process beside the engine that compiles those it lacks."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from ...ops.compile import CompiledPackage
from ...ops.cpu.build import KernelsUnavailable, find_compiler
from .cache import GraphCache, GraphCacheError
from .key import CacheKey
from .runner import CaptureReport, GraphKey, GraphRunner
from .worker import WorkerAnswer, WorkerJob, WorkerRequest

logger = logging.getLogger(__name__)
SCRATCH_PREFIX = "omni-engine-compile-"  # of folders in the temporary one; the engine's process id follows


class GraphError(ValueError):
    """A graph that is required cannot be made; the text says why."""


@dataclass(frozen=True)
class SupplyPlan:
    """What the supply needs beside the runner: the worker's job, and what all keys have in common."""

    job: WorkerJob
    fields: dict[str, Any]

    def cache_key(self, key: GraphKey) -> CacheKey:
        return CacheKey({**self.fields, **key._asdict()})


class InductorGraphs:
    """Loads compiled steps and never compiles: a thread takes what the cache has, then feeds the worker, the graphs
    that steps have asked for first. Steps whose graph is not there run eager meanwhile."""

    name = "inductor"

    def __init__(
        self,
        plan: SupplyPlan,
        cache: GraphCache,
        *,
        required: bool = False,
    ) -> None:
        self.plan = plan
        self.cache = cache
        self.required = required
        self.errors: dict[GraphKey, str] = {}
        self.num_compiled = 0
        self.current: GraphKey | None = None  # being compiled
        self._demanded: list[GraphKey] = []
        self._stopping = threading.Event()
        self._finished = threading.Event()
        self._worker: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        self.failure: str | None = None  # why there will be no more graphs

    def start(self, runner: GraphRunner) -> None:
        """Begin in the background; with `required` wait for every graph, and raise GraphError where one is missing."""
        self._thread = threading.Thread(target=self._run, args=(runner,), name="graphs", daemon=True)
        self._thread.start()
        if not self.required:
            return
        self._finished.wait()
        missing = [key for key in runner.keys if not runner.is_ready(key)]
        if missing:
            reason = self.failure or self.errors.get(missing[0], "the compiling process ended")
            raise GraphError(
                f"{len(missing)} of {len(runner.keys)} graphs cannot be made ({reason}); remedy that, or start without "
                f"require_graph: {', '.join(map(str, missing))}"
            )

    def demand(self, key: GraphKey) -> None:
        if key not in self._demanded:
            self._demanded.append(key)

    def wait(self, timeout: float | None = None) -> bool:
        return self._finished.wait(timeout)

    def close(self) -> None:
        self._stopping.set()
        worker = self._worker
        if worker is not None and worker.poll() is None:
            _kill_group(worker)
        if self._thread is not None:
            self._thread.join(timeout=10)

    def _run(self, runner: GraphRunner) -> None:
        try:
            self._supply(runner)
        except (GraphCacheError, KernelsUnavailable, OSError) as error:
            self.failure = str(error)
            if not self._stopping.is_set() and not self.required:
                logger.warning("there will be no compiled graphs, steps run eager: %s", error)
        except Exception as error:  # a defect here must not end an engine that can do without
            self.failure = f"{type(error).__name__}: {error}"
            logger.exception("there will be no more compiled graphs, steps run eager")
        finally:
            self._finished.set()

    def _supply(self, runner: GraphRunner) -> None:
        missing = [key for key in runner.keys if not self._load(runner, key, from_cache=True)]
        if not missing or self._stopping.is_set():
            return
        find_compiler()  # both kernels and graphs need one
        self.cache.check_folder()
        logger.info("compiling %d of %d graphs in the background; until then steps run eager", len(missing),
                    len(runner.keys))  # fmt: skip
        _sweep_scratch()
        with tempfile.TemporaryDirectory(
            prefix=f"{SCRATCH_PREFIX}{os.getpid()}-", ignore_cleanup_errors=True
        ) as scratch:
            self._feed_worker(runner, missing, scratch)

    def _load(self, runner: GraphRunner, key: GraphKey, *, from_cache: bool) -> bool:
        """Install the graph of `key` if the cache has it."""
        start = time.monotonic()
        entry = self.cache.find(self.plan.cache_key(key))
        if entry is None or self._stopping.is_set():
            return False
        try:
            with torch.inference_mode():
                graph = CompiledPackage(entry.path, runner.program(key), runner.inputs(key).flat())
        except RuntimeError as error:
            if entry.path.exists():  # else somebody pruned it just now
                self.errors[key] = f"it cannot be loaded: {str(error).splitlines()[0]}"
                logger.warning("graph %s cannot be loaded: %s", key, error)
            return False
        compile_seconds = entry.details.get("compile_seconds", 0.0)
        report = CaptureReport(key, time.monotonic() - start, from_cache, compile_seconds, entry.num_bytes)
        runner.install(graph, report)
        return True

    def _feed_worker(self, runner: GraphRunner, missing: list[GraphKey], scratch: str) -> None:
        """One key at a time, so that what steps ask for meanwhile comes next."""
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "TORCHINDUCTOR_CACHE_DIR": scratch,
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "TMPDIR": scratch,
            "PYTHONWARNINGS": "ignore::FutureWarning",  # of torch about itself
        }
        self._worker = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        with self._worker as worker:
            assert worker.stdin is not None and worker.stdout is not None
            try:
                worker.stdin.write(msgspec.json.encode(self.plan.job) + b"\n")
                while missing and not self._stopping.is_set():
                    key = next((key for key in self._demanded if key in missing), missing[0])
                    missing.remove(key)
                    self.current = key
                    request = WorkerRequest(
                        (key.num_requests, key.tokens_per_request, key.sampler), self.plan.cache_key(key).fields
                    )
                    worker.stdin.write(msgspec.json.encode(request) + b"\n")
                    worker.stdin.flush()
                    line = worker.stdout.readline()
                    if not line:
                        raise OSError("the compiling process ended; its last words are above")
                    self._take(runner, key, msgspec.json.decode(line, type=WorkerAnswer), len(missing))
            except BrokenPipeError as error:
                raise OSError("the compiling process ended; its last words are above") from error
            finally:
                _kill_group(worker)

    def _take(self, runner: GraphRunner, key: GraphKey, answer: WorkerAnswer, num_left: int) -> None:
        error = answer.error
        if error is not None and answer.is_last:
            raise GraphCacheError(error)
        if error is None and not self._load(runner, key, from_cache=False):
            error = self.errors.get(key, "it was removed from the cache before it could be loaded")
        if error is None:
            self.num_compiled += 1
            logger.info("graph %s compiled in %.1f s, %d to go", key, answer.seconds, num_left)
        elif not self._stopping.is_set():
            self.errors[key] = error
            logger.warning("graph %s cannot be compiled, its steps run eager: %s", key, error)


def _sweep_scratch() -> None:
    """Remove what engines that were killed while they compiled have left."""
    for folder in Path(tempfile.gettempdir()).glob(f"{SCRATCH_PREFIX}*"):
        pid = folder.name.removeprefix(SCRATCH_PREFIX).partition("-")[0]
        with contextlib.suppress(OSError):
            if pid.isdecimal() and folder.stat().st_uid == os.geteuid() and not Path("/proc", pid).exists():
                shutil.rmtree(folder, ignore_errors=True)


def _kill_group(worker: subprocess.Popen[bytes]) -> None:
    """End the worker and the compilers it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)
