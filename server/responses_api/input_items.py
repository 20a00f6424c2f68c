"""From the items of a Responses conversation to chat messages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..body import value_error
from ..errors import RequestError, not_supported

_TEXT_PARTS = ("input_text", "output_text", "text")
_UNFINISHED = ("in_progress", "incomplete")

Item = dict[str, Any]
Message = dict[str, Any]


def chat_messages(items: Iterable[Item]) -> list[Message]:
    """The messages that `items` come to; raises `RequestError` (400) for an item that is wrong or not supported.

    What the model said in one turn (reasoning, text, calls) is several items and one message.
    """
    messages = _Messages()
    for place, item in enumerate(items):
        messages.add(item, f"body.input.{place}")
    return messages.messages


def is_open(items: list[Item]) -> bool:
    """Whether the last item is the beginning of an answer, for the model to go on with."""
    last = items[-1] if items else {}
    return (
        last.get("role") == "assistant"
        and last.get("type", "message") == "message"
        and last.get("status") in _UNFINISHED
    )


class _Messages:
    def __init__(self) -> None:
        self.messages: list[Message] = []
        self._turn: Message | None = None  # of the model, while its items come

    def add(self, item: Item, place: str) -> None:
        kind = item.get("type", "message")
        if kind == "message":
            self._add_message(item, place)
        elif kind == "reasoning":
            self._add_reasoning(item, place)
        elif kind == "function_call":
            call = {"name": _text_of(item, "name", place), "arguments": _text_of(item, "arguments", place)}
            message = self._turn or self._begin_turn()
            message.setdefault("tool_calls", []).append(
                {"id": _text_of(item, "call_id", place), "type": "function", "function": call}
            )
        elif kind == "function_call_output":
            content = _content(item.get("output"), f"{place}.output")
            self._add({"role": "tool", "tool_call_id": _text_of(item, "call_id", place), "content": content})
        else:
            raise not_supported(place, f"not supported yet by this server: an input item of type {kind!r}")

    def _add_message(self, item: Item, place: str) -> None:
        role = item.get("role")
        if not isinstance(role, str):
            raise value_error("every message must have a role, a string.", f"{place}.role")
        content = _content(item.get("content"), f"{place}.content")
        if role != "assistant":
            self._add({"role": role, "content": content})
            return
        turn = self._turn
        if turn is None or turn["content"] or "tool_calls" in turn:
            turn = self._begin_turn()
        turn["content"] = content

    def _add_reasoning(self, item: Item, place: str) -> None:
        parts = item.get("content") or item.get("summary") or []
        if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
            raise value_error("content and summary must be lists of parts.", f"{place}.content")
        text = "\n".join(_text_of(part, "text", f"{place}.content") for part in parts)
        if text:  # what is encrypted is OpenAI's own
            self._begin_turn()["reasoning"] = text

    def _begin_turn(self) -> Message:
        message: Message = {"role": "assistant", "content": ""}
        self._add(message)
        self._turn = message
        return message

    def _add(self, message: Message) -> None:
        self._turn = None
        self.messages.append(message)


def _content(content: Any, place: str) -> str | list[dict[str, str]]:
    """The content of a message or of a tool's result, as chat takes it."""
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise value_error("content must be a string or a list of parts.", place)
    return [{"type": "text", "text": _part_text(part, f"{place}.{number}")} for number, part in enumerate(content)]


def _part_text(part: dict[str, Any], place: str) -> str:
    kind = part.get("type")
    if kind in _TEXT_PARTS:
        return _text_of(part, "text", place)
    if kind == "refusal":
        return _text_of(part, "refusal", place)
    raise not_supported(place, f"not supported yet by this server: content of type {kind!r}")


def _text_of(data: dict[str, Any], name: str, place: str) -> str:
    text = data.get(name)
    if not isinstance(text, str):
        raise _not_text(name, place)
    return text


def _not_text(name: str, place: str) -> RequestError:
    return value_error(f"`{name}` must be a string.", f"{place}.{name}")
