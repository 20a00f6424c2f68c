"""Measures what the device at hand can do at best: the two rates that the floor of a step is reckoned with."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional

from ..kvcache.tensors import TORCH_DTYPES
from .floor import MachineRates

MIB = 2**20
# Many times the last-level cache, so that what is read comes from memory.
READ_BYTES = {"cpu": 256 * MIB, "cuda": 2048 * MIB}
CACHE_MULTIPLE = 8
MAX_READ_BYTES = 2048 * MIB
READ_COLUMNS = 4096
# Products of ever larger squares, as long as the next is expected to take less than this.
FIRST_SIZE, MAX_SIZE = 256, 8192
SECONDS_PER_PRODUCT = 0.25
SECONDS_PER_KERNEL = 0.3  # repeats of one kernel; of which the best counts
MIN_REPEATS = 3
CALLS_PER_SAMPLE = {"cpu": 1, "cuda": 10}  # of a GPU, so that waiting for it does not count
LAST_LEVEL_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")


@torch.inference_mode()
def measure_machine_rates(device: torch.device, dtype: str) -> MachineRates:
    """The best of several repeats and kernels, in about 2 s, with torch's present number of threads.

    dtype: float32 | bfloat16 | float16. Other work on the machine makes the rates too low, and so the floor too high.
    Raises ValueError on a device that is not measured yet.
    """
    if device.type not in READ_BYTES:
        raise ValueError(f"the rates of {' and '.join(READ_BYTES)} are measured, and not yet those of: {device}")
    return MachineRates(
        bytes_per_second=_read_rate(device),
        flops_per_second=max(_product_rate(device, TORCH_DTYPES[name]) for name in _product_dtypes(device, dtype)),
        dtype=dtype,
        device=_device_name(device),
        num_threads=torch.get_num_threads() if device.type == "cpu" else 0,
    )


def _read_rate(device: torch.device) -> float:
    """Bytes per second, of the two kernels that do nothing but read, a sum and a matrix-vector product."""
    num_bytes = READ_BYTES[device.type]
    if device.type == "cpu":
        num_bytes = min(max(num_bytes, CACHE_MULTIPLE * _last_level_cache_bytes()), MAX_READ_BYTES)
    matrix = torch.ones(num_bytes // (4 * READ_COLUMNS), READ_COLUMNS, device=device)
    vector = torch.ones(READ_COLUMNS, device=device)
    kernels: tuple[Callable[[], object], ...] = (matrix.sum, lambda: matrix @ vector)
    return matrix.nbytes / min(_best_seconds(kernel, device) for kernel in kernels)


def _product_dtypes(device: torch.device, dtype: str) -> set[str]:
    """A processor without instructions for a short type is faster in float32, and a kernel may convert as it reads."""
    return {dtype, "float32"} if device.type == "cpu" else {dtype}


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of the best product of two squares."""
    best = 0.0
    size = FIRST_SIZE
    while True:
        left = torch.ones(size, size, dtype=dtype, device=device)
        right = torch.ones(size, size, dtype=dtype, device=device)
        flops = 2 * size**3
        seconds = _best_seconds(lambda left=left, right=right: functional.linear(left, right), device, repeats=2)
        best = max(best, flops / seconds)
        if size == MAX_SIZE or 8 * seconds > SECONDS_PER_PRODUCT:
            seconds = _best_seconds(lambda left=left, right=right: functional.linear(left, right), device)
            return max(best, flops / seconds)
        size *= 2


def _best_seconds(kernel: Callable[[], object], device: torch.device, repeats: int | None = None) -> float:
    """Of one call, after one that is not timed: the best of `repeats`, or of as many as a fixed time allows."""
    calls = CALLS_PER_SAMPLE[device.type]
    kernel()
    best = float("inf")
    count = 0
    begin = time.perf_counter()
    while count < (repeats or MIN_REPEATS) or (repeats is None and time.perf_counter() - begin < SECONDS_PER_KERNEL):
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            kernel()
        _synchronize(device)
        best = min(best, (time.perf_counter() - start) / calls)
        count += 1
    return best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _last_level_cache_bytes() -> int:
    """What Linux tells of the first core's; 0 where it does not."""
    with contextlib.suppress(OSError, ValueError):
        text = LAST_LEVEL_CACHE.read_text().strip()
        return int(text.removesuffix("K")) * (1024 if text.endswith("K") else 1)
    return 0


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return "cpu"
