"""What surrounds the two APIs: models, health, loading, API keys, clients that go away."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import ClientTimeout

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


async def wait_until(condition):
    for _ in range(200):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not happen within 2 s")


def test_models_lists_a_card_per_served_name(serve):
    async def scenario(client, _engine):
        status, body = await client.get("/v1/models")
        assert (status, body["object"]) == (200, "list")
        assert [card["id"] for card in body["data"]] == ["a/b", "c"]
        card = body["data"][0]
        assert set(card) == {"id", "object", "created", "owned_by", "root", "parent", "max_model_len", "permission"}
        assert (card["object"], card["owned_by"], card["root"]) == ("model", "vllm", "tiny/model")
        assert (card["parent"], card["max_model_len"]) == (None, 64)
        assert card["permission"][0]["object"] == "model_permission"

    serve(scenario, served_model_names=("a/b", "c"))


def test_one_model_is_shown_by_its_name_even_with_a_slash(serve):
    async def scenario(client, _engine):
        status, card = await client.get("/v1/models/tiny/model")
        assert (status, card["id"]) == (200, "tiny/model")
        status, body = await client.get("/v1/models/other")
        assert (status, body["error"]["type"]) == (404, "NotFoundError")

    serve(scenario)


def test_health_and_ping_follow_the_engine(serve):
    async def scenario(client, engine):
        assert await client.get("/health") == (200, None)
        assert await client.get("/ping") == (200, None)
        async with client.session.post(client.address + "/ping") as response:
            assert response.status == 200
        engine.is_ready = False
        assert await client.get("/health") == (503, {"status": "loading"})
        engine.is_ready = engine.errored = True
        assert (await client.get("/health"))[0] == 503

    serve(scenario)


def test_version_is_the_packages(serve):
    from omni_engine import __version__

    async def scenario(client, _engine):
        assert await client.get("/version") == (200, {"version": __version__})

    serve(scenario)


def test_requests_wait_while_the_model_loads_but_wrong_ones_are_answered(serve):
    async def scenario(client, engine):
        engine.is_ready = False
        waiting = asyncio.create_task(client.post(COMPLETIONS, {"prompt": "a"}))
        status, _body = await client.post(COMPLETIONS, {"prompt": 1})
        assert status == 400
        await asyncio.sleep(0.05)
        assert not waiting.done()
        engine.is_ready = True
        engine.ready.set()
        assert (await waiting)[0] == 200

    serve(scenario)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": "one"}, 401),
        ({"Authorization": "Basic one"}, 401),
        ({"x-api-key": "wrong"}, 401),
        ({"Authorization": "Bearer one"}, 200),
        ({"Authorization": "Bearer two"}, 200),
        ({"x-api-key": "two"}, 200),
        ({"Authorization": "Bearer wrong", "x-api-key": "two"}, 200),
    ],
)
@pytest.mark.parametrize("guards_as_vllm", [False, True])
def test_api_keys_guard_the_routes(serve, headers, status, guards_as_vllm):
    if guards_as_vllm and "x-api-key" in headers:
        status = 401

    async def scenario(client, _engine):
        answer = await client.post(COMPLETIONS, {"prompt": "a"}, headers=headers)
        assert answer[0] == status
        if status == 401 and guards_as_vllm:
            assert answer[1] == {"error": "Unauthorized"}
        elif status == 401:
            assert (answer[1]["error"]["type"], answer[1]["error"]["code"]) == ("Unauthorized", 401)
        assert (await client.get("/v1/models", headers=headers))[0] == status
        assert (await client.get("/v1/nothing", headers=headers))[0] == (404 if status == 200 else 401)
        assert (await client.get("/health"))[0] == (await client.get("/ping"))[0] == 200
        for path in ("/version", "/load", "/nothing"):
            found = 404 if path == "/nothing" else 200
            assert (await client.get(path, headers=headers))[0] == (found if guards_as_vllm or status == 200 else 401)

    serve(scenario, api_keys=("one", "two"), guards_as_vllm=guards_as_vllm)


def test_request_id_headers_are_sent_when_enabled(serve):
    async def scenario(client, _engine):
        async with client.session.get(client.address + "/health") as response:
            assert len(response.headers["X-Request-Id"]) == 32
        async with client.session.get(client.address + "/health", headers={"X-Request-Id": "mine"}) as response:
            assert response.headers["X-Request-Id"] == "mine"

    serve(scenario, enable_request_id_headers=True)


@pytest.mark.parametrize(("path", "prompts"), [(COMPLETIONS, 1), (COMPLETIONS, 3), (CHAT, 1)])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_disconnects_ends_its_requests(serve, path, stream, prompts):
    body = {"prompt": ["a"] * prompts} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "a"}]}

    async def scenario(client, engine):
        engine.hangs = True
        with pytest.raises(asyncio.TimeoutError):
            await client.post(path, {**body, "stream": stream}, timeout=ClientTimeout(total=0.2))
        assert len(engine.request_ids) == prompts
        await wait_until(lambda: not engine.running)
        assert sorted(engine.closed_early) == sorted(engine.request_ids)

    serve(scenario)


def test_200_clients_that_give_up_leave_nothing_running(serve):
    async def scenario(client, engine):
        engine.hangs = True
        body = {"prompt": "a", "stream": True}

        async def give_up(number):
            with pytest.raises(asyncio.TimeoutError):
                timeout = ClientTimeout(total=0.5 + number / 1000)
                await client.post(COMPLETIONS, {**body, "stream": bool(number % 2)}, timeout=timeout)

        await asyncio.gather(*(give_up(number) for number in range(200)))
        await wait_until(lambda: not engine.running)
        engine.hangs = False
        assert (await client.post(COMPLETIONS, {"prompt": "a"}))[0] == 200

    serve(scenario)
