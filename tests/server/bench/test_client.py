"""The client: what it sends, what it times, and how every failure is told."""

from __future__ import annotations

import asyncio
import time

import aiohttp
import numpy as np
import pytest
from tqdm import tqdm

from omni_engine.server.bench.client import Client, ClientOptions, RequestResult
from omni_engine.server.bench.prompts import BenchRequest
from omni_engine.server.bench.traffic import TrafficRun

REQUEST = BenchRequest(np.array([5, 6, 7], dtype=np.int32), 3, 4)
TEXT = BenchRequest("a b", 2, 4)


def send(server, number=1, *, request=REQUEST, times=None, timeout=20.0, run_options=None, **options):
    """Results of `number` requests, and how long they took."""
    chat = options.get("chat", False)
    url = f"{server.url}/v1/{'chat/' if chat else ''}completions"

    async def main():
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=timeout)) as session:
            client = Client(session, ClientOptions(url, "m", **options))
            run = TrafficRun(client, **(run_options or {}))
            with tqdm(disable=True) as bar:
                return await run.run([request] * number, times or [0.0] * number, bar)

    return asyncio.run(main())


def one(server, **options):
    return send(server, **options)[0][0]


def test_a_completion_is_asked_for_as_vllm_does(server):
    one(server, ignore_eos=True, logprobs=2, sampling={"temperature": 0.5}, headers={"X-Team": "a"})
    assert server.bodies == [
        {
            "model": "m", "prompt": [5, 6, 7], "max_tokens": 4, "stream": True,
            "stream_options": {"include_usage": True}, "repetition_penalty": 1.0, "ignore_eos": True, "logprobs": 2,
            "temperature": 0.5,
        }
    ]  # fmt: skip
    assert server.headers[0]["X-Team"] == "a"
    assert server.headers[0]["X-Request-Id"] == "bench-0"


def test_a_chat_completion_is_asked_for_as_vllm_does(server):
    result = one(server, request=TEXT, chat=True, logprobs=2)
    assert server.bodies == [
        {
            "model": "m", "messages": [{"role": "user", "content": "a b"}], "max_completion_tokens": 4, "stream": True,
            "stream_options": {"include_usage": True}, "repetition_penalty": 1.0, "logprobs": True, "top_logprobs": 2,
        }
    ]  # fmt: skip
    assert (result.success, result.generated_text) == (True, "w w w w ")


def test_the_extra_body_goes_first_and_null_takes_a_field_out(server):
    one(server, sampling={"temperature": 0.5}, extra_body={"temperature": 1, "repetition_penalty": None, "x": [1]})
    body = server.bodies[0]
    assert (body["temperature"], body["x"]) == (1, [1])
    assert "repetition_penalty" not in body


def test_token_counts_are_the_servers(server):
    result = one(server, request=TEXT)
    assert (result.success, result.error, result.output_tokens, result.prompt_len) == (True, "", 4, 77)


def test_without_usage_nobody_has_told_the_tokens(server):
    server.behaviours = ["no_usage"]
    result = one(server, request=TEXT)
    assert (result.success, result.output_tokens, result.prompt_len) == (True, None, 2)


def test_times_are_those_of_the_chunks(server):
    server.seconds_before, server.seconds_between = 0.2, 0.1
    result = one(server)
    assert result.ttft == pytest.approx(0.2, abs=0.08)
    assert len(result.itl) == 3
    assert result.itl == pytest.approx([0.1] * 3, abs=0.06)
    assert result.latency == pytest.approx(result.ttft + sum(result.itl))


def test_several_tokens_in_a_chunk_are_one_interval(server):
    server.tokens_per_chunk = 2
    result = one(server)
    assert (len(result.itl), result.output_tokens) == (1, 4)


def test_the_role_chunk_of_a_chat_is_its_first(server):
    server.seconds_between = 0.05
    assert len(one(server, request=TEXT, chat=True).itl) == 4
    server.sends_role_chunk = False
    assert len(one(server, request=TEXT, chat=True).itl) == 3


@pytest.mark.parametrize(
    ("behaviour", "error"),
    [
        ("fail", "HTTP 503: overloaded now"),
        ("refuse", "HTTP 400: no such thing"),
        ("error_event", "error in the stream: the engine has stopped"),
        ("disconnect", "Client"),
        ("no_end", "broke off"),
        ("empty", "without a single chunk"),
        ("nonsense", "not that of an OpenAI server"),
    ],
)
def test_a_failure_is_told_and_harms_no_other_request(server, behaviour, error):
    server.behaviours = [behaviour]
    results, _ = send(server, 3, run_options={"max_concurrency": 1})
    assert [result.success for result in results] == [False, True, True]
    assert error in results[0].error
    assert [result.error for result in results[1:]] == ["", ""]


def test_no_server_is_a_failure_like_others(server):
    results, _ = send(type(server)(), 2)  # has no address
    assert all("Error" in result.error or "URL" in result.error for result in results)


@pytest.mark.parametrize("behaviour", ["hang", "silent"])
def test_a_request_that_takes_too_long_fails(server, behaviour):
    server.behaviours = [behaviour]
    start = time.monotonic()
    assert one(server, timeout=0.5).error == "took longer than --request-timeout"
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("behaviour", ["hang", "silent"])
def test_a_server_that_says_nothing_more_is_given_up(server, behaviour):
    server.behaviours = ["good", behaviour, behaviour]
    results, duration = send(server, 5, run_options={"stall_timeout": 0.4, "max_concurrency": 2})
    assert [result.success for result in results] == [True, False, False, False, False]
    errors = [result.error for result in results[1:]]
    assert errors[:2] == ["the server sent nothing for 0.4 s (--stall-timeout)"] * 2
    assert errors[2:] == ["not sent: the server had stopped answering"] * 2
    assert duration < 5


def test_a_slow_stream_is_not_given_up(server):
    server.seconds_between = 0.3
    assert one(server, run_options={"stall_timeout": 0.6}).success


def test_requests_wait_for_a_free_place_and_the_wait_is_not_latency(server):
    server.seconds_before = 0.2
    results, duration = send(server, 4, run_options={"max_concurrency": 2})
    assert server.most_open == 2
    assert duration == pytest.approx(0.4, abs=0.25)
    assert [result.queue_time > 0.15 for result in results] == [False, False, True, True]
    assert all(result.latency < 0.39 for result in results)


def test_requests_are_sent_at_their_times(server):
    send(server, 3, times=[0.0, 0.3, 0.5])
    gaps = np.diff(server.arrivals)
    assert gaps.tolist() == pytest.approx([0.3, 0.2], abs=0.1)


def test_results_are_in_the_order_of_the_requests(server):
    server.behaviours = ["silent", "fail", "good"]
    results, _ = send(server, 3, times=[0.0, 0.1, 0.2], timeout=1.0)
    assert [result.success for result in results] == [False, False, True]
    assert "503" in results[1].error


def test_a_connection_is_used_again(server):
    async def main():
        opened = []
        trace = aiohttp.TraceConfig()

        async def note(*_):
            opened.append(1)

        trace.on_connection_create_end.append(note)
        async with aiohttp.ClientSession(trace_configs=[trace]) as session:
            client = Client(session, ClientOptions(f"{server.url}/v1/completions", "m"))
            for index in range(3):
                await client.complete(REQUEST, str(index), RequestResult(prompt_len=3))
        return len(opened)

    assert asyncio.run(main()) == 1
