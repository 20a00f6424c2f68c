"""Log probabilities in the shapes of the two APIs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..engine.outputs import Logprob
from .responses import ChatLogprobs, ChatTokenLogprobs, CompletionLogprobs, PromptLogprobs, TokenLogprob

if TYPE_CHECKING:
    from ..models.tokenizer import Tokenizer

LOWEST_LOGPROB = -9999.0  # JSON has no infinity

Entries = Sequence[Mapping[int, Logprob] | None]


@dataclass(frozen=True)
class LogprobFormat:
    """How many alternatives to show per token (-1: all), and whether tokens are shown as "token_id:N"."""

    top: int
    tokens_as_ids: bool
    tokenizer: Tokenizer | None

    def completion(self, token_ids: Sequence[int], entries: Entries, first_offset: int) -> CompletionLogprobs:
        """The legacy shape; an entry of None (the first token of a prompt) has no probability."""
        result = CompletionLogprobs([], [], [], [])
        offset = first_offset
        for token_id, entry in zip(token_ids, entries, strict=True):
            own = None if entry is None else entry[token_id]
            text = self._text(token_id, own)
            result.tokens.append(text)
            result.text_offset.append(offset)
            offset += len(text)
            result.token_logprobs.append(None if own is None else _finite(own.logprob))
            result.top_logprobs.append(
                None
                if entry is None
                else {
                    self._text(other, item): _finite(item.logprob)
                    for place, (other, item) in enumerate(entry.items())
                    # The token itself comes first, so N alternatives are N or N + 1 entries.
                    if self.top == -1 or place <= self.top
                }
            )
        return result

    def chat(self, token_ids: Sequence[int], entries: Entries) -> ChatLogprobs:
        """The chat shape: the `top` most likely tokens, best first."""
        content = []
        for token_id, entry in zip(token_ids, entries, strict=True):
            assert entry is not None  # generated tokens always have one
            ranked = sorted(entry.items(), key=lambda item: -item[1].logprob) if self.top else []
            shown = ranked if self.top == -1 else ranked[: self.top]
            own = self._token(token_id, entry[token_id])
            alternatives = [self._token(other, item) for other, item in shown]
            content.append(ChatTokenLogprobs(own.token, own.logprob, own.bytes, alternatives))
        return ChatLogprobs(content)

    def _token(self, token_id: int, item: Logprob) -> TokenLogprob:
        text = self._text(token_id, item)
        return TokenLogprob(text, _finite(item.logprob), list(text.encode("utf-8", "replace")))

    def _text(self, token_id: int, item: Logprob | None) -> str:
        if not self.tokens_as_ids:
            if item is not None and item.decoded_token is not None:
                return item.decoded_token
            if item is None and self.tokenizer is not None:
                return self.tokenizer.token_string(token_id)
        return f"token_id:{token_id}"


def prompt_logprobs(entries: Entries | None) -> PromptLogprobs | None:
    """Per prompt token, the first being null: token id → logprob, rank, decoded_token."""
    if entries is None:
        return None
    return [
        None
        if entry is None
        else {
            token_id: {"logprob": _finite(item.logprob), "rank": item.rank, "decoded_token": item.decoded_token}
            for token_id, item in entry.items()
        }
        for entry in entries
    ]


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)
