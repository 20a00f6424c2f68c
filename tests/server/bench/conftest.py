"""A small OpenAI server that misbehaves on request, and a tokenizer of words."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading

import numpy as np
import pytest
from aiohttp import web

MODEL = "owner/tiny"


class FakeServer:
    """Answers in a thread of its own. `behaviours` are taken by the requests in turn; without one left they go well.

    fail: 503. refuse: 400. error_event: an error after a chunk. disconnect: the connection is cut after a chunk.
    no_end: the stream ends after a chunk. hang: nothing comes after a chunk. silent: nothing comes at all. empty: no
    chunk. nonsense: an event of another form. no_usage: all goes well, but no token counts are told.
    """

    def __init__(self):
        self.behaviours = []
        self.default_behaviour = "good"
        self.owner = "vllm"
        self.tokenizes = True
        self.seconds_before = 0.0
        self.seconds_between = 0.0
        self.tokens_per_chunk = 1
        self.sends_role_chunk = True
        self.starts_after = 0.0
        self.bodies = []
        self.headers = []
        self.arrivals = []
        self.most_open = 0
        self.num_open = 0
        self.url = ""
        self.port = 0
        self.drafts = None  # counters of speculation, each request adding to them; None: without it
        self.metrics_status = 200
        self.metrics_headers = []
        self._words = {}

    def app(self):
        app = web.Application(client_max_size=2**24)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_post("/v1/completions", self.complete)
        app.router.add_post("/v1/chat/completions", self.complete)
        app.router.add_post("/tokenize", self.tokenize)
        app.router.add_post("/detokenize", self.detokenize)
        return app

    async def models(self, request):
        self.headers.append(request.headers.copy())  # keeps ignoring case
        return web.json_response({"object": "list", "data": [{"id": MODEL, "owned_by": self.owner, "root": None}]})

    async def metrics(self, request):
        self.metrics_headers.append(request.headers.copy())
        text = "# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running 0.0\n"
        for name, value in (self.drafts or {}).items():
            text += f"vllm:spec_decode_num_{name} {value}.0\n"
        return web.Response(text=text, status=self.metrics_status)

    async def tokenize(self, request):
        if not self.tokenizes:
            raise web.HTTPNotFound
        body = await request.json()
        ids = [self._words.setdefault(word, len(self._words)) for word in body["prompt"].split()]
        return web.json_response({"tokens": ids, "count": len(ids)})

    async def detokenize(self, request):
        words = list(self._words)
        body = await request.json()
        return web.json_response({"prompt": " ".join(words[i] for i in body["tokens"])})

    async def complete(self, request):
        loop = asyncio.get_running_loop()
        self.arrivals.append(loop.time())
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(request.headers.copy())  # keeps ignoring case
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            behaviour = self.behaviours.pop(0) if self.behaviours else self.default_behaviour
            return await self.answer(request, body, behaviour)
        finally:
            self.num_open -= 1

    async def answer(self, request, body, behaviour):
        if behaviour == "fail":
            return web.json_response({"error": {"message": "overloaded\nnow", "code": 503}}, status=503)
        if behaviour == "refuse":
            return web.Response(text="no such thing", status=400)
        if behaviour == "silent":
            await asyncio.sleep(60)
        chat = "messages" in body
        number = body["max_completion_tokens"] if chat else body["max_tokens"]
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)

        async def send(data):
            text = data if isinstance(data, str) else json.dumps(data)
            await response.write(f"data: {text}\n\n".encode())

        def chunk(text, reason=None):
            content = {"delta": {"content": text}} if chat else {"text": text}
            return {"choices": [{"index": 0, **content, "finish_reason": reason}]}

        await response.write(b": keep-alive\n\n")
        await asyncio.sleep(self.seconds_before)
        if behaviour == "empty":
            await send("[DONE]")
            return response
        if behaviour == "nonsense":
            await send([1, 2])
            return response
        if chat and self.sends_role_chunk:
            await send({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        if behaviour not in ("good", "no_usage"):
            await send(chunk("x"))
        if behaviour == "error_event":
            await send({"error": {"message": "the engine has stopped"}})
            return response
        if behaviour == "disconnect":
            await asyncio.sleep(0.05)
            request.transport.abort()
            return response
        if behaviour == "no_end":
            return response
        if behaviour == "hang":
            await asyncio.sleep(60)
        sent = 0
        while sent < number:
            if sent:
                await asyncio.sleep(self.seconds_between)
            sent += self.tokens_per_chunk
            await send(chunk("w " * self.tokens_per_chunk, "length" if sent >= number else None))
        if self.drafts is not None:
            for name, value in (
                ("drafts_total", 2), ("draft_tokens_total", 6), ("accepted_tokens_total", 3),
                ('accepted_tokens_per_pos_total{position="0"}', 2), ('accepted_tokens_per_pos_total{position="1"}', 1),
            ):  # fmt: skip
                self.drafts[name] = self.drafts.get(name, 0) + value
        if behaviour != "no_usage":
            prompt = body.get("prompt")
            counted = len(prompt) if isinstance(prompt, list) else 77
            usage = {"prompt_tokens": counted, "completion_tokens": number, "total_tokens": counted + number}
            await send({"choices": [], "usage": usage})
        await send("[DONE]")
        return response


@pytest.fixture
def server():
    fake = FakeServer()
    loop = asyncio.new_event_loop()
    ready = threading.Event()
    stop = asyncio.Event()

    async def main():
        runner = web.AppRunner(fake.app(), handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        fake.port = runner.addresses[0][1]
        fake.url = f"http://127.0.0.1:{fake.port}"
        ready.set()
        await stop.wait()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: loop.run_until_complete(main()), daemon=True)
    thread.start()
    assert ready.wait(10)
    yield fake
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(stop.set)
    thread.join(10)
    loop.close()


class WordTokens:
    """Ids 2 to 99 are the words w2 to w99; a text begins with the special token 1. Words of two digits next to one
    of the same last digit become one token, so that texts may have other lengths than the ids they came from."""

    name = "words"

    def __init__(self, merges=False):
        self.merges = merges

    def ids(self):
        return np.arange(2, 100, dtype=np.int32)

    def words(self):
        return self.ids()

    def encode(self, text, *, add_special_tokens):
        ids = [int(word[1:]) for word in text.split()]
        if self.merges:
            merged = []
            for i in ids:
                if merged and merged[-1] % 10 == i % 10:
                    merged[-1] = 100 + i % 10
                else:
                    merged.append(i)
            ids = merged
        return [1] * add_special_tokens + ids

    def decode(self, ids):
        return "".join(f" w{i}" for i in ids)


@pytest.fixture
def tokens():
    return WordTokens()


@pytest.fixture
def merging_tokens():
    return WordTokens(merges=True)
