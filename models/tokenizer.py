"""Text to token ids and back: `Tokenizer`, and `load_tokenizer` which opens a checkpoint's folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import normalizers

from .byte_level import BYTE_OF_CHARACTER
from .sentencepiece_model import SPACE
from .tokenizer_files import TokenizerFiles, read_tokenizer_files

# Above this many characters the text is encoded through the batch call: it releases the interpreter lock, so a long
# prompt does not stop the server's other requests. Below it the plain call is cheaper.
_LONG_TEXT = 4096
_MAX_TOKEN_ID = 2**32 - 1


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Open the folder `path` with a tokenizer.json, a sentencepiece tokenizer.model, or Kimi's tiktoken.model.

    A missing or broken file raises ValueError with its name.
    """
    return Tokenizer(read_tokenizer_files(Path(path)))


class Tokenizer:
    """A checkpoint's tokenizer. Read-only after loading and safe to share between threads.

    Ids at or above `vocab_size` are legal input (a model's vocabulary may be padded beyond the tokenizer's): they
    decode to nothing. Negative ids raise ValueError.
    """

    def __init__(self, files: TokenizerFiles) -> None:
        self._backend = files.backend
        self.chat_template = files.chat_template
        self.sorts_tools = files.sorts_tools
        self.truncation_side = files.truncation_side
        self.special_tokens_map = files.special_tokens  # name -> text; what a chat template may use
        self.vocab_size: int = self._backend.get_vocab_size(with_added_tokens=True)
        self.max_token_id: int = max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)
        self.bos_token = files.special_tokens.get("bos_token")
        self.eos_token = files.special_tokens.get("eos_token")
        self.pad_token = files.special_tokens.get("pad_token")
        self.bos_token_id = self._optional_id(self.bos_token)
        self.eos_token_id = self._optional_id(self.eos_token)
        self.pad_token_id = self._optional_id(self.pad_token)
        added = self._backend.get_added_tokens_decoder()
        self.skipped_ids = frozenset(i for i, token in added.items() if token.special)  # by skip_special_tokens
        named = {self._optional_id(token) for token in files.special_tokens.values()}
        self.all_special_ids: frozenset[int] = self.skipped_ids | {i for i in named if i is not None}
        self.decoder = DecoderKind.of(self._backend)
        self._bytes: dict[int, bytes] = {}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`. Special tokens written out in the text are recognised as such.

        `add_special_tokens`: also add what the model expects around a text, such as BOS.
        """
        with _readable(text):
            if len(text) < _LONG_TEXT:
                return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
            return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def encode_segments(
        self,
        text: str,
        pair: str | None = None,
        *,
        add_special_tokens: bool = True,
        max_tokens: int | None = None,
        truncation_side: str = "right",
    ) -> tuple[list[int], list[int]]:
        """The ids of a text, or of two joined as the model expects them, and the segment (token type) of each.

        Of what exceeds `max_tokens`, special tokens included, the longer text loses first, at `truncation_side`; the
        special tokens stay. ValueError where `max_tokens` has no room for these.
        """
        backend = self._backend
        pair = pair or None  # as transformers has it: an empty second text is none
        with _readable(text + (pair or "")):
            if max_tokens is None:
                whole = backend.encode(text, pair, add_special_tokens=add_special_tokens)
                return whole.ids, whole.type_ids
            texts = [text] if pair is None else [text, pair]
            parts = backend.encode_batch(texts, add_special_tokens=False)
            room = max_tokens
            if add_special_tokens:
                room -= backend.num_special_tokens_to_add(pair is not None)
            if room < 0:
                raise ValueError(f"the special tokens around the text alone are more than: {max_tokens}")
            for part, length in zip(parts, _shares([len(part) for part in parts], room), strict=True):
                part.truncate(length, direction=truncation_side)
            whole = backend.post_process(parts[0], parts[1] if len(parts) > 1 else None, add_special_tokens)
            return whole.ids, whole.type_ids

    def lowercase(self) -> None:
        """Read every text in lower case from now on; called before the tokenizer is shared."""
        own = [] if self._backend.normalizer is None else [self._backend.normalizer]
        self._backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *own])  # type: ignore[assignment]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids` in one piece; ill-formed UTF-8 becomes U+FFFD."""
        for token_id in ids:
            _check_id(token_id)
        known = [i for i in ids if i <= _MAX_TOKEN_ID]
        return self._backend.decode(known, skip_special_tokens=skip_special_tokens)

    def id_to_token(self, token_id: int) -> str | None:
        """The entry of the vocabulary, e.g. "Ġthe" or "▁the"; None outside the vocabulary."""
        _check_id(token_id)
        return self._backend.id_to_token(token_id) if token_id <= _MAX_TOKEN_ID else None

    def token_to_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def token_string(self, token_id: int) -> str:
        """The text of this token decoded alone, as logprobs show it; "" outside the vocabulary."""
        return self.decode([token_id], skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes this token adds inside a text (a leading space included); b"" outside the vocabulary."""
        known = self._bytes.get(token_id)
        if known is None:
            token = self.id_to_token(token_id)
            known = b"" if token is None else self.decoder.token_bytes(token)
            self._bytes[token_id] = known
        return known

    def _optional_id(self, token: str | None) -> int | None:
        return None if token is None else self._backend.token_to_id(token)


class DecoderKind:
    """How a backend turns tokens into text. `name`: byte_level | byte_fallback | other.

    byte_level:    each token is a run of bytes in GPT-2's printable alphabet; the text is their UTF-8 decoding.
    byte_fallback: "▁" is a space, "<0xE2>" a byte (if `has_byte_tokens`), everything else text. `strips_first_space`:
                   one space at the very start of the text is dropped.
    other:         only the backend knows.
    """

    def __init__(self, name: str, *, has_byte_tokens: bool = False, strips_first_space: bool = False) -> None:
        self.name = name
        self.has_byte_tokens = has_byte_tokens
        self.strips_first_space = strips_first_space

    @classmethod
    def of(cls, backend: Backend) -> DecoderKind:
        decoder: Any = backend.decoder
        steps = [] if decoder is None else _flatten(json.loads(decoder.__getstate__()))
        kinds = [step["type"] for step in steps]
        if kinds == ["ByteLevel"]:
            return cls("byte_level")
        replace = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
        strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        if steps[:1] == [replace]:
            has_byte_tokens = kinds[1:2] == ["ByteFallback"]
            rest = steps[2:] if has_byte_tokens else steps[1:]
            if rest in ([], [{"type": "Fuse"}]):
                return cls("byte_fallback", has_byte_tokens=has_byte_tokens)
            if rest == [{"type": "Fuse"}, strip]:
                return cls("byte_fallback", has_byte_tokens=has_byte_tokens, strips_first_space=True)
        return cls("other")

    def token_bytes(self, token: str) -> bytes:
        if self.name == "byte_level":
            try:
                return bytes([BYTE_OF_CHARACTER[character] for character in token])
            except KeyError:  # an added token with characters outside the alphabet stands for itself
                return token.encode("utf-8")
        if self.name == "byte_fallback":
            byte = self.byte_of(token)
            return bytes([byte]) if byte is not None else token.replace(SPACE, " ").encode("utf-8")
        return token.encode("utf-8")

    def byte_of(self, token: str) -> int | None:
        """The byte that a token such as "<0xE2>" stands for; None for every other token."""
        if self.has_byte_tokens and len(token) == 6 and token.startswith("<0x") and token[5] == ">":
            try:
                return int(token[3:5], 16)
            except ValueError:
                return None
        return None


@contextmanager
def _readable(text: str) -> Iterator[None]:
    """Around calls of the backend: what it cannot read is a ValueError."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"the text is not valid Unicode: lone surrogate at character {error.start}") from error
    try:
        yield
    except BaseException as error:
        # The library's regular expressions give up by a panic, which is no Exception, e.g. on 12 million spaces.
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the tokenizer cannot split this text, {error}") from error


def _shares(lengths: list[int], room: int) -> list[int]:
    """How many tokens of one text or two may stay, `room` in all: the longer one loses first."""
    if sum(lengths) <= room:
        return lengths
    if len(lengths) == 1:
        return [room]
    shorter = min(lengths[0], lengths[1], room // 2)
    return [shorter, room - shorter] if lengths[0] <= lengths[1] else [room - shorter, shorter]


def _flatten(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for part in decoder["decoders"] for step in _flatten(part)]


def _check_id(token_id: int) -> None:
    if token_id < 0:
        raise ValueError(f"token ids must not be negative: {token_id}")
