"""A soak of `omni-engine serve`: minutes of mixed requests and aborts, while memory and open files are watched.

    python benchmarks/soak.py --minutes 20 --concurrency 24 [flags of omni-engine serve]

Starts a server of its own on the bundled demo model, or on --model. Every 10 s it prints the resident memory and the
open files of both processes; at the end the slope of the memory after the warm-up. Exits with 1 if a slope is over
--max-slope MB/min, if files stay open, if an answer is wrong or missing, or if anything is left in the engine.
Graphs that are compiled beside the traffic take memory and files as they come: give --require-graph, which waits for
all of them first, or --enforce-eager.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import os
import random
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from aiohttp import ClientConnectionError, ClientSession, ClientTimeout, TCPConnector

SECONDS_BETWEEN_SAMPLES = 10
# The pool hands out the block that was free longest, so every block's memory is touched once before any is used again.
# With this few blocks that is over within the warm-up; with the default it looks like a leak for a long time.
NUM_BLOCKS = "1024"
CALM_REQUEST = {"prompt": "In the beginning", "max_tokens": 24, "temperature": 0, "ignore_eos": True}
TEXT = "And it came to pass in those days that the people went up out of the land, and the king spake unto them, "


class Sample(NamedTuple):
    """One look at the server: bytes resident and files open, of the front and of the core."""

    seconds: float
    resident: tuple[int, int]
    files: tuple[int, int]


class Server:
    """A running `omni-engine serve` and its two processes."""

    def __init__(self, model: str | None, flags: list[str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "omni_engine.server.cli", "serve", *([model] if model else []), "--port", str(port),
             "--host", "127.0.0.1", "--num-gpu-blocks-override", NUM_BLOCKS, "--disable-uvicorn-access-log", *flags],
        )  # fmt: skip

    def sample(self, seconds: float) -> Sample:
        front = self.process.pid
        children = Path(f"/proc/{front}/task/{front}/children").read_text().split()
        pids = front, int(children[0])
        files = [len(os.listdir(f"/proc/{pid}/fd")) for pid in pids]
        return Sample(seconds, (resident_bytes(pids[0]), resident_bytes(pids[1])), (files[0], files[1]))

    async def wait_ready(self, session: ClientSession) -> None:
        while self.process.poll() is None:
            with contextlib.suppress(ClientConnectionError):
                async with session.get(f"{self.url}/health") as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(0.2)
        raise SystemExit("the server did not start")


def resident_bytes(pid: int) -> int:
    match = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert match is not None  # every process has resident memory
    return int(match[1]) * 1024


class Soak:
    """The traffic: workers that each send one random request after another until the time is over."""

    def __init__(self, url: str, session: ClientSession, seed: int) -> None:
        self.url = url
        self.session = session
        self.chance = random.Random(seed)
        self.counts: collections.Counter[str] = collections.Counter()
        self.failures: list[str] = []
        self.calm_text = ""

    async def work(self, deadline: float) -> None:
        while time.monotonic() < deadline:
            behaviour = self.chance.choice(
                (self.read_whole, self.read_whole, self.read_stream, self.read_stream, self.leave_stream,
                 self.leave_stream, self.give_up, self.give_up, self.read_slowly, self.ask_wrongly, self.ask_calmly)
            )  # fmt: skip
            try:
                await behaviour()
                self.counts[behaviour.__name__] += 1
            except Exception as error:
                self.failures.append(f"{behaviour.__name__}: {type(error).__name__}: {error}")

    def request(self, **fields: Any) -> tuple[str, dict[str, Any]]:
        """A random path and body."""
        chance = self.chance
        body: dict[str, Any] = {
            "max_tokens": min(int(chance.expovariate(1 / 40)) + 1, 300),
            "temperature": chance.choice((0.0, 0.7, 1.0, 1.3)),
            "ignore_eos": chance.random() < 0.5,
        }
        optional: dict[str, Any] = {
            "top_p": 0.9, "top_k": 20, "min_p": 0.02, "seed": chance.randrange(2**40), "frequency_penalty": 0.5,
            "repetition_penalty": 1.1, "stop": ["LORD", "\n\n"], "logit_bias": {"300": 2.5}, "bad_words": ["king"],
            "min_tokens": 1, "logprobs": chance.randrange(6), "cache_salt": str(chance.randrange(4)),
            "stop_token_ids": [500], "return_token_ids": True,
        }  # fmt: skip
        body.update({name: value for name, value in optional.items() if chance.random() < 0.15})
        if body["temperature"] and chance.random() < 0.2:
            body["n"] = chance.choice((2, 3))
        length = min(int(chance.expovariate(1 / 60)) + 1, 500)
        if chance.random() < 0.3:
            logprobs = body.pop("logprobs", None)
            if logprobs is not None:
                body.update(logprobs=True, top_logprobs=logprobs)
            text = " ".join(chance.choice(TEXT.split()) for _ in range(length))
            return "/v1/chat/completions", {**body, "messages": [{"role": "user", "content": text}], **fields}
        body["echo"] = chance.random() < 0.1
        prompt: Any = [chance.randrange(5, 2000) for _ in range(length)]
        if chance.random() < 0.3:
            prompt = TEXT * (1 + length // 30) + str(chance.randrange(50))  # shares a prefix with others
        return "/v1/completions", {**body, "prompt": prompt, **fields}

    async def read_whole(self) -> None:
        path, body = self.request()
        async with self.session.post(self.url + path, json=body) as response:
            answer = await response.json()
            assert response.status == 200, answer
            assert all(choice["finish_reason"] in ("stop", "length") for choice in answer["choices"]), answer

    async def read_stream(self) -> None:
        path, body = self.request(stream=True, stream_options={"include_usage": True})
        async with self.session.post(self.url + path, json=body) as response:
            text = await response.text()
            assert response.status == 200 and text.endswith("data: [DONE]\n\n") and '"error"' not in text, text[-300:]

    async def leave_stream(self) -> None:
        path, body = self.request(stream=True, max_tokens=400, ignore_eos=True)
        body.pop("stop", None)
        async with self.session.post(self.url + path, json=body) as response:
            assert response.status == 200
            for _ in range(self.chance.randrange(30)):
                await response.content.readline()
            response.close()

    async def give_up(self) -> None:
        path, body = self.request(max_tokens=400)
        patience = ClientTimeout(total=self.chance.uniform(0.001, 1.5))
        with contextlib.suppress(asyncio.TimeoutError):
            async with self.session.post(self.url + path, json=body, timeout=patience) as response:
                await response.read()

    async def read_slowly(self) -> None:
        path, body = self.request(stream=True, n=4, temperature=1.0, max_tokens=120)
        async with self.session.post(self.url + path, json=body) as response:
            assert response.status == 200
            for _ in range(self.chance.randrange(20)):
                await asyncio.sleep(self.chance.uniform(0.1, 0.6))
                await response.content.readline()
            response.close()

    async def ask_wrongly(self) -> None:
        path, body = self.request(temperature=-1)
        async with self.session.post(self.url + path, json=body) as response:
            assert response.status == 400, response.status

    async def ask_calmly(self) -> None:
        async with self.session.post(self.url + "/v1/completions", json=CALM_REQUEST) as response:
            text = (await response.json())["choices"][0]["text"]
        self.calm_text = self.calm_text or text
        assert text == self.calm_text, f"{text!r} is not the calm answer {self.calm_text!r}"

    async def engine_load(self) -> float:
        """Requests running and waiting, and the share of the KV cache in use: 0 when nothing is left."""
        async with self.session.get(self.url + "/metrics") as response:
            text = await response.text()
        names = "num_requests_running|num_requests_waiting|kv_cache_usage_perc"
        return sum(map(float, re.findall(rf"^vllm:(?:{names})\{{[^}}]*\}} (\S+)", text, re.MULTILINE)))


async def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--warm-up", type=float, help="minutes that the slope leaves out (a quarter of all)")
    parser.add_argument("--concurrency", type=int, default=24)
    parser.add_argument("--max-slope", type=float, default=1.0, help="MB/min")
    parser.add_argument("--model", help="instead of the bundled demo")
    parser.add_argument("--seed", type=int, default=0)
    arguments, flags = parser.parse_known_args()
    server = Server(arguments.model, flags)
    try:
        return await soak(server, arguments)
    finally:
        server.process.terminate()
        server.process.wait(30)


async def soak(server: Server, arguments: argparse.Namespace) -> int:
    """Runs the traffic against `server` and judges what it left; 0 if all is well."""
    timeout = ClientTimeout(total=300)
    # Connections are not kept: what is open when nothing runs is the server's own.
    async with ClientSession(connector=TCPConnector(limit=0, force_close=True), timeout=timeout) as session:
        await server.wait_ready(session)
        traffic = Soak(server.url, session, arguments.seed)
        await traffic.ask_calmly()
        await asyncio.sleep(1)
        started = time.monotonic()
        samples = [server.sample(0)]
        show(samples[0], traffic)
        deadline = started + arguments.minutes * 60
        workers = [asyncio.create_task(traffic.work(deadline)) for _ in range(arguments.concurrency)]
        while time.monotonic() < deadline:
            await asyncio.sleep(min(SECONDS_BETWEEN_SAMPLES, max(deadline - time.monotonic(), 0)))
            samples.append(server.sample(time.monotonic() - started))
            show(samples[-1], traffic)
        await asyncio.gather(*workers)
        await traffic.ask_calmly()
        for _ in range(50):
            left = await traffic.engine_load()
            if not left:
                break
            await asyncio.sleep(0.1)
        await asyncio.sleep(1)
        last = server.sample(time.monotonic() - started)
    show(last, traffic)
    warm_up = arguments.minutes / 4 if arguments.warm_up is None else arguments.warm_up
    slopes = [slope([s for s in samples if s.seconds >= warm_up * 60], which) for which in (0, 1)]
    print(f"slope after {warm_up:g} min: front {slopes[0]:+.2f} MB/min, core {slopes[1]:+.2f} MB/min")
    print(f"open files: {samples[0].files} before, {last.files} after; left in the engine: {left:g}")
    print(f"requests: {dict(sorted(traffic.counts.items()))}, failures: {len(traffic.failures)}")
    for failure in traffic.failures[:5]:
        print(" ", failure[:500])
    grew = any(after > before for before, after in zip(samples[0].files, last.files, strict=True))
    return int(max(slopes) > arguments.max_slope or grew or left > 0 or bool(traffic.failures))


def show(sample: Sample, traffic: Soak) -> None:
    front, core = (size / 1e6 for size in sample.resident)
    print(
        f"{sample.seconds:6.0f} s  front {front:7.1f} MB {sample.files[0]:4} files  core {core:7.1f} MB "
        f"{sample.files[1]:4} files  {traffic.counts.total()} requests",
        flush=True,
    )


def slope(samples: list[Sample], which: int) -> float:
    """Least-squares slope of the resident memory of one process, in MB per minute."""
    if len(samples) < 2:
        raise SystemExit("too short to fit a slope: give more --minutes or a shorter --warm-up")
    minutes = [sample.seconds / 60 for sample in samples]
    sizes = [sample.resident[which] / 1e6 for sample in samples]
    middle, mean = sum(minutes) / len(minutes), sum(sizes) / len(sizes)
    covariance = sum((x - middle) * (y - mean) for x, y in zip(minutes, sizes, strict=True))
    return covariance / sum((x - middle) ** 2 for x in minutes)


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
