"""One response while it is made: what it says so far, and the events that tell it."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec

from ..chat import ChatCompletion, ChatPiece
from ..errors import error_info
from .output_items import Event, OutputItems
from .protocol import (
    InputTokensDetails,
    OutputTokensDetails,
    ResponseBody,
    ResponseError,
    ResponsesRequest,
    ResponseUsage,
)


class ResponseRun:
    """Answers one request; `response` is as far as the answer is."""

    def __init__(self, body: ResponsesRequest, chat: ChatCompletion, response_id: str, *, stored: bool) -> None:
        self._chat = chat
        self._items = OutputItems()
        self._shows_messages = bool(body.enable_response_messages)
        self._said: list[ChatPiece] = []  # kept for `output_messages` only
        background = bool(body.background)
        text = body.text
        self.response = ResponseBody(
            id=response_id,
            created_at=chat.created,
            status="queued" if background else "in_progress",
            background=background,
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            max_tool_calls=body.max_tool_calls,
            model=chat.context.model_name,
            output=self._items.items,
            parallel_tool_calls=body.parallel_tool_calls is not False,
            previous_response_id=body.previous_response_id,
            prompt_cache_key=body.prompt_cache_key,
            reasoning=None if body.reasoning is None else msgspec.to_builtins(body.reasoning),
            safety_identifier=body.safety_identifier,
            store=stored,
            temperature=chat.params.temperature,
            text={
                "format": (text and text.format) or {"type": "text"},
                **({"verbosity": text.verbosity} if text and text.verbosity else {}),
            },
            tool_choice="auto" if body.tool_choice is None else body.tool_choice,
            tools=[{"description": None, "parameters": None, "strict": None, **tool} for tool in body.tools or []],
            top_logprobs=body.top_logprobs or 0,
            top_p=chat.params.top_p,
            truncation=body.truncation or "disabled",
            user=body.user,
            metadata=body.metadata or {},
        )

    async def finish(self) -> ResponseBody:
        """The whole response; raises what keeps it from being made."""
        async with aclosing(self._events()) as events:
            async for _ in events:
                pass
        return self.response

    async def events(self) -> AsyncGenerator[Event, None]:
        """The events of a stream, numbered from 0. What fails after the first one is told as the last one."""
        number = 0
        try:
            async with aclosing(self._events()) as events:
                async for event in events:
                    yield {**event, "sequence_number": number}
                    number += 1
        except Exception as error:
            if not number:
                raise
            info = error_info(error)
            self._fail("server_error" if info.code >= 500 else "invalid_prompt", info.message)
            yield {"type": "response.failed", "response": self.response, "sequence_number": number}

    async def _events(self) -> AsyncGenerator[Event, None]:
        """An event holds `response` itself, which goes on changing: read it before the next."""
        background = self.response.background
        if background:
            yield self._lifecycle_event("created")
            yield self._lifecycle_event("queued")
        piece: ChatPiece | None = None
        async with aclosing(self._chat.pieces()) as pieces:
            async for piece in pieces:
                if self.response.usage is None:
                    self.response.status = "in_progress"
                    if not background:
                        yield self._lifecycle_event("created")
                    yield self._lifecycle_event("in_progress")
                self.response.usage = _usage(piece)
                if self._shows_messages:
                    self._said.append(piece)
                logprobs = [] if piece.logprobs is None else piece.logprobs.content
                for event in self._items.feed(piece.deltas, logprobs):
                    yield event
        assert piece is not None  # the engine ends a stream with an output or an error
        for event in self._items.finish(cut=piece.finish_reason in ("length", "abort")):
            yield event
        yield self._lifecycle_event(self._end(piece.finish_reason))

    def _end(self, finish_reason: str | None) -> str:
        """Note how it ended; the name of its last event."""
        response = self.response
        if self._said:
            self._show_messages()
        if finish_reason == "abort":
            self._fail("server_error", "The server ended the request before it was complete.")
        elif finish_reason == "length":
            response.status = "incomplete"
            response.incomplete_details = {"reason": "max_output_tokens"}
        else:
            response.status = "completed"
            response.completed_at = int(time.time())
        return response.status

    def _fail(self, code: str, message: str) -> None:
        self.response.status = "failed"
        self.response.error = ResponseError(code, message)

    def cancel(self) -> None:
        """Note that it was stopped; what has been said stays."""
        if self.response.output:
            self._items.finish(cut=True)
        self.response.status = "cancelled"

    def fail(self, error: BaseException) -> None:
        """Note a failure that came before the first event."""
        info = error_info(error)
        self._fail("server_error" if info.code >= 500 else "invalid_prompt", info.message)

    def _show_messages(self) -> None:
        prompt_ids = self._said[0].output.prompt_token_ids
        completions = [piece.output.outputs[0] for piece in self._said]
        text = "".join(completion.text for completion in completions)
        token_ids = [token_id for completion in completions for token_id in completion.token_ids]
        self.response.input_messages = [_raw_message(self._chat.prompt_text, prompt_ids)]
        self.response.output_messages = [_raw_message(text, token_ids)]

    def _lifecycle_event(self, name: str) -> Event:
        return {"type": f"response.{name}", "response": self.response}


def _usage(piece: ChatPiece) -> ResponseUsage:
    usage = piece.usage
    reasoning = usage.completion_tokens_details
    return ResponseUsage(
        usage.prompt_tokens,
        InputTokensDetails(piece.output.num_cached_tokens or 0),
        usage.completion_tokens,
        OutputTokensDetails(0 if reasoning is None else reasoning.reasoning_tokens),
        usage.total_tokens,
    )


def _raw_message(text: str, token_ids: list[int]) -> dict[str, Any]:
    return {"type": "raw_message_tokens", "message": text, "tokens": token_ids}
