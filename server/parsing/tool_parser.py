"""The class of all tool parsers, with vLLM's methods, and the manager that vLLM's plugins register with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from .deltas import DeltaBuilder, tool_calls_of
from .events import Emitter
from .messages import DeltaMessage, ExtractedToolCallInformation
from .parse import Parse
from .registry import TOOL_PARSERS
from .schema_types import properties_by_tool
from .text_stream import Reading, TextStream
from .vllm_stream import VllmStream


class ToolParser:
    """Finds tool calls in text. A subclass has a grammar; this class has everything else.

    `tools` are those of the request, for the types of their parameters. One object serves one stream at a time; a
    new stream begins with an empty `previous_text`.
    """

    special_tokens: tuple[str, ...] = ()  # tokens that the grammar looks for and a tokenizer may call special
    strips_content: ClassVar[bool] = False  # whether whitespace directly before a call is none of the content
    is_harmony: ClassVar[bool] = False  # whether the answer is one of `harmony`, with its reasoning
    supports_required_and_named: ClassVar[bool] = True  # as JSON that a grammar enforces, in place of the format's own

    def __init__(self, tokenizer: Any, tools: Sequence[Any] | None = None) -> None:
        self.model_tokenizer = tokenizer
        self.tools = list(tools or [])
        self.types = properties_by_tool(self.tools)
        self._stream = VllmStream(self.new_parse)

    def grammar(self, stream: TextStream, emit: Emitter) -> Reading[None]:
        """Read an answer to its end and emit what it says."""
        raise NotImplementedError(f"a tool parser must define grammar: {type(self).__name__}")

    def new_parse(self) -> Parse:
        """A parse of one answer."""
        return Parse(self.grammar, Emitter(strips_content=self.strips_content))

    @property
    def vocab(self) -> dict[str, int]:
        """Token ids by token."""
        return self.model_tokenizer.get_vocab()

    def adjust_request(self, request: Any) -> Any:
        """Make sure that the special tokens of the format reach the parser. Returns `request`."""
        if request.tools and request.tool_choice != "none":
            request.skip_special_tokens = False
        return request

    def extract_tool_calls(self, model_output: str, request: Any) -> ExtractedToolCallInformation:
        """Content and calls of a complete answer."""
        self._learn_tools(request)
        parse = self.new_parse()
        deltas = DeltaBuilder().deltas([*parse.feed(model_output), *parse.finish()])
        calls = tool_calls_of(deltas)
        content = "".join(delta.content or "" for delta in deltas)
        return ExtractedToolCallInformation(bool(calls), calls, content or None)

    def extract_tool_calls_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
        request: Any,
    ) -> DeltaMessage | None:
        """What `delta_text` adds, None if that is nothing."""
        self._learn_tools(request)
        return self._stream.feed(delta_text, previous_text, begins=not previous_text and current_text == delta_text)

    def finish_streaming(self) -> DeltaMessage | None:
        """What the end of the answer adds; vLLM's tests never ask, its engine does."""
        return self._stream.finish()

    def get_remaining_unstreamed_args(self) -> str:
        """Always empty: arguments are never kept back."""
        return ""

    def _learn_tools(self, request: Any) -> None:
        if not self.tools and isinstance(tools := getattr(request, "tools", None), list):
            self.types = properties_by_tool(tools)


class ToolParserManager:
    """vLLM's way to name and register tool parsers; the names are those of `registry.TOOL_PARSERS`."""

    @classmethod
    def get_tool_parser(cls, name: str) -> type[ToolParser]:
        """The class of that name. KeyError with all names for another one."""
        return TOOL_PARSERS.get(name)

    @classmethod
    def list_registered(cls) -> list[str]:
        """All names."""
        return TOOL_PARSERS.names()

    @classmethod
    def register_module(cls, name: str | list[str] | None = None, force: bool = True, module: Any = None) -> Any:
        """Give `module`, a subclass of ToolParser, a name or several; without it, a decorator that does.

        KeyError if a name is taken and `force` is False, TypeError for another class.
        """
        return TOOL_PARSERS.register(name, module, ToolParser, force=force)

    @classmethod
    def import_tool_parser(cls, plugin_path: str) -> None:
        """Refused: code comes by an installed package's entry point and never by a path."""
        TOOL_PARSERS.refuse_file(plugin_path)
