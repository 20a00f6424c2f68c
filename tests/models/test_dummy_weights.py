"""Dummy weights depend on the tensor's name and the seed, and on nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from omni_engine.models import dummy_weights
from omni_engine.models.dummy_weights import initialise_dummy_weights
from omni_engine.models.weights import Shard, WeightSlot


class Slots:
    """A model that is nothing but its slots."""

    def __init__(self, *slots: WeightSlot) -> None:
        self.slots = slots

    def weight_slots(self) -> Iterator[WeightSlot]:
        yield from self.slots

    def ignored_weights(self, name: str) -> bool:
        return False


def filled(name: str, *shape: int, seed: int = 0) -> torch.Tensor:
    target = torch.full(shape, float("nan"))
    initialise_dummy_weights(Slots(WeightSlot(name, target)), seed)
    return target


def test_the_same_name_and_seed_give_the_same_weights_in_any_order() -> None:
    a, b = torch.zeros(3, 4), torch.zeros(5)
    initialise_dummy_weights(Slots(WeightSlot("b", b), WeightSlot("a", a)), 7)
    assert torch.equal(a, filled("a", 3, 4, seed=7)) and torch.equal(b, filled("b", 5, seed=7))


def test_another_name_or_seed_gives_other_weights() -> None:
    assert not torch.equal(filled("a", 3, 4), filled("b", 3, 4))
    assert not torch.equal(filled("a", 3, 4), filled("a", 3, 4, seed=1))


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("chunk", [2**22, 25])
def test_the_shards_of_two_ranks_are_the_whole_tensor(monkeypatch: pytest.MonkeyPatch, dim: int, chunk: int) -> None:
    monkeypatch.setattr(dummy_weights, "CHUNK_ELEMENTS", chunk)
    whole = filled("w", 14, 10)
    parts = []
    for start, stop in ((0, 6), (6, whole.shape[dim])):
        shape = [14, 10]
        shape[dim] = stop - start
        parts.append(torch.full(shape, float("nan")))
        initialise_dummy_weights(Slots(WeightSlot("w", parts[-1], Shard(dim, start, stop, whole.shape[dim]))))
    assert torch.equal(torch.cat(parts, dim), whole)


def test_sizes_keep_activations_in_range() -> None:
    assert filled("layers.0.up_proj.weight", 500, 400).std().item() == pytest.approx(1 / 20, rel=0.02)
    assert filled("layers.0.norm.weight", 2000).mean().item() == pytest.approx(1, abs=0.01)
    assert filled("layers.0.q_proj.bias", 2000).mean().item() == pytest.approx(0, abs=0.01)


def test_numbers_are_drawn_once_whatever_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda size, **rest: drawn.append(size) or randn(size, **rest))
    targets = [torch.full((2500, 1000), float("nan")), torch.full((2048, 1024), float("nan"))]
    initialise_dummy_weights(Slots(*(WeightSlot(str(index), target) for index, target in enumerate(targets))))
    assert drawn == [dummy_weights.PERIOD] and targets[0].numel() > dummy_weights.PERIOD
    assert all(target.isfinite().all() for target in targets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1024, 3000])
def test_no_two_rows_of_any_tensors_are_equal(dtype: torch.dtype, width: int) -> None:
    targets = [torch.empty(2400, width, dtype=dtype) for _ in range(3)]  # each longer than the block
    initialise_dummy_weights(
        Slots(*(WeightSlot(f"experts.{index}.weight", target) for index, target in enumerate(targets)))
    )
    rows = torch.cat(targets)
    assert len(torch.unique(rows[:, :24], dim=0)) == len(rows)


def test_two_tensors_at_the_same_place_of_the_block_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    digest = dummy_weights._digest
    monkeypatch.setattr(
        dummy_weights, "_digest", lambda seed, name: digest(seed, name) // dummy_weights.PERIOD * dummy_weights.PERIOD
    )
    a, b = filled("a", 20, 30), filled("b", 20, 30)
    assert not torch.equal(a, b) and torch.allclose(a, b, rtol=0.03)


def test_a_row_may_be_longer_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = filled("w", 3, 7, 10)
    monkeypatch.setattr(dummy_weights, "CHUNK_ELEMENTS", 15)
    assert torch.equal(filled("w", 3, 7, 10), whole)


def test_targets_that_are_no_one_stretch_of_memory_are_filled_in_place() -> None:
    memory = torch.zeros(10, 2, 14)
    initialise_dummy_weights(Slots(WeightSlot("w", memory[:, 0].t())))
    assert torch.equal(memory[:, 0].t(), filled("w", 14, 10)) and not memory[:, 1].any()
