"""The embedded engine: `Engine`, with its core in the caller's own process and thread."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any, cast

from tqdm import tqdm

from ..models.tokenizer import Tokenizer
from ..scheduler.sampling_params import RequestOutputKind, SamplingParams, ValidationError
from .config import EngineArgs, EngineConfig
from .core import EngineCore
from .errors import EngineDeadError
from .front import Front
from .inputs import PromptType
from .outputs import RequestOutput


class Engine:
    """Continuous batching in one process: load a checkpoint, generate.

        engine = Engine(model="path/to/checkpoint")
        for output in engine.generate(["Once upon a time"], SamplingParams(max_tokens=32)):
            print(output.outputs[0].text)

    Keywords are the fields of `EngineArgs`. Not thread-safe. A request that fails raises for that request; after an
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
        self._inputs = self._front.input_processor(self._core.info.max_model_len)
        self._dead: EngineDeadError | None = None
        self._request_ids = itertools.count()
        self._early: list[RequestOutput] = []  # outputs of aborts, told by the next step
        self._failures: dict[str, Exception] = {}

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
        self, request_id: str, prompt: PromptType, params: SamplingParams | None = None, *, priority: int = 0
    ) -> None:
        """Queue a request; raises `ValidationError`, also for an id that is in use."""
        self._check_alive()
        if any(state.request_id == request_id for state in self._front.outputs.requests.values()):
            raise ValidationError("a request of this id is running", parameter="request_id", value=request_id)
        self._submit(request_id, prompt, params or self.get_default_sampling_params(), priority)

    def step(self) -> list[RequestOutput]:
        """Run one step; returns what is new. A request the engine refused or failed raises its error here."""
        outputs = self._step()
        if self._failures:
            raise self._failures.pop(next(iter(self._failures)))
        return [output for _, output in outputs]

    def abort_request(self, request_ids: str | Sequence[str]) -> None:
        """End requests; their last output, finish_reason abort, comes with the next step. Unknown ids are ignored."""
        core_ids = self._front.outputs.unfinished_core_ids(request_ids)
        result = self._front.outputs.process(self._core.abort(core_ids))
        self._early += [output for _, output in result.outputs]

    abort = abort_request

    def has_unfinished_requests(self) -> bool:
        return bool(self._front.outputs.requests or self._early)

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
        finals: dict[str, RequestOutput] = {}
        requests = self._pair(prompts, sampling_params, priority)
        final_only = [
            (prompt, params.clone(output_kind=RequestOutputKind.FINAL_ONLY), level)
            for prompt, params, level in requests
        ]
        with tqdm(total=len(requests), desc="Processed prompts", unit="prompt", disable=not use_tqdm) as bar:
            for output in self._run(final_only):
                finals[output.request_id] = output
                bar.update()
        return [finals[request_id] for request_id in sorted(finals, key=int)]

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

    def check_integrity(self) -> None:
        """Raise if a KV block is lost, doubly used or held by no request."""
        self._core.scheduler.check_integrity()

    def _run(self, requests: Sequence[tuple[PromptType, SamplingParams, int]]) -> Iterator[RequestOutput]:
        self._check_alive()
        ids: dict[str, None] = {}  # in order, of those unfinished
        try:
            for prompt, params, level in requests:
                ids[self._submit(str(next(self._request_ids)), prompt, params, level)] = None
            while ids:
                for key, output in self._step():
                    if output.finished:
                        ids.pop(key, None)
                    yield output
                for key in list(ids):
                    if key in self._failures:
                        raise self._failures.pop(key)
        finally:
            for key in ids:
                self._core.abort(self._front.outputs.remove(key))

    def _submit(self, request_id: str, prompt: PromptType, params: SamplingParams, priority: int) -> str:
        request = self._inputs.process(request_id, prompt, params, priority=priority)
        self._front.outputs.add(request)
        for core_request in request.core_requests:
            self._take(self._core.add(core_request))
            if request.key in self._failures:
                break  # one of the n sequences was refused, so the request has failed
        return request.key

    def _step(self) -> list[tuple[str, RequestOutput]]:
        self._check_alive()
        early, self._early = self._early, []
        outputs = [("", output) for output in early]
        if not self._core.has_unfinished:
            return outputs
        try:
            updates = self._core.step()
        except Exception as error:
            self._dead = EngineDeadError(f"a step failed: {type(error).__name__}: {error}")
            raise self._dead from error
        return outputs + self._take(updates)

    def _take(self, updates: Sequence[Any]) -> list[tuple[str, RequestOutput]]:
        result = self._front.outputs.process(updates)
        self._core.abort(result.core_ids_to_abort)
        self._failures.update((state.key, error) for state, error in result.failures)
        return [(state.key, output) for state, output in result.outputs]

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
        else:
            params = list(sampling_params)
        levels = [0] * len(many) if priority is None else list(priority)
        for name, values in (("sampling_params", params), ("priority", levels)):
            if len(values) != len(many):
                raise ValidationError(
                    f"The lengths of prompts ({len(many)}) and {name} ({len(values)}) must be the same.", parameter=name
                )
        return list(zip(many, params, levels, strict=True))


def as_prompt_list(prompts: Any) -> list[PromptType]:
    """One prompt (text, dict or token ids) or a sequence of them, as a list."""
    if isinstance(prompts, (str, Mapping)):
        return [cast(PromptType, prompts)]
    many = list(prompts)
    if many and all(isinstance(item, Integral) for item in many):
        return [cast(PromptType, many)]
    return many


def engine_args(model: str | None, kwargs: Mapping[str, Any]) -> EngineArgs:
    """`EngineArgs` from keywords; names the first one that is unknown."""
    known = {field.name for field in dataclasses.fields(EngineArgs)}
    for name in kwargs:
        if name not in known:
            raise TypeError(
                f"not supported yet, or not an engine argument; known are {', '.join(sorted(known))}: {name}"
            )
    return EngineArgs(**({} if model is None else {"model": str(model)}), **kwargs)


LLMEngine = Engine
