"""Decode steps as static graphs: one captured program per gear, replayed on one set of persistent buffers."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..row_state import RowState
from ..speculation.buffers import Drafting
from .decode_step import DRAFT, SAMPLERS, Decoder, DecodeStep, DraftStep

Graph = Callable[[], Tensor]  # one step on the persistent buffers -> what its program returns
Program = DecodeStep | DraftStep


class GraphKey(NamedTuple):
    """A gear: the fixed shape of a decode step, and its part: what stands behind the logits (one of SAMPLERS), or the
    drafts that are made behind `split` (DRAFT)."""

    num_requests: int
    tokens_per_request: int
    sampler: str

    def __str__(self) -> str:
        return f"{self.num_requests}x{self.tokens_per_request} {self.sampler}"


class GraphInputs(NamedTuple):
    """The arguments of a program, always the same tensors: what changes is what is in them."""

    rows: Tensor
    state: tuple[Tensor, ...]
    caches: list[tuple[Tensor, ...]]
    handoff: tuple[Tensor, ...]
    memory: tuple[Tensor, ...]

    def flat(self) -> list[Tensor]:
        """In the order in which exporters flatten them."""
        caches = (part for cache in self.caches for part in cache)
        return [self.rows, *self.state, *caches, *self.handoff, *self.memory]


class GraphBackend(Protocol):
    """Makes graphs. `start` may leave that to the background; graphs arrive through `GraphRunner.install`."""

    name: str

    def start(self, runner: GraphRunner) -> None:
        """Begin with the graphs of `runner.keys`; what cannot be is logged, or raised where graphs are required."""
        ...

    def demand(self, key: GraphKey) -> None:
        """A step has run eager for want of this graph: make it next. Must return at once."""
        ...

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing more is to come; False after `timeout` seconds."""
        ...

    def close(self) -> None:
        """Stop whatever goes on in the background."""
        ...


@dataclass(frozen=True)
class CaptureReport:
    """How a graph came to be."""

    key: GraphKey
    seconds: float  # until it could be replayed
    from_cache: bool = False
    compile_seconds: float = 0.0  # whenever it was compiled
    num_bytes: int = 0  # of the artefact on disk


class GraphRunner:
    """Runs decode steps: by the graph of the smallest gear that holds them, eager where there is none (yet).

    A step of fewer rows than its gear is padded with the null row, which writes to the null block and is read by
    nobody. All gears share the weights, the caches and one set of buffers.
    """

    def __init__(
        self,
        model: Decoder,
        state: RowState,
        caches: list[tuple[Tensor, ...]],
        drafting: Drafting | None = None,
    ) -> None:
        self.model = model
        self.state = state
        self.caches = caches
        self.drafting = drafting
        self._programs: dict[tuple[str, int], Program] = {}
        self.null_row = state.position.shape[0] - 1
        self.gears: tuple[int, ...] = ()
        self.backend: GraphBackend | None = None
        self.reports: dict[GraphKey, CaptureReport] = {}
        self.num_replayed: Counter[GraphKey] = Counter()
        self.num_eager = 0
        self.lengths: list[int] = []  # as in `decode_context`, of the step being launched, where it was told
        self.graphs_take_lengths = False  # set by backends whose graphs must be told them
        self.last_gear = 0  # of the last step; 0: it ran without a graph
        self.kernels: threading.Thread | None = None  # that builds the ops' faster bodies, if they are not there yet
        self._ready: dict[GraphKey, Graph] = {}
        self._padded = np.full(0, self.null_row, np.int64)
        self._rows = torch.from_numpy(self._padded)

    def use(self, backend: GraphBackend, gears: tuple[int, ...]) -> None:
        """Capture these batch sizes with `backend`. Called once, before the first step."""
        self.allocate(gears)
        self.backend = backend
        backend.start(self)

    def allocate(self, gears: tuple[int, ...]) -> None:
        """The buffers for steps of these sizes."""
        self.gears = tuple(sorted(gears))
        self._padded = np.full(self.gears[-1], self.null_row, np.int64)
        self._rows = torch.from_numpy(self._padded.copy()).to(self.state.position.device)

    @property
    def keys(self) -> list[GraphKey]:
        """All graphs there may be, in the order in which to make them."""
        depths = (0,) if self.drafting is None else self.drafting.depths
        parts = SAMPLERS if self.drafting is None else (*SAMPLERS, DRAFT)
        return [GraphKey(gear, 1 + depth, part) for part in parts for depth in reversed(depths) for gear in self.gears]

    def key_for(self, num_requests: int, sampler: str, num_drafts: int = 0) -> GraphKey | None:
        """The graph for a decode step of so many rows; None: more than every gear has, or not a depth there are graphs
        for, which is asked for where a step has no room for all drafts."""
        depths = (0,) if self.drafting is None else self.drafting.depths
        for gear in self.gears if num_drafts in depths else ():
            if gear >= num_requests:
                return GraphKey(gear, 1 + num_drafts, sampler)
        return None

    def inputs(self, key: GraphKey) -> GraphInputs:
        """The buffers that the graph of `key` works on."""
        return self._inputs(self._rows[: key.num_requests], tuple(self.state), key.tokens_per_request, key.sampler)

    def _inputs(self, rows: Tensor, state: tuple[Tensor, ...], tokens_per_request: int, sampler: str) -> GraphInputs:
        drafting = self.drafting
        if drafting is None:
            return GraphInputs(rows, state, self.caches, (), ())
        is_handed = sampler in ("split", DRAFT)
        handoff = tuple(drafting.handoff.view(rows.shape[0], tokens_per_request)) if is_handed else ()
        return GraphInputs(rows, state, self.caches, handoff, () if sampler == "split" else drafting.memory)

    def program(self, key: GraphKey) -> Program:
        return self._program(key.sampler, key.tokens_per_request - 1)

    def _program(self, sampler: str, num_drafts: int) -> Program:
        program = self._programs.get((sampler, num_drafts))
        if program is None:
            drafting = self.drafting
            if drafting is None:
                program = DecodeStep(self.model, sampler, num_drafts)
            elif sampler == DRAFT:
                program = DraftStep(self.model, num_drafts, drafting.drafter)
            else:
                program = DecodeStep(self.model, sampler, num_drafts, drafting.drafter, drafting.acceptance)
            self._programs[sampler, num_drafts] = program
        return program

    def install(self, graph: Graph, report: CaptureReport) -> None:
        """Use a graph from the next step on. May be called by another thread than the one that steps."""
        self.reports[report.key] = report
        self._ready[report.key] = graph

    def is_ready(self, key: GraphKey) -> bool:
        return key in self._ready

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until kernels and graphs that can be made are there; False after `timeout` seconds for either."""
        if self.kernels is not None:
            self.kernels.join(timeout)
            if self.kernels.is_alive():
                return False
        return self.backend is None or self.backend.wait(timeout)

    def close(self) -> None:
        if self.backend is not None:
            self.backend.close()

    def takes_lengths(self, num_requests: int, sampler: str, num_drafts: int) -> bool:
        """Whether `replay` must be told the lengths of such a step, on an NPU, where attention takes numbers: unless
        the step's graph reads them from tensors."""
        key = self.key_for(num_requests, sampler, num_drafts)
        return self.graphs_take_lengths or key is None or key not in self._ready

    def replay(
        self, sampler: str, rows: np.ndarray, num_blocks: int, num_drafts: int = 0, lengths: list[int] | None = None
    ) -> Tensor:
        """One decode step of `rows` (int64 [n], distinct), each with `num_drafts` drafts and at most `num_blocks`
        blocks; or with the sampler DRAFT, the drafts that follow a `split` step of the same rows. `lengths` as in
        `decode_context`, where the device's attention takes numbers.

        Returns what the program does, for these rows: `DecodeStep` or `DraftStep`.
        """
        count = len(rows)
        key = self.key_for(count, sampler, num_drafts)
        graph = None if key is None else self._ready.get(key)
        if key is None or graph is None:
            if key is not None and self.backend is not None:
                self.backend.demand(key)
            self.num_eager += sampler != DRAFT
            self.last_gear = 0
            return self.run_eager(sampler, rows, num_blocks, num_drafts, lengths)
        padded = self._padded[: key.num_requests]
        padded[:count] = rows
        padded[count:] = self.null_row
        self._rows[: key.num_requests].copy_(torch.from_numpy(padded))
        if lengths is not None:
            self.lengths = lengths + [key.tokens_per_request] * (key.num_requests - count)
        self.num_replayed[key] += 1
        self.last_gear = key.num_requests
        return graph()[: count * (key.tokens_per_request if sampler == "split" else 1)]

    def run_eager(
        self, sampler: str, rows: np.ndarray, num_blocks: int, num_drafts: int = 0, lengths: list[int] | None = None
    ) -> Tensor:
        """The same step without a graph and without padding, over no more of the block table than it needs."""
        # Drafts that have no block lie behind the last one; attention that takes numbers is told of them.
        width = num_blocks if lengths is None or not num_drafts else num_blocks + 1
        state = self.state._replace(block_table=self.state.block_table[:, :width])
        index = torch.from_numpy(rows).to(self.state.position.device)
        inputs = self._inputs(index, tuple(state), 1 + num_drafts, sampler)
        return self._program(sampler, num_drafts)(*inputs, lengths)


class GraphsFromTheStart:
    """What backends have in common that make every graph in `start`: afterwards nothing is missing or under way."""

    def demand(self, key: GraphKey) -> None:
        raise AssertionError(f"every gear is there from the start: {key}")

    def wait(self, timeout: float | None = None) -> bool:
        return True

    def close(self) -> None:
        pass


class EagerGraphs(GraphsFromTheStart):
    """The backend `eager`: every gear is its program, uncompiled. Slower than steps without gears, and good for one
    thing: it shows whether padding and persistent buffers change anything."""

    name = "eager"

    def start(self, runner: GraphRunner) -> None:
        for key in runner.keys:
            program, inputs = runner.program(key), runner.inputs(key)
            runner.install(lambda program=program, inputs=inputs: program(*inputs), CaptureReport(key, 0.0))


class CudaGraphs(GraphsFromTheStart):
    """The backend `cudagraph`: every gear is captured at the start, on a stream of its own, from the eager program."""

    name = "cudagraph"

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def start(self, runner: GraphRunner) -> None:
        for key in sorted(runner.keys, reverse=True):  # the largest first: the smaller ones live in its memory
            start = time.perf_counter()
            graph = self._capture(runner.program(key), runner.inputs(key))
            runner.install(graph, CaptureReport(key, time.perf_counter() - start))

    @torch.inference_mode()
    def _capture(self, program: Program, inputs: GraphInputs) -> Graph:
        # All rows are the null row here, so warming up changes nothing that anybody reads.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                program(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = program(*inputs)

        def replay() -> Tensor:
            graph.replay()
            return output.clone()  # the next replay writes to the same memory, and this one may not be read yet

        return replay
