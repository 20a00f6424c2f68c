"""Special tokens that the detokenizer left out of the text, put back for grammars that look for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


class SpecialTokenRestorer:
    """Puts `tokens` back into text that was decoded without them; `tokenizer` is this package's, or transformers'."""

    def __init__(self, tokenizer: Any, tokens: Iterable[str]) -> None:
        self._tokenizer = tokenizer
        id_of = tokenizer.get_vocab().get if hasattr(tokenizer, "get_vocab") else tokenizer.token_to_id
        found = ((id_of(token), token) for token in tokens)
        self._text_of_id = {each: token for each, token in found if each is not None}

    def restore(self, text: str, token_ids: Sequence[int]) -> str:
        """`text` is what `token_ids` add to the answer.

        It may begin with characters of earlier tokens, which come late when they end a character; so it is read from
        its end: what the ordinary tokens after a special one decode to stands after it.
        """
        restored: list[str] = []
        ordinary: list[int] = []
        for each in reversed(token_ids):
            if each not in self._text_of_id:
                ordinary.append(each)
                continue
            after = self._tokenizer.decode(ordinary[::-1], skip_special_tokens=True) if ordinary else ""
            ordinary = []
            if after and text.endswith(after):
                restored.append(after)
                text = text[: -len(after)]
            restored.append(self._text_of_id[each])
        return text + "".join(reversed(restored))
