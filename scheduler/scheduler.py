"""The scheduler: which tokens of which requests the next step computes, and what its output means for them."""

from __future__ import annotations

import time
from bisect import insort
from collections import deque
from collections.abc import Iterable
from heapq import heappop, heappush
from itertools import pairwise

import msgspec

from ..kvcache.manager import KVCacheManager
from .admission import reason_to_refuse
from .config import SchedulerConfig
from .draft_depth import DraftDepth
from .draft_stats import DraftCounter, DraftStats
from .plan import NewRow, StepOutput, StepPlan, TokenLogprobs
from .prefill_pace import NO_LIMIT, PrefillPace
from .queue import WaitingQueue
from .request import Request, RequestInput, RequestStatus, RequestUpdate
from .sketch import PlanSketch


class SchedulerStats(msgspec.Struct, frozen=True):
    """A snapshot for metrics and logs. Counters grow from the start of the engine."""

    num_running: int
    num_waiting: int
    num_waiting_tokens: int  # prompt tokens of the waiting requests
    kv_cache_usage: float  # share of the blocks that is pinned, in [0, 1]
    prefix_cache_queries: int  # counter, tokens
    prefix_cache_hits: int  # counter, tokens
    num_preemptions: int  # counter
    drafts: DraftStats | None = None  # counters of speculation, where there is any


class Scheduler:
    """One rule: a request has `num_computed` tokens and a number it should have; each step gives it tokens to catch up.

    Requests are served in the order of `Request.order`. Running ones come before waiting ones, unless a waiting one is
    more urgent under the "priority" policy. Who finds no block takes those of the last in line, which starts over later
    (its prefix usually still cached); the first in line therefore always goes on, and a request that could not run even
    alone is refused by `add`.

    `num_computed` advances when a step is planned, tokens are appended when its output is read. In between a request
    has `num_unread` tokens that the device knows and the host does not, and the next plan computes them all the same:
    plans may be made ahead, and their outputs must come in the order of the plans. What a plan computes for a request
    that turns out to have ended before is dropped. A request is not planned beyond its longest length, and a preempted
    one comes back only when all its tokens are read. The entries of a step in flight hold the request, not its id or
    row: what arrives for a request that has been aborted meanwhile is dropped.

    With speculation (`draft_depth`) a decoding request computes its newest token and some drafts behind it, and a step
    brings it as many tokens as the device accepted drafts, and one more. Until the output is read, `num_computed` and
    `num_unread` count the one token that is certain, and `num_ahead` those that may come on top: blocks are given for
    all of them. A draft without a block is not accepted (the device sees to that), so the drafts of the step itself get
    blocks where there are some and preempt nobody.

    With `max_prefill_share` below 1 prompts are held back while others decode (`PrefillPace`), but for those of more
    urgent requests, which come in as without it.
    """

    def __init__(self, config: SchedulerConfig, kv: KVCacheManager, draft_depth: DraftDepth | None = None) -> None:
        self.config = config
        self.kv = kv
        self.draft_depth = draft_depth
        self._drafts = None if draft_depth is None else DraftCounter(draft_depth.deepest)
        self.requests: dict[str, Request] = {}  # all that are not finished
        self.running: list[Request] = []  # sorted by order
        self.waiting = WaitingQueue()
        self._pace = PrefillPace(config.max_prefill_share) if config.max_prefill_share < 1 else None
        self._by_priority = config.policy == "priority"
        self._num_arrived = 0
        self._num_planned = 0
        self._num_preemptions = 0
        self._free_rows = list(range(config.max_num_seqs))  # a heap
        self._released_rows: list[int] = []  # not told yet
        self._in_flight: deque[tuple[int, list[Request]]] = deque()  # step, its requests in the order of its entries

    def add(self, source: RequestInput) -> RequestUpdate | None:
        """Queue a request, or return the update that refuses it."""
        reason = reason_to_refuse(source, self.requests, self.waiting, self.config, self.kv)
        if reason is not None:
            kind, message = reason
            return RequestUpdate(source.request_id, finish_reason="error", error=message, error_kind=kind)
        order = (source.priority if self._by_priority else 0, self._num_arrived)
        self._num_arrived += 1
        blocks = self.kv.new_blocks(source.cache_salt)
        request = Request(source, order, self.config.max_model_len, blocks, time.monotonic())
        self.waiting.add(request)
        self.requests[source.request_id] = request
        return None

    def abort(self, request_ids: Iterable[str]) -> list[RequestUpdate]:
        """End requests in whatever phase they are. Unknown and finished ids are ignored."""
        found = [self.requests[request_id] for request_id in dict.fromkeys(request_ids) if request_id in self.requests]
        return self._end(found, "abort")

    def schedule(self) -> StepPlan:
        """Plan the next step. A plan without rows means that there is nothing to do; it is not to be executed."""
        budget, depth = self.config.max_num_batched_tokens, self.draft_depth
        num_prompts = NO_LIMIT if self._pace is None else self._pace.num_prompts(any(map(_decodes, self.running)))
        if depth is None:
            sketch = PlanSketch(budget, num_prompts=num_prompts)
        else:
            # With nothing running yet, for those who will be when this step's prompts are through.
            num_requests = len(self.running) or min(len(self.waiting), self.config.max_num_seqs)
            sketch = PlanSketch(budget, depth.depths, depth.choose(num_requests), num_prompts)
        self._fill(sketch)
        if sketch.is_empty and not sketch.num_prompts and not self._in_flight:
            # Who decodes waits for blocks of a request whose prompt was held back: that one must go on.
            sketch.num_prompts, sketch.is_short = NO_LIMIT, False
            self._fill(sketch)
        return self._plan(sketch)

    def _fill(self, sketch: PlanSketch) -> None:
        self._plan_running(sketch)
        # While blocks are short nobody comes in: it would take what a running request gave up or waits for.
        if not sketch.is_short:
            while sketch.has_tokens and sketch.num_prompts > 0 and (head := self.waiting.peek()) is not None:
                if not self._admit(head, sketch):
                    break

    def update(self, plan: StepPlan, output: StepOutput) -> list[RequestUpdate]:
        """Take in the output of the oldest plan in flight: append tokens, end what is complete, say what changed.

        An entry may bring several tokens; those behind the one that ends its request are dropped. ValueError where the
        output is not that plan's; then the scheduler's state is as before.
        """
        requests = self._take_in_flight(plan, output)
        if self._pace is not None:
            self._pace.observe(output.seconds)
        if output.pooled:
            return self._end_pooled(requests, output)
        all_logprobs, all_prompt_logprobs = output.logprobs, output.prompt_logprobs
        finished, running = RequestStatus.FINISHED, RequestStatus.RUNNING
        num_decode, num_drafts = plan.num_decode, plan.num_drafts
        if self.draft_depth is not None:
            seconds = output.seconds if num_decode == len(requests) else 0.0  # with chunks it is no measure
            self.draft_depth.observe(num_decode, num_drafts, seconds, sum(map(len, output.token_ids)))
        updates: list[RequestUpdate] = []
        ended: list[Request] = []
        failed: list[tuple[Request, str]] = []
        for entry, tokens in enumerate(output.token_ids):
            request = requests[entry]
            if request.status is finished:
                continue
            token_ids = request.token_ids
            num_before = len(token_ids)
            if tokens:
                request.num_unread -= 1
                if num_drafts and entry < num_decode:
                    request.num_ahead -= num_drafts
                    if request.status is running:
                        request.num_computed += len(tokens) - 1
            if output.failures and entry in output.failures:
                failed.append((request, output.failures[entry]))
                continue
            end_token_ids, limit = request.end_token_ids, request.length_limit
            ending = None
            for token_id in tokens:
                token_ids.append(token_id)
                if token_id in end_token_ids or len(token_ids) >= limit:
                    ending = request.stops_at(token_id)
                    if ending is not None:
                        ended.append(request)
                        break
            if num_drafts and entry < num_decode and self._drafts is not None:
                num_kept = len(token_ids) - num_before
                self._drafts.count(request, output.num_drafts[entry], len(tokens), num_kept)
            logprobs = all_logprobs.get(entry) if all_logprobs else None
            prompt_logprobs = all_prompt_logprobs.get(entry) if all_prompt_logprobs else None
            if ending is None and prompt_logprobs is None and num_before > request.num_prompt_tokens:
                request_id, num_preemptions = request.source.request_id, request.num_preemptions
                if request.num_draft_tokens:
                    update = RequestUpdate(
                        request_id, tokens, logprobs, num_preemptions=num_preemptions,
                        num_draft_tokens=request.num_draft_tokens, num_accepted_tokens=request.num_accepted_tokens,
                    )  # fmt: skip
                else:
                    update = RequestUpdate(request_id, tokens, logprobs, num_preemptions=num_preemptions)
                updates.append(update)
            elif tokens or prompt_logprobs:
                updates.append(_full_update(request, num_before, logprobs, prompt_logprobs, ending))
        for request in ended:
            # A block may have waited for the very token that ends the request.
            self.kv.publish(request.blocks, request.token_ids, request.num_computed)
        if ended:
            self._release(ended)
        for request, message in failed:
            updates += self._end([request], "error", message, "invalid")
        return updates

    def _end_pooled(self, requests: list[Request], output: StepOutput) -> list[RequestUpdate]:
        """End the requests whose prompts have been pooled; where some are, none decode."""
        updates: list[RequestUpdate] = []
        ended: list[Request] = []
        for entry, pooled in output.pooled.items():
            request = requests[entry]
            if request.status is RequestStatus.FINISHED:
                continue
            ended.append(request)
            updates.append(
                RequestUpdate(
                    request.source.request_id,
                    finish_reason="stop",
                    num_cached_tokens=request.num_cached_tokens,
                    num_preemptions=request.num_preemptions,
                    queued_time=request.queued_time,
                    scheduled_time=request.scheduled_time,
                    pooled=pooled,
                )
            )
        self._release(ended)
        return updates

    @property
    def has_unfinished(self) -> bool:
        return bool(self.requests)

    @property
    def next_output_is_dropped(self) -> bool:
        """Whether the oldest step in flight computes nothing for a request that still runs or waits."""
        finished = RequestStatus.FINISHED
        return bool(self._in_flight) and all(request.status is finished for request in self._in_flight[0][1])

    def stats(self) -> SchedulerStats:
        return SchedulerStats(
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            num_waiting_tokens=self.waiting.num_prompt_tokens,
            kv_cache_usage=self.kv.usage,
            prefix_cache_queries=self.kv.num_queried_tokens,
            prefix_cache_hits=self.kv.num_hit_tokens,
            num_preemptions=self._num_preemptions,
            drafts=None if self._drafts is None else self._drafts.stats(),
        )

    def check_integrity(self) -> None:
        """Raise RuntimeError unless rows, order and blocks are where the requests say they are."""
        self.kv.check_integrity(request.blocks for request in self.requests.values())
        running = self.running
        if any(first.order > second.order for first, second in pairwise(running)):
            raise RuntimeError("scheduler integrity: running requests are out of order")
        rows = sorted([request.row for request in running] + self._free_rows)
        if rows != list(range(self.config.max_num_seqs)):
            raise RuntimeError(f"scheduler integrity: every row must be free or held once: {rows}")
        if len(running) + len(self.waiting) != len(self.requests):
            raise RuntimeError("scheduler integrity: a request must run or wait, not both and not neither")
        for request in self.requests.values():
            if request.status is not RequestStatus.RUNNING and (request.num_computed or request.blocks.block_ids):
                raise RuntimeError(f"scheduler integrity: a waiting request holds blocks: {request.request_id}")

    def _plan_running(self, sketch: PlanSketch) -> None:
        """Give tokens to the running requests, and to waiting ones that are more urgent than the next running one."""
        running, kv = self.running, self.kv
        decode_requests, decode_rows = sketch.decode_requests, sketch.decode_rows
        decode_computed, decode_block_ids = sketch.decode_computed, sketch.decode_block_ids
        none_new: list[int] = []  # one list for all entries without new blocks; nobody writes to it
        may_jump = self._by_priority
        index = 0
        while index < len(running) and sketch.has_tokens:
            request = running[index]
            if may_jump:
                head = self.waiting.peek()
                if head is not None and head.order[0] < request.order[0]:
                    # Admitted, it stands at or before `index`, where all have been served.
                    may_jump = self._admit(head, sketch, is_urgent=True)
                    index += may_jump
                    continue
            index += 1
            blocks, num_computed = request.blocks, request.num_computed
            num_tokens = len(request.token_ids) + request.num_unread
            count = num_tokens - num_computed
            # What `PlanSketch.add` does, spelled out: this is the path of every decoding request.
            if count == 1 and not request.pools:
                if request.num_unread and num_tokens >= request.length_limit:
                    continue  # a token in flight is its last
                while sketch.num_drafts and sketch.budget <= sketch.num_drafts:  # its own token goes before drafts
                    sketch.drop_drafts()
                if not sketch.budget:
                    break
                num_drafts = sketch.num_drafts
                new_block_ids = none_new
                if num_computed + request.num_ahead + num_drafts >= blocks.capacity:
                    new_block_ids = self._grow_with_drafts(request, sketch)
                    if new_block_ids is None:
                        break
                decode_requests.append(request)
                decode_rows.append(request.row)
                decode_computed.append(num_computed)
                decode_block_ids.append(new_block_ids)
                sketch.budget -= 1 + num_drafts
                request.num_unread += 1
                request.num_ahead += num_drafts
                num_computed += 1
                request.num_computed = num_computed
                if num_computed >= blocks.next_publish:
                    kv.publish(blocks, request.token_ids, num_computed)
            elif count:
                if sketch.num_prompts <= 0:
                    continue
                if not sketch.spares_token():
                    break
                count = min(count, self.config.long_prefill_token_threshold or count, sketch.budget)
                new_block_ids = self._grow(request, num_computed + count, sketch)
                if new_block_ids is None:
                    break
                self._compute(request, count, new_block_ids, sketch)

    def _grow(self, request: Request, num_tokens: int, sketch: PlanSketch) -> list[int] | None:
        """New block ids for a running request, at the cost of those behind it. None where it is the last itself: then
        it keeps what it has and waits for those before it, which have been served in this step."""
        while (block_ids := self.kv.allocate(request.blocks, num_tokens)) is None:
            sketch.is_short = True
            if self.running[-1] is request:
                return None
            self._preempt_last()
        return block_ids

    def _grow_with_drafts(self, request: Request, sketch: PlanSketch) -> list[int] | None:
        """As `_grow`, for a request that decodes: blocks as far as its newest token may stand, and if there are some,
        for the drafts behind it."""
        limit = request.length_limit - 1  # the KV of the last token is never needed
        # A draft without a block is not accepted, so the newest token stands behind the last block at most.
        needed = min(request.num_computed + 1 + request.num_ahead, request.blocks.capacity + 1, limit)
        if sketch.num_drafts:
            block_ids = self.kv.allocate(request.blocks, min(needed + sketch.num_drafts, limit))
            if block_ids is not None:
                return block_ids
        return self._grow(request, needed, sketch)

    def _compute(self, request: Request, count: int, new_block_ids: list[int], sketch: PlanSketch) -> None:
        sketch.add(request, request.num_computed, count, new_block_ids)
        sketch.num_prompts -= 1
        request.num_computed += count
        self.kv.publish(request.blocks, request.token_ids, request.num_computed)

    def _admit(self, request: Request, sketch: PlanSketch, is_urgent: bool = False) -> bool:
        """Let the head of the queue run, if budget, rows and blocks allow. An urgent one takes the place of less urgent
        requests, all of which stand behind those planned so far."""
        if request.num_unread or (not self._free_rows and not is_urgent):
            return False
        if not sketch.spares_token():
            return False
        kv, token_ids = self.kv, request.token_ids
        prefix_ids = kv.find_prefix(request.blocks, token_ids) if request.reads_prefix_cache else []
        num_cached = len(prefix_ids) * kv.block_size
        count = self._first_count(len(token_ids) - num_cached, sketch.budget)
        if not count:
            return False
        num_tokens = num_cached + count
        while not self._free_rows or (
            (block_ids := kv.admit(request.blocks, prefix_ids, num_tokens, len(token_ids))) is None
        ):
            if not is_urgent or not self._can_make_room(request, kv.blocks_for(len(token_ids)) - len(prefix_ids)):
                return False
            self._preempt_last()
            sketch.is_short = True
        self._start(request, num_cached, sketch)
        self._compute(request, count, block_ids, sketch)
        return True

    def _first_count(self, missing: int, budget: int) -> int:
        """Tokens for a request that has `missing` to compute when it is let in; 0: it waits."""
        config = self.config
        if config.enable_chunked_prefill:
            return min(missing, config.long_prefill_token_threshold or missing, budget)
        if missing <= budget:
            return missing
        # With its output a preempted request may have outgrown a step; it cannot come back whole.
        return budget if missing > config.max_num_batched_tokens else 0

    def _can_make_room(self, request: Request, num_blocks: int) -> bool:
        """Whether preempting all that is less urgent can free a row and `num_blocks` (shared blocks count as free)."""
        victims = [other for other in self.running if other.order[0] > request.order[0]]
        free = self.kv.pool.num_free + sum(len(victim.blocks.block_ids) for victim in victims)
        return bool(victims) and num_blocks <= free

    def _start(self, request: Request, num_cached: int, sketch: PlanSketch) -> None:
        taken = self.waiting.pop()
        assert taken is request
        if request.num_preemptions == 0:
            request.scheduled_time = time.monotonic()
            request.num_cached_tokens = num_cached
            if request.reads_prefix_cache and self.kv.enable_prefix_caching:
                self.kv.count_lookup(len(request.token_ids), num_cached)
        request.status = RequestStatus.RUNNING
        request.num_computed = num_cached
        request.row = heappop(self._free_rows)
        insort(self.running, request, key=_order)
        source = request.source
        sketch.new_rows.append(
            NewRow(
                row=request.row,
                request_id=source.request_id,
                token_ids=list(request.token_ids),
                num_prompt_tokens=request.num_prompt_tokens,
                params=source.params,
                eos_token_ids=source.eos_token_ids,
                bad_words_token_ids=source.bad_words_token_ids,
                prompt_logprobs_start=request.num_prompt_logprobs + 1,
                grammar=source.grammar,
                pooling=source.pooling,
                segment_start=source.segment_start,
            )
        )

    def _preempt_last(self) -> None:
        request = self.running.pop()
        self._take_back(request)
        request.num_computed = 0
        request.num_preemptions += 1
        request.status = RequestStatus.PREEMPTED
        self._num_preemptions += 1
        self.waiting.add(request)

    def _take_back(self, request: Request) -> None:
        """Blocks and row of a running request. A step in flight may still write there: on the device it comes before
        every step that is planned from now on."""
        self.kv.free(request.blocks)
        self._released_rows.append(request.row)
        heappush(self._free_rows, request.row)
        request.row = -1

    def _release(self, requests: list[Request]) -> None:
        """Finish requests, running or waiting."""
        for request in requests:
            if request.status is RequestStatus.RUNNING:
                self._take_back(request)
            else:
                self.waiting.remove(request)
            request.status = RequestStatus.FINISHED
            del self.requests[request.source.request_id]
        self.running = [request for request in self.running if request.status is RequestStatus.RUNNING]

    def _end(
        self, requests: list[Request], reason: str, error: str | None = None, error_kind: str | None = None
    ) -> list[RequestUpdate]:
        self._release(requests)
        return [
            RequestUpdate(
                request.request_id,
                finish_reason=reason,
                error=error,
                error_kind=error_kind,
                num_preemptions=request.num_preemptions,
                num_draft_tokens=request.num_draft_tokens,
                num_accepted_tokens=request.num_accepted_tokens,
            )
            for request in requests
        ]

    def _plan(self, sketch: PlanSketch) -> StepPlan:
        if sketch.is_empty:
            return StepPlan(self._num_planned, [], [], [], [], [], [], [])
        step = self._num_planned
        self._num_planned += 1
        self._in_flight.append((step, sketch.requests))
        if self._pace is not None:
            self._pace.plan(len(sketch.decode_requests), len(sketch.chunks))
        released_rows, self._released_rows = self._released_rows, []
        return sketch.finish(step, released_rows)

    def _take_in_flight(self, plan: StepPlan, output: StepOutput) -> list[Request]:
        if not self._in_flight:
            raise ValueError(f"no step is in flight, so no output is expected: {output.step}")
        step, requests = self._in_flight[0]
        if not plan.step == output.step == step:
            raise ValueError(f"expected the output of step {step} with its plan, got: {output.step} and {plan.step}")
        pooled = output.pooled
        if [bool(tokens) or entry in pooled for entry, tokens in enumerate(output.token_ids)] != plan.samples:
            raise ValueError(
                "the output must hold what was pooled, or tokens for the entries that sample, and no others: "
                f"step {step}"
            )
        if len(output.num_drafts) != (plan.num_decode if plan.num_drafts else 0):
            raise ValueError(
                f"the output must tell how many drafts were verified for each entry that decodes: step {step}"
            )
        self._in_flight.popleft()
        return requests


def _order(request: Request) -> tuple[int, int]:
    return request.order


def _decodes(request: Request) -> bool:
    return len(request.token_ids) + request.num_unread == request.num_computed + 1 and not request.pools


def _full_update(
    request: Request,
    num_before: int,
    logprobs: list[TokenLogprobs] | None,
    prompt_logprobs: list[TokenLogprobs] | None,
    ending: tuple[str, int | None] | None,
) -> RequestUpdate:
    """The update of a request that begins, ends or reports prompt logprobs; it had `num_before` tokens."""
    if prompt_logprobs is not None:
        request.num_prompt_logprobs += len(prompt_logprobs)
    new_token_ids = request.token_ids[num_before:]
    begins = bool(new_token_ids) and num_before == request.num_prompt_tokens
    finish_reason, stop_reason = ending or (None, None)
    return RequestUpdate(
        request_id=request.source.request_id,
        new_token_ids=new_token_ids,
        logprobs=logprobs[: len(new_token_ids)] if logprobs is not None else None,
        prompt_logprobs=prompt_logprobs,
        finish_reason=finish_reason,
        stop_reason=stop_reason,
        num_cached_tokens=request.num_cached_tokens if begins else None,
        num_preemptions=request.num_preemptions,
        queued_time=request.queued_time if begins else 0.0,
        scheduled_time=request.scheduled_time if begins else 0.0,
        num_draft_tokens=request.num_draft_tokens,
        num_accepted_tokens=request.num_accepted_tokens,
    )
