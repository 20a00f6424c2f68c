"""Questions to the core that somebody waits for: `Questions`."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

from .core_client import CoreClient
from .errors import EngineDeadError
from .messages import Answer, Profile, ResetPrefixCache


class Questions:
    """Those that have been asked and not answered, by number. All methods belong to one event loop."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[bool]] = {}

    async def ask(self, client: CoreClient, make: Callable[[int], ResetPrefixCache | Profile]) -> bool:
        """The core's answer; raises RuntimeError with its error, `EngineDeadError` if it is lost meanwhile."""
        question = make(next(self._numbers))
        answer = self._waiting[question.number] = asyncio.get_running_loop().create_future()
        client.send(question)
        try:
            return await answer
        finally:
            del self._waiting[question.number]

    def take(self, answer: Answer) -> None:
        waiting = self._waiting.get(answer.number)
        if waiting is None or waiting.done():
            return  # whoever asked has left
        if answer.error is None:
            waiting.set_result(answer.done)
        else:
            waiting.set_exception(RuntimeError(answer.error))

    def fail(self, error: EngineDeadError) -> None:
        """The core is lost: nobody is left to answer."""
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(error)
