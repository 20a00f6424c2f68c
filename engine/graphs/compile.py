"""Filling the graph cache ahead: every graph that an engine with these arguments would use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..config import EngineArgs, EngineConfig
from ..core import EngineCore
from .runner import CaptureReport, GraphKey
from .supply import GraphError, InductorGraphs

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class CompiledGraph:
    """One graph, made now or found; `error` says why there is none."""

    key: GraphKey
    from_cache: bool
    seconds: float  # of compiling; 0 if it was there
    num_bytes: int
    error: str | None = None


def compile_missing(args: EngineArgs, on_progress: Callable[[int, int, str], None]) -> list[CompiledGraph]:
    """Compile what the cache lacks; `on_progress` gets how many are there, how many there will be, and the current one.

    The model is loaded as for serving, because the size of the KV cache, which follows from the memory that is left, is
    part of what is compiled. Raises GraphError where no graph can be made at all, and what loading raises.
    """
    core = EngineCore.load(EngineConfig.from_args(replace(args, require_graph=False, graph_backend="inductor")))
    try:
        graphs = core.runner.graphs
        backend = graphs.backend
        if not isinstance(backend, InductorGraphs):
            raise GraphError("no graph can be made for these arguments; drop --enforce-eager, or see the warning above")
        while True:
            finished = backend.wait(POLL_SECONDS)
            current = "" if backend.current is None else str(backend.current)
            on_progress(len(graphs.reports), len(graphs.keys), "" if finished else current)
            if finished:
                break
        if backend.failure is not None:
            raise GraphError(f"compiling ended early: {backend.failure}")
        return [_result(key, graphs.reports.get(key), backend.errors) for key in graphs.keys]
    finally:
        core.close()


def _result(key: GraphKey, report: CaptureReport | None, errors: dict[GraphKey, str]) -> CompiledGraph:
    if report is None:
        return CompiledGraph(key, False, 0.0, 0, errors.get(key, "it was not made"))
    return CompiledGraph(key, report.from_cache, report.compile_seconds, report.num_bytes)
