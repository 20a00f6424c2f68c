"""Turns the token ids of one sequence into text as they are generated."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from .tokenizer import Tokenizer

# The "other" decoders are only known through the backend, which is asked about this many tokens at a time.
_CONTEXT_TOKENS = 4
_MAX_HELD_TOKENS = 8


class IncrementalDetokenizer:
    """The text of a growing sequence, in pieces that are never taken back.

    However the ids are split over `push` calls, the pieces join to the same text. That text is what decoding prompt and
    output together adds to decoding the prompt:
    - byte-level tokenizers: exactly `tokenizer.decode(output ids)`;
    - "▁" tokenizers (Llama 2, Mistral): the same, but a space at the start stays where the prompt has text.
      Byte tokens ("<0xE2>") become text as soon as they complete a character: a newline must be able to stop a
      request at once. Bytes that are no UTF-8 become U+FFFD as in any lossy decoder, where `decode` replaces every
      byte of such a run, those of its good characters too: it can tell only when the run is over;
    - any other decoder: by decoding a short window of tokens again; a window that ends in U+FFFD waits for up to 8.

    Time is linear in the number of ids whatever they are. Ids outside the vocabulary add nothing; a negative id raises
    ValueError. `skip_special_tokens` leaves out special tokens; added tokens that are not special stay.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool = True
    ) -> None:
        self._skipped: frozenset[int] = tokenizer.skipped_ids if skip_special_tokens else frozenset()
        name = tokenizer.decoder.name
        if name == "byte_level":
            self._stream: _ByteLevelStream | _ByteFallbackStream | _WindowStream = _ByteLevelStream(tokenizer)
        elif name == "byte_fallback":
            has_text = any(i not in self._skipped and tokenizer.token_bytes(i) for i in prompt_token_ids)
            self._stream = _ByteFallbackStream(tokenizer, at_start=not has_text)
        else:
            context = [i for i in prompt_token_ids[-64:] if i not in self._skipped][-_CONTEXT_TOKENS:]
            self._stream = _WindowStream(tokenizer, context)

    def push(self, token_ids: Sequence[int]) -> str:
        """Add ids; returns the text that has become final."""
        skipped = self._skipped
        return self._stream.push([i for i in token_ids if i not in skipped] if skipped else token_ids)

    def finish(self) -> str:
        """The text still held back, when no more ids will come; an incomplete character becomes U+FFFD."""
        return self._stream.finish()


class _ByteLevelStream:
    """Concatenates the bytes of tokens and decodes them as UTF-8."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Sequence[int]) -> str:
        return self._decoder.decode(b"".join([self._token_bytes(i) for i in token_ids]))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _ByteFallbackStream:
    """Text tokens as they are; byte tokens through a UTF-8 decoder, which a text token ends."""

    def __init__(self, tokenizer: Tokenizer, *, at_start: bool) -> None:
        self._tokenizer = tokenizer
        self._strip_space = at_start and tokenizer.decoder.strips_first_space
        self._text: dict[int, str | None] = {}  # by id; None: a byte token
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Sequence[int]) -> str:
        parts: list[str] = []
        for token_id in token_ids:
            text = self._text[token_id] if token_id in self._text else self._look_up(token_id)
            if text is None:
                parts.append(self._decoder.decode(self._tokenizer.token_bytes(token_id)))
            elif text:
                parts.append(self._decoder.decode(b"", final=True))
                parts.append(text)
        return self._emit("".join(parts))

    def finish(self) -> str:
        return self._emit(self._decoder.decode(b"", final=True))

    def _look_up(self, token_id: int) -> str | None:
        token = self._tokenizer.id_to_token(token_id)
        is_byte = token is not None and self._tokenizer.decoder.byte_of(token) is not None
        text = None if is_byte else self._tokenizer.token_bytes(token_id).decode("utf-8")
        self._text[token_id] = text
        return text

    def _emit(self, text: str) -> str:
        if text and self._strip_space:
            self._strip_space = False
            return text[1:] if text[0] == " " else text
        return text


class _WindowStream:
    """Decodes a few tokens of context with and without the new ones; the difference is the new text."""

    def __init__(self, tokenizer: Tokenizer, context: list[int]) -> None:
        self._tokenizer = tokenizer
        self._context = context
        self._pending: list[int] = []

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join([self._push_one(i) for i in token_ids])

    def finish(self) -> str:
        return self._take() if self._pending else ""

    def _push_one(self, token_id: int) -> str:
        self._pending.append(token_id)
        if len(self._pending) < _MAX_HELD_TOKENS and self._decode(self._context + self._pending).endswith("\ufffd"):
            return ""
        return self._take()

    def _take(self) -> str:
        before = self._decode(self._context)
        after = self._decode(self._context + self._pending)
        self._context = (self._context + self._pending)[-_CONTEXT_TOKENS:]
        self._pending = []
        return after[len(before) :] if after.startswith(before) else after[_common_prefix(before, after) :]

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)


def _common_prefix(a: str, b: str) -> int:
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return length
