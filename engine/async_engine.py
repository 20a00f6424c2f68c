"""The engine for an event loop: `AsyncEngine`, whose core runs in a process of its own."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry

from ..models.config import ModelConfig
from ..models.pooling_config import PoolingConfig
from ..models.tokenizer import Tokenizer
from ..scheduler.pooling_params import PoolingParams
from ..scheduler.sampling_params import SamplingParams
from .config import EngineArgs, EngineConfig
from .core_client import CoreClient
from .core_launch import DEFAULT_STEP_TIMEOUT_SECONDS, LaunchedCore
from .errors import EngineDeadError, EngineRestartError, EngineShutdownError, RequestRejectedError
from .front import Front
from .input_processor import InputProcessor, ProcessedRequest
from .inputs import PromptType
from .load import LoadMeter
from .messages import Abort, Add, Answer, CoreInfo, Profile, ResetPrefixCache, Updates, Watch
from .output_processor import AnyState, RequestState
from .outputs import RequestOutput
from .phases import Phase, PhaseTimer
from .pooling.input import PoolingInputProcessor
from .pooling.outputs import PoolingOutput, PoolingRequestOutput
from .pooling.scoring import ScoringPlan, plan_scores
from .pooling.state import PoolingState
from .preparation import INLINE_ENCODE_CHARACTERS, prepare, prepare_pooling
from .questions import Questions
from .structured.threads import GrammarThreads
from .telemetry import Telemetry
from .tracing import RequestTracer

logger = logging.getLogger(__name__)
SHUTDOWN_MESSAGE = "the server is shutting down; send the request again later"


class AsyncEngine:
    """Continuous batching behind an async interface; imports no torch.

    All methods belong to one event loop. `generate` may be called before the engine is ready: it waits. Breaking out
    of it, or cancelling it, aborts the request. Metrics are in `metrics_registry` once the engine is ready, under the
    label `served_model_name` (by default the model's own), unless `disable_log_stats` is set. With `restart_core` a
    core that is lost once it was ready is replaced; what it was computing fails, what comes later waits. A core counts
    as lost too when it does not answer, or has been in one step for `hang_timeout` seconds (0: no limit). `tracer` gets
    every request at its end, and is closed with the engine.
    """

    def __init__(
        self,
        args: EngineArgs,
        served_model_name: str | None = None,
        *,
        restart_core: bool = False,
        hang_timeout: float = DEFAULT_STEP_TIMEOUT_SECONDS,
        core: LaunchedCore | None = None,
        timer: PhaseTimer | None = None,
        tracer: RequestTracer | None = None,
    ) -> None:
        self.args = args
        self._timer = timer or PhaseTimer()
        self.hang_timeout = hang_timeout
        self._launched = core
        self.tracer = tracer
        self.restart_core = restart_core
        self.served_model_name = served_model_name or args.model
        self.metrics_registry = CollectorRegistry()
        self._front: Front | None = None
        self._inputs: InputProcessor | None = None
        self._client: CoreClient | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._starting: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()
        self._info: CoreInfo | None = None
        self._stats: dict[str, Any] = {}
        self._telemetry = Telemetry(self._timer, disable_log_stats=args.disable_log_stats)
        self._dead_error: EngineDeadError | None = None
        self._streams: dict[str, asyncio.Queue[Any]] = {}
        self._closing = False
        self._request_ids = itertools.count()
        self._grammars = GrammarThreads()
        self._questions = Questions()

    @classmethod
    def from_engine_args(
        cls,
        args: EngineArgs,
        *,
        start: bool = False,
        served_model_name: str | None = None,
        restart_core: bool = False,
        hang_timeout: float = DEFAULT_STEP_TIMEOUT_SECONDS,
        core: LaunchedCore | None = None,
        timer: PhaseTimer | None = None,
        tracer: RequestTracer | None = None,
    ) -> AsyncEngine:
        """An engine for `args`; with `start` it begins to load at once, which needs a running event loop.

        `core` is a core process that has been launched already; its launcher sees to its end. `timer` holds the
        phases of the start before the engine, which are told together with its own.
        """
        engine = cls(
            args,
            served_model_name,
            restart_core=restart_core,
            hang_timeout=hang_timeout,
            core=core,
            timer=timer,
            tracer=tracer,
        )
        if start:
            engine._starting = asyncio.get_running_loop().create_task(engine._start())
        return engine

    async def start(self) -> None:
        """Start the core and load the tokenizer; returns while the core still loads. Further calls share the first.

        Raises ValueError or OSError, with what to change, if the checkpoint cannot be used.
        """
        if self._starting is None:
            self._starting = asyncio.create_task(self._start())
        await asyncio.shield(self._starting)

    async def _start(self) -> None:
        if self._closing:
            return
        launched, self._launched = self._launched, None
        self._client = await CoreClient.spawn(self.args, launched)
        try:
            self._front = await asyncio.to_thread(lambda: Front(EngineConfig.from_args(self.args)))
            self._timer.done("configuration, tokenizer")
        except BaseException as error:
            self._die(EngineDeadError(str(error)))
            raise
        self._tasks.append(asyncio.create_task(self._read_core(self._client)))
        self._tasks.append(asyncio.create_task(self._telemetry.write_log(lambda: self.errored)))

    async def wait_ready(self) -> None:
        """Wait until requests can be served; raises `EngineDeadError` if loading failed."""
        await self.start()
        await self._ready.wait()
        if self._dead_error is not None:
            raise self._dead_error

    @property
    def is_ready(self) -> bool:
        return self._inputs is not None and not self.errored

    @property
    def errored(self) -> bool:
        return self._dead_error is not None

    @property
    def dead_error(self) -> EngineDeadError | None:
        return self._dead_error

    @property
    def config(self) -> EngineConfig:
        return self._loaded_front.config

    @property
    def model_config(self) -> ModelConfig:
        return self.config.model

    @property
    def pooling_config(self) -> PoolingConfig | None:
        """How the model pools; None where it generates."""
        return self.config.pooling

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._loaded_front.tokenizer

    def tokenizer_config(self) -> dict[str, Any]:
        """What tokenizer_config.json says; empty where there is none."""
        return self._loaded_front.tokenizer_config()

    @property
    def max_model_len(self) -> int:
        """Longest sequence in tokens; known once the engine is ready."""
        return self._loaded_inputs.max_model_len

    @property
    def default_sampling_params(self) -> dict[str, Any]:
        """The sampling fields that generation_config.json and the overrides set."""
        return self.config.sampling_defaults

    @property
    def _loaded_front(self) -> Front:
        if self._front is None:
            raise EngineDeadError("the engine has not been started: await wait_ready() first")
        return self._front

    @property
    def _loaded_inputs(self) -> InputProcessor:
        if self._inputs is None:
            raise EngineDeadError("the engine is not ready: await wait_ready() first")
        return self._inputs

    async def generate(
        self,
        prompt: PromptType,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
    ) -> AsyncIterator[RequestOutput]:
        """The outputs of one request as they come, by its output kind.

        Raises `ValidationError` for input that cannot be served, `RequestRejectedError` when too many wait,
        `RequestFailedError` and `EngineDeadError` when the engine fails.
        """
        await self.wait_ready()
        if self._closing:
            raise EngineShutdownError(SHUTDOWN_MESSAGE)
        if request_id is None:
            request_id = str(next(self._request_ids))
        params = sampling_params or self._loaded_front.default_sampling_params()
        request = await self._process(request_id, prompt, params, priority)
        state = RequestState(request, self.tokenizer)
        try:
            stream = self._submit(state)
            while True:
                item = await stream.get()
                if isinstance(item, Exception):
                    raise item
                yield item
                if item.finished:
                    return
        finally:
            self._forget(request.key)
            if self.tracer is not None:
                self.tracer.finish(state)

    async def encode(
        self,
        prompt: Any,
        pooling_params: PoolingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
    ) -> AsyncIterator[PoolingRequestOutput[PoolingOutput]]:
        """The output of one request to a pooling model; prompts as `PoolingInputProcessor` takes them. Errors as of
        `generate`."""
        await self.wait_ready()
        if self._closing:
            raise EngineShutdownError(SHUTDOWN_MESSAGE)
        if request_id is None:
            request_id = str(next(self._request_ids))
        request = await self._process_pooling(request_id, prompt, pooling_params or PoolingParams(), priority)
        try:
            item = await self._submit(PoolingState(request)).get()
            if isinstance(item, Exception):
                raise item
            yield item
        finally:
            self._forget(request.key)

    async def _process_pooling(
        self, request_id: str, prompt: Any, params: PoolingParams, priority: int
    ) -> ProcessedRequest:
        inputs = self._loaded_inputs
        if not isinstance(inputs, PoolingInputProcessor):
            return inputs.process(request_id, prompt, params)  # which says what is wrong
        tokens, params = await prepare_pooling(self._loaded_front, inputs, prompt, params)
        await self.check_health()
        return inputs.admit(request_id, tokens, params, priority=priority)

    async def _process(
        self, request_id: str, prompt: PromptType, params: SamplingParams, priority: int
    ) -> ProcessedRequest:
        try:
            inputs = self._loaded_inputs
            prompt, grammar = await prepare(self._loaded_front, inputs, self._grammars, prompt, params)
        except RequestRejectedError:
            self._telemetry.reject_for_grammars()
            raise
        await self.check_health()
        return self._loaded_inputs.process(request_id, prompt, params, priority=priority, grammar=grammar)

    def warm_up_grammars(self) -> None:
        """Start the process for grammars, which would start with the first constraint. Returns at once."""
        if self._loaded_front.grammars is not None:
            self._grammars.warm_up(self._loaded_front.grammars)

    def _submit(self, state: AnyState) -> asyncio.Queue[Any]:
        assert self._client is not None
        request = state.request
        self._loaded_front.outputs.add(state)
        stream: asyncio.Queue[Any] = asyncio.Queue()
        self._streams[request.key] = stream
        self._telemetry.add(request.core_requests)
        for core_request in request.core_requests:
            self._client.send(Add(core_request))
        return stream

    def _forget(self, key: str) -> None:
        """Drop a request; whatever of it is still being computed is aborted."""
        self._streams.pop(key, None)
        core_ids = self._loaded_front.outputs.remove(key)
        self._telemetry.end(core_ids, "abort")
        if core_ids and self._client is not None and not self.errored:
            self._client.send(Abort(core_ids))

    async def abort(self, request_id: str | Sequence[str]) -> None:
        """End requests by their id; their streams close with finish_reason abort. Unknown ids are ignored."""
        core_ids = self._loaded_front.outputs.unfinished_core_ids(request_id)
        if core_ids and self._client is not None:
            self._client.send(Abort(core_ids))

    async def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; raises `ValidationError`."""
        await self.wait_ready()
        inputs = self._loaded_inputs
        if len(text) > INLINE_ENCODE_CHARACTERS:
            return await asyncio.to_thread(inputs.encode, text, add_special_tokens=add_special_tokens)
        return inputs.encode(text, add_special_tokens=add_special_tokens)

    async def plan_scores(
        self, queries: str | Sequence[str], documents: str | Sequence[str], chat_template: str | None = None
    ) -> ScoringPlan:
        """What to `encode` in order to score queries and documents; see `scoring.plan_scores`. Raises ValueError."""
        await self.wait_ready()
        render = None
        if chat_template is not None:
            render = partial(self._loaded_front.render_pair, chat_template=chat_template)
        return await asyncio.to_thread(plan_scores, self.pooling_config, queries, documents, render)

    async def render_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The prompt text of a conversation; see `Front.render_chat`. Raises ValueError."""
        await self.wait_ready()
        return await asyncio.to_thread(self._loaded_front.render_chat, messages, **options)

    async def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes; False if running requests still hold some."""
        return await self._ask(ResetPrefixCache)

    async def start_profile(self) -> None:
        """Profile the steps from now on, as `profiler_config` says; RuntimeError if that cannot be done."""
        await self._ask(partial(Profile, starts=True))

    async def stop_profile(self) -> None:
        """Write down what has been seen since `start_profile`; RuntimeError if that cannot be done."""
        await self._ask(partial(Profile, starts=False))

    async def _ask(self, make: Callable[[int], ResetPrefixCache | Profile]) -> bool:
        await self.wait_ready()
        assert self._client is not None
        return await self._questions.ask(self._client, make)

    async def stats(self) -> dict[str, Any]:
        """The scheduler's counters as of its last step."""
        return dict(self._stats)

    @property
    def core_info(self) -> CoreInfo | None:
        """What loading found out; None before the engine is ready."""
        return self._info

    @property
    def start_phases(self) -> list[tuple[str, list[Phase]]]:
        """How long each phase of the last start took, by process; empty before the engine is ready."""
        return self._telemetry.start_phases

    @contextmanager
    def watched(self) -> Iterator[LoadMeter]:
        """A meter of the load from here to the end of the block. Outside of it the core reports no step, and nothing is
        counted. One at a time: RuntimeError. It may begin before the engine is ready and outlives a lost core."""
        with self._telemetry.watch() as meter:
            self._send_watch(True)
            try:
                yield meter
            finally:
                self._send_watch(False)

    def _send_watch(self, wanted: bool) -> None:
        if self._client is not None and self.is_ready:
            self._client.send(Watch(wanted))

    async def check_health(self) -> None:
        """Raises `EngineDeadError` if no request can be served any more."""
        if self._dead_error is not None:
            raise self._dead_error

    async def shutdown(self, timeout: float = 0) -> None:
        """Refuse new requests, let running ones end for `timeout` seconds, abort the rest, stop the core."""
        self._closing = True
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while self._streams and not self.errored and loop.time() < deadline:
            await asyncio.sleep(0.02)
        if self._streams and not self.errored:
            await self.abort([state.request_id for state in self._loaded_front.outputs.requests.values()])
            deadline = loop.time() + 2.0  # a step may be long; then the streams end with an error instead
            while self._streams and not self.errored and loop.time() < deadline:
                await asyncio.sleep(0.01)
        if self._client is not None:
            await self._client.close()
        self._die(EngineShutdownError(SHUTDOWN_MESSAGE))
        self._grammars.close()
        if self._front is not None:
            await asyncio.to_thread(self._front.close)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.tracer is not None:
            await asyncio.to_thread(self.tracer.close)

    async def _read_core(self, client: CoreClient) -> None:
        """Hand what the core says to the streams, until it ends."""
        try:
            while True:
                message = await client.receive()
                if isinstance(message, CoreInfo):
                    self._take_info(message)
                    self._tasks.append(asyncio.create_task(self._watch_core(client)))
                elif isinstance(message, Answer):
                    self._questions.take(message)
                else:
                    self._take_updates(message)
        except EngineDeadError as error:
            self._lose_core(client, error)
        except Exception as error:  # a fault of ours must not leave callers waiting
            logger.exception("reading from the engine core failed")
            self._die(EngineDeadError(f"{type(error).__name__}: {error}"))

    def _take_info(self, info: CoreInfo) -> None:
        self._info = info
        self._inputs = self._loaded_front.input_processor(info.max_model_len)
        if self._telemetry.meter is not None:
            self._send_watch(True)
        self._telemetry.begin(self.metrics_registry, self.served_model_name, self.config, info)
        self._ready.set()

    async def _watch_core(self, client: CoreClient) -> None:
        why = await client.wait_until_hung(self.hang_timeout)
        if why is not None:
            self._lose_core(client, EngineDeadError(f"the engine core process {why} and has been killed"))

    def _lose_core(self, client: CoreClient, error: EngineDeadError) -> None:
        """The core has ended or hangs: the end, or a new beginning if that is wanted and the core was ready."""
        if client is not self._client:
            return  # it has been replaced
        if not self.restart_core or self._closing or self._inputs is None:
            self._die(error)
            return
        logger.error("%s; starting it anew", error)
        self._client = self._inputs = None
        self._ready.clear()
        client.kill()
        self._fail_streams(EngineRestartError("the engine core was lost and is started anew; send the request again"))
        self._tasks.append(asyncio.create_task(self._respawn()))

    async def _respawn(self) -> None:
        try:
            self._client = await CoreClient.spawn(self.args)
        except OSError as error:
            self._die(EngineDeadError(f"the engine core process could not be started anew: {error}"))
            return
        self._tasks.append(asyncio.create_task(self._read_core(self._client)))

    def _fail_streams(self, error: EngineDeadError) -> None:
        self._telemetry.lose_core()
        for stream in self._streams.values():
            stream.put_nowait(error)
        self._questions.fail(error)

    def _take_updates(self, message: Updates) -> None:
        self._stats = msgspec.structs.asdict(message.stats)
        result = self._loaded_front.outputs.process(message.updates)
        self._telemetry.take(message, result)
        if result.core_ids_to_abort and self._client is not None:
            self._client.send(Abort(result.core_ids_to_abort))
        for state, item in itertools.chain(result.outputs, result.failures):
            stream = self._streams.get(state.key)
            if stream is not None:
                stream.put_nowait(item)

    def _die(self, error: EngineDeadError) -> None:
        """From here on every request, running or new, gets `error`."""
        if self._dead_error is None:
            self._dead_error = error
        self._ready.set()
        self._fail_streams(self._dead_error)
        if self._client is not None:
            self._client.kill()


AsyncLLM = AsyncLLMEngine = AsyncEngine
