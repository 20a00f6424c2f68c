"""The embedded engine: `Engine`, with its core in the caller's own process and thread."""

from __future__ import annotations

import dataclasses
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from tqdm import tqdm

from ..models.tokenizer import Tokenizer
from ..scheduler.pooling_params import PoolingParams
from ..scheduler.request import RequestUpdate
from ..scheduler.sampling_params import RequestOutputKind, SamplingParams, ValidationError
from ..scheduler.scheduler import SchedulerStats
from .config import EngineArgs, EngineConfig
from .core import EngineCore
from .errors import EngineDeadError
from .front import Front
from .inputs import PromptType, as_prompt_list, is_conversation
from .output_processor import new_state
from .outputs import RequestOutput
from .pooling.outputs import PoolingOutput, PoolingRequestOutput, ScoringOutput
from .pooling.scoring import plan_scores

_Request = tuple[PromptType, SamplingParams | PoolingParams, int]  # and its priority

_Inbox = deque[Any]  # outputs, and the errors of requests that failed


class Engine:
    """Continuous batching in one process: load a checkpoint, generate.

        engine = Engine(model="path/to/checkpoint")
        for output in engine.generate(["Once upon a time"], SamplingParams(max_tokens=32)):
            print(output.outputs[0].text)

    Keywords are the fields of `EngineArgs`. Not thread-safe. Several `generate` and `stream` calls and requests of
    `add_request` may be under way at once: whoever steps computes for all, and each gets its own outputs. After an
    error inside a step the engine is dead, and every further call raises `EngineDeadError`.
    """

    def __init__(self, model: str | None = None, *, args: EngineArgs | None = None, **kwargs: Any) -> None:
        if args is None:
            args = engine_args(model, kwargs)
        elif model is not None or kwargs:
            raise TypeError("give either args or keywords, not both")
        self.config = EngineConfig.from_args(args)
        self._front = Front(self.config)
        self._core = EngineCore.load(self.config)
        # Dropped or left to the interpreter's end, it must not leave a compiling process or its files behind.
        weakref.finalize(self, self._core.close)
        weakref.finalize(self, self._front.close)
        self._core.bring_memory()
        self._inputs = self._front.input_processor(self._core.info.max_model_len)
        self._dead: EngineDeadError | None = None
        self._num_prompts = 0  # of generate and stream; their request ids count on from here
        self._step_inbox: _Inbox = deque()  # of the requests of add_request, for step to tell
        self._inboxes: dict[str, _Inbox] = {}  # by request key: where its outputs go

    @classmethod
    def from_engine_args(cls, args: EngineArgs) -> Engine:
        return cls(args=args)

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._front.tokenizer

    @property
    def max_model_len(self) -> int:
        """Longest sequence, prompt and output together, in tokens."""
        return self._inputs.max_model_len

    def get_tokenizer(self) -> Tokenizer | None:
        return self.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What requests without parameters of their own get: generation_config.json over the plain defaults."""
        return self._front.default_sampling_params()

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The prompt text of a conversation, by the model's chat template; see `Front.render_chat`."""
        return self._front.render_chat(messages, **options)

    def add_request(
        self,
        request_id: str,
        prompt: PromptType,
        params: SamplingParams | PoolingParams | None = None,
        *,
        priority: int = 0,
    ) -> None:
        """Queue a request; raises `ValidationError`, also for an id that is in use."""
        self._check_alive()
        inbox_keys = [key for key, inbox in self._inboxes.items() if inbox is self._step_inbox]
        if any(self._front.outputs.requests[key].request_id == request_id for key in inbox_keys):
            raise ValidationError("a request of this id is running", parameter="request_id", value=request_id)
        if params is None:
            params = self.get_default_sampling_params() if self.config.pooling is None else PoolingParams()
        self._submit(request_id, prompt, params, priority, self._step_inbox)

    def step(self) -> list[Any]:
        """Run one step; returns what is new of the requests of `add_request`: `RequestOutput`s, or of an engine that
        pools `PoolingRequestOutput`s.

        Raises ValueError or `RequestFailedError` where one of them cannot go on, such as one whose grammar proves too
        costly; the others' outputs come with the next call.
        """
        self._step()
        failure = next((item for item in self._step_inbox if isinstance(item, Exception)), None)
        if failure is not None:
            self._step_inbox.remove(failure)
            raise failure
        outputs = list(self._step_inbox)
        self._step_inbox.clear()
        return outputs

    def abort_request(self, request_ids: str | Sequence[str]) -> None:
        """End requests; their last output, finish_reason abort, comes with the next step. Unknown ids are ignored."""
        core_ids = self._front.outputs.unfinished_core_ids(request_ids)
        self._take(self._core.abort(core_ids))

    abort = abort_request

    def has_unfinished_requests(self) -> bool:
        return bool(self._front.outputs.requests or self._step_inbox)

    def get_num_unfinished_requests(self) -> int:
        return len(self._front.outputs.requests)

    def generate(
        self,
        prompts: PromptType | Sequence[PromptType],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete every prompt; outputs are in the order of the prompts."""
        requests = [
            (prompt, params.clone(output_kind=RequestOutputKind.FINAL_ONLY), level)
            for prompt, params, level in self._pair(prompts, sampling_params, priority)
        ]
        return self._run_all(requests, use_tqdm)

    def _run_all(self, requests: Sequence[_Request], use_tqdm: bool) -> list[Any]:
        """The last outputs of these requests, in their order."""
        first = self._num_prompts
        finals: dict[int, Any] = {}
        with tqdm(total=len(requests), desc="Processed prompts", unit="prompt", disable=not use_tqdm) as bar:
            for output in self._run(requests):
                finals[int(output.request_id) - first] = output
                bar.update()
        return [finals[index] for index in range(len(requests))]

    def encode(
        self,
        prompts: PromptType | Sequence[PromptType],
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        *,
        use_tqdm: bool = False,
        priority: Sequence[int] | None = None,
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """Pool every prompt; outputs are in the order of the prompts. For engines whose runner is pooling."""
        return self._run_all(self._pair_pooling(prompts, pooling_params, priority), use_tqdm)

    def score(
        self,
        queries: str | Sequence[str],
        documents: str | Sequence[str],
        pooling_params: PoolingParams | None = None,
        *,
        use_tqdm: bool = False,
        chat_template: str | None = None,
    ) -> list[PoolingRequestOutput[ScoringOutput]]:
        """How alike one query and every document are, or as many queries and documents in pairs. `chat_template`
        writes the two as one prompt, from messages of the roles query and document."""
        render = None if chat_template is None else partial(self._front.render_pair, chat_template=chat_template)
        plan = plan_scores(self.config.pooling, queries, documents, render)
        prompts: list[Any] = plan.prompts
        return plan.scores(self.encode(prompts, plan.params(pooling_params), use_tqdm=use_tqdm))

    def stream(
        self,
        prompts: PromptType | Sequence[PromptType],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[RequestOutput]:
        """Outputs as they come, by each request's output kind; ids count the prompts from the first one on.

        Leaving the loop early aborts what is left.
        """
        return self._run(self._pair(prompts, sampling_params, None))

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; False if running requests still hold some."""
        return self._core.reset_prefix_cache()

    def stats(self) -> SchedulerStats:
        """Queues and counters since the start, as of the last step."""
        return self._core.stats()

    def close(self) -> None:
        """Finish the steps in flight and end what works in the background, such as the compiling of graphs."""
        self._core.close()
        self._front.close()
        self._dead = EngineDeadError("the engine was closed")

    def check_integrity(self) -> None:
        """Raise if a KV block is lost, doubly used or held by no request."""
        self._core.scheduler.check_integrity()

    def _run(self, requests: Sequence[_Request]) -> Iterator[Any]:
        """Outputs of these requests and no others. Their ids are the next numbers from `_num_prompts` on."""
        self._check_alive()
        inbox: _Inbox = deque()
        ids = [str(self._num_prompts + index) for index in range(len(requests))]
        self._num_prompts += len(requests)
        keys: dict[str, None] = {}
        try:
            for request_id, (prompt, params, level) in zip(ids, requests, strict=True):
                keys[self._submit(request_id, prompt, params, level, inbox)] = None
            num_unfinished = len(keys)
            while num_unfinished:
                while inbox:
                    output = inbox.popleft()
                    if isinstance(output, Exception):
                        raise output
                    num_unfinished -= output.finished
                    yield output
                if num_unfinished:
                    self._step()
        finally:
            for key in keys:
                self._forget(key)

    def _submit(
        self,
        request_id: str,
        prompt: PromptType,
        params: SamplingParams | PoolingParams,
        priority: int,
        inbox: _Inbox,
    ) -> str:
        grammar = self._front.check_grammar(params) if isinstance(params, SamplingParams) else None
        prompt = self._front.read_chat(prompt)
        request = self._inputs.process(request_id, prompt, params, priority=priority, grammar=grammar)
        self._front.outputs.add(new_state(request, self._front.tokenizer))
        self._inboxes[request.key] = inbox
        for core_request in request.core_requests:
            refusal = self._core.add(core_request)
            if refusal:
                failures = self._front.outputs.process(refusal).failures
                self._forget(request.key)
                raise failures[0][1]
        return request.key

    def _forget(self, key: str) -> None:
        """Drop a request, finished or not; whatever of it is still being computed is aborted."""
        self._inboxes.pop(key, None)
        self._core.abort(self._front.outputs.remove(key))

    def _step(self) -> None:
        """Compute one step for all requests and put their outputs where they belong."""
        self._check_alive()
        if not self._core.has_unfinished:
            return
        try:
            updates = self._core.step()
        except Exception as error:
            self._dead = EngineDeadError(f"a step failed: {type(error).__name__}: {error}")
            raise self._dead from error
        self._take(updates)

    def _take(self, updates: Sequence[RequestUpdate]) -> None:
        result = self._front.outputs.process(updates)
        self._core.abort(result.core_ids_to_abort)
        for state, failure in result.failures:
            inbox = self._inboxes.pop(state.key, None)
            if inbox is not None:
                inbox.append(failure)
        for state, output in result.outputs:
            inbox = self._inboxes.get(state.key)
            if inbox is not None:
                inbox.append(output)
            if output.finished:
                self._inboxes.pop(state.key, None)

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise self._dead

    def _pair(
        self,
        prompts: PromptType | Sequence[PromptType],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        priority: Sequence[int] | None,
    ) -> list[tuple[PromptType, SamplingParams, int]]:
        many = as_prompt_list(prompts)
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            params = [sampling_params or self.get_default_sampling_params()] * len(many)
        elif isinstance(sampling_params, Sequence) and all(isinstance(p, SamplingParams) for p in sampling_params):
            params = list(sampling_params)
        else:
            raise ValidationError(
                "sampling_params must be SamplingParams, or a list with one for each prompt",
                parameter="sampling_params",
                value=sampling_params,
            )
        return _zipped(many, params, priority, "sampling_params")

    def _pair_pooling(
        self,
        prompts: PromptType | Sequence[PromptType],
        pooling_params: PoolingParams | Sequence[PoolingParams] | None,
        priority: Sequence[int] | None,
    ) -> list[_Request]:
        # A conversation ends with what was said, and not with the beginning of an answer.
        many: list[Any] = [
            {"messages": prompt, "add_generation_prompt": False} if is_conversation(prompt) else prompt
            for prompt in as_prompt_list(prompts)
        ]
        if pooling_params is None or isinstance(pooling_params, PoolingParams):
            params = [pooling_params or PoolingParams()] * len(many)
        elif isinstance(pooling_params, Sequence) and all(isinstance(p, PoolingParams) for p in pooling_params):
            params = list(pooling_params)
        else:
            raise ValidationError(
                "pooling_params must be PoolingParams, or a list with one for each prompt",
                parameter="pooling_params",
                value=pooling_params,
            )
        return _zipped(many, params, priority, "pooling_params")


def _zipped(prompts: list[Any], params: list[Any], priority: Sequence[int] | None, name: str) -> list[Any]:
    """Prompts with their parameters and priorities; raises `ValidationError` where they are not as many."""
    levels = [0] * len(prompts) if priority is None else list(priority)
    for what, values in ((name, params), ("priority", levels)):
        if len(values) != len(prompts):
            raise ValidationError(
                f"The lengths of prompts ({len(prompts)}) and {what} ({len(values)}) must be the same.", parameter=what
            )
    return list(zip(prompts, params, levels, strict=True))


# vLLM's arguments that are not ours, with the values under which they change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "cpu_offload_gb": (0,),
    "distributed_executor_backend": (None, "uni", "mp"),
    "enable_lora": (False, None),
    "enable_prompt_embeds": (False,),
    "kv_cache_dtype": ("auto",),
    "kv_transfer_config": (None,),
    "logits_processors": (None,),
    "max_lora_rank": (None, 16),
    "model_impl": ("auto",),
    "speculative_config": (None,),
    "structured_outputs_config": (None,),
    "swap_space": (0, 4),
}


def engine_args(model: str | None, kwargs: Mapping[str, Any]) -> EngineArgs:
    """`EngineArgs` from keywords, vLLM's neutral ones left out; TypeError names what is unknown or not built."""
    known = {field.name for field in dataclasses.fields(EngineArgs)}
    ours: dict[str, Any] = {} if model is None else {"model": str(model)}
    for name, value in kwargs.items():
        if name in known:
            ours[name] = value
        elif name not in _NEUTRAL:
            raise TypeError(
                f"not an engine argument, or not supported yet; known are {', '.join(sorted(known))}: {name}"
            )
        elif value not in _NEUTRAL[name]:
            raise TypeError(f"not supported yet: {name}={value!r}")
    return EngineArgs(**ours)


LLMEngine = Engine
