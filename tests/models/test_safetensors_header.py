"""The torch-free header reader: what it knows of good files, and which files it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from omni_engine.models.safetensors_header import read_header


def write(path: Path, header: dict[str, Any] | bytes, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(start: int, stop: int, shape: list[Any], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def test_names_shapes_and_dtypes_agree_with_the_tensors_that_were_saved(tmp_path: Path) -> None:
    tensors = {
        "a": torch.zeros(3, 5),
        "b": torch.zeros(7, dtype=torch.bfloat16),
        "c": torch.zeros(2, 2, dtype=torch.float8_e4m3fn),
        "d": torch.tensor(1.0, dtype=torch.float16),
        "e": torch.zeros(0, 4),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = {info.name: info for info in read_header(tmp_path / "x.safetensors")}
    assert {name: info.shape for name, info in found.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    assert {name: info.dtype for name, info in found.items()} == {
        "a": "F32", "b": "BF16", "c": "F8_E4M3", "d": "F16", "e": "F32"
    }  # fmt: skip
    assert {name: info.num_bytes for name, info in found.items()} == {n: t.nbytes for n, t in tensors.items()}


@pytest.mark.parametrize(
    ("header", "data", "word"),
    [
        ({"a": entry(0, 8, [2])}, b"\0" * 7, "unfinished download"),
        ({"a": entry(0, 8, [2])}, b"\0" * 9, "must have"),
        ({"a": entry(0, 8, [3])}, b"\0" * 8, "span 12 bytes"),
        ({"a": entry(4, 12, [2])}, b"\0" * 12, "byte 0 comes next"),
        ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, b"\0" * 12, "byte 8 comes next"),
        ({"a": entry(0, 8, [2], "F99")}, b"\0" * 8, "dtype of a"),
        ({"a": entry(0, 8, [-2])}, b"\0" * 8, "shape and data_offsets of a"),
        ({"a": entry(8, 0, [2])}, b"\0" * 8, "shape and data_offsets of a"),
        ({"a": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}}, b"\0" * 8, "shape and data_offsets of a"),
        ({"a": 5}, b"", "dtype of a"),
        (b"[1]", b"", "JSON object"),
        (b"{nonsense", b"", "JSON"),
        (b"\xff\xfe{}", b"", "JSON"),
        (b'{"a":{}, "a":{}}', b"", "a name stands twice: a"),
        (b"[" * 100_000, b"", "JSON"),
    ],
)
def test_a_broken_file_is_refused_by_name(
    tmp_path: Path, header: dict[str, Any] | bytes, data: bytes, word: str
) -> None:
    file = write(tmp_path / "broken.safetensors", header, data)
    with pytest.raises(ValueError, match=r"broken\.safetensors is not a whole safetensors file") as caught:
        read_header(file)
    assert word in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\1\0", (2**40).to_bytes(8, "little"), (50).to_bytes(8, "little") + b"{}"])
def test_a_header_length_that_does_not_fit_is_refused_before_it_is_read(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="header length"):
        read_header(tmp_path / "x.safetensors")
