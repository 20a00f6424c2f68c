"""What the client checks share: their arguments, the table of passed and failed checks, a look at /metrics."""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import inspect
import json
import re
import sys
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

KEY_OF_AN_OPEN_SERVER = "none"  # the clients insist on a key


class Checks:
    """The checks of one client against one server; a check is a function, its name says what must hold."""

    def __init__(self, *packages: str) -> None:
        parser = argparse.ArgumentParser(description=f"Checks {packages[0]} against a running omni-engine serve.")
        parser.add_argument("base_url", help="for example http://127.0.0.1:8000")
        parser.add_argument("--api-key", help="the server's key; without it the checks of keys are left out")
        parser.add_argument("--only", default="", help="run the checks whose name contains this")
        parser.add_argument("--traceback", action="store_true", help="show where a check failed")
        self.arguments = parser.parse_args()
        self.server_url: str = self.arguments.base_url.rstrip("/").removesuffix("/v1")
        self.api_url = f"{self.server_url}/v1"
        self.api_key: str = self.arguments.api_key or KEY_OF_AN_OPEN_SERVER
        self.packages = packages
        self._checks: list[Callable[[], Any]] = []
        self._loop = asyncio.new_event_loop()  # one for all: clients keep connections between calls
        try:
            self.model: str = self.get("/v1/models")["data"][0]["id"]
        except OSError as error:
            sys.exit(f"no server answers with a model, start one or give its --api-key: {self.server_url}: {error}")

    def __call__(self, check: Callable[[], Any]) -> Callable[[], Any]:
        """Decorates a check, plain or async."""
        self._checks.append(check)
        return check

    def if_guarded(self, check: Callable[[], Any]) -> Callable[[], Any]:
        """Decorates a check that only a server with API keys can pass."""
        return self(check) if self.arguments.api_key else check

    def run(self) -> None:
        """Run them all, print the table, exit with 1 if one failed."""
        print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in self.packages), "at", self.server_url)
        num_failed = num_run = 0
        for check in self._checks:
            name = check.__name__.replace("_", " ")
            if self.arguments.only not in name:
                continue
            num_run += 1
            failure = self._failure(check)
            num_failed += failure is not None
            print(f"  pass  {name}" if failure is None else f"  FAIL  {name}: {failure}", flush=True)
        print(f"{num_run - num_failed} passed, {num_failed} failed")
        sys.exit(1 if num_failed or not num_run else 0)

    def _failure(self, check: Callable[[], Any]) -> str | None:
        try:
            if inspect.iscoroutinefunction(check):
                self._loop.run_until_complete(asyncio.wait_for(check(), 120))
            else:
                check()
        except Exception as error:
            if self.arguments.traceback:
                traceback.print_exc()
            frames = traceback.extract_tb(error.__traceback__)
            lines = [frame.lineno for frame in frames if frame.filename == check.__code__.co_filename]
            return f"{type(error).__name__} in line {lines[-1] if lines else '?'}: {str(error)[:500]}"
        return None

    def get(self, path: str) -> Any:
        request = urllib.request.Request(
            self.server_url + path, headers={"Authorization": f"Bearer {self.api_key}", "Connection": "close"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            text = response.read().decode()
        return json.loads(text) if response.headers.get_content_type() == "application/json" else text

    def num_in_server(self) -> int:
        """Requests that the engine holds, running and waiting."""
        values = re.findall(
            r"^vllm:num_requests_(?:running|waiting)\{[^}]*\} (\S+)", self.get("/metrics"), re.MULTILINE
        )
        assert len(values) == 2, "the metrics name no running and waiting requests"
        return sum(int(float(value)) for value in values)

    def wait_until_idle(self, seconds: float = 5) -> None:
        """Fails if the server still computes for a client that has left."""
        deadline = time.monotonic() + seconds
        while left := self.num_in_server():
            assert time.monotonic() < deadline, f"requests left in the server: {left}"
            time.sleep(0.1)


@contextmanager
def raises(kind: type[BaseException], text: str = "") -> Iterator[list[Any]]:
    """The block must end in this exception, whose message contains `text`; it is put into the list."""
    caught: list[Any] = []
    try:
        yield caught
    except kind as error:
        assert text in str(error), f"{text!r} is not in {str(error)!r}"
        caught.append(error)
    assert caught, f"no {kind.__name__}"
