"""Headless Chromium, driven over its DevTools protocol, and a server of its own where a test wants a real engine."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, ClientWebSocketResponse, WSMsgType

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
    "--disable-breakpad", "--disable-crash-reporter", "--hide-scrollbars",
    "--remote-debugging-port=0",
)  # fmt: skip
START_SECONDS = 60.0
MAIN = "from omni_engine.server.cli import main; import sys; sys.exit(main())"


class Chromium:
    """A browser process with a profile of its own."""

    def __init__(self, program: str, profile: Path) -> None:
        self.process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        told = profile / "DevToolsActivePort"
        deadline = time.monotonic() + START_SECONDS
        while not (told.exists() and len(told.read_text().split()) == 2):
            assert self.process.poll() is None and time.monotonic() < deadline, "Chromium did not start"
            time.sleep(0.05)
        port, path = told.read_text().split()
        self.address = f"ws://127.0.0.1:{port}{path}"

    @contextlib.asynccontextmanager
    async def page(
        self, url: str, *, width: int = 1280, height: int = 800, scheme: str = "light", language: str = "en-US"
    ) -> AsyncIterator[Page]:
        """A tab of its own, without what other tabs have stored, at `url`."""
        async with ClientSession() as session, session.ws_connect(self.address, max_msg_size=0) as connection:
            page = Page(connection)
            reader = asyncio.create_task(page.read())
            try:
                await page.begin(width, height, scheme, language)
                await page.go(url)
                yield page
            finally:
                with contextlib.suppress(ConnectionError):
                    await page.end()
                reader.cancel()
                await asyncio.gather(reader, return_exceptions=True)

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Page:
    """One tab: what a person does there, what can be seen, what went wrong and what was loaded."""

    def __init__(self, connection: ClientWebSocketResponse) -> None:
        self._connection = connection
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._session: str | None = None
        self.errors: list[str] = []  # uncaught ones, and what the console shows as such: refusals by the policy too
        self.requests: list[str] = []  # addresses

    async def read(self) -> None:
        async for message in self._connection:
            if message.type != WSMsgType.TEXT:
                continue
            event = json.loads(message.data)
            if "id" in event:
                answer = self._answers.pop(event["id"])
                if "error" in event:
                    answer.set_exception(RuntimeError(event["error"]["message"]))
                else:
                    answer.set_result(event["result"])
            elif event["method"] == "Runtime.exceptionThrown":
                self.errors.append(json.dumps(event["params"]["exceptionDetails"]))
            elif event["method"] == "Log.entryAdded" and event["params"]["entry"]["level"] == "error":
                self.errors.append(event["params"]["entry"]["text"])
            elif event["method"] == "Network.requestWillBeSent":
                self.requests.append(event["params"]["request"]["url"])

    async def send(self, method: str, **params: Any) -> Any:
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        message = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        await self._connection.send_json(message)
        return await asyncio.wait_for(answer, 30)

    async def begin(self, width: int, height: int, scheme: str, language: str) -> None:
        self._context = (await self.send("Target.createBrowserContext"))["browserContextId"]
        target = await self.send("Target.createTarget", url="about:blank", browserContextId=self._context)
        attached = await self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.send(f"{domain}.enable")
        await self.resize(width, height)
        await self.prefer(scheme)
        agent = (await self.evaluate("navigator.userAgent")).replace("Headless", "")
        await self.send("Emulation.setUserAgentOverride", userAgent=agent, acceptLanguage=language)

    async def end(self) -> None:
        self._session = None
        await self.send("Target.disposeBrowserContext", browserContextId=self._context)

    async def resize(self, width: int, height: int) -> None:
        phone = width < 600
        await self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone
        )

    async def prefer(self, scheme: str) -> None:
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ]
        await self.send("Emulation.setEmulatedMedia", features=features)

    async def go(self, url: str) -> None:
        await self.send("Page.navigate", url=url)
        await self.wait("document.readyState === 'complete'")

    async def evaluate(self, script: str) -> Any:
        """The value of an expression, awaited if it is a promise."""
        answer = await self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise AssertionError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    async def wait(self, script: str, seconds: float = 15) -> Any:
        """The first value of `script` that counts as true there."""
        deadline = time.monotonic() + seconds
        value: Any = None
        while time.monotonic() < deadline:
            try:
                value = await self.evaluate(script)
            except (AssertionError, RuntimeError) as error:  # between two documents there is no context, or no node
                value = error
            else:
                if value not in (None, False, 0, ""):  # a node is an empty object here
                    return value
            await asyncio.sleep(0.03)
        raise AssertionError(f"not within {seconds} s: {script}; errors: {self.errors}; last: {value!r}")

    async def text(self, selector: str) -> str:
        return await self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText")

    async def _point(self, selector: str) -> dict[str, float]:
        return await self.wait(
            f"""(() => {{
                const node = document.querySelector({json.dumps(selector)});
                if (!node) return null;
                node.scrollIntoView({{ block: "nearest" }});
                const box = node.getBoundingClientRect();
                return box.width ? {{ x: box.x + box.width / 2, y: box.y + box.height / 2 }} : null;
            }})()"""
        )

    async def click(self, selector: str) -> None:
        point = await self._point(selector)
        for kind in ("mousePressed", "mouseReleased"):
            await self.send("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **point)

    async def hover(self, selector: str) -> None:
        await self.send("Input.dispatchMouseEvent", type="mouseMoved", **await self._point(selector))

    async def type(self, text: str) -> None:
        """Text into what has the focus."""
        await self.send("Input.insertText", text=text)

    async def press(self, key: str, *, shift: bool = False) -> None:
        codes = {"Enter": 13, "Tab": 9, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39, "ArrowUp": 38, "ArrowDown": 40,
                 "Home": 36, "End": 35, " ": 32}  # fmt: skip
        rest: dict[str, Any] = {"key": key, "windowsVirtualKeyCode": codes[key], "modifiers": 8 if shift else 0}
        if key in ("Enter", " "):
            rest["text"] = "\r" if key == "Enter" else " "
        await self.send("Input.dispatchKeyEvent", type="keyDown", **rest)
        await self.send("Input.dispatchKeyEvent", type="keyUp", **{**rest, "text": ""})

    async def picture(self, file: Path) -> None:
        answer = await self.send("Page.captureScreenshot", format="png")
        file.write_bytes(base64.b64decode(answer["data"]))


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Any:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("needs Chromium on the PATH (Debian: apt-get install chromium)")
    browser = Chromium(program, tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


class Server:
    """`omni-engine serve` over the bundled demo model, in a process of its own."""

    def __init__(self, *flags: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = subprocess.Popen(
            [sys.executable, "-c", MAIN, "serve", "--host", "127.0.0.1", "--port", str(self.port), "--graph-backend",
             "eager", "--num-gpu-blocks-override", "2048", *flags],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        deadline = time.monotonic() + START_SECONDS
        while not self._answers("/health"):
            assert self.process.poll() is None and time.monotonic() < deadline, "the server did not start"
            time.sleep(0.05)

    def _answers(self, path: str) -> bool:
        try:
            with urllib.request.urlopen(self.url + path, timeout=2) as response:
                return response.status == 200
        except (urllib.error.URLError, OSError):
            return False

    @property
    def core_pid(self) -> int:
        with open(f"/proc/{self.process.pid}/task/{self.process.pid}/children") as file:
            return int(file.read().split()[0])

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def serve_demo() -> Any:
    """Starts servers over the demo model, and ends them with the test."""
    with contextlib.ExitStack() as stack:

        def start(*flags: str) -> Server:
            server = Server(*flags)
            stack.callback(server.close)
            return server

        yield start
