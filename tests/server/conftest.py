"""A fake engine at the boundary of server/, and a client that talks to the real application over a socket."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import ClientSession, web
from prometheus_client import CollectorRegistry

from omni_engine.engine.config import EngineArgs
from omni_engine.engine.load import LoadMeter
from omni_engine.engine.messages import CoreInfo
from omni_engine.engine.outputs import CompletionOutput, Logprob, RequestOutput, RequestStats
from omni_engine.engine.phases import Phase
from omni_engine.models.chat_template import ChatTemplate
from omni_engine.scheduler.sampling_params import RequestOutputKind, SamplingParams, ValidationError
from omni_engine.server.app import build_app
from omni_engine.server.settings import ServerSettings

MODEL = "tiny/model"
DELTA_FIELDS = {"content", "reasoning", "tool_calls"}
FIRST_SPECIAL = 0xF0000  # among the characters of private use


class FakeTokenizer:
    """One token per character, or per text of `special`; a "^" (token 1) is the special token put before a text."""

    max_token_id = 0x10FFFF

    def __init__(self) -> None:
        self.special: list[str] = []
        self.special_tokens_map = {"bos_token": "^"}
        self.vocab_size = 300
        self.chat_template: str | None = None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        pieces = re.findall("|".join([*map(re.escape, self.special), "(?s:.)"]), text)
        ids = [self.token_to_id(piece) for piece in pieces]
        return [1] * add_special_tokens + [ord(pieces[at]) if i is None else i for at, i in enumerate(ids)]

    def token_to_id(self, token: str) -> int | None:
        if token in self.special:
            return FIRST_SPECIAL + self.special.index(token)
        return ord(token) if len(token) == 1 else None

    def id_to_token(self, token_id: int) -> str:
        return self.token_string(token_id)

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        special = {1: "^"} | {FIRST_SPECIAL + place: text for place, text in enumerate(self.special)}
        return "".join(special.get(i) or chr(i) for i in ids if not (skip_special_tokens and i in special))

    def token_string(self, token_id: int) -> str:
        return self.decode([token_id], skip_special_tokens=False)


class FakeEngine:
    """Answers every request with `answer`, `tokens_per_output` tokens in each step."""

    def __init__(self) -> None:
        self.answer = "hello"
        self.answers: list[str] = []  # of the choices, if they differ
        self.tokens_per_output = 1
        self.finish_reason = "stop"  # of answers that are not cut
        self.stop_reason: str | None = None  # likewise
        self.text_delay = 0  # how many characters of the text come one output later than their tokens
        self.template: ChatTemplate | None = None
        self.prompt_end = ""
        self.failure: Exception | None = None  # raised before the first output
        self.failure_after: tuple[int, Exception] | None = None  # raised after so many outputs
        self.hangs = False  # after the first output
        self.pause = 0.0  # seconds before each output
        self.request_stats: RequestStats | None = None
        self.is_ready = True
        self.errored = False
        self.dead_error: BaseException | None = None
        self.tracer = None
        self.max_model_len = 64
        self.model_config = SimpleNamespace(vocab_size=300)
        self.pooling_config = None
        self.metrics_registry = CollectorRegistry()
        self.tokenizer = FakeTokenizer()
        self.default_sampling_params: dict[str, Any] = {}
        self.args = EngineArgs(model=MODEL)
        self.counters: dict[str, Any] = {}
        self.num_resets = 0
        self.profiles = False
        self.ready = asyncio.Event()
        self.prompts: list[Any] = []
        self.params: list[SamplingParams] = []
        self.request_ids: list[str] = []
        self.priorities: list[int] = []
        self.running: set[str] = set()
        self.closed_early: list[str] = []
        self.rendered: list[tuple[Any, dict[str, Any]]] = []
        self.core_info: CoreInfo | None = None
        self.start_phases: list[tuple[str, list[Phase]]] = []
        self.config = SimpleNamespace(speculation=None)
        self.meter: LoadMeter | None = None  # while somebody looks
        self.num_watches = 0

    @contextmanager
    def watched(self) -> Iterator[LoadMeter]:
        assert self.meter is None
        self.meter = LoadMeter(time.monotonic())
        self.num_watches += 1
        try:
            yield self.meter
        finally:
            self.meter = None

    def tokenizer_config(self) -> dict[str, Any]:
        return {"tokenizer_class": "FakeTokenizer"}

    async def stats(self) -> dict[str, Any]:
        return self.counters

    async def check_health(self) -> None:
        if self.dead_error is not None:
            raise self.dead_error

    async def reset_prefix_cache(self) -> bool:
        self.num_resets += 1
        return True

    async def start_profile(self) -> None:
        self.profiles = True

    async def stop_profile(self) -> None:
        if not self.profiles:
            raise RuntimeError("none runs")
        self.profiles = False

    async def wait_ready(self) -> None:
        if not self.is_ready:
            await self.ready.wait()

    async def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    async def render_chat(self, messages: Any, **options: Any) -> str:
        self.rendered.append((messages, options))
        if any(message["role"] == "refused" for message in messages):
            raise ValueError("the template knows no role: refused")
        if self.template is not None:
            options.pop("chat_template")
            return self.template.render(messages, template_kwargs=options.pop("chat_template_kwargs"), **options)
        return "".join(f"<{message['role']}>{message['content']}" for message in messages) + self.prompt_end

    async def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, *, priority: int = 0
    ) -> AsyncIterator[RequestOutput]:
        self.prompts.append(prompt)
        self.params.append(sampling_params)
        self.request_ids.append(request_id)
        self.priorities.append(priority)
        token_ids = prompt.get("prompt_token_ids")
        if token_ids is None:
            token_ids = await self.tokenize(prompt["prompt"])
        if self.failure is not None:
            raise self.failure
        if len(token_ids) > self.max_model_len:
            raise ValidationError(
                f"This model's maximum context length is {self.max_model_len} tokens. However, your prompt contains "
                f"{len(token_ids)} input tokens",
                parameter="input_tokens",
                value=len(token_ids),
            )
        self.running.add(request_id)
        finished = False
        try:
            for number, output in enumerate(self._outputs(prompt, token_ids, sampling_params, request_id)):
                if self.failure_after is not None and number == self.failure_after[0]:
                    raise self.failure_after[1]
                if self.hangs and (number or sampling_params.output_kind == RequestOutputKind.FINAL_ONLY):
                    await asyncio.Event().wait()
                await asyncio.sleep(self.pause)
                yield output
                finished = output.finished
        finally:
            self.running.discard(request_id)
            if not finished:
                self.closed_early.append(request_id)

    def _outputs(self, prompt: Any, token_ids: list[int], params: SamplingParams, request_id: str) -> list[Any]:
        texts = self.answers or [self.answer] * params.n
        answers = [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        cut = [ids[: params.max_tokens or len(ids)] for ids in answers]
        longest = max(map(len, cut))
        step = longest if params.output_kind == RequestOutputKind.FINAL_ONLY else self.tokens_per_output
        prompt_logprobs = None
        if params.prompt_logprobs is not None:
            prompt_logprobs = [None, *(entry(i, params.prompt_logprobs) for i in token_ids[1:])]
        outputs = []
        for start in range(0, longest, step):
            completions = []
            for index, ids in enumerate(cut):
                new = ids[start : start + step]
                if not new:
                    continue
                done = start + step >= len(ids)
                reason = "length" if len(ids) < len(answers[index]) else self.finish_reason
                logprobs = None if params.logprobs is None else [entry(i, params.logprobs) for i in new]
                text = self._text(ids, start, params) if start else ""
                text = self._text(ids, start + step, params)[len(text) :]
                ended = (reason, self.stop_reason if reason == "stop" else None) if done else (None, None)
                completions.append(CompletionOutput(index, text, new, 0.0, logprobs, *ended))
            outputs.append(
                RequestOutput(
                    request_id, prompt.get("prompt"), token_ids, None if start else prompt_logprobs, completions,
                    start + step >= longest, self.request_stats, num_cached_tokens=2,
                )
            )  # fmt: skip
        return outputs

    def _text(self, ids: list[int], end: int, params: SamplingParams) -> str:
        """The text after `end` tokens of an answer."""
        text = self.tokenizer.decode(ids[:end], skip_special_tokens=params.skip_special_tokens)
        return text if end >= len(ids) else text[: max(len(text) - self.text_delay, 0)]


def entry(token_id: int, count: int) -> dict[int, Logprob]:
    """The token itself (never the likeliest) and `count` likelier ones, as the engine reports them."""
    result = {token_id: Logprob(-5.0, count + 1, chr(token_id))}
    for rank in range(1, count + 1):
        other = token_id + rank
        result[other] = Logprob(float("-inf") if rank == 3 else -0.1 * rank, rank, chr(other))
    return result


class Client:
    """HTTP against a running application."""

    def __init__(self, session: ClientSession, address: str) -> None:
        self.session = session
        self.address = address

    async def post(self, path: str, body: Any = None, **options: Any) -> tuple[int, Any]:
        """Status and decoded body."""
        if "data" not in options:
            options["json"] = body
        async with self.session.post(self.address + path, **options) as response:
            return response.status, await response.json()

    async def get(self, path: str, **options: Any) -> tuple[int, Any]:
        async with self.session.get(self.address + path, **options) as response:
            text = await response.text()
            return response.status, await response.json() if text else None

    async def events(self, path: str, body: dict[str, Any]) -> list[Any]:
        """The events of a stream; [DONE] stays text."""
        async with self.session.post(self.address + path, json={"stream": True, **body}) as response:
            assert response.status == 200, await response.text()
            assert response.content_type == "text/event-stream"
            text = await response.text()
        return parse_events(text)


def parse_events(text: str) -> list[Any]:
    import json

    assert text.endswith("\n\n")
    events = []
    for block in text[:-2].split("\n\n"):
        assert block.startswith("data: ") and "\n" not in block
        data = block[len("data: ") :]
        events.append(data if data == "[DONE]" else json.loads(data))
    return events


Scenario = Callable[[Client, FakeEngine], Coroutine[Any, Any, None]]


@pytest.fixture
def serve() -> Callable[..., None]:
    """Runs a scenario against the application over a fake engine."""

    def run(scenario: Scenario, seconds: float = 20, **settings: Any) -> None:
        async def main() -> None:
            engine = FakeEngine()
            app = build_app(engine, ServerSettings(**{"model": MODEL, **settings}))  # type: ignore[arg-type]
            runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            port = runner.addresses[0][1]
            async with ClientSession() as session:
                await asyncio.wait_for(scenario(Client(session, f"http://127.0.0.1:{port}"), engine), seconds)
            await runner.cleanup()

        asyncio.run(main())

    return run


@pytest.fixture
def fake_engine() -> FakeEngine:
    return FakeEngine()


def join_chunks(events: list[Any], index: int = 0) -> dict[str, Any]:
    """The message of a choice as the API's rules say: texts are appended, calls by their index."""
    assert events[-1] == "[DONE]"
    message: dict[str, Any] = {"finish_reason": None}
    calls: list[dict[str, Any]] = []
    choices = [choice for event in events[:-1] for choice in event["choices"] if choice["index"] == index]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    for choice in choices[1:]:
        assert message["finish_reason"] is None  # nothing comes after the end
        delta = choice["delta"]
        assert set(delta) <= DELTA_FIELDS
        for name in ("content", "reasoning"):
            if name in delta:
                assert delta[name] or name == "content"  # a special token without a parser
                message[name] = message.get(name, "") + delta[name]
        pieces = delta.get("tool_calls", [])
        assert len({piece["index"] for piece in pieces}) == len(pieces)
        for piece in pieces:
            if piece["index"] == len(calls):
                assert set(piece) == {"index", "id", "type", "function"} and piece["type"] == "function"
                assert set(piece["function"]) == {"name", "arguments"}
                calls.append({"id": piece["id"], "type": "function", "function": dict(piece["function"])})
            else:
                assert piece["index"] == len(calls) - 1 and set(piece) == {"index", "function"}
                assert set(piece["function"]) == {"arguments"}
                calls[-1]["function"]["arguments"] += piece["function"]["arguments"]
        message["finish_reason"] = choice["finish_reason"]
        assert ("stop_reason" in choice) == (choice["finish_reason"] is not None)
    if calls:
        message["tool_calls"] = calls
    return message


def what_is_said(message: dict[str, Any]) -> dict[str, Any]:
    """What a whole or joined message says: reasoning, content, calls without their random ids."""
    found = {name: message[name] for name in ("reasoning", "content") if message.get(name) is not None}
    if "tool_calls" in message:
        assert all(call["id"] and call["type"] == "function" for call in message["tool_calls"])
        found["calls"] = [(call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]]
    return found


@pytest.fixture
def joined() -> Callable[..., dict[str, Any]]:
    return join_chunks


@pytest.fixture
def said() -> Callable[[dict[str, Any]], dict[str, Any]]:
    return what_is_said
