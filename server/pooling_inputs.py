"""From the body of a pooling request to the engine's prompts, and from these to its outputs."""

from __future__ import annotations

from contextlib import aclosing
from typing import Any

from aiohttp import web

from ..engine.pooling.outputs import PoolingOutput, PoolingRequestOutput
from ..models.pooling_config import PoolingConfig
from ..scheduler.pooling_params import PoolingParams
from .body import value_error
from .context import ServerContext
from .errors import RequestError, caller_errors, not_supported
from .pooling_protocol import InputBody, PoolingBody, RerankRequest, ScoreRequest
from .request_checks import check_cache_salt, check_messages, check_own_template
from .streaming import merge_outputs

MAX_INPUTS = 2048  # of one body, as OpenAI's limit
MAX_RUNNING = 256  # requests of one body that are with the engine at a time


def check_body(body: PoolingBody) -> None:
    """Rules of all routes; raises `RequestError` (400)."""
    if body.normalize is not None:
        raise value_error("Parameter `normalize` was removed; use `use_activation` instead.", "normalize")
    if body.padding not in (None, "do_not_pad"):
        raise not_supported("padding")
    if body.truncation_side not in (None, "left", "right"):
        raise value_error("`truncation_side` must be left or right.", "truncation_side")
    check_cache_salt(body.cache_salt)
    if isinstance(body, (ScoreRequest, RerankRequest)):
        for name in ("max_tokens_per_query", "max_tokens_per_doc"):
            if getattr(body, name):
                raise not_supported(name)


async def pooling_of(context: ServerContext, task: str | None, api: str) -> PoolingConfig:
    """How the engine pools, once it is ready. Raises 404 where its model has not this task (None: any), before the body
    is looked at, as for a route that is not there."""
    await context.engine.wait_ready()
    pooling = context.engine.pooling_config
    if pooling is None or (task is not None and task not in pooling.tasks):
        raise RequestError(f"The model does not support the {api} API.", status=404)
    return pooling


def check_inputs(context: ServerContext, body: InputBody) -> list[Any]:
    """The inputs one by one, each text or token ids; none where there is a conversation instead. Raises 400."""
    check_body(body)
    if body.messages is not None:
        if body.input is not None:
            raise value_error("give either `input` or `messages`.", "input")
        check_messages(body.messages)
        if body.continue_final_message and body.add_generation_prompt:
            raise value_error(
                "Cannot set both `continue_final_message` and `add_generation_prompt` to True.",
                "continue_final_message",
            )
        check_own_template(body, trust_chat_template=context.settings.trust_request_chat_template)
        return []
    given = body.input
    if given is None:
        raise value_error("give `input` or `messages`.", "input")
    if isinstance(given, str):
        return [given]
    if not given:
        raise value_error("`input` must not be empty.", "input")
    kinds = {type(item) for item in given}
    if len(kinds) > 1:
        raise value_error("`input` must hold only texts, only token ids, or only lists of token ids.", "input")
    inputs = [given] if kinds == {int} else given
    check_count(len(inputs), "input")
    return inputs


def check_count(count: int, name: str) -> None:
    """Raises 400 where a body holds more than the server takes at once."""
    if count > MAX_INPUTS:
        raise value_error(f"`{name}` may hold at most {MAX_INPUTS} elements, got {count}.", name)


async def read_prompts(context: ServerContext, body: InputBody, inputs: list[Any]) -> list[dict[str, Any]]:
    """The engine's prompts; of a conversation the one that its template writes."""
    add_special_tokens = body.add_special_tokens
    if body.messages is not None:
        options: dict[str, Any] = {**context.settings.default_chat_template_kwargs, **(body.chat_template_kwargs or {})}
        own_template = options.pop("chat_template", None) or body.chat_template
        with caller_errors():
            text = await context.engine.render_chat(
                body.messages,
                add_generation_prompt=bool(body.add_generation_prompt),
                continue_final_message=bool(body.continue_final_message),
                chat_template=own_template or context.settings.chat_template,
                chat_template_kwargs=options,
            )
        inputs = [text]
        add_special_tokens = bool(add_special_tokens)  # the template writes them itself
    prompts: list[dict[str, Any]] = []
    for each in inputs:
        prompt: dict[str, Any] = {"prompt": each} if isinstance(each, str) else {"prompt_token_ids": each}
        if add_special_tokens is not None and isinstance(each, str):
            prompt["add_special_tokens"] = add_special_tokens
        if body.messages is None and getattr(body, "prompt_name", None) is not None:
            prompt["prompt_name"] = getattr(body, "prompt_name")  # noqa: B009  (not of every body)
        prompts.append(prompt)
    return prompts


async def pool(
    context: ServerContext,
    request: web.Request,
    body: PoolingBody,
    prompts: list[dict[str, Any]],
    params: PoolingParams,
    response_id: str,
) -> list[PoolingRequestOutput[PoolingOutput]]:
    """What every prompt comes to, in their order. The first failure ends the others; so does the client's leaving."""
    for prompt in prompts:
        if body.truncation_side is not None:
            prompt["truncation_side"] = body.truncation_side
        if body.cache_salt is not None:
            prompt["cache_salt"] = body.cache_salt
    params = params.clone(truncate_prompt_tokens=body.truncate_prompt_tokens)
    priority = context.priority(request, body)
    outputs: dict[int, Any] = {}
    for first in range(0, len(prompts), MAX_RUNNING):
        streams: list[Any] = [
            context.engine.encode(prompt, params, f"{response_id}-{place}", priority=priority)
            for place, prompt in enumerate(prompts[first : first + MAX_RUNNING], first)
        ]
        async with aclosing(merge_outputs(streams)) as merged:
            async for place, output in merged:
                outputs[first + place] = output
    return [outputs[place] for place in range(len(prompts))]
