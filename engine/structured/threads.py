"""Grammars checked in threads while an event loop goes on: `GrammarThreads`."""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor

from ...scheduler.structured_outputs import StructuredOutputsParams
from .checker import GrammarChecker

logger = logging.getLogger(__name__)
NUM_THREADS = 16  # in which grammars are tried out or wait for it; who finds none is late by then, and told so


class GrammarThreads:
    """Threads of their own, since no other work may wait behind a grammar. They start with the first that needs one."""

    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None

    async def check(self, checker: GrammarChecker, constraint: StructuredOutputsParams) -> str:
        """As `GrammarChecker.check`; the time it may wait counts from here."""
        known = checker.known(constraint)
        if known is not None:
            return known
        return await asyncio.wrap_future(self._threads.submit(checker.check, constraint, time.monotonic()))

    def warm_up(self, checker: GrammarChecker) -> None:
        """Start the checker's process, which would start with the first constraint. Returns at once."""

        def start() -> None:
            try:
                checker.start()
            except (RuntimeError, OSError) as error:  # who needs it will be told
                logger.debug("%s", error)

        self._threads.submit(start)

    def close(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)

    @property
    def _threads(self) -> ThreadPoolExecutor:
        if self._executor is None:
            self._executor = ThreadPoolExecutor(max_workers=NUM_THREADS, thread_name_prefix="grammar")
        return self._executor
