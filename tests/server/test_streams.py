"""What a stream sends beside its chunks: comments while it is quiet, and at its end the times of the request."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from omni_engine.engine.outputs import RequestStats
from omni_engine.server.request_metrics import request_metrics

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BODIES = {COMPLETIONS: {"prompt": "a"}, CHAT: {"messages": [{"role": "user", "content": "hi"}]}}
PATHS = pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
KEEP_ALIVE = ": keep-alive"
STATS = RequestStats(
    arrival_time=1e9, queued_ts=10.0, scheduled_ts=10.25, first_token_ts=10.5, last_token_ts=12.5,
    num_generation_tokens=5,
)  # fmt: skip


async def blocks(client, path, **body):
    """Status and the blocks of the stream, as text."""
    async with client.session.post(client.address + path, json={"stream": True, **BODIES[path], **body}) as response:
        return response.status, (await response.text()).split("\n\n")[:-1]


@PATHS
def test_a_quiet_stream_gets_a_comment_per_interval_before_and_between_its_chunks(serve, path):
    async def scenario(client, engine):
        engine.pause, engine.answer = 0.25, "ab"
        status, said = await blocks(client, path)
        chunks = [block for block in said if block != KEEP_ALIVE]
        assert status == 200
        assert said[0] == KEEP_ALIVE
        assert 2 <= said.count(KEEP_ALIVE) <= 6
        assert all(block.startswith("data: {") for block in chunks[:-1])
        assert chunks[-1] == "data: [DONE]"

    serve(scenario, keep_alive_seconds=0.1)


@pytest.mark.parametrize("seconds", [0.0, 5.0])
def test_a_stream_that_is_not_quiet_for_so_long_gets_none(serve, seconds):
    async def scenario(client, engine):
        engine.pause = 0.02
        assert KEEP_ALIVE not in (await blocks(client, COMPLETIONS))[1]

    serve(scenario, keep_alive_seconds=seconds)


def test_what_fails_within_the_first_interval_still_has_its_status(serve):
    async def scenario(client, engine):
        engine.failure = RuntimeError("broken")
        assert (await client.post(COMPLETIONS, {"prompt": "a", "stream": True}))[0] == 500

    serve(scenario, keep_alive_seconds=5)


def test_what_fails_after_a_comment_is_an_error_event(serve):
    async def scenario(client, engine):
        engine.pause, engine.failure_after = 0.2, (1, RuntimeError("broken"))
        status, said = await blocks(client, COMPLETIONS)
        assert (status, said[0], said[-1]) == (200, KEEP_ALIVE, "data: [DONE]")
        assert '"code":500' in said[-2]

    serve(scenario, keep_alive_seconds=0.05)


def test_a_client_that_leaves_a_quiet_stream_ends_its_request(serve):
    async def scenario(client, engine):
        engine.hangs = True
        async with client.session.post(client.address + COMPLETIONS, json={"prompt": "a", "stream": True}) as response:
            while await response.content.readline() != KEEP_ALIVE.encode() + b"\n":
                pass
        while engine.running:
            await asyncio.sleep(0.01)
        assert len(engine.closed_early) == 1

    serve(scenario, keep_alive_seconds=0.05)


def test_times_are_of_the_core_and_of_the_tokens_after_the_first():
    metrics = request_metrics(STATS, 5)
    assert metrics is not None
    assert (metrics.queue_time_ms, metrics.time_to_first_token_ms, metrics.generation_time_ms) == (250, 500, 2000)
    assert (metrics.mean_itl_ms, metrics.tokens_per_second) == (500, 2)


def test_one_token_has_no_time_between_tokens_and_none_has_no_times():
    metrics = request_metrics(RequestStats(queued_ts=1.0, scheduled_ts=1.0, first_token_ts=2.0, last_token_ts=2.0), 1)
    assert metrics is not None
    assert (metrics.generation_time_ms, metrics.mean_itl_ms, metrics.tokens_per_second) == (0, None, None)
    assert request_metrics(RequestStats(), 0) is None
    assert request_metrics(None, 3) is None


@PATHS
def test_the_times_of_a_request_are_in_its_answer_and_in_the_usage_chunk(serve, path):
    async def scenario(client, engine):
        engine.request_stats = STATS
        _, whole = await client.post(path, BODIES[path])
        assert whole["metrics"] == {
            "time_to_first_token_ms": 500, "generation_time_ms": 2000, "queue_time_ms": 250, "mean_itl_ms": 500,
            "tokens_per_second": 2,
        }  # fmt: skip
        events = await client.events(path, {**BODIES[path], "stream_options": {"include_usage": True}})
        assert events[-2]["metrics"] == whole["metrics"]
        assert all("metrics" not in event for event in events[:-2])

    serve(scenario, enable_per_request_metrics=True)


@PATHS
def test_the_drafts_of_a_request_are_in_its_answer_where_there_were_any(serve, path):
    async def scenario(client, engine):
        engine.request_stats = dataclasses.replace(STATS, num_draft_tokens=9, num_accepted_tokens=0)
        _, whole = await client.post(path, BODIES[path])
        assert (whole["metrics"]["num_draft_tokens"], whole["metrics"]["num_accepted_tokens"]) == (9, 0)
        engine.request_stats = STATS
        _, whole = await client.post(path, BODIES[path])
        assert not any("draft" in name or "accepted" in name for name in whole["metrics"])

    serve(scenario, enable_per_request_metrics=True)


@PATHS
def test_several_sequences_have_no_times_of_their_own(serve, path):
    async def scenario(client, engine):
        engine.request_stats = STATS
        for body in [{"n": 2}, {"prompt": ["a", "b"]}] if path == COMPLETIONS else [{"n": 2}]:
            assert (await client.post(path, {**BODIES[path], **body}))[1]["metrics"] is None
            events = await client.events(path, {**BODIES[path], **body, "stream_options": {"include_usage": True}})
            assert all("metrics" not in event for event in events[:-1])

    serve(scenario, enable_per_request_metrics=True)


@PATHS
def test_times_are_told_only_if_the_operator_wants_it(serve, path):
    async def scenario(client, engine):
        engine.request_stats = STATS
        assert (await client.post(path, BODIES[path]))[1]["metrics"] is None

    serve(scenario)
