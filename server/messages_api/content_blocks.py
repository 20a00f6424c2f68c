"""From what the model says to content blocks, and to the events that tell a stream's client how they come about."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from ..parsing.messages import DeltaMessage, DeltaToolCall

Event = dict[str, Any]


class ContentBlocks:
    """The content of a message while it is written: thinking, text and tool uses in the order they are said.

    One block is open at a time.
    """

    def __init__(self) -> None:
        self.blocks: list[dict[str, Any]] = []
        self.has_calls = False
        self._pieces: list[str] = []  # of the block that is open
        self._call_index = -1  # of the call that is open, as the parser numbers it
        self._is_open = False

    def feed(self, deltas: list[DeltaMessage]) -> list[Event]:
        """What the next piece of the answer changes."""
        events: list[Event] = []
        for delta in deltas:
            if delta.reasoning:
                events += self._say("thinking", delta.reasoning)
            if delta.content:
                events += self._say("text", delta.content)
            for piece in delta.tool_calls:
                events += self._call(piece)
        return events

    def finish(self) -> list[Event]:
        """The end of the answer."""
        return list(self._close())

    def _say(self, kind: str, text: str) -> Iterator[Event]:
        if not (self._is_open and self.blocks[-1]["type"] == kind):
            block = {"type": kind, kind: ""}
            yield from self._begin(block | {"signature": ""} if kind == "thinking" else block)
        yield self._delta({"type": f"{kind}_delta", kind: text})
        self._pieces.append(text)

    def _call(self, piece: DeltaToolCall) -> Iterator[Event]:
        assert piece.function is not None  # the parsers always tell a name or arguments
        if piece.index != self._call_index:
            self._call_index = piece.index
            self.has_calls = True
            yield from self._begin({"type": "tool_use", "id": piece.id, "name": piece.function.name, "input": {}})
        if piece.function.arguments:
            yield self._delta({"type": "input_json_delta", "partial_json": piece.function.arguments})
            self._pieces.append(piece.function.arguments)

    def _begin(self, block: dict[str, Any]) -> Iterator[Event]:
        yield from self._close()
        self._is_open = True
        self.blocks.append(block)
        yield {"type": "content_block_start", "index": len(self.blocks) - 1, "content_block": dict(block)}

    def _close(self) -> Iterator[Event]:
        if not self._is_open:
            return
        self._is_open = False
        block, text = self.blocks[-1], "".join(self._pieces)
        self._pieces = []
        if block["type"] == "tool_use":
            block["input"] = _input(text)
        else:
            block[block["type"]] = text
        if block["type"] == "thinking":
            # Clients hand it back unread and drop thoughts that have none; nothing checks it.
            block["signature"] = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
            yield self._delta({"type": "signature_delta", "signature": block["signature"]})
        yield {"type": "content_block_stop", "index": len(self.blocks) - 1}

    def _delta(self, delta: dict[str, Any]) -> Event:
        return {"type": "content_block_delta", "index": len(self.blocks) - 1, "delta": delta}


def _input(arguments: str) -> dict[str, Any]:
    """The arguments of a call as an object; empty where they were cut off or are none."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
