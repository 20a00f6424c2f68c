"""POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from aiohttp import web

from ...engine.errors import EngineShutdownError
from ..body import read_body
from ..chat import ChatCompletion, ChatPiece, open_chat, render_prompt, template_options
from ..context import CONTEXT
from ..errors import json_response
from ..request_checks import check_chat, check_tool_types
from ..streaming import EventFormat, named_event_bytes, send_events
from .chat_request import chat_request
from .content_blocks import ContentBlocks, Event
from .protocol import MessageBody, MessagesRequest, MessageUsage, count_decoder, error_body, messages_decoder

MESSAGES_PATH, COUNT_PATH = "/v1/messages", "/v1/messages/count_tokens"
_EVENTS = EventFormat(named_event_bytes, lambda info: named_event_bytes(error_body(info)), b"")
_STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}


def add_message_routes(app: web.Application, prefix: str) -> None:
    """The routes under `prefix`."""
    app.add_routes(
        [
            web.post(f"{prefix}{MESSAGES_PATH}", create_message),
            web.post(f"{prefix}{COUNT_PATH}", count_tokens),
        ]
    )


async def create_message(request: web.Request) -> web.StreamResponse:
    """Answer a conversation with one message."""
    return await answer_messages(request, await read_body(request, messages_decoder))


async def answer_messages(request: web.Request, body: MessagesRequest) -> web.StreamResponse:
    """The response to a Messages request, whole or as a stream."""
    context = request.app[CONTEXT]
    own = context.request_id(request, body)
    message_id = own if own.startswith("msg_") else f"msg_{own}"
    run = _MessageRun(await open_chat(request, chat_request(body), message_id), message_id)
    if body.stream:
        return await send_events(request, run.events(), context.settings.keep_alive_seconds, _EVENTS)
    async with aclosing(run.events()) as events:
        async for _ in events:
            pass
    assert run.message is not None
    return json_response(run.message)


async def count_tokens(request: web.Request) -> web.Response:
    """How many tokens the prompt of a conversation has; nothing is generated."""
    context = request.app[CONTEXT]
    body = chat_request(await read_body(request, count_decoder))
    check_chat(body, trust_chat_template=context.settings.trust_request_chat_template)
    if body.tools is not None:
        check_tool_types(body.tools)
    context.check_model(body.model)
    await context.engine.wait_ready()
    text, prompt = await render_prompt(context, body, template_options(context, body))
    token_ids = prompt.get("prompt_token_ids")
    if token_ids is None:
        token_ids = await context.engine.tokenize(text)
    return json_response({"input_tokens": len(token_ids)})


class _MessageRun:
    """One message while it is made; `message` is there once it has begun."""

    def __init__(self, chat: ChatCompletion, message_id: str) -> None:
        self._chat = chat
        self._id = message_id
        self._content = ContentBlocks()
        self.message: MessageBody | None = None

    async def events(self) -> AsyncGenerator[Event, None]:
        piece: ChatPiece | None = None
        async with aclosing(self._chat.pieces()) as pieces:
            async for piece in pieces:
                if self.message is None:
                    self.message = MessageBody(id=self._id, model=self._chat.context.model_name, usage=_usage(piece, 0))
                    yield {"type": "message_start", "message": self.message}
                for event in self._content.feed(piece.deltas):
                    yield event
        assert piece is not None and self.message is not None  # the engine ends a stream with an output or an error
        if piece.finish_reason == "abort":
            raise EngineShutdownError("the server ended the request before it was complete")
        for event in self._content.finish():
            yield event
        self.message.content = self._content.blocks
        self.message.usage = _usage(piece, piece.usage.completion_tokens)
        self._tell_end(self.message, piece)
        ended = {"stop_reason": self.message.stop_reason, "stop_sequence": self.message.stop_sequence}
        yield {"type": "message_delta", "delta": ended, "usage": self.message.usage}
        yield {"type": "message_stop"}

    def _tell_end(self, message: MessageBody, piece: ChatPiece) -> None:
        if piece.finish_reason == "stop" and self._content.has_calls:
            message.stop_reason = "tool_use"  # a named function: chat says stop
        elif piece.finish_reason == "stop" and isinstance(piece.stop_reason, str):
            message.stop_reason, message.stop_sequence = "stop_sequence", piece.stop_reason
        else:
            message.stop_reason = _STOP_REASONS.get(piece.finish_reason or "", "end_turn")


def _usage(piece: ChatPiece, output_tokens: int) -> MessageUsage:
    cached = piece.output.num_cached_tokens or 0
    return MessageUsage(piece.usage.prompt_tokens - cached, output_tokens, cache_read_input_tokens=cached)
