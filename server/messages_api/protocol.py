"""The request and the message of Anthropic's Messages API, and its error body."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from ..errors import ErrorInfo
from ..protocol import GenerationRequest, Int, ReasoningEffort

Positive = Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]
MIN_THINKING_BUDGET = 1024


class InputMessage(msgspec.Struct):
    role: str
    content: str | list[dict[str, Any]]


class Tool(msgspec.Struct):
    """A function of the client's. Tools of the server's own have another `type`."""

    name: str
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    type: str | None = None
    strict: bool | None = None


class ToolSelection(msgspec.Struct):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(msgspec.Struct):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Int | None = None


class OutputFormat(msgspec.Struct):
    schema: dict[str, Any]
    type: Literal["json_schema"] = "json_schema"


class OutputOptions(msgspec.Struct):
    format: OutputFormat | None = None
    effort: ReasoningEffort | None = None


class CountTokensRequest(GenerationRequest, kw_only=True):
    """Body of POST /v1/messages/count_tokens: a conversation, and what else reaches the prompt."""

    model: str  # pyright: ignore[reportIncompatibleVariableOverride, reportGeneralTypeIssues]
    messages: list[InputMessage]
    system: str | list[dict[str, Any]] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolSelection | None = None
    thinking: Thinking | None = None
    output_config: OutputOptions | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class MessagesRequest(CountTokensRequest, kw_only=True):
    """Body of POST /v1/messages; of the fields of other generation requests those that have a meaning here hold."""

    max_tokens: Positive  # pyright: ignore[reportIncompatibleVariableOverride, reportGeneralTypeIssues]
    stop_sequences: list[str] | None = None
    metadata: dict[str, Any] | None = None  # without effect: it names the client's user
    container: Any = None
    mcp_servers: Any = None


class MessageUsage(msgspec.Struct):
    """`input_tokens` are those that were not found in the prefix cache."""

    input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int = 0  # not counted by the engine
    cache_read_input_tokens: int = 0


class MessageBody(msgspec.Struct, kw_only=True):
    id: str
    type: str = "message"
    role: str = "assistant"
    model: str
    content: list[dict[str, Any]] = []
    stop_reason: str | None = None
    stop_sequence: str | None = None
    usage: MessageUsage


_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class MessageError(msgspec.Struct):
    """What went wrong, by Anthropic's name for its kind."""

    type: str
    message: str


class MessageErrorResponse(msgspec.Struct):
    """The body of every error response of these routes."""

    type: str
    error: MessageError


def error_body(info: ErrorInfo) -> dict[str, Any]:
    """A failure in Anthropic's form, by Anthropic's names."""
    kind = _ERROR_TYPES.get(info.code, "api_error" if info.code >= 500 else "invalid_request_error")
    return msgspec.to_builtins(MessageErrorResponse("error", MessageError(kind, info.message)))


messages_decoder = msgspec.json.Decoder(MessagesRequest)
count_decoder = msgspec.json.Decoder(CountTokensRequest)
