"""From a Messages request to the chat request that answers it."""

from __future__ import annotations

from typing import Any

import msgspec

from ..body import value_error
from ..errors import not_supported
from ..protocol import ChatCompletionRequest, GenerationRequest
from .protocol import MIN_THINKING_BUDGET, CountTokensRequest, InputMessage, MessagesRequest, Thinking, Tool

_ROLES = {
    "user": "user",
    "assistant": "assistant",
    "system": "system",
    "ctx": "user",
    "msg": "user",
}  # Claude Code's too
_TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
_PASSED_ON = tuple(
    name
    for name in GenerationRequest.__struct_fields__
    if name not in ("n", "max_tokens", "echo", "stream_options", "prompt_logprobs", "response_format", "stop")
)

Message = dict[str, Any]
Block = dict[str, Any]


def chat_request(body: CountTokensRequest) -> ChatCompletionRequest:
    """The chat request of `body`; raises `RequestError` (400) for what is wrong or not supported."""
    messages: list[Message] = []
    if body.system:
        messages.append({"role": "system", "content": _text_content(body.system, "body.system")})
    for place, message in enumerate(body.messages):
        messages += _chat_messages(message, f"body.messages.{place}")
    fields: dict[str, Any] = {name: getattr(body, name) for name in _PASSED_ON}
    if _is_open(body.messages, messages):
        fields |= {"continue_final_message": True, "add_generation_prompt": False}
    choice, output = body.tool_choice, body.output_config
    options = dict(body.chat_template_kwargs or {})
    if body.thinking is not None:
        options.setdefault("enable_thinking", body.thinking.type != "disabled")
        if body.thinking.type == "enabled":
            fields["thinking_token_budget"] = _thinking_budget(body.thinking, body)
    if isinstance(body, MessagesRequest):
        for name in ("container", "mcp_servers"):
            if getattr(body, name):
                raise not_supported(name)
        fields |= {"max_completion_tokens": body.max_tokens, "stop": body.stop_sequences or body.stop}
    if output is not None and output.format is not None:
        schema = {"name": "output", "schema": output.format.schema}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    return ChatCompletionRequest(
        **fields,
        messages=messages,
        tools=[_chat_tool(tool, f"body.tools.{place}") for place, tool in enumerate(body.tools or [])] or None,
        tool_choice=_tool_choice(body),
        parallel_tool_calls=False if choice is not None and choice.disable_parallel_tool_use else None,
        reasoning_effort=None if output is None else output.effort,
        chat_template=body.chat_template,
        chat_template_kwargs=options or None,
    )


def _is_open(given: list[InputMessage], messages: list[Message]) -> bool:
    """Whether the last message is the beginning of the answer, for the model to go on with."""
    return bool(given) and messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]


def _thinking_budget(thinking: Thinking, body: CountTokensRequest) -> int:
    budget = thinking.budget_tokens
    if budget is None or budget < MIN_THINKING_BUDGET:
        raise value_error(f"`budget_tokens` must be at least {MIN_THINKING_BUDGET}.", "thinking.budget_tokens")
    if isinstance(body, MessagesRequest) and budget >= body.max_tokens:
        raise value_error("`budget_tokens` must be less than `max_tokens`.", "thinking.budget_tokens")
    return budget


def _tool_choice(body: CountTokensRequest) -> str | dict[str, Any] | None:
    choice = body.tool_choice
    if choice is None:
        return None
    if choice.type != "tool":
        return None if choice.type == "auto" and not body.tools else _TOOL_CHOICES[choice.type]
    if not choice.name:
        raise value_error("`name` is needed where the type is tool.", "tool_choice.name")
    return {"type": "function", "function": {"name": choice.name}}


def _chat_tool(tool: Tool, place: str) -> dict[str, Any]:
    if tool.type not in (None, "custom"):
        raise not_supported(place, f"not supported yet by this server: a tool of type {tool.type!r}; use your own")
    if tool.input_schema is None:
        raise value_error("`input_schema` is missing.", f"{place}.input_schema")
    function: dict[str, Any] = {"name": tool.name, "parameters": {"type": "object", **tool.input_schema}}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _chat_messages(message: InputMessage, place: str) -> list[Message]:
    """One message, or several where it holds results of tools: those are messages of their own in a chat."""
    role = _ROLES.get(message.role)
    if role is None:
        raise value_error(f"`role` must be user, assistant or system, got {message.role!r}.", f"{place}.role")
    if isinstance(message.content, str):
        return [{"role": role, "content": message.content}]
    if role == "assistant":
        return [_assistant_message(message.content, f"{place}.content")]
    messages: list[Message] = []
    parts: list[Block] = []
    for number, block in enumerate(message.content):
        where = f"{place}.content.{number}"
        if block.get("type") != "tool_result":
            parts.append({"type": "text", "text": _text(block, where)})
            continue
        if parts:
            messages.append({"role": role, "content": parts})
            parts = []
        content = _text_content(block.get("content") or "", f"{where}.content")
        messages.append({"role": "tool", "tool_call_id": _field(block, "tool_use_id", str, where), "content": content})
    if parts or not messages:
        messages.append({"role": role, "content": parts})
    return messages


def _assistant_message(blocks: list[Block], place: str) -> Message:
    parts: list[Block] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for number, block in enumerate(blocks):
        where, kind = f"{place}.{number}", block.get("type")
        if kind == "thinking":
            thoughts.append(_field(block, "thinking", str, where))
        elif kind == "tool_use":
            arguments = msgspec.json.encode(_field(block, "input", dict, where)).decode()
            function = {"name": _field(block, "name", str, where), "arguments": arguments}
            calls.append({"id": _field(block, "id", str, where), "type": "function", "function": function})
        elif kind != "redacted_thinking":  # only Anthropic can read that
            parts.append({"type": "text", "text": _text(block, where)})
    message: Message = {"role": "assistant", "content": parts or ""}
    if thoughts:
        message["reasoning"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _text_content(content: Any, place: str) -> str | list[Block]:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        raise value_error("content must be a string or a list of blocks.", place)
    return [{"type": "text", "text": _text(block, f"{place}.{number}")} for number, block in enumerate(content)]


def _text(block: Block, place: str) -> str:
    if block.get("type") != "text":
        raise not_supported(place, f"not supported yet by this server: a block of type {block.get('type')!r} here")
    return _field(block, "text", str, place)


def _field(block: Block, name: str, kind: type, place: str) -> Any:
    value = block.get(name)
    if not isinstance(value, kind):
        expected = "a string" if kind is str else "an object"
        raise value_error(f"`{name}` must be {expected}.", f"{place}.{name}")
    return value
