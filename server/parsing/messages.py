"""The forms in which tool calls and deltas leave the parsers; names and fields are vLLM's."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field


def new_tool_call_id() -> str:
    """An id for a call to which the model gave none."""
    return f"chatcmpl-tool-{uuid.uuid4().hex}"


@dataclass
class FunctionCall:
    """The function of a complete call; `arguments` is a JSON text, cut off where the answer was."""

    name: str
    arguments: str


@dataclass
class ToolCall:
    """A complete call."""

    function: FunctionCall
    id: str = field(default_factory=new_tool_call_id)
    type: str = "function"


@dataclass
class DeltaFunctionCall:
    """The name, or a piece of the arguments, or both."""

    name: str | None = None
    arguments: str | None = None


@dataclass
class DeltaToolCall:
    """A piece of call number `index`; the first piece has id, type and name."""

    index: int
    id: str | None = None
    type: str | None = None
    function: DeltaFunctionCall | None = None


@dataclass
class DeltaMessage:
    """A piece of an answer; what it does not have is None, or empty."""

    role: str | None = None
    content: str | None = None
    reasoning: str | None = None
    tool_calls: list[DeltaToolCall] = field(default_factory=list)


@dataclass
class ExtractedToolCallInformation:
    """A complete answer; `content` is None where it is empty."""

    tools_called: bool
    tool_calls: list[ToolCall]
    content: str | None = None
