"""Prompts have the number of tokens that is asked for, and begin alike where they should."""

from __future__ import annotations

import json

import numpy as np
import pytest

from omni_engine.models.tokenizer import load_tokenizer
from omni_engine.server.bench.prompts import IdsOnly, LocalTokens, PromptMaker, ServerTokens


def generator(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    """Words, printable characters, and the halves of a character that is none by itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = [a + b + c for a in "bdfgkl" for b in "aeiou" for c in "mnrst"]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([f" {word}" * 5 for word in words], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return folder


def test_token_ids_are_sent_as_they_are(tokens):
    maker = PromptMaker(tokens, as_text=False)
    parts = [maker.draw(generator(), 5), maker.draw(generator(1), 3)]
    prompt, length = maker.build(parts)
    assert length == 8
    assert prompt.tolist() == [*parts[0].tolist(), *parts[1].tolist()]


def test_ids_of_a_tokenizer_hold_no_special_tokens(tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    ids = LocalTokens(tokenizer, "t").ids()
    assert not tokenizer.all_special_ids & set(ids.tolist())
    assert len(ids) == tokenizer.vocab_size - 2


def test_ids_stay_under_the_vocabulary_of_the_model(tokenizer_folder):
    assert LocalTokens(load_tokenizer(tokenizer_folder), "t", vocab_size=300).ids().max() == 299


def test_texts_of_a_real_tokenizer_have_the_wanted_length(tokenizer_folder):
    tokens = LocalTokens(load_tokenizer(tokenizer_folder), "t")
    maker = PromptMaker(tokens, as_text=True)
    for wanted in (1, 2, 17, 500):
        text, length = maker.build([maker.draw(generator(wanted), wanted)])
        assert length == len(tokens.encode(text, add_special_tokens=True)) == wanted
    assert maker.num_inexact == 0


def test_without_words_texts_are_made_of_printable_characters(tokenizer_folder, monkeypatch):
    monkeypatch.setattr("omni_engine.server.bench.prompts._FEWEST_WORDS", 10**6)
    tokens = LocalTokens(load_tokenizer(tokenizer_folder), "t")
    assert len(tokens.words()) > 90
    assert all(tokens.decode([i]).isprintable() for i in tokens.words().tolist())
    maker = PromptMaker(tokens, as_text=True)
    text, length = maker.build([maker.draw(generator(), 40)])
    assert len(tokens.encode(text, add_special_tokens=True)) == length == 40


def test_special_tokens_around_a_text_count_as_part_of_it(tokens):
    text, length = PromptMaker(tokens, as_text=True).build([np.arange(2, 12)])
    assert (len(text.split()), length) == (9, 10)
    text, length = PromptMaker(tokens, as_text=True, adds_special_tokens=False).build([np.arange(2, 12)])
    assert (len(text.split()), length) == (10, 10)


def test_a_text_that_tokenizes_otherwise_is_adjusted(merging_tokens):
    maker = PromptMaker(merging_tokens, as_text=True)
    ids = np.array([11, 21, 31, 42, 52, 63, 74, 85])  # 6 tokens as text
    text, length = maker.build([ids])
    assert len(text.split()) > 8
    assert length == 8 == len(merging_tokens.encode(text, add_special_tokens=True))


def test_adjusting_leaves_the_shared_part_alone(merging_tokens):
    maker = PromptMaker(merging_tokens, as_text=True)
    shared = maker.draw(generator(), 30)
    texts = [maker.build([shared, maker.draw(generator(seed), 10)])[0] for seed in (1, 2)]
    start = merging_tokens.decode(shared.tolist())
    assert texts[0] != texts[1]
    assert all(text.startswith(start) for text in texts)


def test_a_shared_part_that_is_too_long_is_not_cut(tokens):
    encode = tokens.encode
    tokens.encode = lambda text, *, add_special_tokens: encode(text, add_special_tokens=False) * 2
    maker = PromptMaker(tokens, as_text=True, adds_special_tokens=False)
    shared = maker.draw(generator(), 30)
    text, length = maker.build([shared, maker.draw(generator(1), 4)])
    assert text.startswith(tokens.decode(shared.tolist()))
    assert (length, maker.num_inexact) == (2 * len(text.split()), 1)


def test_equal_parts_give_equal_texts(merging_tokens):
    maker = PromptMaker(merging_tokens, as_text=True)
    parts = [maker.draw(generator(), 30), maker.draw(generator(1), 20)]
    assert maker.build(parts) == maker.build(parts)


def test_a_text_that_cannot_be_adjusted_is_counted(tokens):
    tokens.encode = lambda text, *, add_special_tokens: [7] * 3  # whatever the text
    maker = PromptMaker(tokens, as_text=True, adds_special_tokens=False)
    assert maker.build([np.arange(2, 12)])[1] == 3
    assert maker.num_inexact == 1


def test_a_server_tokenizes_what_is_not_here(server):
    tokens = ServerTokens(server.url, "m", {})
    maker = PromptMaker(tokens, as_text=True)
    text, length = maker.build([maker.draw(generator(), 50)])
    assert length == len(text.split()) == 50
    assert len(set(text.split())) > 20


def test_a_server_without_a_tokenizer_is_answered_with_the_flag_to_use(server):
    server.tokenizes = False
    with pytest.raises(ValueError, match="name a checkpoint folder or a cached model id with --tokenizer"):
        ServerTokens(server.url, "m", {})


def test_without_a_tokenizer_there_are_ids_but_no_texts():
    tokens = IdsOnly(9)
    assert PromptMaker(tokens, as_text=False).build([np.array([3, 8])])[1] == 2
    with pytest.raises(ValueError, match="--skip-tokenizer-init"):
        PromptMaker(tokens, as_text=True)
