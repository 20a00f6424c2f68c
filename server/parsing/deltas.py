"""From events to what the API shows: deltas of a stream, or one message."""

from __future__ import annotations

from collections.abc import Iterable

from .events import Arguments, CallBegun, CallEnded, Content, Event, Reasoning
from .messages import DeltaFunctionCall, DeltaMessage, DeltaToolCall, FunctionCall, ToolCall, new_tool_call_id


class DeltaBuilder:
    """Numbers the calls of one answer and gives them ids. With `parallel` False only the first call is shown."""

    def __init__(self, *, parallel: bool = True) -> None:
        self.num_calls = 0
        self._parallel = parallel

    def deltas(self, events: Iterable[Event]) -> list[DeltaMessage]:
        """The events in order, each delta with content, with reasoning or with one piece of one call."""
        found: list[DeltaMessage] = []
        for event in events:
            if isinstance(event, Content):
                found.append(DeltaMessage(content=event.text))
            elif isinstance(event, Reasoning):
                found.append(DeltaMessage(reasoning=event.text))
            elif isinstance(event, CallBegun):
                self.num_calls += 1
                if self._shown:
                    call_id = event.call_id or new_tool_call_id()
                    function = DeltaFunctionCall(event.name, "")
                    piece = DeltaToolCall(self.num_calls - 1, call_id, "function", function)
                    found.append(DeltaMessage(tool_calls=[piece]))
            elif isinstance(event, Arguments):
                if self._shown:
                    self._add_arguments(found, event.text)
            else:
                assert isinstance(event, CallEnded)  # nothing in the API marks the end of a call
        return found

    @property
    def _shown(self) -> bool:
        return self._parallel or self.num_calls == 1

    def _add_arguments(self, found: list[DeltaMessage], text: str) -> None:
        index = self.num_calls - 1
        last = found[-1].tool_calls if found else []
        if last and last[0].index == index and last[0].function is not None:
            last[0].function.arguments = (last[0].function.arguments or "") + text
        else:
            found.append(DeltaMessage(tool_calls=[DeltaToolCall(index, function=DeltaFunctionCall(arguments=text))]))


def merge_deltas(deltas: Iterable[DeltaMessage]) -> DeltaMessage | None:
    """All of `deltas` in one, the content before the calls, each call in one piece; None if there are none."""
    merged = DeltaMessage()
    for delta in deltas:
        if delta.content is not None:
            merged.content = (merged.content or "") + delta.content
        if delta.reasoning is not None:
            merged.reasoning = (merged.reasoning or "") + delta.reasoning
        for piece in delta.tool_calls:
            _add_piece(merged.tool_calls, piece)
    return merged if merged != DeltaMessage() else None


def _add_piece(pieces: list[DeltaToolCall], piece: DeltaToolCall) -> None:
    last = pieces[-1] if pieces else None
    if last is None or last.index != piece.index or last.function is None or piece.function is None:
        pieces.append(piece)
    else:
        last.function.arguments = (last.function.arguments or "") + (piece.function.arguments or "")


def tool_calls_of(deltas: Iterable[DeltaMessage]) -> list[ToolCall]:
    """The complete calls of an answer, from all its deltas."""
    calls: list[ToolCall] = []
    arguments: list[list[str]] = []
    for piece in (piece for delta in deltas for piece in delta.tool_calls):
        assert piece.function is not None
        if piece.function.name is not None:
            calls.append(ToolCall(FunctionCall(piece.function.name, ""), piece.id or new_tool_call_id()))
            arguments.append([])
        arguments[piece.index].append(piece.function.arguments or "")
    for call, pieces in zip(calls, arguments, strict=True):
        call.function.arguments = "".join(pieces)
    return calls
