"""Sizing of the KV cache: the arithmetic, the refusals and what they tell the user to change."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omni_engine.kvcache.budget import (
    available_kv_bytes,
    check_model_fit,
    format_bytes,
    longest_sequence,
    sequence_bytes,
    size_kv_cache,
)
from omni_engine.kvcache.spec import KVPart, uniform_spec

GIB = 1 << 30
SPEC = uniform_spec(32, (KVPart("k", 8, 128), KVPart("v", 8, 128)), "bfloat16")  # Llama-3-8B: 128 KiB per token
BLOCK_BYTES = 16 * 128 * 1024


def test_blocks_from_bytes():
    budget = size_kv_cache(SPEC, 16, 4 * GIB, 8192)
    assert budget.bytes_per_block == BLOCK_BYTES
    assert budget.num_blocks == 2048
    assert budget.num_tokens == 2047 * 16
    assert budget.max_concurrency == 2047 / 512
    assert budget.kv_bytes == 4 * GIB


def test_number_of_blocks_goes_before_bytes():
    assert size_kv_cache(SPEC, 16, 4 * GIB, 128, num_blocks=10).num_blocks == 10


def test_sequence_that_does_not_fit_is_refused_with_the_arithmetic():
    with pytest.raises(ValueError) as error:
        size_kv_cache(SPEC, 16, GIB, 131072)
    message = str(error.value)
    assert "max seq len (131072), 16.00 GiB KV cache is needed (8192 blocks of 16 tokens" in message
    assert "larger than the available KV cache memory (1.00 GiB)" in message
    assert "raise kv_cache_memory_bytes" in message and "lower max_model_len" in message
    assert message.endswith("The estimated maximum model length is: 8176")


def test_refusal_under_an_override_names_the_override():
    with pytest.raises(ValueError, match="raise num_gpu_blocks_override"):
        size_kv_cache(SPEC, 16, 64 * GIB, 4096, num_blocks=10)


def test_cache_without_room_for_one_block_is_refused():
    with pytest.raises(ValueError, match=r"at least 2 blocks of 16 tokens, 4.00 MiB.*Available: 3.00 MiB"):
        size_kv_cache(SPEC, 16, 3 << 20, 4096, fit_max_model_len=True)


def test_auto_length_is_the_longest_that_fits():
    budget = size_kv_cache(SPEC, 16, GIB, 131072, fit_max_model_len=True)
    assert budget.max_model_len == 8176
    assert budget.max_concurrency == 1
    assert size_kv_cache(SPEC, 16, GIB, 1000, fit_max_model_len=True).max_model_len == 1000


@given(kv_bytes=st.integers(0, 64 * BLOCK_BYTES), block_size=st.sampled_from([1, 16, 128]))
def test_longest_sequence_fits_and_one_token_more_does_not(kv_bytes, block_size):
    longest = longest_sequence(SPEC, block_size, kv_bytes)
    assert sequence_bytes(SPEC, block_size, longest + 1) > kv_bytes
    if longest:
        assert sequence_bytes(SPEC, block_size, longest) <= kv_bytes
        size_kv_cache(SPEC, block_size, kv_bytes, longest)


def test_available_bytes_leave_the_unused_share_and_the_workspace():
    assert available_kv_bytes(100 * GIB, 20 * GIB, 0.5, workspace_bytes=10 * GIB) == 20 * GIB
    assert available_kv_bytes(100 * GIB, 60 * GIB, 0.5) == 0
    with pytest.raises(ValueError, match=r"gpu_memory_utilization must be in \(0, 1\]: 1.5"):
        available_kv_bytes(GIB, 0, 1.5)


def test_model_that_fits_reports_what_it_needs():
    fit = check_model_fit(SPEC, 16, 8192, weight_bytes=15 * GIB, available_bytes=24 * GIB, workspace_bytes=GIB)
    assert fit.needed_bytes == 16 * GIB + 513 * BLOCK_BYTES


def test_model_that_does_not_fit_is_refused_with_the_sum_and_the_length_that_would():
    with pytest.raises(ValueError) as error:
        check_model_fit(SPEC, 16, 131072, weight_bytes=15 * GIB, available_bytes=24 * GIB, device="cuda:0")
    message = str(error.value)
    assert "does not fit on cuda:0: 15.00 GiB weights + 0 B workspace + 16.00 GiB KV cache" in message
    assert "= 31.00 GiB" in message
    assert "lower max_model_len (at most 73712 tokens fit)" in message
    assert message.endswith("Available: 24.00 GiB")


def test_model_whose_weights_alone_are_too_big_gets_other_advice():
    with pytest.raises(ValueError, match="use a smaller model, a narrower dtype"):
        check_model_fit(SPEC, 16, 4096, weight_bytes=30 * GIB, available_bytes=24 * GIB)


def test_table_names_every_size():
    table = size_kv_cache(SPEC, 16, 4 * GIB, 8192).table(weight_bytes=15 * GIB, other_bytes=GIB // 2)
    assert [" ".join(line.split()) for line in table.splitlines()] == [
        "weights 15.00 GiB",
        "workspace 512.00 MiB",
        "KV cache 4.00 GiB 2.00 MiB per block",
        "KV blocks 2,048 of 16 tokens, one of them the null block",
        "KV tokens 32,752",
        "concurrency 4.00x at 8,192 tokens per request",
    ]


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (GIB, "1.00 GiB"), (5000 * GIB, "5000.00 GiB")]
)
def test_bytes_are_written_in_binary_units(size, text):
    assert format_bytes(size) == text
