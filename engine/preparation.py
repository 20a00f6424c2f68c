"""Requests made ready for the core while an event loop goes on: `prepare` and `prepare_pooling`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from ..scheduler.pooling_params import PoolingParams
from ..scheduler.sampling_params import SamplingParams
from .front import Front
from .input_processor import InputProcessor
from .inputs import PromptType, is_conversation
from .pooling.input import PoolingInputProcessor
from .structured.threads import GrammarThreads

# Longer texts are tokenized in a thread, so that they do not hold up the event loop.
INLINE_ENCODE_CHARACTERS = 4096


async def prepare(
    front: Front, inputs: InputProcessor, grammars: GrammarThreads, prompt: PromptType, params: SamplingParams
) -> tuple[PromptType, str | None]:
    """Read a conversation, tokenize a long text and check a grammar, all in threads -> the prompt and the grammar as
    `InputProcessor.process` takes them. Raises `ValidationError`, and `RequestRejectedError` where grammars have no
    place."""
    if is_conversation(prompt) or (isinstance(prompt, Mapping) and "messages" in prompt):
        prompt = await asyncio.to_thread(front.read_chat, prompt)
    text = prompt if isinstance(prompt, str) else prompt.get("prompt") if isinstance(prompt, Mapping) else None
    if isinstance(text, str) and len(text) > INLINE_ENCODE_CHARACTERS:
        given: dict[str, Any] = dict(prompt) if isinstance(prompt, Mapping) else {"prompt": text}
        if given.get("prompt_token_ids") is None:
            given["prompt_token_ids"] = await asyncio.to_thread(inputs.encode, text)
        prompt = given  # type: ignore[assignment]
    if params.structured_outputs is None:
        return prompt, None
    return prompt, await grammars.check(front.grammar_checker, params.structured_outputs)


async def prepare_pooling(
    front: Front, inputs: PoolingInputProcessor, prompt: Any, params: PoolingParams
) -> tuple[Any, PoolingParams]:
    """As `prepare`, for a pooling model -> tokens and parameters as `PoolingInputProcessor.admit` takes them."""
    if is_conversation(prompt):
        prompt = {"messages": prompt, "add_generation_prompt": False}
    if isinstance(prompt, Mapping) and "messages" in prompt:
        prompt = await asyncio.to_thread(front.read_chat, prompt)
    params = inputs.complete(params)
    texts = (prompt.get("prompt"), prompt.get("text_pair")) if isinstance(prompt, Mapping) else (prompt,)
    if sum(len(text) for text in texts if isinstance(text, str)) > INLINE_ENCODE_CHARACTERS:
        return await asyncio.to_thread(inputs.tokenize, prompt, params), params
    return inputs.tokenize(prompt, params), params
