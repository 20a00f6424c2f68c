"""POST /v1/chat/completions/batch: several conversations in one request, one choice for each."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec
from aiohttp import web

from .body import read_body, value_error
from .chat import open_chat
from .context import CONTEXT
from .errors import json_response
from .protocol import ChatCompletionRequest
from .request_checks import MAX_PROMPTS
from .responses import ChatCompletionResponse, CompletionTokensDetails, PromptTokensDetails, Usage


class BatchChatRequest(ChatCompletionRequest, kw_only=True):
    """Body of POST /v1/chat/completions/batch: chat's, but for the conversations."""

    messages: list[list[dict[str, Any]]]  # pyright: ignore[reportIncompatibleVariableOverride]


_decoder = msgspec.json.Decoder(BatchChatRequest)


async def create_chat_batch(request: web.Request) -> web.Response:
    """Answer each conversation; choice i is the answer to conversation i. One that fails fails them all."""
    context = request.app[CONTEXT]
    body = await read_body(request, _decoder)
    _check(body)
    response_id = context.response_id("chatcmpl", request, body)
    fields = msgspec.structs.asdict(body)
    chats = []
    for place, conversation in enumerate(body.messages):
        single = ChatCompletionRequest(**{**fields, "messages": conversation})
        chats.append(await open_chat(request, single, f"{response_id}-{place}"))
    tasks = [asyncio.create_task(chat.response()) for chat in chats]
    try:
        answers = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    choices = [msgspec.structs.replace(answer.choices[0], index=place) for place, answer in enumerate(answers)]
    return json_response(
        ChatCompletionResponse(
            response_id,
            answers[0].created,
            context.model_name,
            choices,
            _sum([answer.usage for answer in answers]),
            system_fingerprint=context.settings.fingerprint,
        )
    )


def _check(body: BatchChatRequest) -> None:
    if not body.messages:
        raise value_error("`messages` must hold at least one conversation.", "messages")
    if len(body.messages) > MAX_PROMPTS:
        raise value_error(
            f"`messages` may hold at most {MAX_PROMPTS} conversations, got {len(body.messages)}.", "messages"
        )
    for name in ("stream", "tools", "prompt_logprobs", "return_prompt_text"):
        if getattr(body, name) not in (None, False):
            raise value_error(f"`{name}` cannot be used with a batch of conversations.", name)
    if body.n not in (None, 1):
        raise value_error("`n` must be 1 with a batch of conversations.", "n")


def _sum(usages: Sequence[Usage]) -> Usage:
    prompt, reasoning = usages[0].prompt_tokens_details, usages[0].completion_tokens_details
    if prompt is not None:
        prompt = PromptTokensDetails(sum(each.prompt_tokens_details.cached_tokens or 0 for each in usages))  # type: ignore[union-attr]
    if reasoning is not None:
        reasoning = CompletionTokensDetails(sum(each.completion_tokens_details.reasoning_tokens for each in usages))  # type: ignore[union-attr]
    return Usage(
        sum(usage.prompt_tokens for usage in usages),
        sum(usage.total_tokens for usage in usages),
        sum(usage.completion_tokens for usage in usages),
        prompt,
        reasoning,
    )
