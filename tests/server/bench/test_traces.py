"""Traces: both formats are read, and equal hash ids become equal blocks."""

from __future__ import annotations

import json

import numpy as np
import pytest

from omni_engine.server.bench.datasets import DatasetOptions, make_requests
from omni_engine.server.bench.prompts import PromptMaker
from omni_engine.server.bench.traces import TraceRow, read_trace, trace_requests

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:15:46.6805900,374,44\r\n"
    "2023-11-16 18:15:50.9951690,396,109\r\n"
    "2023-11-16 18:16:46.6805900,7,1"
)
MOONCAKE = [
    {"timestamp": 2000, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]},
    {"timestamp": 2000, "input_length": 1300, "output_length": 6, "hash_ids": [0, 1, 3]},
    {"timestamp": 5500, "input_length": 600, "output_length": 7, "hash_ids": [0, 4]},
]


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "trace"
        path.write_text(text, newline="")
        return str(path)

    return write


@pytest.fixture
def mooncake(write):
    return write("".join(json.dumps(row) + "\n" for row in MOONCAKE))


def make(tokens, path, as_text=False, **options):
    maker = PromptMaker(tokens, as_text=as_text, adds_special_tokens=False)
    return make_requests(DatasetOptions(trace=path, **options), maker)


def test_azure_rows(write):
    rows = read_trace(write(AZURE), 10)
    assert [(row.input_len, row.output_len) for row in rows] == [(374, 44), (396, 109), (7, 1)]
    assert [row.arrival for row in rows] == pytest.approx([0, 4.314579, 60], abs=1e-5)


def test_azure_times_with_a_zone_and_fewer_digits(write):
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:59.5+00:00,1,2\n2024-05-10 00:01:00+00:00,1,2\n"
    assert [row.arrival for row in read_trace(write(text), 10)] == [0, 0.5]


def test_mooncake_rows(mooncake):
    assert read_trace(mooncake, 10) == [
        TraceRow(0.0, 1100, 5, (0, 1, 2)),
        TraceRow(0.0, 1300, 6, (0, 1, 3)),
        TraceRow(3.5, 600, 7, (0, 4)),
    ]


def test_only_the_first_requests_are_read(write, mooncake):
    assert len(read_trace(mooncake, 2)) == 2
    broken_later = write(AZURE + "\r\nnothing,x,y")
    assert len(read_trace(broken_later, 3)) == 3


def test_requests_come_in_the_order_of_their_arrival(write):
    rows = read_trace(write("".join(json.dumps(row) + "\n" for row in reversed(MOONCAKE))), 10)
    assert [row.arrival for row in rows] == [0, 0, 3.5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "begins neither"),
        ("a,b\n1,2\n", "begins neither"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "no requests"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nnow,1,2\n", "not a time: now"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,x,2\n", "'x'"),
        ('{"timestamp": 1, "input_length": 2}\n', "no field 'output_length'"),
        ('{"timestamp": 1\n', "cannot be read"),
    ],
)
def test_a_file_that_is_no_trace_is_refused_by_name(write, text, message):
    with pytest.raises(ValueError, match=f"{message}.*trace$"):
        read_trace(write(text), 10)


def test_prompts_have_the_lengths_and_times_of_the_trace(tokens, mooncake):
    requests = make(tokens, mooncake)
    assert [(r.prompt_len, len(r.prompt), r.output_len, r.arrival) for r in requests] == [
        (1100, 1100, 5, 0.0), (1300, 1300, 6, 0.0), (600, 600, 7, 3.5),
    ]  # fmt: skip


def test_equal_hash_ids_give_equal_blocks_and_others_do_not(tokens, mooncake):
    a, b, c = (r.prompt for r in make(tokens, mooncake))
    assert np.array_equal(a[:1024], b[:1024])
    assert np.array_equal(a[:512], c[:512])
    assert (a[1024:] != b[1024:1100]).mean() > 0.9
    assert (a[512:600] != c[512:]).mean() > 0.9


def test_blocks_depend_on_id_and_seed_alone(tokens):
    maker = PromptMaker(tokens, as_text=False)
    one = trace_requests([TraceRow(0, 512, 1, (7,))], maker, seed=3)[0].prompt
    later = trace_requests([TraceRow(0, 99, 1, (1,)), TraceRow(0, 700, 1, (7, 8))], maker, seed=3)[1].prompt
    assert np.array_equal(one, later[:512])
    assert not np.array_equal(one, trace_requests([TraceRow(0, 512, 1, (7,))], maker, seed=4)[0].prompt)


def test_what_blocks_do_not_cover_is_shared_with_nothing(tokens):
    maker = PromptMaker(tokens, as_text=False)
    rows = [TraceRow(0, 600, 1, (7,)), TraceRow(0, 600, 1, (7,)), TraceRow(0, 100, 1, (7, 8))]
    a, b, c = (r.prompt for r in trace_requests(rows, maker, seed=0))
    assert np.array_equal(a[:512], b[:512]) and np.array_equal(a[:100], c)
    assert (a[512:] != b[512:]).mean() > 0.9


def test_texts_share_their_blocks_too(merging_tokens, mooncake):
    texts = [r.prompt for r in make(merging_tokens, mooncake, as_text=True)]
    words = [text.split() for text in texts]
    assert words[0][:1024] == words[1][:1024]
    assert words[0][:512] == words[2][:512]
    assert [r.prompt_len for r in make(merging_tokens, mooncake, as_text=True)] == [1100, 1300, 600]


def test_times_are_scaled(tokens, mooncake):
    assert [r.arrival for r in make(tokens, mooncake, trace_time_scale=0.5)] == [0, 0, 1.75]
    assert [r.arrival for r in make(tokens, mooncake, trace_time_scale=0)] == [0, 0, 0]


def test_lengths_are_scaled_with_the_blocks(tokens, mooncake):
    requests = make(tokens, mooncake, trace_length_scale=1 / 16)
    assert [(r.prompt_len, r.output_len) for r in requests] == [(69, 1), (81, 1), (38, 1)]
    a, b, c = (r.prompt for r in requests)
    assert np.array_equal(a[:64], b[:64]) and np.array_equal(a[:32], c[:32])
    assert not np.array_equal(a[32:38], c[32:38])
