"""A fake engine at the boundary of server/, and a client that talks to the real application over a socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import ClientSession, web
from prometheus_client import CollectorRegistry

from omni_engine.engine.outputs import CompletionOutput, Logprob, RequestOutput, RequestStats
from omni_engine.scheduler.sampling_params import RequestOutputKind, SamplingParams, ValidationError
from omni_engine.server.app import build_app
from omni_engine.server.settings import ServerSettings

MODEL = "tiny/model"


class FakeTokenizer:
    """One token per character; a "^" (token 1) is the special token put before a text."""

    max_token_id = 0x10FFFF

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [1] * add_special_tokens + [ord(char) for char in text]

    def id_to_token(self, token_id: int) -> str:
        return self.token_string(token_id)

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        return "".join("^" if i == 1 else chr(i) for i in ids if not (skip_special_tokens and i == 1))

    def token_string(self, token_id: int) -> str:
        return self.decode([token_id], skip_special_tokens=False)


class FakeEngine:
    """Answers every request with `answer`, one character per token and step."""

    def __init__(self) -> None:
        self.answer = "hello"
        self.failure: Exception | None = None  # raised before the first output
        self.failure_after: tuple[int, Exception] | None = None  # raised after so many outputs
        self.hangs = False  # after the first output
        self.pause = 0.0  # seconds before each output
        self.stats: RequestStats | None = None
        self.is_ready = True
        self.errored = False
        self.dead_error: BaseException | None = None
        self.max_model_len = 64
        self.model_config = SimpleNamespace(vocab_size=300)
        self.metrics_registry = CollectorRegistry()
        self.tokenizer = FakeTokenizer()
        self.default_sampling_params: dict[str, Any] = {}
        self.ready = asyncio.Event()
        self.prompts: list[Any] = []
        self.params: list[SamplingParams] = []
        self.request_ids: list[str] = []
        self.priorities: list[int] = []
        self.running: set[str] = set()
        self.closed_early: list[str] = []
        self.rendered: list[tuple[Any, dict[str, Any]]] = []

    async def wait_ready(self) -> None:
        if not self.is_ready:
            await self.ready.wait()

    async def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    async def render_chat(self, messages: Any, **options: Any) -> str:
        self.rendered.append((messages, options))
        if any(message["role"] == "refused" for message in messages):
            raise ValueError("the template knows no role: refused")
        return "".join(f"<{message['role']}>{message['content']}" for message in messages)

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
        length = min(params.max_tokens or 10**9, len(self.answer))
        prompt_logprobs = None
        if params.prompt_logprobs is not None:
            prompt_logprobs = [None, *(entry(i, params.prompt_logprobs) for i in token_ids[1:])]
        step = length if params.output_kind == RequestOutputKind.FINAL_ONLY else 1
        outputs = []
        for end in range(step, length + 1, step):
            done = end == length
            completions = []
            for index in range(params.n):
                ids = [ord(char) for char in self.answer[end - step : end]]
                logprobs = None if params.logprobs is None else [entry(i, params.logprobs) for i in ids]
                completions.append(
                    CompletionOutput(
                        index, self.answer[end - step : end], ids, 0.0, logprobs,
                        ("length" if length < len(self.answer) else "stop") if done else None,
                    )
                )  # fmt: skip
            outputs.append(
                RequestOutput(
                    request_id, prompt.get("prompt"), token_ids, prompt_logprobs if end == step else None, completions,
                    done, self.stats, num_cached_tokens=2,
                )
            )  # fmt: skip
        return outputs


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

    def run(scenario: Scenario, **settings: Any) -> None:
        async def main() -> None:
            engine = FakeEngine()
            app = build_app(engine, ServerSettings(**{"model": MODEL, **settings}))  # type: ignore[arg-type]
            runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            port = runner.addresses[0][1]
            async with ClientSession() as session:
                await asyncio.wait_for(scenario(Client(session, f"http://127.0.0.1:{port}"), engine), 20)
            await runner.cleanup()

        asyncio.run(main())

    return run


@pytest.fixture
def fake_engine() -> FakeEngine:
    return FakeEngine()
