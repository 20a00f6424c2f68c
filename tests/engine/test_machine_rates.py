"""The measured rates: of the right kind and size, quickly, and by the kernels and types that may be used."""

from __future__ import annotations

import time

import pytest
import torch

from omni_engine.engine import machine_rates
from omni_engine.engine.machine_rates import measure_machine_rates

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_and_short(monkeypatch):
    monkeypatch.setitem(machine_rates.READ_BYTES, "cpu", 16 * 2**20)
    monkeypatch.setattr(machine_rates, "CACHE_MULTIPLE", 0)
    monkeypatch.setattr(machine_rates, "MAX_SIZE", 512)
    monkeypatch.setattr(machine_rates, "SECONDS_PER_KERNEL", 0.01)


def test_rates_are_those_of_a_computer():
    start = time.perf_counter()
    rates = measure_machine_rates(CPU, "float32")
    assert 1e8 < rates.bytes_per_second < 1e13
    assert 1e8 < rates.flops_per_second < 1e16
    assert (rates.dtype, rates.num_threads) == ("float32", torch.get_num_threads())
    assert rates.device
    assert time.perf_counter() - start < 30  # that it ends; how soon is for a quiet machine to say


def test_a_short_type_may_be_computed_in_float32(monkeypatch):
    measured = []
    seconds = {torch.bfloat16: 5e9, torch.float32: 60e9}

    def product_rate(device, dtype):
        measured.append(dtype)
        return seconds[dtype]

    monkeypatch.setattr(machine_rates, "_product_rate", product_rate)
    rates = measure_machine_rates(CPU, "bfloat16")
    assert set(measured) == {torch.bfloat16, torch.float32}
    assert (rates.flops_per_second, rates.dtype) == (60e9, "bfloat16")


def test_products_grow_until_they_are_long_enough(monkeypatch):
    sizes = []

    def linear(left, right):
        sizes.append(len(left))

    monkeypatch.setattr(machine_rates.functional, "linear", linear)
    machine_rates._product_rate(CPU, torch.float32)
    assert sorted(set(sizes)) == [256, 512]
    sizes.clear()
    monkeypatch.setattr(machine_rates, "SECONDS_PER_PRODUCT", 0.0)
    machine_rates._product_rate(CPU, torch.float32)
    assert set(sizes) == {256}


def test_a_call_costs_the_best_of_its_repeats(monkeypatch):
    clock = iter([0.0, 0.0, 9.0, 9.0, 10.0, 10.0, 14.0])  # samples of 9, 1 and 4 s
    monkeypatch.setattr(machine_rates.time, "perf_counter", lambda: next(clock))
    assert machine_rates._best_seconds(lambda: None, CPU, repeats=3) == 1.0


def test_what_is_read_is_larger_than_the_caches(monkeypatch):
    read = []
    monkeypatch.setattr(machine_rates, "CACHE_MULTIPLE", 8)
    monkeypatch.setattr(machine_rates, "_last_level_cache_bytes", lambda: 4 * 2**20)
    monkeypatch.setattr(machine_rates, "_best_seconds", lambda kernel, device: read.append(kernel) or 2.0)
    assert machine_rates._read_rate(CPU) == 8 * 4 * 2**20 / 2.0
    monkeypatch.setattr(machine_rates, "_last_level_cache_bytes", lambda: 2**50)
    monkeypatch.setattr(machine_rates, "MAX_READ_BYTES", 48 * 2**20)
    assert machine_rates._read_rate(CPU) == 48 * 2**20 / 2.0


def test_the_size_of_the_last_cache_is_read_as_linux_writes_it(monkeypatch, tmp_path):
    file = tmp_path / "size"
    monkeypatch.setattr(machine_rates, "LAST_LEVEL_CACHE", file)
    assert machine_rates._last_level_cache_bytes() == 0
    file.write_text("32768K\n")
    assert machine_rates._last_level_cache_bytes() == 32 * 2**20
    file.write_text("odd\n")
    assert machine_rates._last_level_cache_bytes() == 0
