"""fp8 block checkpoints: what is loaded equals weight times block scale, for every shape and shard."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from omni_engine.models import weights
from omni_engine.models.config import Fp8BlockConfig
from omni_engine.models.quantized import dequantized_rows
from omni_engine.models.weights import Shard, WeightSlot, load_weights

BLOCK = 128
QUANTIZATION = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}


class OneSlot:
    """A model with one weight."""

    def __init__(self, target: Tensor, shard: Shard | None = None, ignored: str = "") -> None:
        self.slot = WeightSlot("x.weight", target, shard)
        self.ignored = ignored

    def weight_slots(self) -> Iterator[WeightSlot]:
        yield self.slot

    def ignored_weights(self, name: str) -> bool:
        return name == self.ignored


def quantized(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """(fp8 weight, scales, what they stand for in float32): the plain formula, element by element block."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    weight = torch.randn(rows, columns, generator=generator).mul(100).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-rows // BLOCK), -(-columns // BLOCK), generator=generator) + 0.01
    expected = weight.float()
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            expected[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK] *= scales[i, j]
    return weight, scales, expected


def save(folder: Path, *files: dict[str, Tensor], quantization: dict[str, object] | None = QUANTIZATION) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    weight_map = {}
    for number, tensors in enumerate(files):
        save_file(tensors, folder / f"part{number}.safetensors")
        weight_map |= dict.fromkeys(tensors, f"part{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (130, 7), (1, 1), (127, 300), (576, 129)])
def test_a_weight_is_dequantised_block_by_block(tmp_path: Path, shape: tuple[int, int]) -> None:
    weight, scales, expected = quantized(*shape)
    target = torch.full(shape, float("nan"))
    load_weights(OneSlot(target), save(tmp_path, {"x.weight": weight, "x.weight_scale_inv": scales}))
    assert torch.equal(target, expected)
    assert not torch.equal(target, weight.float() * scales[0, 0]) or scales.numel() == 1  # the control: one scale


def test_the_product_is_rounded_once_to_the_dtype_of_the_target(tmp_path: Path) -> None:
    weight, scales, expected = quantized(200, 200)
    target = torch.zeros(200, 200, dtype=torch.bfloat16)
    load_weights(OneSlot(target), save(tmp_path, {"x.weight": weight, "x.weight_scale_inv": scales}))
    assert torch.equal(target, expected.bfloat16())


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("cuts", [(0, 100, 300), (0, 128, 300), (0, 1, 129, 300), (0, 299, 300)])
def test_shards_that_begin_inside_a_block_are_the_whole_weight(tmp_path: Path, dim: int, cuts: tuple[int, ...]) -> None:
    weight, scales, expected = quantized(300, 300)
    folder = save(tmp_path, {"x.weight": weight, "x.weight_scale_inv": scales})
    parts = []
    for start, stop in pairwise(cuts):
        shape = [300, 300]
        shape[dim] = stop - start
        parts.append(torch.full(shape, float("nan")))
        load_weights(OneSlot(parts[-1], Shard(dim, start, stop, 300)), folder)
    assert torch.equal(torch.cat(parts, dim), expected)


def test_counting_blocks_from_the_shards_own_start_would_be_wrong() -> None:
    weight, scales, expected = quantized(300, 300)
    block = Fp8BlockConfig(BLOCK, BLOCK)
    assert torch.equal(dequantized_rows(weight[100:], scales, block, first_row=100, first_column=0), expected[100:])
    assert not torch.equal(dequantized_rows(weight[100:], scales, block, first_row=0, first_column=0), expected[100:])


def test_a_weight_larger_than_a_chunk_is_dequantised_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = weights._row_chunks
    seen: list[tuple[int, int]] = []

    def small(start: int, stop: int, row_elements: int) -> Iterator[tuple[int, int]]:
        for chunk in whole(start, stop, row_elements, limit=7000):
            seen.append(chunk)
            yield chunk

    monkeypatch.setattr(weights, "_row_chunks", small)
    weight, scales, expected = quantized(300, 200)
    target = torch.zeros(300, 200)
    load_weights(OneSlot(target), save(tmp_path, {"x.weight": weight, "x.weight_scale_inv": scales}))
    assert len(seen) == 9 and torch.equal(target, expected)


def test_the_scales_may_lie_in_another_file(tmp_path: Path) -> None:
    weight, scales, expected = quantized(130, 130)
    target = torch.zeros(130, 130)
    load_weights(OneSlot(target), save(tmp_path, {"x.weight": weight}, {"x.weight_scale_inv": scales}))
    assert torch.equal(target, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_of_fewer_bits_are_widened_before_the_product(tmp_path: Path, dtype: torch.dtype) -> None:
    weight, scales, _ = quantized(128, 128)
    target = torch.zeros(128, 128)
    load_weights(OneSlot(target), save(tmp_path, {"x.weight": weight, "x.weight_scale_inv": scales.to(dtype)}))
    assert torch.equal(target, weight.float() * scales.to(dtype).float())


def test_unquantized_tensors_stand_beside_quantized_ones(tmp_path: Path) -> None:
    plain = torch.randn(5, 5)
    target = torch.zeros(5, 5)
    load_weights(OneSlot(target), save(tmp_path, {"x.weight": plain}))
    assert torch.equal(target, plain)


def test_missing_scales_are_named(tmp_path: Path) -> None:
    weight, _, _ = quantized(128, 128)
    with pytest.raises(ValueError, match=r"lacks the block scales: x\.weight_scale_inv$"):
        load_weights(OneSlot(torch.zeros(128, 128)), save(tmp_path, {"x.weight": weight}))


def test_scales_of_another_shape_are_refused_with_both_shapes(tmp_path: Path) -> None:
    weight, _, _ = quantized(130, 128)
    folder = save(tmp_path, {"x.weight": weight, "x.weight_scale_inv": torch.ones(1, 1)})
    with pytest.raises(ValueError, match=r"x\.weight_scale_inv .*\[2, 1\].*\[1, 1\]$"):
        load_weights(OneSlot(torch.zeros(130, 128)), folder)


def test_scales_beside_an_unquantized_weight_are_left_over(tmp_path: Path) -> None:
    folder = save(tmp_path, {"x.weight": torch.ones(4, 4), "x.weight_scale_inv": torch.ones(1, 1)})
    with pytest.raises(ValueError, match=r"no place for: x\.weight_scale_inv$"):
        load_weights(OneSlot(torch.zeros(4, 4)), folder)


def test_the_scales_of_an_ignored_weight_are_ignored_with_it(tmp_path: Path) -> None:
    weight, scales, _ = quantized(128, 128)
    folder = save(tmp_path, {"x.weight": torch.ones(4), "mtp.weight": weight, "mtp.weight_scale_inv": scales})
    load_weights(OneSlot(torch.zeros(4), ignored="mtp.weight"), folder)


def test_an_fp8_weight_without_a_block_size_in_the_config_is_refused(tmp_path: Path) -> None:
    weight, scales, _ = quantized(128, 128)
    folder = save(tmp_path, {"x.weight": weight, "x.weight_scale_inv": scales}, quantization=None)
    with pytest.raises(ValueError, match=r"weight_block_size in quantization_config: F8_E4M3$"):
        load_weights(OneSlot(torch.zeros(128, 128)), folder)
