"""Reads a sentencepiece `tokenizer.model` and rebuilds it as a `tokenizers.Tokenizer`.

The sentencepiece library checks the file. It does not tell all that segmentation depends on, and its generated
protocol-buffer code works with one release of the protobuf runtime only, so those few fields are read from the wire
format here (sentencepiece_model.proto); the tests hold the result against the library and transformers' conversion.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers import models as token_models

SPACE = "▁"  # how sentencepiece writes a space inside a piece

# Piece.type in sentencepiece_model.proto; 1 is a normal piece, 6 a byte.
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_UNIGRAM, _BPE = 1, 2  # TrainerSpec.model_type
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types


class Piece(NamedTuple):
    text: str
    score: float
    kind: int


@dataclass
class SentencePieceModel:
    """The fields of a sentencepiece model that segmentation and decoding depend on. Ids are -1 where unused."""

    pieces: list[Piece] = field(default_factory=list)
    model_type: int = _UNIGRAM
    byte_fallback: bool = False
    unk_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    pad_id: int = -1
    add_dummy_prefix: bool = True
    charsmap: bytes = b""  # precompiled normalisation rules; empty: identity

    def special_tokens(self) -> dict[str, str]:
        """The named special tokens that the model itself declares, e.g. {"bos_token": "<s>"}."""
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id, "unk_token": self.unk_id, "pad_token": self.pad_id}
        return {name: self.pieces[i].text for name, i in ids.items() if 0 <= i < len(self.pieces)}


def parse_sentencepiece_model(data: bytes) -> SentencePieceModel:
    """Read the serialized model; raises ValueError where `data` is not one."""
    from sentencepiece import SentencePieceProcessor  # only checkpoints without tokenizer.json need it

    try:
        SentencePieceProcessor().LoadFromSerializedProto(data)
    except RuntimeError as error:
        raise ValueError(f"not a sentencepiece model: {error}") from error
    model = SentencePieceModel()
    try:
        for number, value in _fields(data):
            if number == 1:
                model.pieces.append(_parse_piece(_as_bytes(value)))
            elif number == 2:
                _read_trainer_spec(model, _as_bytes(value))
            elif number == 3:
                _read_normalizer_spec(model, _as_bytes(value))
    except (IndexError, struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"not a sentencepiece model: {error}") from error
    if not model.pieces:
        raise ValueError("not a sentencepiece model: it holds no pieces")
    if model.model_type not in (_UNIGRAM, _BPE):
        raise ValueError(f"only BPE and unigram sentencepiece models are supported, not model_type: {model.model_type}")
    return model


def build_tokenizer(model: SentencePieceModel, *, legacy: bool, llama: bool) -> Tokenizer:
    """The `tokenizers` form of `model`, without post-processor.

    `llama` reads the model as transformers' LlamaTokenizer does: it applies none of the model's normalisation. With
    `legacy`, a space is put before the text behind every added token, not only before the first.
    """
    ids = {piece.text: i for i, piece in enumerate(model.pieces)}
    if len(ids) != len(model.pieces):
        raise ValueError("not a usable sentencepiece model: a piece occurs twice")
    unk = model.pieces[model.unk_id].text if 0 <= model.unk_id < len(model.pieces) else None
    if model.model_type == _BPE:
        merges = _merges(model, ids)
        bpe = token_models.BPE(
            vocab=ids, merges=merges, unk_token=unk, fuse_unk=True, byte_fallback=model.byte_fallback
        )
        tokenizer = Tokenizer(bpe)
    else:
        scored = [(piece.text, piece.score) for piece in model.pieces]
        tokenizer = Tokenizer(token_models.Unigram(scored, unk_id=model.unk_id, byte_fallback=model.byte_fallback))
    if model.charsmap and not llama:
        tokenizer.normalizer = normalizers.Precompiled(model.charsmap)  # pyright: ignore[reportAttributeAccessIssue]
    apply_metaspace(tokenizer, legacy=legacy, add_prefix_space=model.add_dummy_prefix)
    tokenizer.add_tokens(
        [
            AddedToken(piece.text, normalized=False, special=piece.kind == _CONTROL)
            for piece in model.pieces
            if piece.kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    return tokenizer


def apply_metaspace(tokenizer: Tokenizer, *, legacy: bool, add_prefix_space: bool) -> None:
    """Give `tokenizer` the pre-tokenizer and decoder of the Llama family."""
    scheme = "never" if not add_prefix_space else "always" if legacy else "first"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(  # pyright: ignore[reportAttributeAccessIssue]
        replacement=SPACE, prepend_scheme=scheme, split=False
    )
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if add_prefix_space:
        steps.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]


def _merges(model: SentencePieceModel, ids: dict[str, int]) -> list[tuple[str, str]]:
    """The merge list that makes BPE by rank pick what sentencepiece picks by score: pieces are stored best first.

    A piece may be reached by several splits; among these, shorter left and then right parts go first.
    """
    ranked: list[tuple[int, int, int, int, int, str, str]] = []
    for text, rank in ids.items():
        if model.pieces[rank].kind in (_CONTROL, _USER_DEFINED, _UNKNOWN):
            continue
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in ids and right in ids:
                ranked.append((rank, len(left), len(right), ids[left], ids[right], left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def _parse_piece(data: bytes) -> Piece:
    text, score, kind = "", 0.0, 1
    for number, value in _fields(data):
        if number == 1:
            text = _as_bytes(value).decode("utf-8")
        elif number == 2:
            score = struct.unpack("<f", _as_bytes(value))[0]
        elif number == 3:
            kind = _as_int(value)
    return Piece(text, score, kind)


def _read_trainer_spec(model: SentencePieceModel, data: bytes) -> None:
    names = {3: "model_type", 35: "byte_fallback", 40: "unk_id", 41: "bos_id", 42: "eos_id", 43: "pad_id"}
    for number, value in _fields(data):
        if number == 35:
            model.byte_fallback = bool(value)
        elif number in names:
            setattr(model, names[number], _as_int(value))


def _read_normalizer_spec(model: SentencePieceModel, data: bytes) -> None:
    for number, value in _fields(data):
        if number == 2:
            model.charsmap = _as_bytes(value)
        elif number == 3:
            model.add_dummy_prefix = bool(value)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The (field number, value) pairs of one message; varints as int, the other wire types as bytes."""
    position, end = 0, len(data)
    while position < end:
        tag, position = _varint(data, position)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == _VARINT:
            value, position = _varint(data, position)
            yield number, value
            continue
        if wire_type == _BYTES:
            length, position = _varint(data, position)
        elif wire_type in (_FIXED32, _FIXED64):
            length = 4 if wire_type == _FIXED32 else 8
        else:
            raise ValueError(f"not a sentencepiece model: unknown wire type {wire_type}")
        if length > end - position:
            raise ValueError("not a sentencepiece model: the file is cut short")
        yield number, data[position : position + length]
        position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("not a sentencepiece model: a number is longer than 64 bits")


def _as_bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("not a sentencepiece model: a field has the wrong type")
    return value


def _as_int(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise ValueError("not a sentencepiece model: a field has the wrong type")
    value &= 0xFFFFFFFFFFFFFFFF
    return value - (1 << 64) if value >> 63 else value
