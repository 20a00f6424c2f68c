"""Streams of a request: engine outputs merged over its prompts, and chunks sent as server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, cast

import msgspec
from aiohttp import web

from ..engine.outputs import RequestOutput
from .errors import ErrorInfo, ErrorResponse, caller_errors, error_info

_encoder = msgspec.json.Encoder()
_PAUSE = object()
_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


@dataclass(frozen=True)
class EventFormat:
    """How an API writes its stream: each event, a failure after the first one, and the end."""

    event: Callable[[Any], bytes]
    failure: Callable[[ErrorInfo], bytes]
    end: bytes


def event_bytes(event: Any) -> bytes:
    """One server-sent event without a name, holding `event` as JSON."""
    return b"data: " + _encoder.encode(event) + b"\n\n"


def named_event_bytes(event: dict[str, Any]) -> bytes:
    """One server-sent event that is named by its `type`."""
    return b"event: " + event["type"].encode() + b"\n" + event_bytes(event)


OPENAI_CHUNKS = EventFormat(event_bytes, lambda info: event_bytes(ErrorResponse(info)), b"data: [DONE]\n\n")


async def merge_outputs(
    streams: Sequence[AsyncIterator[RequestOutput]],
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """Outputs of all `streams` as they come, each with the place of its stream.

    The first failure ends the merge. However it ends, every stream is closed, which aborts its request.
    """
    if len(streams) == 1:
        with caller_errors():
            async with _closing(streams[0]) as stream:
                async for output in stream:
                    yield 0, output
        return
    arrived: asyncio.Queue[tuple[int, RequestOutput | Exception | None]] = asyncio.Queue()
    tasks = [asyncio.create_task(_pump(place, stream, arrived)) for place, stream in enumerate(streams)]
    try:
        running = len(tasks)
        while running:
            place, item = await arrived.get()
            if item is None:
                running -= 1
            elif isinstance(item, Exception):
                with caller_errors():
                    raise item
            else:
                yield place, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(
    place: int,
    source: AsyncIterator[RequestOutput],
    arrived: asyncio.Queue[tuple[int, RequestOutput | Exception | None]],
) -> None:
    end: Exception | None = None
    try:
        async with _closing(source) as stream:
            async for output in stream:
                arrived.put_nowait((place, output))
    except Exception as error:
        end = error
    arrived.put_nowait((place, end))


def _closing(stream: AsyncIterator[RequestOutput]) -> aclosing[AsyncGenerator[RequestOutput, None]]:
    """The engine's streams are generators; leaving one early must close it at once, not when it is collected."""
    return aclosing(cast("AsyncGenerator[RequestOutput, None]", stream))


async def send_events(
    request: web.Request,
    events: AsyncGenerator[Any, None],
    keep_alive_seconds: float = 0.0,
    written: EventFormat = OPENAI_CHUNKS,
) -> web.StreamResponse:
    """Answer with `events`, structs or plain data, as server-sent events.

    The response begins with the first event, so that what fails before it gets its own status; what fails after it
    becomes an error event. With `keep_alive_seconds` it begins that early at the latest, and a comment is sent
    whenever it has been quiet for so long.
    """
    if keep_alive_seconds:
        events = _with_pauses(events, keep_alive_seconds)
    async with aclosing(events):
        first = await anext(events)
        response = web.StreamResponse(headers=_HEADERS)
        try:
            await response.prepare(request)
            await response.write(_bytes(first, written))
            await _write_rest(response, events, written)
            await response.write_eof(written.end)
        except ConnectionResetError:
            pass  # the client has gone; closing the events aborts the request
    return response


async def _write_rest(response: web.StreamResponse, events: AsyncGenerator[Any, None], written: EventFormat) -> None:
    while True:
        try:
            event = await anext(events)
        except StopAsyncIteration:
            return
        except Exception as error:
            await response.write(written.failure(error_info(error)))
            return
        await response.write(_bytes(event, written))


async def _with_pauses(events: AsyncGenerator[Any, None], seconds: float) -> AsyncGenerator[Any, None]:
    """`events`, and `_PAUSE` wherever the next one takes longer than so many seconds."""
    async with aclosing(events):
        while True:
            coming = asyncio.ensure_future(anext(events))
            try:
                while not (await asyncio.wait({coming}, timeout=seconds))[0]:
                    yield _PAUSE
            finally:
                coming.cancel()  # no effect once it has come
                await asyncio.gather(coming, return_exceptions=True)
            try:
                event = coming.result()
            except StopAsyncIteration:
                return
            yield event


def _bytes(event: Any, written: EventFormat) -> bytes:
    return b": keep-alive\n\n" if event is _PAUSE else written.event(event)
