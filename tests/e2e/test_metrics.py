"""GET /metrics of a real server: exact counts, vLLM's names, and gauges that come to rest."""

from __future__ import annotations

import asyncio
import json

import pytest
from aiohttp import ClientSession, web
from prometheus_client.parser import text_string_to_metric_families

from omni_engine import AsyncEngine, EngineArgs
from omni_engine.server.app import build_app
from omni_engine.server.settings import ServerSettings

PROMPT = [(5 * i) % 400 + 4 for i in range(40)]
STARRED = {
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "lora_requests_info",
    "prompt_tokens_total",
    "generation_tokens_total",
    "request_success_total",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "num_preemptions_total",
    "time_to_first_token_seconds_bucket",
    "inter_token_latency_seconds_bucket",
    "request_time_per_output_token_seconds_bucket",
    "e2e_request_latency_seconds_bucket",
    "request_queue_time_seconds_bucket",
    "request_prefill_time_seconds_bucket",
    "request_decode_time_seconds_bucket",
    "request_prompt_tokens_bucket",
    "request_generation_tokens_bucket",
    "request_max_num_generation_tokens_bucket",
    "iteration_tokens_total_bucket",
    "external_prefix_cache_queries_total",
    "external_prefix_cache_hits_total",
    "mm_cache_queries_total",
    "mm_cache_hits_total",
}


@pytest.fixture(scope="module")
def served(make_checkpoint):
    """Runs a scenario against a server over a real core, which all scenarios share."""
    loop = asyncio.new_event_loop()
    args = EngineArgs(
        model=str(make_checkpoint("LlamaForCausalLM")),
        dtype="float32", max_model_len=192, max_num_seqs=8, max_num_queued_reqs=50,
    )  # fmt: skip
    engine = AsyncEngine(args, served_model_name="tiny")

    async def start():
        await engine.wait_ready()
        runner = web.AppRunner(build_app(engine, ServerSettings(model="tiny")), handler_cancellation=True)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner

    runner = loop.run_until_complete(start())

    def run(scenario):
        async def play():
            async with ClientSession(f"http://127.0.0.1:{runner.addresses[0][1]}") as session:
                await asyncio.wait_for(scenario(session), 60)

        loop.run_until_complete(play())

    yield run
    loop.run_until_complete(runner.cleanup())
    loop.run_until_complete(engine.shutdown())
    loop.close()


async def scrape(session, address="/metrics"):
    """The engine's samples by name without prefix, other labels than the two of every metric behind it."""
    async with session.get(address, allow_redirects=False) as response:
        assert response.status == 200
        assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        text = await response.text()
    samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("vllm:"):
                assert sample.labels.get("model_name") == "tiny", sample
                own = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
                key = sample.name.removeprefix("vllm:") + ("".join(f" {k}={v}" for k, v in sorted(own.items())))
                samples[key] = sample.value
    return samples


class Grown:
    """How much each sample has grown since `since`."""

    def __init__(self, since, now):
        self.since, self.now = since, now

    def __getitem__(self, name):
        return self.now[name] - self.since[name]


async def complete(session, **fields):
    body = {"prompt": PROMPT, "max_tokens": 6, "temperature": 0, "ignore_eos": True, **fields}
    async with session.post("/v1/completions", json=body) as response:
        assert response.status == 200, await response.text()
        return await response.json()


def test_requests_one_by_one_count_exactly(served):
    async def scenario(session):
        before = await scrape(session)
        for _ in range(3):
            await complete(session)
        grown = Grown(before, await scrape(session))
        assert grown["time_to_first_token_seconds_count"] == 3
        assert grown["inter_token_latency_seconds_count"] == 3 * 5
        assert grown["request_prompt_tokens_sum"] == grown["prompt_tokens_total"] == 3 * 40
        assert grown["generation_tokens_total"] == grown["request_generation_tokens_sum"] == 3 * 6
        assert grown["iteration_tokens_total_sum"] == 3 * 46
        assert grown["iteration_tokens_total_count"] == 3 * 6
        assert grown["request_success_total finished_reason=length"] == 3
        assert grown["prefix_cache_queries_total"] == 3 * 40
        assert grown["prefix_cache_hits_total"] == grown["prompt_tokens_cached_total"] == 2 * 32
        assert grown["e2e_request_latency_seconds_sum"] > grown["request_decode_time_seconds_sum"] > 0

    served(scenario)


def test_requests_at_once_count_as_many_tokens(served):
    async def scenario(session):
        before = await scrape(session)
        await asyncio.gather(*(complete(session, prompt=[PROMPT] * 2, n=2, temperature=1, seed=3) for _ in range(5)))
        grown = Grown(before, await scrape(session))
        assert grown["time_to_first_token_seconds_count"] == 20
        assert grown["inter_token_latency_seconds_count"] == 20 * 5
        assert grown["iteration_tokens_total_sum"] == 20 * 46
        assert grown["request_params_n_count"] == 10
        assert grown["request_params_n_sum"] == 20

    served(scenario)


def test_a_stop_string_ends_a_sequence_once_with_reason_stop(served):
    async def scenario(session):
        stop = (await complete(session, max_tokens=30))["choices"][0]["text"][8:10]
        before = await scrape(session)
        await complete(session, max_tokens=30, stop=stop)
        grown = Grown(before, await scrape(session))
        assert grown["request_success_total finished_reason=stop"] == 1
        assert grown["request_success_total finished_reason=abort"] == 0

    served(scenario)


def test_both_addresses_answer_without_redirect_with_every_starred_name(served):
    async def scenario(session):
        plain, slashed = await scrape(session), await scrape(session, "/metrics/")
        assert set(plain) == set(slashed)
        names = {key.split(" ")[0] for key in plain}
        assert names >= STARRED
        assert not {key.split(" ")[0] for key in list(plain)[:-60]} >= STARRED  # the check can fail
        assert any(key.startswith("cache_config_info") and "block_size=16" in key for key in plain)

    served(scenario)


def test_caches_that_are_not_there_are_asked_nothing(served):
    """Dashboards divide by these; the cache that is there counts what two equal prompts look up."""

    async def scenario(session):
        before = await scrape(session)
        prompt = [(7 * i) % 400 + 5 for i in range(64)]
        for _ in range(2):
            await complete(session, prompt=prompt)
        grown = Grown(before, await scrape(session))
        for name in ("external_prefix_cache", "mm_cache"):
            assert grown[f"{name}_queries_total"] == grown[f"{name}_hits_total"] == 0
            assert grown.now[f"{name}_queries_total"] == grown.now[f"{name}_hits_total"] == 0
        assert grown["prefix_cache_queries_total"] == 2 * 64
        assert grown["prefix_cache_hits_total"] == grown["prompt_tokens_cached_total"] == 48  # whole blocks, less one

    served(scenario)


def test_gauges_return_to_zero_after_aborts(served):
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")

    async def scenario(session):
        async def ask():
            body = {"prompt": PROMPT, "max_tokens": 150, "ignore_eos": True, "n": 2}
            async with session.post("/v1/completions", json=body):
                pass

        before = await scrape(session)
        clients = [asyncio.create_task(ask()) for _ in range(20)]  # 40 sequences for 8 seats: most still wait
        while not (samples := await scrape(session))["num_requests_running"] or not samples["num_requests_waiting"]:
            assert not all(client.done() for client in clients)
        assert samples["num_requests_running"] + samples["num_requests_waiting"] > 0
        for client in clients:
            client.cancel()
        ends = await asyncio.gather(*clients, return_exceptions=True)
        assert any(isinstance(end, asyncio.CancelledError) for end in ends)
        for _ in range(100):
            samples = await scrape(session)
            if not any(samples[name] for name in names):
                break
            await asyncio.sleep(0.05)
        assert [samples[name] for name in names] == [0, 0, 0]
        assert Grown(before, samples)["request_success_total finished_reason=abort"] > 0

    served(scenario)


def test_a_full_queue_counts_its_rejections(served):
    async def scenario(session):
        async def ask():
            async with session.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 20}) as response:
                return response.status

        before = await scrape(session)
        statuses = await asyncio.gather(*(ask() for _ in range(90)))
        grown = Grown(before, await scrape(session))
        assert grown["admission_rejections_total reason=queue_full"] == statuses.count(503) > 0

    served(scenario)


def test_sizes_of_bodies_are_counted_of_plain_and_of_streamed_answers(served):
    names = ("http_request_size_bytes", "http_response_size_bytes")

    async def sizes(session):
        async with session.get("/metrics") as response:
            lines = (await response.text()).splitlines()
        found = dict(line.rsplit(" ", 1) for line in lines if line.startswith(names))
        return [float(found.get(f'{name}_sum{{handler="/v1/completions"}}', 0)) for name in names]

    async def scenario(session):
        before = await sizes(session)
        body = json.dumps({"prompt": PROMPT, "max_tokens": 3}).encode()
        headers = {"Content-Type": "application/json"}
        async with session.post("/v1/completions", data=body, headers=headers) as response:
            answer = await response.read()
        plain = await sizes(session)
        assert [plain[0] - before[0], plain[1] - before[1]] == [len(body), len(answer)]
        streamed = json.dumps({"prompt": PROMPT, "max_tokens": 3, "stream": True}).encode()
        async with session.post("/v1/completions", data=streamed, headers=headers) as response:
            answer = await response.read()
        after = await sizes(session)
        assert after[0] - plain[0] == len(streamed)
        assert len(answer) <= after[1] - plain[1] < len(answer) + 600  # with the marks between chunks, and the head

    served(scenario)
