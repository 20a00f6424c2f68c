"""The class of all reasoning parsers, with vLLM's methods, and the manager that vLLM's plugins register with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, ClassVar

from ...scheduler.structured_outputs import ReasoningSpan
from .events import Content, Emitter, Event, Reasoning
from .messages import DeltaMessage
from .parse import Parse
from .registry import REASONING_PARSERS
from .text_stream import Reading, TextStream
from .vllm_stream import VllmStream


class ReasoningParser:
    """Divides text into reasoning and content. A subclass has a grammar and knows where reasoning ends in token ids.

    `chat_template_kwargs` are those with which the prompt was rendered: a template's switch for thinking is also the
    parser's. One object serves one stream at a time; a new stream begins with an empty `previous_text`.
    """

    special_tokens: tuple[str, ...] = ()  # tokens that the grammar looks for and a tokenizer may call special
    is_harmony: ClassVar[bool] = False  # whether the answer is one of `harmony`, with its calls

    def __init__(
        self, tokenizer: Any, *args: Any, chat_template_kwargs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        self.model_tokenizer = tokenizer
        self.chat_template_kwargs = chat_template_kwargs or {}
        self._stream = VllmStream(self.new_parse)

    def grammar(self, stream: TextStream, emit: Emitter) -> Reading[None]:
        """Read an answer to its end; emit its reasoning and everything else as content."""
        raise NotImplementedError(f"a reasoning parser must define grammar: {type(self).__name__}")

    def new_parse(self) -> Parse:
        """A parse of one answer."""
        return Parse(self.grammar, Emitter())

    @cached_property
    def vocab(self) -> dict[str, int]:
        """Token ids by token, of a tokenizer of transformers or vLLM."""
        return self.model_tokenizer.get_vocab()

    def token_id(self, token: str) -> int | None:
        """The id of `token`, None if it is no token of its own."""
        if hasattr(self.model_tokenizer, "get_vocab"):
            return self.vocab.get(token)
        return self.model_tokenizer.token_to_id(token)

    @property
    def reasoning_start_str(self) -> str | None:
        """What opens the reasoning in text, if it is one string."""
        return None

    @property
    def reasoning_end_str(self) -> str | None:
        """What closes the reasoning in text, if it is one string."""
        return None

    def span(self) -> ReasoningSpan:
        """What ends the reasoning of an answer, for constraints that begin there; ValueError if nothing is known."""
        end = self.reasoning_end_str
        if end is None:
            raise ValueError(f"the reasoning parser does not say what ends reasoning: {type(self).__name__}")
        return ReasoningSpan(ends=[end], starts=[self.reasoning_start_str] if self.reasoning_start_str else [])

    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        """Whether no reasoning is open after `input_ids`, the tokens of a prompt or of an answer so far."""
        raise NotImplementedError(f"a reasoning parser must define is_reasoning_end: {type(self).__name__}")

    def is_reasoning_end_streaming(self, input_ids: Sequence[int], delta_ids: Iterable[int]) -> bool:
        """Whether reasoning ends in `delta_ids`, the last of `input_ids`."""
        return self.is_reasoning_end(input_ids)

    def extract_content_ids(self, input_ids: list[int]) -> list[int]:
        """The tokens after the reasoning."""
        raise NotImplementedError(f"a reasoning parser must define extract_content_ids: {type(self).__name__}")

    def count_reasoning_tokens(self, token_ids: Sequence[int]) -> int:
        """How many of the tokens of an answer are reasoning, its tags not counted."""
        return 0

    def extract_reasoning(self, model_output: str, request: Any) -> tuple[str | None, str | None]:
        """Reasoning and content of a complete answer, None where there is none."""
        parse = self.new_parse()
        return texts_of([*parse.feed(model_output), *parse.finish()])

    def extract_reasoning_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
    ) -> DeltaMessage | None:
        """What `delta_text` adds, None if that is nothing."""
        return self._stream.feed(delta_text, previous_text, begins=not previous_text and current_text == delta_text)

    def finish_streaming(self) -> DeltaMessage | None:
        """What the end of the answer adds."""
        return self._stream.finish()

    def adjust_request(self, request: Any) -> Any:
        """Make sure that the special tokens of the format reach the parser. Returns `request`."""
        request.skip_special_tokens = False
        return request


def texts_of(events: Iterable[Event]) -> tuple[str | None, str | None]:
    """Reasoning and content of `events`, None where there is none."""
    texts: dict[type, list[str]] = {Reasoning: [], Content: []}
    for event in events:
        if isinstance(event, (Reasoning, Content)):
            texts[type(event)].append(event.text)
    return "".join(texts[Reasoning]) or None, "".join(texts[Content]) or None


class ReasoningParserManager:
    """vLLM's way to name and register reasoning parsers; the names are those of `registry.REASONING_PARSERS`."""

    @classmethod
    def get_reasoning_parser(cls, name: str) -> type[ReasoningParser]:
        """The class of that name. KeyError with all names for another one."""
        return REASONING_PARSERS.get(name)

    @classmethod
    def list_registered(cls) -> list[str]:
        """All names."""
        return REASONING_PARSERS.names()

    @classmethod
    def register_module(cls, name: str | list[str] | None = None, force: bool = True, module: Any = None) -> Any:
        """Give `module`, a subclass of ReasoningParser, a name or several; without it, a decorator that does.

        KeyError if a name is taken and `force` is False, TypeError for another class.
        """
        return REASONING_PARSERS.register(name, module, ReasoningParser, force=force)

    @classmethod
    def import_reasoning_parser(cls, plugin_path: str) -> None:
        """Refused: code comes by an installed package's entry point and never by a path."""
        REASONING_PARSERS.refuse_file(plugin_path)
