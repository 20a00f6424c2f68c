"""Data sets: lengths, shared prefixes, seeds, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from omni_engine.server.bench.arguments import BenchParser
from omni_engine.server.bench.datasets import DatasetOptions, add_dataset_arguments, make_requests
from omni_engine.server.bench.prompts import PromptMaker


def make(tokens, **options):
    return make_requests(DatasetOptions(**options), PromptMaker(tokens, as_text=False))


def ids_of(requests):
    return [request.prompt.tolist() for request in requests]


def parse(*words):
    parser = BenchParser("bench serve", "", "")
    add_dataset_arguments(parser, default="random")
    return DatasetOptions.of(parser.parse(words))


def test_flags_have_the_defaults_of_the_options():
    assert parse() == DatasetOptions()


def test_random_requests_have_the_asked_lengths_and_no_arrival_times(tokens):
    requests = make(tokens, num_prompts=20, random_input_len=30, random_output_len=7)
    assert [(r.prompt_len, len(r.prompt), r.output_len, r.arrival) for r in requests] == [(30, 30, 7, None)] * 20
    assert len({tuple(ids) for ids in ids_of(requests)}) == 20


def test_the_seed_alone_makes_the_difference(tokens):
    options = {"num_prompts": 5, "random_range_ratio": 0.5}
    assert ids_of(make(tokens, **options)) == ids_of(make(tokens, **options))
    assert ids_of(make(tokens, **options)) != ids_of(make(tokens, **options, seed=1))
    assert len(make(tokens, **options, seed=-1)) == 5


def test_lengths_vary_evenly_by_the_ratio(tokens):
    requests = make(tokens, num_prompts=3000, random_input_len=10, random_output_len=5, random_range_ratio=0.4)
    assert {r.prompt_len for r in requests} == set(range(6, 15))
    assert {r.output_len for r in requests} == set(range(3, 8))
    counts = np.bincount([r.prompt_len for r in requests])[6:]
    assert counts.min() > 3000 / 9 * 0.75 and counts.max() < 3000 / 9 * 1.25


def test_the_random_prefix_comes_on_top_and_is_shared(tokens):
    prompts = ids_of(make(tokens, num_prompts=4, random_input_len=20, random_prefix_len=12))
    assert {len(ids) for ids in prompts} == {32}
    assert len({tuple(ids[:12]) for ids in prompts}) == 1
    assert len({tuple(ids[12:]) for ids in prompts}) == 4


def test_input_len_and_output_len_go_before_the_data_sets_own(tokens):
    for name in ("random", "prefix_repetition"):
        requests = make(tokens, dataset_name=name, num_prompts=20, input_len=9, output_len=3)
        assert {(r.prompt_len, r.output_len) for r in requests} == {(9 + 256 * (name != "random"), 3)}


def test_prefixes_repeat_equally_often_in_shuffled_order(tokens):
    options = {
        "dataset_name": "prefix_repetition", "num_prompts": 11, "prefix_repetition_num_prefixes": 3,
        "prefix_repetition_prefix_len": 16, "prefix_repetition_suffix_len": 5, "prefix_repetition_output_len": 2,
    }  # fmt: skip
    prompts = ids_of(make(tokens, **options))
    prefixes = [tuple(ids[:16]) for ids in prompts]
    assert sorted(prefixes.count(prefix) for prefix in set(prefixes)) == [3, 4, 4]
    assert len({tuple(ids) for ids in prompts}) == 11
    in_order = [tuple(ids[:16]) for ids in ids_of(make(tokens, **options, disable_shuffle=True))]
    changes = [sum(a != b for a, b in pairwise(order)) for order in (prefixes, in_order)]
    assert changes[0] > 2 and changes[1] == 2


def conversation(question, answer):
    words = [" ".join(f"w{2 + i % 90}" for i in range(n)) for n in (question, answer)]
    return {"conversations": [{"from": "human", "value": words[0]}, {"from": "gpt", "value": words[1]}]}


@pytest.fixture
def sharegpt(tmp_path):
    path = tmp_path / "sharegpt.json"
    entries = [
        conversation(9, 20), conversation(2, 20), conversation(1024, 5), conversation(1000, 1100), conversation(9, 3),
        {"conversations": [{"value": "w2"}]}, conversation(30, 40),
    ]  # fmt: skip
    path.write_text(json.dumps(entries))
    return DatasetOptions(dataset_name="sharegpt", dataset_path=str(path), num_prompts=2)


def test_sharegpt_leaves_out_what_vllm_leaves_out(sharegpt, tokens):
    requests = make_requests(sharegpt, PromptMaker(tokens, as_text=True))
    # Each text begins with a special token; answers have none.
    assert sorted((r.prompt_len, r.output_len) for r in requests) == [(10, 20), (31, 40)]
    assert all(isinstance(r.prompt, str) for r in requests)


def test_sharegpt_answers_may_be_given_a_length(sharegpt, tokens):
    options = replace(sharegpt, num_prompts=9, sharegpt_output_len=6, no_oversample=True, disable_shuffle=True)
    requests = make_requests(options, PromptMaker(tokens, as_text=True))
    assert [(r.prompt_len, r.output_len) for r in requests] == [(10, 6), (1001, 6), (10, 6), (31, 6)]


def test_a_small_file_is_repeated_unless_it_must_not_be(sharegpt, tokens):
    maker = PromptMaker(tokens, as_text=True)
    assert len(make_requests(replace(sharegpt, num_prompts=7), maker)) == 7
    assert len(make_requests(replace(sharegpt, num_prompts=7, no_oversample=True), maker)) == 2


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": 1}', '[{"conversations": [{"from": "x"}, {}]}]'])
def test_a_file_of_another_form_is_refused_by_name(tmp_path, tokens, text):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"not a ShareGPT file.*bad\.json"):
        make(tokens, dataset_name="sharegpt", dataset_path=str(path))


def test_a_file_without_a_fitting_conversation_is_refused(tmp_path, tokens):
    path = tmp_path / "short.json"
    path.write_text(json.dumps([conversation(1, 1)]))
    with pytest.raises(ValueError, match=r"no conversation has a prompt of 4 to 1024 tokens.*short\.json"):
        make(tokens, dataset_name="sharegpt", dataset_path=str(path))


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--dataset-name", "sharegpt"], "--dataset-path FILE"), (["--dataset-name", "trace"], "--trace FILE")],
)
def test_data_sets_from_files_need_one(words, message):
    with pytest.raises(ValueError, match=message):
        parse(*words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--random-range-ratio", "1"], "at least 0 and under 1: 1"),
        (["--num-prompts", "0"], "must be at least 1: 0"),
        (["--random-prefix-len", "-1"], "must not be negative: -1"),
        (["--trace-time-scale", "x"], "not a number: x"),
        (["--trace-time-scale", "inf"], "must be at least 0: inf"),
        (["--trace-length-scale", "nan"], "must be above 0: nan"),
        (["--hf-subset", "x"], "not supported yet: --hf-subset"),
    ],
)
def test_values_are_checked(capsys, words, message):
    with pytest.raises(SystemExit):
        parse(*words)
    assert message in capsys.readouterr().err
