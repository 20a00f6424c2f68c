"""The reasoning parser of gpt-oss; its format is read whole, see `harmony`."""

from __future__ import annotations

from collections.abc import Sequence

from ..events import Emitter
from ..harmony import SPECIAL_TOKENS, harmony_grammar
from ..reasoning_parser import ReasoningParser
from ..text_stream import Reading, TextStream


class GptOssReasoningParser(ReasoningParser):
    """Reasoning and content of a harmony answer; its calls are in neither."""

    special_tokens = SPECIAL_TOKENS
    is_harmony = True

    def grammar(self, stream: TextStream, emit: Emitter) -> Reading[None]:
        return harmony_grammar(stream, emit)

    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        """Always: the channels are part of what a grammar has to allow, so it never waits for an end of reasoning."""
        return True

    def count_reasoning_tokens(self, token_ids: Sequence[int]) -> int:
        """Tokens in messages of the analysis channel that go to no tool."""
        start, channel, message, _, *ends = (self.token_id(token) for token in SPECIAL_TOKENS)
        count = 0
        header: list[int] | None = None
        is_reasoning = False
        for token_id in token_ids:
            if token_id in (start, channel):
                header, is_reasoning = [], False
            elif token_id == message and header is not None:
                text = self.model_tokenizer.decode(header, skip_special_tokens=False)
                header, is_reasoning = None, text.strip() == "analysis"
            elif token_id in ends:
                is_reasoning = False
            elif header is not None:
                header.append(token_id)
            else:
                count += is_reasoning
        return count

    def extract_content_ids(self, input_ids: list[int]) -> list[int]:
        """Refused: messages of several channels have no single end of reasoning in token ids."""
        raise NotImplementedError("content of a harmony answer is found in its text, with extract_reasoning: token ids")
