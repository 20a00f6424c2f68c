"""The request and the response object of the Responses API."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from ..protocol import GenerationRequest, Int, ReasoningEffort

Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
MAX_METADATA_KEYS = 16


class ReasoningOptions(msgspec.Struct):
    effort: ReasoningEffort | None = None
    summary: str | None = None


class TextOptions(msgspec.Struct):
    format: dict[str, Any] | None = None
    verbosity: str | None = None


class ResponsesRequest(GenerationRequest, kw_only=True):
    """Body of POST /v1/responses; of the fields of other generation requests those that have a meaning here hold."""

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: Int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningOptions | None = None
    text: TextOptions | None = None
    store: bool | None = None
    background: bool | None = None
    previous_response_id: str | None = None
    include: list[str] | None = None
    top_logprobs: Int | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: Annotated[dict[str, str], msgspec.Meta(max_length=MAX_METADATA_KEYS)] | None = None
    enable_response_messages: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    # Without effect here: tools of the server's own, of which there are none, would count towards max_tool_calls.
    max_tool_calls: Int | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    prompt: Any = None
    conversation: Any = None
    previous_response: Any = None
    previous_input_messages: Any = None


class InputTokensDetails(msgspec.Struct):
    cached_tokens: int
    cache_write_tokens: int = 0  # not counted by the engine; OpenAI's type needs it


class OutputTokensDetails(msgspec.Struct):
    reasoning_tokens: int


class ResponseUsage(msgspec.Struct):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseError(msgspec.Struct):
    code: str
    message: str


class ResponseBody(msgspec.Struct, kw_only=True):
    """The response object: what was asked for, how far it is, and what was said."""

    id: str
    object: str = "response"
    created_at: int
    completed_at: int | None = None
    status: Status
    background: bool = False
    error: ResponseError | None = None
    incomplete_details: dict[str, str] | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    model: str
    output: list[dict[str, Any]] = []
    parallel_tool_calls: bool = True
    previous_response_id: str | None = None
    prompt_cache_key: str | None = None
    reasoning: dict[str, Any] | None = None
    safety_identifier: str | None = None
    service_tier: str = "default"
    store: bool = True
    temperature: float | None = None
    text: dict[str, Any]
    tool_choice: str | dict[str, Any] = "auto"
    tools: list[dict[str, Any]] = []
    top_logprobs: int = 0
    top_p: float | None = None
    truncation: str = "disabled"
    usage: ResponseUsage | None = None
    user: str | None = None
    metadata: dict[str, str] = {}
    input_messages: list[dict[str, Any]] | msgspec.UnsetType = msgspec.UNSET
    output_messages: list[dict[str, Any]] | msgspec.UnsetType = msgspec.UNSET


responses_decoder = msgspec.json.Decoder(ResponsesRequest)
