"""Reads the header of a safetensors file without torch: names, dtypes, shapes and places of its tensors."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

# Bits per element of the format's dtypes (safetensors README and its Rust enum).
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies. `dtype` in the format's names (BF16, F32, F8_E4M3, …); [start, stop) in bytes after the
    header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.stop - self.start


def read_header(file: Path) -> list[TensorInfo]:
    """Tensors in the order of their bytes. ValueError naming the file where it is no whole safetensors file."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or not 2 <= length <= MAX_HEADER_BYTES or 8 + length > size:
            raise _broken(file, f"its first 8 bytes must give a header length that fits its {size} bytes", length)
        text = stream.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _broken(file, f"its header must be JSON ({error})", text[:80]) from error
    if not isinstance(header, dict):
        raise _broken(file, "its header must be a JSON object", type(header).__name__)
    header.pop("__metadata__", None)
    tensors = sorted((_tensor(file, name, entry) for name, entry in header.items()), key=lambda info: info.start)
    end = 0
    for info in tensors:
        if info.start != end:
            raise _broken(file, f"tensors must lie one behind the other, byte {end} comes next", info)
        end = info.stop
    if 8 + length + end != size:
        raise _broken(
            file, f"it must have {8 + length + end} bytes by its header; an unfinished download? fetch it again", size
        )
    return tensors


def _tensor(file: Path, name: str, entry: Any) -> TensorInfo:
    fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _broken(file, f"the dtype of {name} must be one of {', '.join(DTYPE_BITS)}", entry)
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _broken(file, f"shape and data_offsets of {name} must be lists of integers, start before end", entry)
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise _broken(file, f"data_offsets of {name} must span {bits / 8:g} bytes", entry)
    return TensorInfo(name, dtype, tuple(shape), file, offsets[0], offsets[1])


def _sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 2**48 for item in value
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"a name stands twice: {next(name for name in names if names.count(name) > 1)}")
    return result


def _broken(file: Path, what: str, value: Any) -> ValueError:
    return ValueError(f"{file} is not a whole safetensors file, {what}: {str(value)[:200]}")
