"""Takes the pictures of docs/page.md: `python tests/server/ui/take_pictures.py docs/images`. Then look at them."""

from __future__ import annotations

import asyncio
import shutil
import sys
import tempfile
from pathlib import Path

from aiohttp import ClientSession
from conftest import Chromium, Server

DONE = "[...document.querySelectorAll('.turn.model')].at(-1)?.getAttribute('aria-busy') === 'false'"
SPECULATION = ("--speculative-config", '{"method": "mtp", "num_speculative_tokens": 2}')
REQUESTS = 14


async def load(url: str) -> None:
    """Requests that begin one after another, so that the charts have a shape."""

    async def one(session: ClientSession, number: int) -> None:
        await asyncio.sleep(1.2 * number)
        body = {"prompt": "In the beginning God created", "max_tokens": 90 + 20 * (number % 5), "seed": number}
        async with session.post(f"{url}/v1/completions", json={**body, "ignore_eos": True}) as response:
            await response.read()

    async with ClientSession() as session:
        await asyncio.gather(*(one(session, number) for number in range(REQUESTS)))


async def settle(page) -> None:
    await asyncio.sleep(0.4)


async def take(server: Server, browser: Chromium, folder: Path) -> None:
    async with browser.page(server.url + "/", width=1280, height=760) as page:
        await page.wait("document.getElementById('model').textContent === 'demo'")
        for name, value in (("max_tokens", "70"), ("seed", "5"), ("temperature", "0.8")):
            await page.click(f"#set-{name}")
            await page.type(value)
        for words in ("Tell me about Moses.", "And what did Aaron say?"):
            await page.click("#prompt")
            await page.type(words)
            await page.press("Enter")
            await page.wait(f"{DONE} && document.querySelectorAll('.turn.model').length", 120)
            await settle(page)
        await page.picture(folder / "chat-light.png")
        await page.evaluate(
            "[...document.querySelectorAll('.turn.model')].at(-1).querySelectorAll('button')[2].click()"
        )
        await page.hover(".turn.model:last-of-type .token:nth-of-type(9)")
        await page.prefer("dark")
        await settle(page)
        await page.picture(folder / "tokens-dark.png")
        await page.prefer("light")
        await page.evaluate(
            "[...document.querySelectorAll('.turn.model')].at(-1).querySelectorAll('button')[3].click()"
        )
        await settle(page)
        await page.picture(folder / "raw-light.png")
        await page.press("Escape")
        await page.click("#tab-engine")
        await load(server.url)
        await asyncio.sleep(2)
        await page.resize(1280, 1160)
        await settle(page)
        await page.picture(folder / "engine-light.png")
        await page.prefer("dark")
        await page.click("#language")
        await settle(page)
        await page.picture(folder / "engine-dark-chinese.png")
        await page.resize(390, 844)
        await settle(page)
        await page.picture(folder / "engine-phone.png")
        await page.click("#tab-chat")
        await settle(page)
        await page.picture(folder / "chat-phone.png")
        await page.click("#settings-button")
        await settle(page)
        await page.picture(folder / "settings-phone.png")


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    profile = Path(tempfile.mkdtemp())
    server = Server(*SPECULATION)
    browser = Chromium("chromium", profile)
    try:
        asyncio.run(take(server, browser, folder))
    finally:
        browser.close()
        server.close()
        shutil.rmtree(profile, ignore_errors=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
