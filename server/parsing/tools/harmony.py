"""The tool parser of gpt-oss; its format is read whole, see `harmony`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from ..events import Emitter
from ..harmony import SPECIAL_TOKENS, harmony_grammar
from ..messages import DeltaMessage, ExtractedToolCallInformation
from ..special_tokens import SpecialTokenRestorer
from ..text_stream import Reading, TextStream
from ..tool_parser import ToolParser


class OpenAIToolParser(ToolParser):
    """Content and calls of a harmony answer; the deltas of a stream have the reasoning too.

    All tokens that structure an answer are special. Where the text lacks them the token ids are used.
    """

    special_tokens = SPECIAL_TOKENS
    is_harmony = True
    supports_required_and_named = False  # JSON alone is no harmony answer

    def grammar(self, stream: TextStream, emit: Emitter) -> Reading[None]:
        return harmony_grammar(stream, emit)

    def extract_tool_calls(
        self, model_output: str, request: Any, token_ids: Sequence[int] | None = None
    ) -> ExtractedToolCallInformation:
        """Content and calls of a complete answer, given as text, or as tokens where `token_ids` are given."""
        if token_ids is not None:
            model_output = self.model_tokenizer.decode(list(token_ids), skip_special_tokens=False)
        return super().extract_tool_calls(model_output, request)

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
        """What `delta_text` adds, None if that is nothing. Special tokens that the text lacks are put back."""
        begins = not previous_text and current_text == delta_text and not previous_token_ids
        if delta_token_ids and not any(token in delta_text for token in SPECIAL_TOKENS):
            delta_text = self._restorer.restore(delta_text, delta_token_ids)
        return self._stream.feed(delta_text, previous_text, begins=begins)

    @cached_property
    def _restorer(self) -> SpecialTokenRestorer:
        return SpecialTokenRestorer(self.model_tokenizer, SPECIAL_TOKENS)
