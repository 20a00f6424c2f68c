"""What surrounds the APIs: load, root path, HTTP metrics, the access log, fingerprints, priorities, statuses."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys

import pytest
from prometheus_client.parser import text_string_to_metric_families

from omni_engine.engine.errors import (
    EngineDeadError,
    EngineRestartError,
    EngineShutdownError,
    RequestFailedError,
    RequestRejectedError,
)
from omni_engine.scheduler.sampling_params import ValidationError

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = [{"role": "user", "content": "hi"}]
BODIES = {COMPLETIONS: {"prompt": "a"}, CHAT: {"messages": USER}}


async def http_counts(client):
    """(handler, method, status) -> requests."""
    async with client.session.get(client.address + "/metrics") as response:
        assert response.status == 200
        families = {family.name: family for family in text_string_to_metric_families(await response.text())}
    samples = families["http_requests"].samples if "http_requests" in families else []
    return {
        tuple(sample.labels[key] for key in ("handler", "method", "status")): sample.value
        for sample in samples
        if sample.name == "http_requests_total"
    }


@pytest.mark.parametrize("tracked", [True, False])
def test_load_counts_requests_in_progress_only_if_they_are_tracked(serve, tracked):
    async def scenario(client, engine):
        engine.hangs = True
        tasks = [
            asyncio.create_task(client.post(path, {**BODIES[path], "stream": stream}))
            for path in (COMPLETIONS, CHAT)
            for stream in (False, True)
        ]
        while len(engine.running) < 4:
            await asyncio.sleep(0.01)
        assert await client.get("/load") == (200, {"server_load": 4 if tracked else 0})
        for task in tasks:
            task.cancel()
        while engine.running:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.01)
        assert await client.get("/load") == (200, {"server_load": 0})

    serve(scenario, enable_server_load_tracking=tracked)


def test_a_root_path_may_come_with_the_request_or_be_stripped(serve):
    key = {"Authorization": "Bearer k"}

    async def scenario(client, _engine):
        for prefix in ("", "/api/v"):
            assert (await client.get(prefix + "/health"))[0] == 200
            assert (await client.post(prefix + COMPLETIONS, {"prompt": "a"}))[0] == 401
            assert (await client.post(prefix + COMPLETIONS, {"prompt": "a"}, headers=key))[0] == 200
            assert (await client.get(prefix + "/v1/models/tiny/model", headers=key))[0] == 200
        assert (await client.get("/other/health"))[0] == 401
        assert (await client.get("/other/health", headers=key))[0] == 404

    serve(scenario, root_path="/api/v", api_keys=("k",))


def test_http_requests_are_counted_by_route_and_made_up_addresses_make_no_series(serve):
    async def scenario(client, _engine):
        await client.post(COMPLETIONS, {"prompt": "a"})
        await client.post(COMPLETIONS, {})
        await client.events(COMPLETIONS, {"prompt": "a"})
        await client.get("/v1/models/a")
        await client.get("/v1/models/tiny/model")
        await client.get("/health")
        for number in range(3):
            await client.get(f"/made/up/{number}")
        assert await http_counts(client) == {
            (COMPLETIONS, "POST", "2xx"): 2,
            (COMPLETIONS, "POST", "4xx"): 1,
            ("/v1/models/{model}", "GET", "4xx"): 1,
            ("/v1/models/{model}", "GET", "2xx"): 1,
            ("none", "none", "4xx"): 3,
        }

    serve(scenario)


def test_a_client_that_left_counts_as_4xx(serve):
    async def scenario(client, engine):
        engine.hangs = True
        task = asyncio.create_task(client.post(COMPLETIONS, {"prompt": "a"}))
        while not engine.running:
            await asyncio.sleep(0.01)
        task.cancel()
        while engine.running:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.01)
        assert await http_counts(client) == {(COMPLETIONS, "POST", "4xx"): 1}

    serve(scenario)


@pytest.fixture
def access_lines(caplog):
    caplog.set_level(logging.INFO, logger="omni_engine.access")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "omni_engine.access"]


def test_the_access_log_has_a_line_per_request_but_for_the_paths_left_out(serve, access_lines):
    async def scenario(client, _engine):
        await client.post(COMPLETIONS, {"prompt": "a"})
        await client.get("/health")
        await client.get("/a%0Ab")

    serve(scenario, unlogged_paths=("/health",))
    assert access_lines() == [
        '127.0.0.1 - "POST /v1/completions HTTP/1.1" 200 OK',
        '127.0.0.1 - "GET /a%0Ab HTTP/1.1" 404 Not Found',
    ]


def test_the_access_log_can_be_off(serve, access_lines):
    async def scenario(client, _engine):
        await client.get("/health")

    serve(scenario, access_log=False)
    assert access_lines() == []


@pytest.mark.parametrize("enabled", [True, False])
def test_request_parameters_are_logged_when_enabled(serve, caplog, enabled):
    caplog.set_level(logging.INFO, logger="omni_engine.server.context")

    async def scenario(client, _engine):
        for path in (COMPLETIONS, CHAT):
            await client.post(path, {**BODIES[path], "top_k": 7, "request_id": "mine"})

    serve(scenario, enable_log_requests=enabled)
    lines = [record.getMessage() for record in caplog.records if record.name == "omni_engine.server.context"]
    assert len(lines) == (2 if enabled else 0)
    assert all("mine" in line and "top_k=7" in line for line in lines)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("usage", [True, False])
def test_the_fingerprint_is_in_whole_answers_and_in_the_last_chunk_only(serve, path, usage):
    body = {**BODIES[path], "n": 2}

    async def scenario(client, _engine):
        _, whole = await client.post(path, body)
        assert whole["system_fingerprint"] == "print"
        events = await client.events(path, {**body, "stream_options": {"include_usage": usage}})
        assert [event.get("system_fingerprint") for event in events[:-1]] == [None] * (len(events) - 2) + ["print"]

    serve(scenario, fingerprint="print")


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    ("headers", "fields", "priority"),
    [({}, {}, 0), ({}, {"priority": 3}, 3), ({"X-Vllm-Priority": "-5"}, {}, -5),
     ({"X-Vllm-Priority": "1"}, {"priority": 3}, 1)],
)  # fmt: skip
def test_the_priority_header_goes_before_the_body(serve, path, headers, fields, priority):
    async def scenario(client, engine):
        assert (await client.post(path, {**BODIES[path], **fields}, headers=headers))[0] == 200
        assert engine.priorities == [priority]

    serve(scenario)


STATUSES = [
    # method, path, body, status, type, param; the body goes as JSON unless it is bytes
    ("GET", "/nothing", None, 404, "Not Found", None),
    ("GET", COMPLETIONS, None, 405, "Method Not Allowed", None),
    ("DELETE", CHAT, None, 405, "Method Not Allowed", None),
    ("POST", "/v1/models", {}, 405, "Method Not Allowed", None),
    ("POST", "/health", {}, 405, "Method Not Allowed", None),
    ("GET", "/tokenize", None, 405, "Method Not Allowed", None),
    ("GET", "/v1/models/other", None, 404, "NotFoundError", "model"),
    ("POST", COMPLETIONS, {"prompt": "a", "model": "other"}, 404, "NotFoundError", "model"),
    ("POST", CHAT, {"messages": USER, "model": "other"}, 404, "NotFoundError", "model"),
    ("POST", COMPLETIONS, b"{", 400, "Bad Request", None),
    ("POST", CHAT, b"", 400, "Bad Request", None),
    ("POST", CHAT, {}, 400, "Bad Request", "body.messages"),
    ("POST", CHAT, {"messages": "hi"}, 400, "Bad Request", "body.messages"),
    ("POST", CHAT, {"messages": USER, "top_logprobs": 2}, 400, "Bad Request", "top_logprobs"),
    ("POST", CHAT, {"messages": USER, "tools": []}, 400, "Bad Request", "tools"),
    ("POST", CHAT, {"messages": USER, "tool_choice": "auto"}, 400, "Bad Request", "tool_choice"),
    ("POST", CHAT, {"messages": USER, "continue_final_message": True}, 400, "Bad Request", "continue_final_message"),
    ("POST", CHAT, {"messages": USER, "stream_options": {}}, 400, "Bad Request", "stream_options"),
    ("POST", CHAT, {"messages": USER, "temperature": 3}, 400, "BadRequestError", "temperature"),
    ("POST", COMPLETIONS, {"prompt": "a" * 100}, 400, "BadRequestError", "input_tokens"),
    ("POST", COMPLETIONS, {"prompt": "a", "use_beam_search": True}, 400, "BadRequestError", "use_beam_search"),
    ("POST", COMPLETIONS, {"prompt_embeds": "AAAA"}, 400, "BadRequestError", "prompt_embeds"),
    ("POST", COMPLETIONS, {"prompt": "a", "suffix": "b"}, 400, "BadRequestError", "suffix"),
    ("POST", COMPLETIONS, {"prompt": "a", "min_tokens": 20}, 400, "BadRequestError", "min_tokens"),
]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "kind", "param"), STATUSES, ids=lambda value: str(value)[:50]
)
def test_each_failure_has_its_status_type_and_parameter(serve, method, path, body, status, kind, param):
    data = body if isinstance(body, bytes) else json.dumps(body)

    async def scenario(client, _engine):
        headers = {"Content-Type": "application/json"}
        async with client.session.request(method, client.address + path, data=data, headers=headers) as response:
            answer = await response.json()
            assert response.status == status, answer
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        assert (answer["error"]["code"], answer["error"]["type"]) == (status, kind)
        assert answer["error"]["param"] == param

    serve(scenario)


@pytest.mark.parametrize("text", ["high", "1.5", str(2**70)])
def test_a_priority_header_that_is_no_integer_is_refused(serve, text):
    async def scenario(client, _engine):
        status, answer = await client.post(COMPLETIONS, {"prompt": "a"}, headers={"X-Vllm-Priority": text})
        assert (status, answer["error"]["param"]) == (400, "priority")

    serve(scenario)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (ValidationError("no", parameter="prompt"), 400, "BadRequestError"),
        (RequestRejectedError("too many"), 503, "Service Unavailable"),
        (EngineDeadError("gone"), 503, "ServiceUnavailableError"),
        (EngineRestartError("again"), 503, "ServiceUnavailableError"),
        (EngineShutdownError("over"), 503, "ServiceUnavailableError"),
        (RequestFailedError("/secret/path"), 500, "InternalServerError"),
        (KeyError("/secret/path"), 500, "InternalServerError"),
    ],
)
def test_what_fails_before_the_first_token_has_its_status_streamed_or_not(serve, error, status, kind, stream):
    async def scenario(client, engine):
        engine.failure = error
        got, answer = await client.post(COMPLETIONS, {"prompt": "a", "stream": stream})
        assert (got, answer["error"]["code"], answer["error"]["type"]) == (status, status, kind)
        assert "secret" not in json.dumps(answer)

    serve(scenario)


def test_any_model_name_goes_where_names_are_not_checked():
    script = (
        "from omni_engine.server.context import ServerContext, ServerSettings\n"
        "ServerContext(None, ServerSettings(model='m')).check_model('other')\n"
    )
    environment = {"VLLM_SKIP_MODEL_NAME_VALIDATION": "1"}
    assert subprocess.run([sys.executable, "-c", script], env=environment).returncode == 0
    assert subprocess.run([sys.executable, "-c", script], env={}, stderr=subprocess.DEVNULL).returncode == 1
