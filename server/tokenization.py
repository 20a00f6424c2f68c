"""POST /tokenize and /detokenize: text or a conversation to the model's token ids, and back."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from aiohttp import web

from .body import read_body, value_error
from .context import CONTEXT, ServerContext
from .errors import RequestError, caller_errors, json_response
from .protocol import TokenizeRequest, detokenize_decoder, tokenize_decoder
from .request_checks import check_messages, check_template_options
from .responses import DetokenizeResponse, TokenizeResponse

if TYPE_CHECKING:
    from ..models.tokenizer import Tokenizer


async def tokenize(request: web.Request) -> web.Response:
    """The token ids of a text or a conversation, of whatever length."""
    context = request.app[CONTEXT]
    body = await read_body(request, tokenize_decoder)
    if (body.prompt is None) == (body.messages is None):
        raise value_error("give either `prompt` or `messages`.", "prompt")
    if body.messages is not None:
        check_messages(body.messages)
        check_template_options(body, trust_chat_template=context.settings.trust_request_chat_template)
    context.check_model(body.model)
    await context.engine.wait_ready()
    tokenizer = _tokenizer(context)
    adds_special = body.prompt is not None if body.add_special_tokens is None else body.add_special_tokens
    with caller_errors():
        text = body.prompt if body.prompt is not None else await _conversation_text(context, body)
        # A thread, because there is no limit to the length.
        token_ids = await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=adds_special)
    token_strs = [tokenizer.id_to_token(i) or "" for i in token_ids] if body.return_token_strs else None
    return json_response(TokenizeResponse(len(token_ids), context.engine.max_model_len, token_ids, token_strs))


async def _conversation_text(context: ServerContext, body: TokenizeRequest) -> str:
    options: dict[str, Any] = {**context.settings.default_chat_template_kwargs, **(body.chat_template_kwargs or {})}
    own_template = options.pop("chat_template", None) or body.chat_template
    return await context.engine.render_chat(
        body.messages or [],
        tools=body.tools,
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
        chat_template=own_template or context.settings.chat_template,
        chat_template_kwargs=options,
    )


async def detokenize(request: web.Request) -> web.Response:
    """The text of token ids, special tokens included."""
    context = request.app[CONTEXT]
    body = await read_body(request, detokenize_decoder)
    context.check_model(body.model)
    await context.engine.wait_ready()
    tokenizer = _tokenizer(context)
    # A model's vocabulary may be padded beyond its tokenizer's.
    end = max(tokenizer.max_token_id + 1, context.engine.model_config.vocab_size)
    wrong = next((token_id for token_id in body.tokens if token_id >= end), None)
    if wrong is not None:
        raise value_error(f"Token id {wrong} is out of vocabulary", "tokens")
    text = await asyncio.to_thread(tokenizer.decode, body.tokens, skip_special_tokens=False)
    return json_response(DetokenizeResponse(text))


async def tokenizer_info(request: web.Request) -> web.Response:
    """The tokenizer's own settings: tokenizer_config.json with its special tokens and the chat template in use."""
    context = request.app[CONTEXT]
    await context.engine.wait_ready()
    tokenizer = _tokenizer(context)
    info = await asyncio.to_thread(context.engine.tokenizer_config)
    template = context.settings.chat_template or tokenizer.chat_template
    return json_response(
        {"tokenizer_class": None, **info, **tokenizer.special_tokens_map, "vocab_size": tokenizer.vocab_size,
         "chat_template": template}
    )  # fmt: skip


def _tokenizer(context: ServerContext) -> Tokenizer:
    tokenizer = context.engine.tokenizer
    if tokenizer is None:
        raise RequestError("This server was started without a tokenizer.", error_type="BadRequestError")
    return tokenizer
