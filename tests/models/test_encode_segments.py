"""Texts and pairs of texts as tokens, whole and cut, against transformers' tokenizers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

from omni_engine.models.tokenizer import Tokenizer, load_tokenizer

SHORT = "The boats go out."
LONG = "A request has tokens that were computed and tokens that should be; each step gives it some more of them."
TEXTS = [(SHORT, None), (LONG, None), ("", None), (SHORT, LONG), (LONG, SHORT), (LONG, LONG), (SHORT, "")]


@pytest.fixture(scope="module", params=["BertModel", "XLMRobertaModel", "Qwen3Model"])
def folder(request: pytest.FixtureRequest, make_pooling_checkpoint: Callable[..., Path]) -> Path:
    return make_pooling_checkpoint(request.param)


@pytest.mark.parametrize("limit", [None, 4, 5, 9, 10, 17, 30])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("text", "pair"), TEXTS)
def test_ids_and_types_are_those_of_transformers(
    folder: Path, text: str, pair: str | None, side: str, limit: int | None
) -> None:
    reference = transformers.AutoTokenizer.from_pretrained(folder, truncation_side=side)
    expected = reference(text, text_pair=pair, truncation=limit is not None, max_length=limit)
    ids, types = load_tokenizer(folder).encode_segments(text, pair, max_tokens=limit, truncation_side=side)
    assert ids == expected["input_ids"]
    assert types == expected["token_type_ids"]


def test_a_limit_below_the_special_tokens_is_refused(make_pooling_checkpoint: Callable[..., Path]) -> None:
    tokenizer = load_tokenizer(make_pooling_checkpoint("BertModel"))
    assert len(tokenizer.encode_segments(SHORT, max_tokens=2)[0]) == 2
    with pytest.raises(ValueError, match="special tokens"):
        tokenizer.encode_segments(SHORT, max_tokens=1)


def test_special_tokens_may_be_left_out(make_pooling_checkpoint: Callable[..., Path]) -> None:
    tokenizer = load_tokenizer(make_pooling_checkpoint("BertModel"))
    plain = tokenizer.encode_segments(LONG, add_special_tokens=False)[0]
    assert tokenizer.encode_segments(LONG)[0][1:-1] == plain
    assert tokenizer.encode_segments(LONG, add_special_tokens=False, max_tokens=3)[0] == plain[:3]


def test_a_tokenizer_may_read_lower_case_only(make_pooling_checkpoint: Callable[..., Path]) -> None:
    folder = make_pooling_checkpoint("BertModel")
    plain, lowered = load_tokenizer(folder), load_tokenizer(folder)
    lowered.lowercase()
    assert isinstance(lowered, Tokenizer)
    text = "The HARBOUR [SEP] weiß"
    assert plain.encode_segments(text)[0] != plain.encode_segments(text.lower())[0]
    assert lowered.encode_segments(text)[0] == plain.encode_segments("the harbour [SEP] weiß")[0]
