"""From a Responses request to the chat request that answers it."""

from __future__ import annotations

from typing import Any

from ..body import value_error
from ..errors import not_supported
from ..protocol import ChatCompletionRequest, GenerationRequest
from .input_items import Item, Message, chat_messages, is_open
from .protocol import ResponsesRequest

INCLUDE_LOGPROBS = "message.output_text.logprobs"
# What OpenAI lets clients ask for but no item here can have, or is told without being asked for.
_INCLUDES = frozenset(
    (
        INCLUDE_LOGPROBS, "reasoning.encrypted_content", "code_interpreter_call.outputs",
        "computer_call_output.output.image_url", "file_search_call.results", "message.input_image.image_url",
        "web_search_call.action.sources", "web_search_call.results",
    )
)  # fmt: skip
_NOT_BUILT = ("conversation", "previous_response", "previous_input_messages")
_PASSED_ON = tuple(
    name
    for name in GenerationRequest.__struct_fields__
    if name not in ("n", "max_tokens", "echo", "stream_options", "prompt_logprobs", "response_format")
)


def check_responses(body: ResponsesRequest, *, stores: bool) -> None:
    """Rules that chat does not have; raises `RequestError` (400). `stores`: the server keeps responses."""
    if body.prompt is not None:
        raise not_supported("prompt", "prompt template is not supported")
    for name in _NOT_BUILT:
        if getattr(body, name) is not None:
            raise not_supported(name)
    if body.background and body.store is False:
        raise value_error("background can only be used when `store` is true", "background")
    if body.background and not stores:
        raise not_supported("background", "background needs the store of responses, which is off in this server")
    unknown = next((name for name in body.include or () if name not in _INCLUDES), None)
    if unknown is not None:
        raise value_error(f"`include` does not know: {unknown}", "include")
    if body.top_logprobs is not None and body.top_logprobs < 0:
        raise value_error("`top_logprobs` must not be negative.", "top_logprobs")
    if _format(body) is not None and body.structured_outputs:
        raise value_error("Cannot specify both structured_outputs and text.format", "structured_outputs")


def input_items(body: ResponsesRequest) -> list[Item]:
    """The new items of the conversation."""
    return [{"type": "message", "role": "user", "content": body.input}] if isinstance(body.input, str) else body.input


def chat_request(body: ResponsesRequest, earlier: list[Item]) -> ChatCompletionRequest:
    """The chat request of `body`, whose conversation begins with the items `earlier`."""
    new = input_items(body)
    messages: list[Message] = [{"role": "system", "content": body.instructions}] if body.instructions else []
    messages += chat_messages([*earlier, *new])
    fields: dict[str, Any] = {name: getattr(body, name) for name in _PASSED_ON}
    tools, tool_choice = _tools(body)
    reasoning = body.reasoning
    if is_open(new):
        fields |= {"continue_final_message": True, "add_generation_prompt": False}
    if body.truncation == "auto" and body.truncate_prompt_tokens is None:
        fields["truncate_prompt_tokens"] = -1
    return ChatCompletionRequest(
        **fields,
        messages=messages,
        max_completion_tokens=body.max_output_tokens,
        logprobs=wants_logprobs(body) or None,
        top_logprobs=body.top_logprobs if wants_logprobs(body) else None,
        tools=tools,
        tool_choice=tool_choice,
        parallel_tool_calls=body.parallel_tool_calls,
        reasoning_effort=None if reasoning is None else reasoning.effort,
        response_format=_response_format(body),
        chat_template=body.chat_template,
        chat_template_kwargs=body.chat_template_kwargs,
    )


def wants_logprobs(body: ResponsesRequest) -> bool:
    return INCLUDE_LOGPROBS in (body.include or ())


def _tools(body: ResponsesRequest) -> tuple[list[dict[str, Any]] | None, str | dict[str, Any] | None]:
    """`tools` and `tool_choice` as chat has them."""
    tools = [_chat_tool(tool, f"body.tools.{place}") for place, tool in enumerate(body.tools or [])]
    choice = body.tool_choice
    if isinstance(choice, dict):
        kind, allowed = choice.get("type"), choice.get("tools")
        if kind == "function":
            choice = {"type": "function", "function": {"name": choice.get("name")}}
        elif kind == "allowed_tools" and isinstance(allowed, list):
            names = [tool.get("name") if isinstance(tool, dict) else None for tool in allowed]
            tools = [tool for tool in tools if tool["function"].get("name") in names]
            choice = choice.get("mode")
        else:
            raise not_supported("tool_choice", f"not supported yet by this server: tool_choice of type {kind!r}")
    if not tools and choice == "auto":
        choice = None  # the API's default, which asks for nothing here
    return tools or None, choice


def _chat_tool(tool: dict[str, Any], place: str) -> dict[str, Any]:
    kind = tool.get("type")
    if kind != "function":
        raise not_supported(place, f"not supported yet by this server: a tool of type {kind!r}; use functions")
    known = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: tool[name] for name in known if tool.get(name) is not None}}


def _format(body: ResponsesRequest) -> dict[str, Any] | None:
    """text.format, None where it leaves the text free."""
    given = None if body.text is None else body.text.format
    return None if given is None or given.get("type") == "text" else given


def _response_format(body: ResponsesRequest) -> dict[str, Any] | None:
    """text.format as chat has it: there the schema and its name are one level down."""
    given = _format(body)
    if given is None or given.get("type") != "json_schema":
        return given
    schema = {name: value for name, value in given.items() if name != "type"}
    return {"type": "json_schema", "json_schema": schema}
