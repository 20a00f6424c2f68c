"""The process that compiles graphs: `python -m omni_engine.engine.graphs.worker`, at the lowest priority.

It reads one `WorkerJob` and then keys, a line of JSON each, from standard input, stores each graph in the cache and
answers with a line on standard output. It ends with its input. It holds no weights: shapes are all that is compiled.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from .key import CacheKey, GraphShape

logger = logging.getLogger(__name__)
PR_SET_PDEATHSIG = 1
LOWEST_PRIORITY = 19


class WorkerJob(msgspec.Struct, frozen=True):
    """What the graphs are of. `args` are the fields of the engine's `EngineArgs`."""

    args: dict[str, Any]
    shape: GraphShape
    num_threads: int
    cache_root: str
    acceptance_rates: tuple[float, ...] | None = None  # in place of verification, for benchmarks


class WorkerRequest(msgspec.Struct, frozen=True):
    """Compile this one. `fields` are those of its `CacheKey`."""

    key: tuple[int, int, str]
    fields: dict[str, Any]


class WorkerAnswer(msgspec.Struct, frozen=True):
    """What became of a request; `error` is one line, or None. `is_last`: the other graphs would fare no better."""

    key: tuple[int, int, str]
    seconds: float
    error: str | None = None
    is_last: bool = False


def work(job: WorkerJob, requests: Any, answer: Any) -> None:
    """Serve `requests`, an iterable of lines, with `answer(bytes)`."""
    import torch

    from ...ops.compile import compile_package
    from ..config import EngineArgs, EngineConfig
    from .cache import GraphCache, GraphCacheError
    from .runner import GraphKey
    from .startup import build_graph_shell

    torch.set_num_threads(1)
    runner = build_graph_shell(EngineConfig.from_args(EngineArgs(**job.args)), job.shape, job.acceptance_rates)
    cache = GraphCache(Path(job.cache_root))
    for line in requests:
        request = msgspec.json.decode(line, type=WorkerRequest)
        key = GraphKey(*request.key)
        start = time.monotonic()
        error, is_last = None, False
        try:
            with cache.building(CacheKey(request.fields)) as found:
                if found is None:

                    def build(path: Path, key: GraphKey = key) -> None:
                        compile_package(runner.program(key), runner.inputs(key), path, num_threads=job.num_threads)

                    cache.store(CacheKey(request.fields), build, {"model": job.args.get("model", "")})
        except GraphCacheError as failure:  # a full disk, a folder that is not ours
            error, is_last = str(failure), True
        except Exception as failure:  # one graph that cannot be must not cost the others
            logger.debug("graph %s", key, exc_info=True)
            error = f"{type(failure).__name__}: {str(failure).strip().partition(chr(10))[0]}"
        answer(msgspec.json.encode(WorkerAnswer(request.key, time.monotonic() - start, error, is_last)) + b"\n")


def end_session_with_this_process() -> None:
    """Let the compilers that this process, which leads a session, starts end when it is killed. Before any thread."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.close(writing)
        os.read(reading, 1)  # there is nothing to be read until the other end has gone
        os.killpg(0, signal.SIGKILL)
    os.close(reading)


def main() -> int:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if os.getsid(0) == os.getpid():
        end_session_with_this_process()
    os.nice(LOWEST_PRIORITY)
    with contextlib.suppress(OSError):  # a session is scheduled as a group, which has a niceness of its own
        Path("/proc/self/autogroup").write_text(str(LOWEST_PRIORITY))
    # Whatever the libraries print belongs to the log, not among the answers.
    answers = os.dup(1)
    os.dup2(2, 1)
    job = msgspec.json.decode(sys.stdin.buffer.readline(), type=WorkerJob)
    work(job, iter(sys.stdin.buffer.readline, b""), lambda line: os.write(answers, line))
    return 0


if __name__ == "__main__":
    sys.exit(main())
