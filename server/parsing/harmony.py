"""The harmony format of gpt-oss: messages with a channel and, if they call a tool, a recipient.

<|channel|>analysis<|message|>The user asks …<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather
<|constrain|>json<|message|>{"city": "Paris"}<|call|>
(openai/harmony, docs/format.md)
"""

from __future__ import annotations

import re

from .events import Emitter
from .text_stream import Markers, Reading, Take, TextStream, ignore
from .typed_arguments import TrimmedArguments

_START, _CHANNEL, _MESSAGE, _CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>")
SPECIAL_TOKENS = (_START, _CHANNEL, _MESSAGE, _CONSTRAIN, *_ENDS)
_OUTSIDE = Markers(_START, _CHANNEL, *_ENDS)
_IN_HEADER = Markers(_MESSAGE, _START, *_ENDS)
_RECIPIENT = re.compile(r"\bto=(?P<name>[^\s<]+)")
_CHANNEL_NAME = re.compile(r"<\|channel\|>\s*(?P<name>\w+)")
_BUILT_IN_RECIPIENTS = ("assistant", "browser", "python", "container", "user", "system")


def harmony_grammar(stream: TextStream, emit: Emitter, *, finds_calls: bool = True) -> Reading[None]:
    """Read messages: analysis is reasoning, final and commentary are content, those to a function are calls.

    Contents of several messages are separated by a line feed. A message to a built-in tool of the model is dropped.
    A header that never reaches its message is content, as is text outside messages, and without `finds_calls` also what
    calls say.
    """
    contents = _Separated(emit.content)
    thoughts = _Separated(emit.reasoning)
    marker = yield from stream.through(_OUTSIDE, emit.content)
    while marker:
        if marker in _ENDS:
            marker = yield from stream.through(_OUTSIDE, emit.content)
            continue
        header = [marker]
        marker = yield from stream.through(_IN_HEADER, header.append)
        if marker != _MESSAGE:
            contents.next_text()
            contents("".join(header))
            continue
        text = "".join(header)
        recipient = _RECIPIENT.search(text)
        channel = _CHANNEL_NAME.search(text)
        if recipient is not None and finds_calls:
            marker = yield from _call(stream, emit, recipient["name"])
        else:
            take = thoughts if channel is not None and channel["name"] == "analysis" else contents
            take.next_text()
            marker = yield from stream.through(_OUTSIDE, take)


def _call(stream: TextStream, emit: Emitter, recipient: str) -> Reading[str]:
    """Read the body of a message to `recipient`; returns the marker after it."""
    if recipient.partition(".")[0] in _BUILT_IN_RECIPIENTS:
        return (yield from stream.through(_OUTSIDE, ignore))
    emit.begin(recipient.removeprefix("functions."))
    arguments = TrimmedArguments(emit)
    marker = yield from stream.through(_OUTSIDE, arguments)
    if marker:
        arguments.end()
    return marker


class _Separated:
    """Passes on several texts with a line feed between those that are not empty."""

    def __init__(self, take: Take) -> None:
        self._take = take
        self._has_text = False
        self._separator = ""

    def next_text(self) -> None:
        self._separator = "\n" if self._has_text else ""

    def __call__(self, text: str) -> None:
        self._take(self._separator + text)
        self._separator = ""
        self._has_text = True
