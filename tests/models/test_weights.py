"""The loader: every slot gets exactly its part of the checkpoint, and what does not fit is named."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from omni_engine.models.checkpoint import open_checkpoint
from omni_engine.models.parallel import ParallelLayout
from omni_engine.models.weights import Shard, WeightSlot, load_weights


class Slots:
    """A model that is nothing but its slots."""

    def __init__(self, slots: Iterable[WeightSlot], ignored: tuple[str, ...] = ()) -> None:
        self.slots = list(slots)
        self.ignored = ignored

    def weight_slots(self) -> Iterator[WeightSlot]:
        yield from self.slots

    def ignored_weights(self, name: str) -> bool:
        return name in self.ignored


def save(folder: Path, *files: dict[str, Tensor], index: bool = False) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    for number, tensors in enumerate(files):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / f"part{number}.safetensors")
    if index:
        weight_map = {name: f"part{number}.safetensors" for number, tensors in enumerate(files) for name in tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def unfilled(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def test_tensors_of_several_files_reach_fused_rows(tmp_path: Path) -> None:
    q, k = torch.randn(6, 4), torch.randn(2, 4)
    fused = unfilled(8, 4)
    load_weights(Slots([WeightSlot("q", fused[:6]), WeightSlot("k", fused[6:])]), save(tmp_path, {"q": q}, {"k": k}))
    assert torch.equal(fused, torch.cat([q, k]))


def test_an_index_and_an_opened_checkpoint_work_as_the_folder_does(tmp_path: Path) -> None:
    a, b = torch.randn(3), torch.randn(5)
    targets = unfilled(3), unfilled(5)
    folder = save(tmp_path, {"a": a}, {"b": b}, index=True)
    load_weights(Slots([WeightSlot("a", targets[0]), WeightSlot("b", targets[1])]), open_checkpoint(folder))
    assert torch.equal(targets[0], a) and torch.equal(targets[1], b)


def test_a_target_may_be_a_transposed_view_or_one_expert_of_a_stack(tmp_path: Path) -> None:
    stored = torch.randn(3, 5)
    transposed, stack = unfilled(5, 3), unfilled(2, 3, 5)
    load_weights(Slots([WeightSlot("w", transposed.t()), WeightSlot("w", stack[1])]), save(tmp_path, {"w": stored}))
    assert torch.equal(transposed, stored.t())
    assert torch.equal(stack[1], stored) and stack[0].isnan().all()


def test_values_are_converted_to_the_dtype_of_the_target(tmp_path: Path) -> None:
    stored = torch.randn(4, 4)
    target = unfilled(4, 4, dtype=torch.bfloat16)
    load_weights(Slots([WeightSlot("w", target)]), save(tmp_path, {"w": stored}))
    assert torch.equal(target, stored.bfloat16())


def test_a_scalar_is_read(tmp_path: Path) -> None:
    target = torch.zeros(())
    load_weights(Slots([WeightSlot("s", target)]), save(tmp_path, {"s": torch.tensor(2.5)}))
    assert target.item() == 2.5


@pytest.mark.parametrize("dim", [0, 1])
def test_the_shards_of_two_ranks_are_the_whole_tensor(tmp_path: Path, dim: int) -> None:
    stored = torch.randn(6, 10)
    folder = save(tmp_path, {"w": stored})
    parts = []
    for rank in range(2):
        start, stop = ParallelLayout(tensor_size=2, tensor_rank=rank).share(stored.shape[dim], "w")
        shape = list(stored.shape)
        shape[dim] = stop - start
        parts.append(unfilled(*shape))
        load_weights(Slots([WeightSlot("w", parts[-1], Shard(dim, start, stop, stored.shape[dim]))]), folder)
    assert torch.equal(torch.cat(parts, dim), stored)
    assert not torch.equal(torch.cat(parts[::-1], dim), stored)  # the control: ranks are not interchangeable


def test_the_fused_halves_of_one_tensor_go_to_two_targets(tmp_path: Path) -> None:
    stored = torch.randn(8, 3)
    gate, up = unfilled(4, 3), unfilled(4, 3)
    slots = [WeightSlot("gate_up", gate, Shard(0, 0, 4, 8)), WeightSlot("gate_up", up, Shard(0, 4, 8, 8))]
    load_weights(Slots(slots), save(tmp_path, {"gate_up": stored}))
    assert torch.equal(torch.cat([gate, up]), stored)


def test_missing_tensors_are_named_ten_and_a_count(tmp_path: Path) -> None:
    slots = [WeightSlot(f"w{i:02}", unfilled(1)) for i in range(14)]
    with pytest.raises(ValueError, match=r"lacks tensors.*: w01, w02, .*, w10 and 3 more$"):
        load_weights(Slots(slots), save(tmp_path, {"w00": torch.ones(1)}))


def test_left_over_tensors_are_named(tmp_path: Path) -> None:
    folder = save(tmp_path, {"a": torch.ones(1), "extra.bias": torch.ones(1)})
    with pytest.raises(ValueError, match=r"no place for: extra\.bias$"):
        load_weights(Slots([WeightSlot("a", unfilled(1))]), folder)


def test_tensors_the_model_ignores_may_be_left_over(tmp_path: Path) -> None:
    folder = save(tmp_path, {"a": torch.ones(1), "extra.bias": torch.ones(1)})
    load_weights(Slots([WeightSlot("a", unfilled(1))], ignored=("extra.bias",)), folder)


def test_a_wrong_shape_is_named_with_both_shapes_before_anything_is_written(tmp_path: Path) -> None:
    first = unfilled(2)
    slots = [WeightSlot("a", first), WeightSlot("b", unfilled(3, 4))]
    with pytest.raises(ValueError, match=r"b in part0\.safetensors must have the shape \[3, 4\].*: \[4, 3\]$"):
        load_weights(Slots(slots), save(tmp_path, {"a": torch.ones(2), "b": torch.ones(4, 3)}))
    assert first.isnan().all()


def test_a_shard_of_a_tensor_of_another_size_is_a_wrong_shape(tmp_path: Path) -> None:
    slot = WeightSlot("w", unfilled(2, 3), Shard(0, 0, 2, 4))
    with pytest.raises(ValueError, match=r"\[4, 3\].*: \[6, 3\]$"):
        load_weights(Slots([slot]), save(tmp_path, {"w": torch.ones(6, 3)}))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.uint8, torch.float8_e5m2])
def test_integers_and_other_floats_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"w in part0\.safetensors must have one of the dtypes"):
        load_weights(Slots([WeightSlot("w", unfilled(2, 2))]), save(tmp_path, {"w": torch.zeros(2, 2, dtype=dtype)}))


def test_a_short_load_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_weights(Slots([WeightSlot("a", unfilled(1))]), save(tmp_path, {"a": torch.ones(1)}))
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
