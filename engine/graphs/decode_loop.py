"""Decode steps of a full batch and nothing else, each part of a step timed: what `bench graph` and `bench host` run.

The scheduler and the runner are the engine's own, and so are their plans. Only the prompts are left out: their plans
are answered with a made-up token, and the runner is told of the requests as if they had come back from a preemption
with everything computed. Their KV blocks hold zeros, which take as long to read as anything else.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from ...kvcache.manager import KVCacheManager
from ...scheduler.config import SchedulerConfig
from ...scheduler.draft_depth import DraftDepth
from ...scheduler.plan import StepOutput, StepPlan
from ...scheduler.request import RequestInput
from ...scheduler.sampling_params import SamplingParams
from ...scheduler.scheduler import Scheduler

if TYPE_CHECKING:  # they bring torch, which those who only read the figures do without
    from ..core import EngineCore
    from .runner import GraphRunner

# What a request asks for so that its steps end in each of the samplers a graph may have.
SAMPLING = {
    "greedy": {"temperature": 0.0},
    "gumbel": {"temperature": 1.0},
    "split": {"temperature": 1.0, "top_k": 50, "top_p": 0.9},
}
FIRST_TOKEN = 1  # the made-up answer to a prompt


@dataclass(frozen=True)
class StepTimes:
    """Seconds that the parts of one step took."""

    schedule: float  # the plan
    step_input: float  # the plan taken in, and the device's inputs made of it
    launch: float  # the call of the graph, or of the model; on a CPU it computes
    device: float  # until the device is done
    step_output: float  # tokens to the host
    update: float  # the plan's outcome taken in by the scheduler

    @property
    def total(self) -> float:
        """The whole step, from planning it to knowing its tokens."""
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def replay(self) -> float:
        """The part that is the model's, not the host's."""
        return self.launch + self.device


class TimedGraphs:
    """Stands before a runner's graphs: times their calls, and can send steps past them."""

    def __init__(self, graphs: GraphRunner) -> None:
        self.graphs = graphs
        self.bypassed = False  # run the steps eager
        self.seconds = 0.0  # of the calls so far: two in a step that ends at its logits and then drafts

    def replay(self, sampler: str, rows: np.ndarray, num_blocks: int, num_drafts: int = 0) -> Any:
        call = self.graphs.run_eager if self.bypassed else self.graphs.replay
        start = time.perf_counter()
        output = call(sampler, rows, num_blocks, num_drafts)
        self.seconds += time.perf_counter() - start
        return output

    @property
    def last_gear(self) -> int:
        return self.graphs.last_gear

    def close(self) -> None:
        """Of the runner's owner; the graphs are needed longer than the loop is."""


class DecodeLoop:
    """`num_requests` requests with `context_len` stored tokens each, which decode in at most `max_steps` steps.

    `core` is loaded and otherwise idle; its runner's graphs are timed by `graphs`; `synchronize` waits for its device.
    Where the core speculates, every step verifies as many drafts as it ever may, and the contexts grow by what is
    accepted. Drafts are the drafter's own, so of tokens that mean nothing few may be.
    """

    def __init__(
        self,
        core: EngineCore,
        graphs: TimedGraphs,
        *,
        num_requests: int,
        context_len: int,
        max_steps: int,
        sampler: str,
        enable_prefix_caching: bool = True,
        synchronize: Callable[[], None] = lambda: None,
    ) -> None:
        runner = core.runner
        runner.graphs = graphs  # type: ignore[assignment]
        self.core = core
        self.runner = runner
        self.graphs = graphs
        self.context_len: float = context_len  # tokens stored before the next step, on average with drafts
        self.num_drafts = 0 if runner.drafting is None else runner.drafting.num_drafts
        self._synchronize = synchronize
        # A scheduler of its own, whose steps hold all prompts at once.
        max_tokens = max_steps * (1 + self.num_drafts) + 2
        config = SchedulerConfig(
            max_num_seqs=num_requests,
            max_num_batched_tokens=num_requests * max(context_len, 1 + self.num_drafts),
            max_model_len=context_len + max_tokens,
        )
        kv = KVCacheManager(None, core.info.num_blocks, runner.block_size, enable_prefix_caching=enable_prefix_caching)
        self.scheduler = Scheduler(config, kv, DraftDepth((self.num_drafts,)) if self.num_drafts else None)
        random = np.random.default_rng(0)
        for index in range(num_requests):
            params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=index, **SAMPLING[sampler])
            prompt = random.integers(runner.vocab_size, size=context_len).tolist()
            refusal = self.scheduler.add(RequestInput(str(index), prompt, params))
            assert refusal is None, refusal.error
        self._admitted = self._skip_prompts()
        if runner.device.type == "cpu":  # whose pages that were never written are all one, and read from its cache
            for part in itertools.chain(*runner.caches):
                for blocks in self._admitted.new_block_ids:
                    part[blocks] = 0

    def _skip_prompts(self) -> StepPlan:
        """Answer the plan of the prompts without computing it."""
        plan = self.scheduler.schedule()
        assert all(plan.samples) and not plan.num_computed[0], "all prompts fit into one step"
        self.scheduler.update(plan, StepOutput(plan.step, [[FIRST_TOKEN] for _ in plan.rows], {}, {}))
        return plan

    def _schedule(self) -> StepPlan:
        plan = self.scheduler.schedule()
        if self._admitted.rows:
            plan = _with_requests(plan, self._admitted, sorted(self.runner.rows))
            self._admitted = msgspec.structs.replace(self._admitted, rows=[])
        return plan

    def step(self) -> StepTimes:
        """One step, read before it returns."""
        started = time.perf_counter()
        plan = self._schedule()
        self.graphs.seconds = 0.0
        planned = time.perf_counter()
        pending = self.runner.dispatch(plan)
        dispatched = time.perf_counter()
        self._synchronize()
        done = time.perf_counter()
        output = self.runner.read(pending)
        read = time.perf_counter()
        self.scheduler.update(plan, output)
        updated = time.perf_counter()
        self.context_len += sum(map(len, output.token_ids)) / len(output.token_ids)
        launch = self.graphs.seconds
        return StepTimes(
            schedule=planned - started,
            step_input=dispatched - planned - launch,
            launch=launch,
            device=done - dispatched,
            step_output=read - done,
            update=updated - read,
        )

    def engine_step_seconds(self, count: int) -> float:
        """Seconds per step, on average over `count` of them, as the engine goes about it: a step is launched before the
        tokens of the last one are read. Then all requests run to their end."""
        core = type(self.core)(self.scheduler, self.runner, self.core.info, overlap=True)
        try:
            core.step()
            start = time.perf_counter()
            for _ in range(count):
                core.step()
            seconds = time.perf_counter() - start
            while core.has_unfinished:
                core.step()
        finally:
            core.close()
        return seconds / count


def _with_requests(plan: StepPlan, admitted: StepPlan, held_rows: list[int]) -> StepPlan:
    """`plan`, which also tells the requests of the plan `admitted` whole; the runner gives `held_rows` up before."""
    first = dict(zip(admitted.rows, admitted.new_block_ids, strict=True))
    new_rows = [msgspec.structs.replace(new, token_ids=[*new.token_ids, FIRST_TOKEN]) for new in admitted.new_rows]
    new_block_ids = [first[row] + added for row, added in zip(plan.rows, plan.new_block_ids, strict=True)]
    return msgspec.structs.replace(plan, released_rows=held_rows, new_rows=new_rows, new_block_ids=new_block_ids)
