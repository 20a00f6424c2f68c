"""Reasoning between tags: DeepSeek R1 and V3, Qwen3, GLM-4.5, Kimi K2, Granite 3.2, and any other pair of tags."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, ClassVar

from ....scheduler.structured_outputs import ReasoningSpan
from ..events import Emitter
from ..reasoning_parser import ReasoningParser
from ..text_stream import SPACE, Markers, Reading, Take, TextStream

# Tokens that begin a message in a prompt: tags before the last of them belong to earlier messages.
_MESSAGE_BEGINNINGS = (
    "<|im_start|>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<｜User｜>", "<｜Assistant｜>",
    "<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|start_header_id|>", "<|start_of_role|>",
)  # fmt: skip


class TagReasoningParser(ReasoningParser):
    """Reasoning between `start` and `end`, <think> and </think> by default.

    Many templates write the start tag into the prompt, so an answer begins inside the reasoning, with the tag or
    without it, unless `needs_start`: then an answer that does not begin with the tag is content. Reasoning that the end
    of the text cuts off is reasoning.
    """

    starts: ClassVar[tuple[str, ...]] = ("<think>",)
    ends: ClassVar[tuple[str, ...]] = ("</think>",)
    needs_start: ClassVar[bool] = False
    calls: ClassVar[tuple[str, ...]] = ()  # markers of tool calls, which end the reasoning and are content
    drops_stray_tags: ClassVar[bool] = False  # a second start tag, or an end tag in the content
    reopens: ClassVar[bool] = False  # a start tag in the content opens reasoning again
    strips_reasoning: ClassVar[bool] = False  # of the whitespace before the end tag

    def __init__(
        self,
        tokenizer: Any,
        *args: Any,
        start: str | None = None,
        end: str | None = None,
        needs_start: bool | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(tokenizer, *args, chat_template_kwargs=chat_template_kwargs, **kwargs)
        self._starts = self.starts if start is None else (start,)
        self._ends = self.ends if end is None else (end,)
        if not all(self._starts + self._ends):
            raise ValueError(f"the tags of reasoning must not be empty: {(start, end)!r}")
        self._needs_start = self.needs_start if needs_start is None else needs_start
        self.special_tokens = (*self._starts, *self._ends, *self.calls)
        self.thinking = self.thinking_switch()

    def thinking_switch(self) -> bool:
        """Whether answers have reasoning at all."""
        return True

    def _switch(self, default: bool) -> bool:
        """The template's `thinking` or `enable_thinking`."""
        values = [self.chat_template_kwargs.get(name) for name in ("thinking", "enable_thinking")]
        return default if values == [None, None] else any(values)

    def grammar(self, stream: TextStream, emit: Emitter) -> Reading[None]:
        if not self.thinking:
            yield from stream.rest(emit.content)
            return
        spaces: list[str] = []
        yield from stream.run(SPACE, spaces.append)
        found = yield from stream.starts_with(Markers(*self._starts))
        if not found and self._needs_start:
            emit.content("".join(spaces))
            yield from stream.rest(emit.content)
            return
        take: Take = _WithoutEndingSpace(emit) if self.strips_reasoning else emit.reasoning
        if not found:
            take("".join(spaces))
        stray = self._starts if self.drops_stray_tags else ()
        in_reasoning = Markers(*self._ends, *self.calls, *stray)
        in_content = Markers(*self._ends, *(self._starts if self.reopens else ()))
        while True:
            marker = yield from stream.through(in_reasoning, take)
            if marker in self._starts:
                continue
            if not marker and isinstance(take, _WithoutEndingSpace):
                take.flush()
            if marker in self.calls:
                emit.content(marker)
            if not self.drops_stray_tags:
                yield from stream.rest(emit.content)
                return
            while marker := (yield from stream.through(in_content, emit.content)):
                if marker in self._starts:
                    break
            if not marker:
                return
            take = _WithoutEndingSpace(emit) if self.strips_reasoning else emit.reasoning

    def extract_reasoning(self, model_output: str, request: Any) -> tuple[str | None, str | None]:
        """As for every parser; but a tag pair that every answer has gives "" and not None for empty reasoning."""
        reasoning, content = super().extract_reasoning(model_output, request)
        always_there = self.thinking and not self.drops_stray_tags and not self._needs_start
        return ("" if reasoning is None and always_there else reasoning), content

    @property
    def reasoning_start_str(self) -> str | None:
        return self._starts[0]

    @property
    def reasoning_end_str(self) -> str | None:
        return self._ends[0]

    def span(self) -> ReasoningSpan:
        return ReasoningSpan(ends=list(self._ends), starts=list(self._starts), barred=list(self.calls))

    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        """Whether the last tag of the last message is an end tag, or a tool call stands where reasoning did.

        A tokenizer that writes the tags with several tokens is asked for the text.
        """
        if not self.thinking or not input_ids:
            return not self.thinking
        if self._start_id is None or self._end_id is None:
            text = self.model_tokenizer.decode(list(input_ids), skip_special_tokens=False)
            message = text[max(text.rfind(beginning) for beginning in _MESSAGE_BEGINNINGS) + 1 :]
            return message.rfind(self._ends[0]) > message.rfind(self._starts[0])
        called = False
        for token_id in reversed(input_ids):
            if token_id in self._message_ids:
                break
            if token_id == self._end_id:
                return True
            if token_id == self._start_id:
                return called
            called = called or token_id in self._call_ids
        return called and bool(self._call_ids)

    def is_reasoning_end_streaming(self, input_ids: Sequence[int], delta_ids: Iterable[int]) -> bool:
        if not self.thinking:
            return True
        if self._end_id is None:
            return self.is_reasoning_end(input_ids)
        return any(token_id == self._end_id or token_id in self._call_ids for token_id in delta_ids)

    def extract_content_ids(self, input_ids: list[int]) -> list[int]:
        if not self.thinking:
            return input_ids
        if self._end_id in input_ids:
            return input_ids[input_ids.index(self._end_id) + 1 :]
        first_call = next((at for at, token_id in enumerate(input_ids) if token_id in self._call_ids), len(input_ids))
        return input_ids[first_call:]

    def count_reasoning_tokens(self, token_ids: Sequence[int]) -> int:
        if not self.thinking or self._end_id is None:
            return 0
        count = 0
        depth = 0 if self._start_id in token_ids or self._needs_start else 1
        for token_id in token_ids:
            if token_id == self._start_id:
                depth += 1
            elif token_id == self._end_id:
                depth = max(0, depth - 1)
            else:
                count += depth > 0
        return count

    @cached_property
    def _start_id(self) -> int | None:
        return self.token_id(self._starts[0])

    @cached_property
    def _end_id(self) -> int | None:
        return self.token_id(self._ends[0])

    @cached_property
    def _message_ids(self) -> frozenset[int | None]:
        return frozenset(self.token_id(token) for token in _MESSAGE_BEGINNINGS) - {None}

    @cached_property
    def _call_ids(self) -> frozenset[int | None]:
        return frozenset(self.token_id(token) for token in self.calls) - {None}


class _WithoutEndingSpace:
    """Passes reasoning on without the whitespace at its end."""

    def __init__(self, emit: Emitter) -> None:
        self._emit = emit
        self._held: list[str] = []

    def __call__(self, text: str) -> None:
        solid = text.rstrip()
        if solid:
            self.flush()
            self._emit.reasoning(solid)
        self._held.append(text[len(solid) :])

    def flush(self) -> None:
        """The whitespace is inside the reasoning after all."""
        self._emit.reasoning("".join(self._held))
        self._held = []


class BaseThinkingReasoningParser(TagReasoningParser):
    """vLLM's base for plugins: `start_token` and `end_token` must be tokens of the tokenizer."""

    def __init__(self, tokenizer: Any, *args: Any, **kwargs: Any) -> None:
        if not tokenizer:
            raise ValueError("The model tokenizer must be passed to the ReasoningParser constructor: None")
        if not self.start_token or not self.end_token:
            raise ValueError(f"start_token and end_token must be defined: {type(self).__name__}")
        super().__init__(tokenizer, *args, start=self.start_token, end=self.end_token, **kwargs)
        start_id, end_id = (self.token_id(token) for token in (self.start_token, self.end_token))
        if start_id is None or end_id is None:
            tags = f"{self.start_token} {self.end_token}"
            raise RuntimeError(
                f"{type(self).__name__} could not locate think start/end tokens in the tokenizer: {tags}"
            )
        self.start_token_id: int = start_id
        self.end_token_id: int = end_id

    @property
    def start_token(self) -> str:
        """The token that begins reasoning."""
        raise NotImplementedError(f"a thinking parser must define start_token: {type(self).__name__}")

    @property
    def end_token(self) -> str:
        """The token that ends reasoning."""
        raise NotImplementedError(f"a thinking parser must define end_token: {type(self).__name__}")


class DeepSeekR1ReasoningParser(TagReasoningParser):
    """DeepSeek R1: <think> is at the end of the prompt (deepseek-ai/DeepSeek-R1, its chat template)."""


class DeepSeekV3ReasoningParser(TagReasoningParser):
    """DeepSeek V3.1 and V3.2: reasoning only with the template's `thinking` (deepseek-ai/DeepSeek-V3.1)."""

    def thinking_switch(self) -> bool:
        return self._switch(False)


class Qwen3ReasoningParser(TagReasoningParser):
    """Qwen3: `enable_thinking`, on by default; a tool call ends reasoning too (Qwen/Qwen3-8B, its chat template)."""

    calls = ("<tool_call>",)
    drops_stray_tags = True

    def thinking_switch(self) -> bool:
        return self._switch(True)


class Glm45ReasoningParser(Qwen3ReasoningParser):
    """GLM-4.5: as Qwen3, and it may reason again after it has said something (zai-org/GLM-4.5, its chat template)."""

    reopens = True
    strips_reasoning = True


class KimiK2ReasoningParser(Qwen3ReasoningParser):
    """Kimi K2 Thinking: the section of tool calls ends reasoning too (moonshotai/Kimi-K2-Thinking)."""

    calls = ("<|tool_calls_section_begin|>",)
    strips_reasoning = True


class GraniteReasoningParser(TagReasoningParser):
    """Granite 3.2 writes sentences in place of tags (ibm-granite/granite-3.2-8b-instruct)."""

    starts = ("Here is my thought process:", "Here's my thought process:")
    ends = ("Here is my response:", "Here's my response:")
    needs_start = True
