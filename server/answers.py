"""How the answers to a chat request are read: reasoning, content and tool calls out of the model's text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import UNSET

from ..engine.outputs import CompletionOutput
from ..scheduler.sampling_params import SamplingParams, ValidationError
from .parsing.deltas import merge_deltas
from .parsing.messages import DeltaMessage
from .parsing.output_parser import OutputParser, message_of
from .parsing.reasoning_parser import ReasoningParser
from .parsing.tool_choice import ToolChoice
from .parsing.tool_parser import ToolParser
from .protocol import ChatCompletionRequest
from .responses import ChatDelta, ChatResponseMessage, FunctionCallDelta, ToolCallDelta


@dataclass(frozen=True)
class AnswerFormat:
    """The parsers of one request, of which each choice gets its own.

    `template_options` are the variables of the chat template: some switch reasoning on. `hides_reasoning`: the client
    wants none of it, so what could show it, tokens and their probabilities, is left out as well.
    """

    tokenizer: Any
    body: ChatCompletionRequest
    tool_choice: ToolChoice
    tool_parser: type[ToolParser] | None
    reasoning_parser: type[ReasoningParser] | None
    template_options: dict[str, Any]

    @property
    def hides_reasoning(self) -> bool:
        return self.body.include_reasoning is False and bool(self.tool_parser or self.reasoning_parser)

    @property
    def needs_special_tokens(self) -> bool:
        """Whether the text must come with its special tokens. Raises ValueError if a parser refuses the request."""
        parser = self._parser(())
        return parser is not None and parser.needs_special_tokens

    def mark_reasoning(self, params: SamplingParams, prompt_token_ids: Sequence[int] | None) -> SamplingParams:
        """The parameters of an answer to the prompt, told where its reasoning ends if constraints begin there.

        Raises ValueError where the reasoning parser cannot say so, and where a thinking budget has no parser.
        """
        budget = params.thinking_token_budget
        if self.reasoning_parser is None or (budget is None and params.structured_outputs is None):
            return params
        parser = self._parser(prompt_token_ids or ())
        assert parser is not None and parser.reasoning is not None
        if parser.reasoning.is_harmony:
            name = "structured_outputs" if budget is None else "thinking_token_budget"
            raise ValidationError("not supported with harmony answers yet", parameter=name)
        if not parser.is_reasoning:  # switched off by the prompt: there is nothing to wait for, and nothing to count
            return msgspec.structs.replace(params, thinking_token_budget=None)
        return msgspec.structs.replace(params, reasoning=parser.reasoning.span())

    def reader(self, prompt_token_ids: Sequence[int]) -> ChoiceReader:
        """A reader of one choice of the answer to the prompt."""
        return ChoiceReader(self._parser(prompt_token_ids))

    def _parser(self, prompt_token_ids: Sequence[int]) -> OutputParser | None:
        # Without calls to find, a tool parser only matters where its format is that of the whole answer.
        finds_calls = self.tool_choice.kind != "none"
        tool_parser = self.tool_parser
        if tool_parser is not None and not finds_calls and not tool_parser.is_harmony:
            tool_parser = None
        calls_are_json = self.tool_choice.kind in ("required", "named")
        if tool_parser is None and self.reasoning_parser is None and not calls_are_json:
            return None
        return OutputParser(
            self.tokenizer,
            tool_parser=tool_parser,
            reasoning_parser=self.reasoning_parser,
            tools=self.body.tools,
            tool_choice=self.tool_choice,
            parallel_tool_calls=self.body.parallel_tool_calls is not False,
            include_reasoning=self.body.include_reasoning is not False,
            chat_template_kwargs=self.template_options,
            prompt_token_ids=prompt_token_ids,
        )


class ChoiceReader:
    """Reads one choice, whole or while it comes; without a parser all of it is content."""

    def __init__(self, parser: OutputParser | None) -> None:
        self._parser = parser
        self._token_ids: list[int] = []

    def message(self, role: str, completion: CompletionOutput, echoed_text: str) -> ChatResponseMessage:
        """The whole answer, behind the message that it continues."""
        if self._parser is None:
            return ChatResponseMessage(role, echoed_text + completion.text)
        parsed = message_of(self._deltas(self._parser, completion))
        return ChatResponseMessage(
            role,
            echoed_text + (parsed.content or "") if echoed_text else parsed.content,
            tool_calls=parsed.tool_calls or UNSET,
            reasoning=parsed.reasoning,
        )

    def deltas(self, completion: CompletionOutput) -> list[DeltaMessage]:
        """What the next piece of the answer adds, in order, each with reasoning, content or a piece of one call."""
        if self._parser is None:
            return [DeltaMessage(content=completion.text)] if completion.text else []
        return self._deltas(self._parser, completion)

    def delta(self, completion: CompletionOutput) -> ChatDelta | None:
        """What the next piece of the answer adds; None: nothing that could be told yet."""
        if self._parser is None:
            return ChatDelta(content=completion.text)
        merged = merge_deltas(self._deltas(self._parser, completion))
        return None if merged is None else _chat_delta(merged)

    def finish_reason(self, reason: str | None) -> str | None:
        """The API's finish_reason for the engine's."""
        return reason if self._parser is None else self._parser.finish_reason(reason)

    def count_reasoning_tokens(self) -> int:
        """How many of the tokens that were read are reasoning."""
        return 0 if self._parser is None else self._parser.count_reasoning_tokens(self._token_ids)

    def _deltas(self, parser: OutputParser, completion: CompletionOutput) -> list[DeltaMessage]:
        self._token_ids += completion.token_ids
        deltas = parser.feed(completion.text, completion.token_ids)
        return deltas if completion.finish_reason is None else [*deltas, *parser.finish()]


def _chat_delta(delta: DeltaMessage) -> ChatDelta:
    calls = []
    for piece in delta.tool_calls:
        assert piece.function is not None  # the parsers always tell a name or arguments
        function = FunctionCallDelta(_or_unset(piece.function.name), _or_unset(piece.function.arguments))
        calls.append(ToolCallDelta(piece.index, _or_unset(piece.id), _or_unset(piece.type), function))
    return ChatDelta(content=_or_unset(delta.content), reasoning=_or_unset(delta.reasoning), tool_calls=calls or UNSET)


def _or_unset(text: str | None) -> Any:
    return UNSET if text is None else text
