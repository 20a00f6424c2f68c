"""`IncrementalDetokenizer`: any split of the ids gives the text that decoding them in one piece gives."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from omni_engine.models.detokenizer import IncrementalDetokenizer
from omni_engine.models.tokenizer import Tokenizer
from omni_engine.models.tokenizer_files import TokenizerFiles

PROPERTY = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXTS = (
    "the boats go out 😀👩‍👩‍👧 before the light",
    "今天天气很好，我们去海边 漢字かな",
    " x  y \n\n naïve e\u0301 Привет",
    "<think>a</think> b",
)


def as_tokenizer(backend: Backend) -> Tokenizer:
    return Tokenizer(TokenizerFiles(backend, {}, None, "left"))


@pytest.fixture(scope="module")
def byte_level(byte_level_backend: Backend) -> Tokenizer:
    return as_tokenizer(byte_level_backend)


@pytest.fixture(scope="module")
def byte_fallback(llama2_backend: Backend) -> Tokenizer:
    backend = Backend.from_str(llama2_backend.to_str())
    backend.add_tokens([AddedToken("<user>", special=False, normalized=False)])
    return as_tokenizer(backend)


def stream(
    tokenizer: Tokenizer, prompt: Sequence[int], ids: Sequence[int], cuts: Sequence[int] = (), skip: bool = True
) -> str:
    """The text of `ids`, pushed in pieces that end at `cuts`; one id at a time where there are none."""
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, skip_special_tokens=skip)
    bounds = sorted({0, len(ids), *(c for c in cuts if c < len(ids))}) if cuts else range(len(ids) + 1)
    pieces = [detokenizer.push(ids[a:b]) for a, b in pairwise(bounds)]
    return "".join(pieces) + detokenizer.finish()


def whole(tokenizer: Tokenizer, prompt: list[int], ids: list[int], skip: bool = True) -> str:
    """What decoding everything at once adds to decoding the prompt."""
    before = tokenizer.decode(prompt, skip_special_tokens=skip)
    return tokenizer.decode([*prompt, *ids], skip_special_tokens=skip)[len(before) :]


@PROPERTY
@given(
    ids=st.lists(st.integers(0, 440), max_size=60),
    cuts=st.lists(st.integers(0, 60), max_size=10),
    skip=st.booleans(),
)
def test_byte_level_stream_equals_decode_on_random_ids(
    byte_level: Tokenizer, ids: list[int], cuts: list[int], skip: bool
) -> None:
    expected = byte_level.decode(ids, skip_special_tokens=skip)
    prompt = byte_level.encode("a prompt")
    assert stream(byte_level, prompt, ids, cuts, skip) == expected
    assert stream(byte_level, prompt, ids, skip=skip) == expected


@PROPERTY
@given(data=st.binary(max_size=40))
def test_byte_level_stream_equals_decode_on_random_bytes(byte_level: Tokenizer, data: bytes) -> None:
    id_of_byte = {byte_level.token_bytes(i): i for i in range(5, 261)}
    ids = [id_of_byte[bytes([byte])] for byte in data]
    assert stream(byte_level, [], ids) == byte_level.decode(ids) == data.decode("utf-8", "replace")


@PROPERTY
@given(
    ids=st.lists(st.one_of(st.integers(0, 500), st.integers(259, 480)), max_size=60),
    cuts=st.lists(st.integers(0, 60), max_size=10),
    skip=st.booleans(),
    prompt=st.sampled_from([[], [1], [1, 2], [1, 300], [300, 0]]),
)
def test_byte_fallback_stream_equals_decode_on_random_ids(
    byte_fallback: Tokenizer, ids: list[int], cuts: list[int], skip: bool, prompt: list[int]
) -> None:
    text = stream(byte_fallback, prompt, ids, cuts, skip)
    assert stream(byte_fallback, prompt, ids, skip=skip) == text
    expected = whole(byte_fallback, prompt, ids, skip)
    if "\ufffd" not in expected:
        assert text == expected


@PROPERTY
@given(data=st.one_of(st.binary(max_size=31), st.text(max_size=7).map(str.encode)), tail=st.sampled_from([[], [300]]))
def test_byte_fallback_stream_is_the_lossy_text_of_a_byte_run(
    byte_fallback: Tokenizer, data: bytes, tail: list[int]
) -> None:
    prompt = byte_fallback.encode("a")
    ids = [3 + byte for byte in data] + tail
    end = "".join(byte_fallback.token_bytes(i).decode() for i in tail)
    assert stream(byte_fallback, prompt, ids) == data.decode("utf-8", "replace") + end
    if "\ufffd" not in byte_fallback.decode(ids):
        assert stream(byte_fallback, prompt, ids) == whole(byte_fallback, prompt, ids)


def test_a_newline_byte_is_text_at_once(byte_fallback: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(byte_fallback, byte_fallback.encode("a"))
    assert [detokenizer.push([3 + 0x0A]) for _ in range(3)] == ["\n"] * 3


@pytest.mark.parametrize("text", TEXTS)
def test_text_streams_back_after_a_prompt(byte_level: Tokenizer, byte_fallback: Tokenizer, text: str) -> None:
    assert stream(byte_level, [5], byte_level.encode(text)) == text
    # This tokenizer puts a space before every text; behind a prompt it is part of the output.
    assert stream(byte_fallback, [1, 300], byte_fallback.encode(text)) == " " + text


def test_a_leading_space_stays_after_a_prompt_with_text(byte_fallback: Tokenizer) -> None:
    space_id = byte_fallback.token_to_id("▁")
    assert space_id is not None
    assert stream(byte_fallback, [1, 300], [space_id, 300]).startswith(" ")
    assert not stream(byte_fallback, [1], [space_id, 300]).startswith(" ")


def test_special_tokens_are_skipped_and_other_added_tokens_kept(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("<think>a<|im_end|>b")
    assert stream(byte_level, [], ids) == "<think>ab"
    assert stream(byte_level, [], ids, skip=False) == "<think>a<|im_end|>b"


def test_a_character_appears_when_its_last_byte_comes(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("😀")
    detokenizer = IncrementalDetokenizer(byte_level, [])
    pieces = [detokenizer.push([i]) for i in ids]
    assert len(ids) > 1
    assert pieces == [""] * (len(ids) - 1) + ["😀"]
    assert detokenizer.finish() == ""


def test_an_incomplete_character_is_replaced_at_the_end(byte_level: Tokenizer) -> None:
    detokenizer = IncrementalDetokenizer(byte_level, [])
    assert detokenizer.push(byte_level.encode("a😀")[:-1]) == "a"
    assert detokenizer.finish() == "\ufffd"


def test_ids_outside_the_vocabulary_add_nothing(byte_level: Tokenizer, byte_fallback: Tokenizer) -> None:
    for tokenizer in (byte_level, byte_fallback):
        ids = tokenizer.encode("boats")
        outside = tokenizer.vocab_size + 7
        assert stream(tokenizer, [5], [outside, *ids[:1], outside, 2**40, *ids[1:]]) == stream(tokenizer, [5], ids)


def test_a_negative_id_is_refused(byte_level: Tokenizer, byte_fallback: Tokenizer) -> None:
    for tokenizer in (byte_level, byte_fallback):
        with pytest.raises(ValueError, match="must not be negative: -3"):
            IncrementalDetokenizer(tokenizer, []).push([5, -3])


def windowed_tokenizers() -> dict[str, Tokenizer]:
    words = {word: i for i, word in enumerate(["<unk>", "the", "boat", "##s", "go", "out", "it"])}
    joined = Backend(models.WordLevel(words, unk_token="<unk>"))
    word_pieces = Backend(models.WordPiece(words, unk_token="<unk>"))
    word_pieces.decoder = decoders.WordPiece(prefix="##", cleanup=False)  # pyright: ignore
    metaspace = Backend(models.WordLevel({"▁the": 0, "▁boat": 1, "s": 2, "▁go": 3, "▁": 4}, unk_token="s"))
    metaspace.decoder = decoders.Metaspace()  # pyright: ignore
    return {name: as_tokenizer(b) for name, b in (("none", joined), ("pieces", word_pieces), ("meta", metaspace))}


@pytest.mark.parametrize("name", ["none", "pieces", "meta"])
def test_other_decoders_stream_by_window(name: str) -> None:
    tokenizer = windowed_tokenizers()[name]
    assert tokenizer.decoder.name == "other"
    source = random.Random(0)
    for _ in range(50):
        prompt = source.choices(range(4), k=source.randint(1, 9))
        ids = source.choices(range(4), k=source.randint(0, 9))
        assert stream(tokenizer, prompt, ids) == whole(tokenizer, prompt, ids)
        assert stream(tokenizer, prompt, ids, [3, 5]) == whole(tokenizer, prompt, ids)


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize("first", [0xE2, 0x80, 0x41, 0xFF])
def test_time_is_linear_in_hostile_ids(byte_level: Tokenizer, byte_fallback: Tokenizer, kind: str, first: int) -> None:
    if kind == "byte_level":
        tokenizer = byte_level
        token_id = next(i for i in range(5, 261) if byte_level.token_bytes(i) == bytes([first]))
    else:
        tokenizer, token_id = byte_fallback, 3 + first

    def seconds(count: int) -> float:
        detokenizer = IncrementalDetokenizer(tokenizer, [])
        started = time.perf_counter()
        for _ in range(count):
            detokenizer.push([token_id])
        detokenizer.finish()
        return time.perf_counter() - started

    short = min(seconds(4_000) for _ in range(3))
    long = min(seconds(32_000) for _ in range(3))
    assert long < 8 * short * 3


def test_loading_a_folder_gives_a_streaming_tokenizer(
    make_folder: Callable[..., Path], sentencepiece_file: Path
) -> None:
    from omni_engine.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(make_folder(sentencepiece_file, {"tokenizer_class": "LlamaTokenizer"}))
    ids = tokenizer.encode("the boats 😀 <user> go")
    assert stream(tokenizer, [1], ids) == tokenizer.decode(ids)
