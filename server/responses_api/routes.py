"""POST /v1/responses, and GET, DELETE, cancel and input_items of a stored one."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager, suppress
from typing import Any

from aiohttp import web

from ...engine.errors import RequestRejectedError
from ..body import read_body, value_error
from ..chat import open_chat
from ..context import CONTEXT
from ..environment import read_switch
from ..errors import ErrorInfo, RequestError, json_response
from ..streaming import EventFormat, named_event_bytes, send_events
from .chat_request import chat_request, check_responses, input_items, wants_logprobs
from .input_items import Item
from .output_items import Event
from .protocol import ResponsesRequest, responses_decoder
from .run import ResponseRun
from .store import ResponseStore, StoredResponse

STORE = web.AppKey("omni_engine.response_store", ResponseStore)
STORES_RESPONSES = read_switch("VLLM_ENABLE_RESPONSES_API_STORE", default=True)
_OWN_NAMES = {"messages": "input", "response_format": "text.format"}  # by chat's
DEFAULT_LISTED, MAX_LISTED = 20, 100


def _failure(info: ErrorInfo) -> bytes:
    event = {"type": "error", "code": info.type, "message": info.message, "param": info.param, "sequence_number": 0}
    return named_event_bytes(event)


_EVENTS = EventFormat(named_event_bytes, _failure, b"")
_WRITTEN_EVENTS = EventFormat(lambda event: event, _failure, b"")


def add_response_routes(app: web.Application, prefix: str) -> None:
    """The routes under `prefix`; the application's store is made with the first."""
    if STORE not in app:
        app[STORE] = ResponseStore()
        app.on_cleanup.append(_stop_running)
    app.add_routes(
        [
            web.post(f"{prefix}/v1/responses", create_response),
            web.get(f"{prefix}/v1/responses/{{id}}", retrieve_response),
            web.delete(f"{prefix}/v1/responses/{{id}}", delete_response),
            web.post(f"{prefix}/v1/responses/{{id}}/cancel", cancel_response),
            web.get(f"{prefix}/v1/responses/{{id}}/input_items", list_input_items),
        ]
    )


async def _stop_running(app: web.Application) -> None:
    tasks = app[STORE].running_tasks()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def create_response(request: web.Request) -> web.StreamResponse:
    """Answer, and keep the answer unless `store` is false."""
    return await answer_response(request, await read_body(request, responses_decoder))


async def answer_response(request: web.Request, body: ResponsesRequest) -> web.StreamResponse:
    """The response to a Responses request, whole, as a stream, or as a promise."""
    context, store = request.app[CONTEXT], request.app[STORE]
    check_responses(body, stores=STORES_RESPONSES)
    stored = body.store is not False and STORES_RESPONSES
    response_id = _response_id(context.request_id(request, body))
    if stored and store.get(response_id) is not None:
        raise value_error(f"there is a response with this id already: {response_id}", "request_id")
    earlier = _earlier_items(store, body)
    chat_body = chat_request(body, earlier)
    # Logprobs belong to the text or to the reasoning, which only pieces tell apart. What is made in the background can
    # be looked at meanwhile.
    chat_body.stream = bool(body.stream or body.background) or wants_logprobs(body)
    with _own_names():
        chat = await open_chat(request, chat_body, response_id)
    run = ResponseRun(body, chat, response_id, stored=stored)
    entry = StoredResponse(run.response, earlier, input_items(body), keeps_events=bool(body.background and body.stream))
    keep_alive = context.settings.keep_alive_seconds
    if body.background:
        if store.is_full_of_running:
            raise RequestRejectedError("too many responses are made in the background; send the request again later")
        entry.task = asyncio.create_task(_make(store, entry, run))
        store.put(entry)
        if body.stream:
            return await send_events(request, entry.follow(0), keep_alive, _WRITTEN_EVENTS)
        return json_response(run.response)
    if body.stream:
        return await send_events(request, _events(store, entry, run, stored=stored), keep_alive, _EVENTS)
    await run.finish()
    if stored:
        store.put(entry)
    return json_response(run.response)


@contextmanager
def _own_names() -> Iterator[None]:
    """Errors name the fields of this API."""
    try:
        yield
    except RequestError as error:
        error.info.param = _OWN_NAMES.get(error.info.param or "", error.info.param)
        raise


def _response_id(own: str) -> str:
    return own if own.startswith("resp_") else f"resp_{own}"


def _earlier_items(store: ResponseStore, body: ResponsesRequest) -> list[Item]:
    if body.previous_response_id is None:
        return []
    entry = _stored(store, body.previous_response_id, "previous_response_id")
    if entry.is_running:
        raise value_error("the previous response is still being made.", "previous_response_id")
    return entry.conversation


async def _events(
    store: ResponseStore, entry: StoredResponse, run: ResponseRun, *, stored: bool
) -> AsyncGenerator[Event, None]:
    """The events of `run`; once it can say no more it is stored, so the last event finds it there."""
    async with aclosing(run.events()) as events:
        async for event in events:
            if stored and run.response.status not in ("queued", "in_progress"):
                store.put(entry)
            yield event


async def _make(store: ResponseStore, entry: StoredResponse, run: ResponseRun) -> None:
    """Make a response in the background, whatever becomes of the client that asked for it."""
    try:
        async with aclosing(run.events()) as events:
            async for event in events:
                entry.add_event(event)
    except asyncio.CancelledError:
        run.cancel()
        raise
    except Exception as error:
        run.fail(error)
    finally:
        if store.get(run.response.id) is entry:
            store.put(entry)
        entry.wake()


async def retrieve_response(request: web.Request) -> web.StreamResponse:
    """A stored response; with `stream` the events of one that is made in the background, from the beginning or after
    event `starting_after`."""
    context = request.app[CONTEXT]
    entry = _stored(request.app[STORE], request.match_info["id"])
    if request.query.get("stream", "false").lower() not in ("true", "1"):
        return json_response(entry.response)
    if entry.events is None:
        raise value_error("only a response that was created with background and stream has events.", "stream")
    start = _number(request, "starting_after", -1, least=-1) + 1
    return await send_events(request, _some(entry, start), context.settings.keep_alive_seconds, _WRITTEN_EVENTS)


async def _some(entry: StoredResponse, start: int) -> AsyncGenerator[bytes, None]:
    """The events from `start` on, and where there are none a comment: a stream begins with something."""
    async with aclosing(entry.follow(start)) as events:
        first = await anext(events, None)
        yield b": nothing new\n\n" if first is None else first
        async for event in events:
            yield event


async def delete_response(request: web.Request) -> web.Response:
    """Forget a stored response; one that is being made is stopped."""
    store = request.app[STORE]
    entry = _stored(store, request.match_info["id"])
    await _stop(entry)
    store.remove(entry.response.id)
    return json_response({"id": entry.response.id, "object": "response", "deleted": True})


async def cancel_response(request: web.Request) -> web.Response:
    """Stop a response that is made in the background; what it has said so far is kept."""
    entry = _stored(request.app[STORE], request.match_info["id"])
    if not entry.response.background:
        raise RequestError("Cannot cancel a synchronous response.", error_type="BadRequestError", param="response_id")
    if entry.is_running:
        await _stop(entry)
    if entry.response.status != "cancelled":
        message = f"Cannot cancel a response that has ended: {entry.response.status}"
        raise RequestError(message, error_type="BadRequestError", param="response_id")
    return json_response(entry.response)


async def _stop(entry: StoredResponse) -> None:
    if entry.task is not None and entry.is_running:
        entry.task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(entry.task, return_exceptions=True)


async def list_input_items(request: web.Request) -> web.Response:
    """The items a stored response was made from, the newest first unless `order` is asc; `limit`, `after`."""
    entry = _stored(request.app[STORE], request.match_info["id"])
    limit = _number(request, "limit", DEFAULT_LISTED, least=1)
    if limit > MAX_LISTED:
        raise value_error(f"`limit` must be at most {MAX_LISTED}, got {limit}.", "limit")
    order, after = request.query.get("order", "desc"), request.query.get("after")
    if order not in ("asc", "desc"):
        raise value_error("`order` must be asc or desc.", "order")
    items = [_listed(item, entry.response.id, place) for place, item in enumerate([*entry.earlier, *entry.new])]
    if order == "desc":
        items.reverse()
    if after is not None:
        places = [place for place, item in enumerate(items) if item["id"] == after]
        if not places:
            raise value_error("`after` is not the id of an item of this response.", "after")
        items = items[places[0] + 1 :]
    shown = items[:limit]
    ends = {"first_id": shown[0]["id"] if shown else None, "last_id": shown[-1]["id"] if shown else None}
    return json_response({"object": "list", "data": shown, **ends, "has_more": len(items) > limit})


def _listed(item: Item, response_id: str, place: int) -> dict[str, Any]:
    """An item with what clients left out: its type, its id, and the form of a list for its content."""
    name = uuid.uuid5(uuid.NAMESPACE_OID, f"{response_id} {place}").hex
    listed = {"type": "message", "id": f"msg_{name}", **item}
    if listed["type"] == "message" and isinstance(listed.get("content"), str):
        kind = "output_text" if listed.get("role") == "assistant" else "input_text"
        listed["content"] = [{"type": kind, "text": listed["content"]}]
    return listed


def _stored(store: ResponseStore, response_id: str, param: str = "response_id") -> StoredResponse:
    entry = store.get(response_id)
    if entry is None:
        message = f"Response with id '{response_id}' not found."
        raise RequestError(message, status=404, error_type="NotFoundError", param=param)
    return entry


def _number(request: web.Request, name: str, default: int, *, least: int) -> int:
    text = request.query.get(name)
    if text is None:
        return default
    try:
        number = int(text)
    except ValueError as error:
        raise value_error(f"`{name}` must be an integer.", name) from error
    if not least <= number < 2**63:
        raise value_error(f"`{name}` must be at least {least}.", name)
    return number
