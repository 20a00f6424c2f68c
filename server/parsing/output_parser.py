"""The seam to the server: the text of one choice in, deltas with reasoning, content and tool calls out.

A server makes one `OutputParser` per choice of an answer:

    choice = read_tool_choice(body.tool_choice, body.tools)                       # ValueError is a 400
    schema = tool_choice_schema(choice, body.tools, body.parallel_tool_calls)     # for the grammar; None: free text
    parser = OutputParser(
        tokenizer,
        tool_parser=TOOL_PARSERS.get(name), reasoning_parser=REASONING_PARSERS.get(name),     # or None
        tools=body.tools, tool_choice=choice, parallel_tool_calls=body.parallel_tool_calls is not False,
        include_reasoning=body.include_reasoning is not False, chat_template_kwargs=options,
        prompt_token_ids=output.prompt_token_ids,
    )
    deltas = parser.feed(completion.text, completion.token_ids)    # for each output: what is new in it
    deltas = parser.finish()                                       # once, after the last output

What `finish` returns belongs to the choice's last chunk; its finish_reason is `parser.finish_reason(reason)`. An answer
that is not streamed goes the same way: feed it whole, finish, and take `message_of` all deltas.

Sample with skip_special_tokens=False where `needs_special_tokens`, or say `special_tokens_skipped=True` and give the
token ids. The schema is enforced unless the tool parser's `supports_required_and_named` is False. The grammar begins
where reasoning ends: at once unless `is_reasoning`, else behind the token for which
`reasoning.is_reasoning_end_streaming` is true.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from .deltas import DeltaBuilder, tool_calls_of
from .events import Content, Emitter, Event, Reasoning
from .harmony import SPECIAL_TOKENS, harmony_grammar
from .json_calls import read_call_list
from .messages import DeltaMessage, ToolCall
from .parse import Grammar, Parse
from .reasoning_parser import ReasoningParser
from .special_tokens import SpecialTokenRestorer
from .text_stream import SPACE, Reading, TextStream, ignore
from .tool_choice import NO_TOOLS, ToolChoice
from .tool_parser import ToolParser
from .typed_arguments import TrimmedArguments


class OutputParser:
    """Parses the text of one choice while it comes, first for reasoning, then for tool calls.

    Each delta has one of reasoning, content, and a piece of one call. All deltas together are the same however the text
    is cut, except that they are cut with it. Parsing never fails: what is no call, or no reasoning, is content.

    tool_choice none: calls are not looked for. auto: in `tool_parser`'s format, if there is one. required: the text is
    a JSON list of {"name", "parameters"}; named: it is the arguments. A parser that does not support JSON there
    (`supports_required_and_named`) looks for its own format.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        tool_parser: type[ToolParser] | None = None,
        reasoning_parser: type[ReasoningParser] | None = None,
        tools: Sequence[Any] | None = None,
        tool_choice: ToolChoice = NO_TOOLS,
        parallel_tool_calls: bool = True,
        include_reasoning: bool = True,
        chat_template_kwargs: dict[str, Any] | None = None,
        prompt_token_ids: Sequence[int] | None = None,
        special_tokens_skipped: bool = False,
    ) -> None:
        self.tool_choice = tool_choice
        self.tools = tool_parser(tokenizer, tools) if tool_parser is not None else None
        self.reasoning: ReasoningParser | None = None
        if reasoning_parser is not None:
            self.reasoning = reasoning_parser(tokenizer, chat_template_kwargs=chat_template_kwargs)
        self._include_reasoning = include_reasoning
        self._builder = DeltaBuilder(parallel=parallel_tool_calls)
        is_harmony = any(parser is not None and parser.is_harmony for parser in (self.tools, self.reasoning))
        self.is_reasoning = (
            self.reasoning is not None
            and not is_harmony
            and not self.reasoning.is_reasoning_end(list(prompt_token_ids or ()))
        )
        self._reasoning_parse: Parse | None = None
        if self.reasoning is not None and self.is_reasoning:
            self._reasoning_parse = self.reasoning.new_parse()
        if is_harmony:
            self._parse = Parse(partial(harmony_grammar, finds_calls=tool_choice.kind != "none"), Emitter())
        else:
            self._parse = self._tool_parse()
        special_tokens: list[str] = list(SPECIAL_TOKENS if is_harmony else ())
        for parser in (self.tools, self.reasoning):
            special_tokens += parser.special_tokens if parser is not None else ()
        self.needs_special_tokens = bool(special_tokens)
        self._restorer = SpecialTokenRestorer(tokenizer, special_tokens) if special_tokens_skipped else None

    def _tool_parse(self) -> Parse:
        kind = self.tool_choice.kind
        in_json = self.tools is None or self.tools.supports_required_and_named
        if kind == "named" and in_json:
            return Parse(_arguments_of(self.tool_choice.name or ""), Emitter())
        if kind == "required" and in_json:
            return Parse(_list_of_calls, Emitter())
        if kind != "none" and self.tools is not None:
            return self.tools.new_parse()
        return Parse(_only_content, Emitter())

    def feed(self, text: str, token_ids: Sequence[int] = ()) -> list[DeltaMessage]:
        """What the next piece of text adds; `token_ids` are the tokens it comes from, of which the text may be behind.

        The ids are looked at only with `special_tokens_skipped`.
        """
        if self._restorer is not None:
            text = self._restorer.restore(text, token_ids)
        if self._reasoning_parse is None:
            return self._deltas(self._parse.feed(text))
        return self._deltas(self._after_reasoning(self._reasoning_parse.feed(text)))

    def finish(self) -> list[DeltaMessage]:
        """What the end of the text adds. Nothing may be fed afterwards."""
        events: list[Event] = []
        if self._reasoning_parse is not None:
            events = self._after_reasoning(self._reasoning_parse.finish())
        return self._deltas([*events, *self._parse.finish()])

    def finish_reason(self, reason: str | None) -> str | None:
        """The API's finish_reason for the engine's: tool_calls in place of stop, unless the caller named the tool."""
        calls = reason == "stop" and self._builder.num_calls and self.tool_choice.kind != "named"
        return "tool_calls" if calls else reason

    def count_reasoning_tokens(self, token_ids: Sequence[int]) -> int:
        """How many of all tokens of the choice are reasoning."""
        if self.reasoning is None or not (self.is_reasoning or self.reasoning.is_harmony):
            return 0
        return self.reasoning.count_reasoning_tokens(token_ids)

    def _after_reasoning(self, events: Iterable[Event]) -> list[Event]:
        found: list[Event] = []
        for event in events:
            found += self._parse.feed(event.text) if isinstance(event, Content) else [event]
        return found

    def _deltas(self, events: list[Event]) -> list[DeltaMessage]:
        if not self._include_reasoning:
            events = [event for event in events if not isinstance(event, Reasoning)]
        return self._builder.deltas(events)


@dataclass(frozen=True)
class ParsedMessage:
    """A complete answer; what it does not have is None, or empty."""

    reasoning: str | None
    content: str | None
    tool_calls: list[ToolCall]


def message_of(deltas: Sequence[DeltaMessage]) -> ParsedMessage:
    """The message of which `deltas` are all the pieces."""
    reasoning = "".join(delta.reasoning or "" for delta in deltas)
    content = "".join(delta.content or "" for delta in deltas)
    return ParsedMessage(reasoning or None, content or None, tool_calls_of(deltas))


def _only_content(stream: TextStream, emit: Emitter) -> Reading[None]:
    return stream.rest(emit.content)


def _list_of_calls(stream: TextStream, emit: Emitter) -> Reading[None]:
    yield from stream.run(SPACE, ignore)
    if (yield from read_call_list(stream, emit, [])):
        yield from stream.rest(ignore)


def _arguments_of(name: str) -> Grammar:
    def grammar(stream: TextStream, emit: Emitter) -> Reading[None]:
        yield from stream.run(SPACE, ignore)
        if (yield from stream.more()):
            emit.begin(name)
            arguments = TrimmedArguments(emit)
            yield from stream.rest(arguments)
            arguments.end()

    return grammar
