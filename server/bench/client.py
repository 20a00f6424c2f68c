"""A streaming client of any OpenAI server, which times what it receives."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec
import numpy as np

from .prompts import BenchRequest

_LONGEST_ERROR = 300


@dataclass
class RequestResult:
    """What became of one request. Times are in seconds, `start_time` on the clock of time.perf_counter.

    As in vLLM, the first chunk with choices gives `ttft`, every later one a sample of `itl` (several tokens in one
    chunk are one sample), and the last one `latency`. `output_tokens` is None if the server has not told it.
    """

    prompt_len: int
    success: bool = False
    error: str = ""
    output_tokens: int | None = None
    start_time: float = 0.0
    ttft: float = 0.0
    itl: list[float] = field(default_factory=list)
    latency: float = 0.0
    queue_time: float = 0.0  # waited for one of --max-concurrency
    generated_text: str = ""


@dataclass(frozen=True)
class ClientOptions:
    """What every request carries beside its prompt. A null in `extra_body` takes a field out."""

    url: str
    model: str
    chat: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    ignore_eos: bool = False
    logprobs: int | None = None
    extra_body: Mapping[str, Any] = field(default_factory=dict)


class Client:
    """Sends requests over one session. `last_activity` is when anything was last received, by time.perf_counter."""

    def __init__(self, session: aiohttp.ClientSession, options: ClientOptions) -> None:
        self.options = options
        self.last_activity = time.perf_counter()
        self._session = session

    async def complete(self, request: BenchRequest, request_id: str, result: RequestResult) -> None:
        """Send one request and fill in `result`; whatever goes wrong is told in it and not raised."""
        headers = {**self.options.headers, "Content-Type": "application/json", "X-Request-Id": request_id}
        body = msgspec.json.encode(self.body(request))
        result.start_time = time.perf_counter()
        try:
            async with self._session.post(self.options.url, data=body, headers=headers) as response:
                self.last_activity = time.perf_counter()
                if response.status != 200:
                    result.error = f"HTTP {response.status}: {_reason(await response.text(), response.reason)}"
                else:
                    await self._read(response, result)
        except asyncio.TimeoutError:
            result.error = "took longer than --request-timeout"
        except (aiohttp.ClientError, OSError, ValueError) as error:
            result.error = f"{type(error).__name__}: {error}"
        except (LookupError, TypeError, AttributeError) as error:
            result.error = f"the answer is not that of an OpenAI server ({type(error).__name__}: {error})"
        self.last_activity = time.perf_counter()
        result.success = not result.error

    def body(self, request: BenchRequest) -> dict[str, Any]:
        """The JSON body of a request."""
        options = self.options
        body: dict[str, Any] = {"model": options.model, "stream": True, "stream_options": {"include_usage": True}}
        prompt = request.prompt
        if options.chat:
            body["messages"] = [{"role": "user", "content": prompt}]
            body["max_completion_tokens"] = request.output_len
            if options.logprobs is not None:
                body |= {"logprobs": True, "top_logprobs": options.logprobs}
        else:
            body["prompt"] = prompt.tolist() if isinstance(prompt, np.ndarray) else prompt
            body["max_tokens"] = request.output_len
            if options.logprobs is not None:
                body["logprobs"] = options.logprobs
        # As vLLM's client does: a generation_config.json of the server must not change what is measured.
        body["repetition_penalty"] = 1.0
        if options.ignore_eos:
            body["ignore_eos"] = True
        body |= {**options.sampling, **options.extra_body}
        return {name: value for name, value in body.items() if value is not None}

    async def _read(self, response: aiohttp.ClientResponse, result: RequestResult) -> None:
        ended = done = False
        texts: list[str] = []
        last = 0.0
        try:
            async for data in self._events(response):
                if data == b"[DONE]":
                    ended = done = True
                    continue  # to the end of the body, so that the connection can be used again
                now = time.perf_counter()
                event = msgspec.json.decode(data)
                if event.get("error"):
                    result.error = f"error in the stream: {_message(event['error'])}"
                    return
                if choices := event.get("choices"):
                    if last:
                        result.itl.append(now - last)
                    else:
                        result.ttft = now - result.start_time
                    last = now
                    result.latency = now - result.start_time
                    texts.append(self._text(choices[0]))
                    ended = ended or choices[0].get("finish_reason") is not None
                if usage := event.get("usage"):
                    result.output_tokens = usage.get("completion_tokens")
                    result.prompt_len = usage.get("prompt_tokens") or result.prompt_len
        except aiohttp.ClientError:
            if not done:
                raise
        finally:
            result.generated_text = "".join(texts)
        if not last:
            result.error = "the stream ended without a single chunk"
        elif not ended:
            result.error = "the stream broke off: neither a finish_reason nor [DONE] came"

    async def _events(self, response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        """The data of each server-sent event; comments (keep-alive) are left out."""
        rest = b""
        async for piece in response.content.iter_any():
            self.last_activity = time.perf_counter()
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                if line.startswith(b"data:"):
                    yield line[5:].strip()
        if rest.startswith(b"data:"):
            yield rest[5:].strip()

    def _text(self, choice: dict[str, Any]) -> str:
        if not self.options.chat:
            return choice.get("text") or ""
        delta = choice.get("delta") or {}
        return delta.get("content") or ""


def _reason(text: str, phrase: str | None) -> str:
    """What an error response says: the message of an OpenAI error body, or the body itself."""
    try:
        error = msgspec.json.decode(text.encode())["error"]
    except (ValueError, KeyError, TypeError):
        error = text or phrase or ""
    return _message(error)


def _message(error: Any) -> str:
    text = str(error["message"]) if isinstance(error, dict) and "message" in error else str(error)
    return " ".join(text.split())[:_LONGEST_ERROR]
