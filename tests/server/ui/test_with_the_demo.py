"""The page over a real server and its demo model: a conversation, an abort, the engine live, its death."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import urllib.request

import pytest

pytestmark = pytest.mark.full
READY = "document.getElementById('status').dataset.status === 'ready'"
DONE = "[...document.querySelectorAll('.turn.model')].at(-1)?.getAttribute('aria-busy') === 'false'"
SPECULATION = ("--speculative-config", '{"method": "mtp", "num_speculative_tokens": 2}')


def run(scenario):
    asyncio.run(asyncio.wait_for(scenario(), 120))


async def say(page, text):
    await page.click("#prompt")
    await page.type(text)
    await page.press("Enter")


async def set_value(page, name, value):
    await page.click(f"#set-{name}")
    await page.type(value)


def complete(url, body):
    """The text that the API gives without the page."""
    request = urllib.request.Request(
        url + "/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.loads(response.read())["choices"][0]["message"]["content"]


def test_a_conversation_an_abort_and_the_engine_live(chromium, serve_demo, monkeypatch):
    monkeypatch.setenv("OMNI_ENGINE_CPU_KERNELS", "0")  # slow enough to be looked at
    server = serve_demo(*SPECULATION)

    async def scenario():
        async with chromium.page(server.url + "/") as page:
            await page.wait(READY)
            await set_value(page, "temperature", "0")
            await set_value(page, "max_tokens", "24")
            await say(page, "Tell me about Moses.")
            await page.wait(DONE, 60)
            conversation = [{"role": "user", "content": "Tell me about Moses."}]
            body = {"messages": conversation, "temperature": 0, "max_tokens": 24}
            expected = await asyncio.to_thread(complete, server.url, body)
            tokens = "document.querySelector('.turn.model').querySelectorAll('.token')"
            assert (
                await page.evaluate("document.querySelector('.turn.model .prose').innerText.trim()") == expected.strip()
            )
            await page.evaluate("document.querySelectorAll('.turn.model .actions button')[2].click()")
            assert await page.evaluate(f"{tokens}.length") == 24
            texts = await page.evaluate(f"[...{tokens}].map((node) => node.entry.token).join('')")
            assert re.sub(r"<[|]\w+[|]>", "", texts).strip() == expected.strip()  # tokens tell the special ones too

            await page.click("#set-max_tokens")
            await page.evaluate("document.getElementById('set-max_tokens').select()")
            await page.type("900")
            await say(page, "What comes next?")  # which the model knows no end of
            await page.wait("[...document.querySelectorAll('.turn.model .prose')].at(-1).innerText.length > 40", 60)
            await page.click("#tab-engine")
            await page.wait("document.querySelector('#tile-running b').textContent === '1'", 20)
            await page.wait("Number.parseFloat(document.querySelector('#tile-generation b').textContent) > 0", 20)
            await page.wait("/accepted \\d/.test(document.getElementById('charts').innerText)", 20)
            charts = await page.text("#charts")
            assert re.search(r"in use [1-9]", charts) and re.search(r"[\d,]+ free", charts)
            assert re.search(r"batch 1\s+gear [01]", charts) and "weights" in charts
            await page.press("Escape")  # wherever the focus is
            await page.wait(f"{DONE} && document.querySelector('#tile-running b').textContent === '0'", 20)
            await page.click("#tab-chat")
            assert "stopped" in await page.text(".turn.model:last-of-type .facts")
            assert page.errors == []

    run(scenario)


def test_the_engine_dies_in_the_middle_of_an_answer(chromium, serve_demo):
    server = serve_demo()

    async def scenario():
        async with chromium.page(server.url + "/") as page:
            await page.wait(READY)
            await set_value(page, "max_tokens", "900")
            await say(page, "Go on for a long time.")
            await page.wait("document.querySelector('.turn.model .prose').innerText.length > 20", 60)
            await page.click("#tab-engine")
            await page.wait("document.querySelector('#tile-running b').textContent === '1'", 20)
            os.kill(server.core_pid, signal.SIGKILL)
            gone = "['dead', 'unreachable'].includes(document.getElementById('status').dataset.status)"
            await page.wait(f"{gone} && {DONE}", 20)
            await page.wait("document.getElementById('engine-note').classList.contains('bad')")
            await page.click("#tab-chat")
            problem = await page.text(".turn.model .problem")
            assert problem.startswith("The request failed") and "log" in problem
            assert len(await page.text(".turn.model .prose")) > 20  # what had come stays
            await asyncio.to_thread(server.process.wait, 20)  # the server ends with its engine
            await say(page, "Are you there?")
            await page.wait(f"{DONE} && document.querySelectorAll('.problem:not([hidden])').length === 2", 20)
            assert "cannot be reached" in await page.text(".turn.model:last-of-type .problem")
            await page.wait("document.getElementById('status').innerText === 'No connection'", 20)

    run(scenario)
