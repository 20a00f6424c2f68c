"""How tensors of a checkpoint reach a model: slots that say where each one goes, and the loader that fills them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from .checkpoint import SCALE_SUFFIX, Checkpoint, open_checkpoint
from .config import Fp8BlockConfig, ModelConfig
from .config_parsers.quantization import read_quantization
from .config_parsers.reader import listed
from .quantized import dequantized_rows, scale_shape
from .safetensors_header import TensorInfo

PLAIN_DTYPES = ("F64", "F32", "BF16", "F16")  # what copy_ converts
FP8_DTYPE = "F8_E4M3"


@dataclass(frozen=True)
class Shard:
    """The range [start, stop) of dimension `dim` that this rank reads; the stored tensor has `size` there."""

    dim: int
    start: int
    stop: int
    size: int


@dataclass(frozen=True)
class WeightSlot:
    """One tensor of the checkpoint (or this rank's `shard` of it) and the memory it is copied into.

    `target` is a tensor or a view of one (rows of a fused weight, one expert of a stack, a transpose), already on its
    device and in its final dtype; its shape is the stored shape, with `shard.stop - shard.start` at `shard.dim`.
    Several slots may read the same stored tensor.
    """

    name: str
    target: Tensor
    shard: Shard | None = None

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape the checkpoint's tensor must have."""
        shape = list(self.target.shape)
        if self.shard is not None:
            shape[self.shard.dim] = self.shard.size
        return tuple(shape)

    @property
    def ranges(self) -> tuple[slice, ...]:
        """What to read of the stored tensor, one slice per dimension."""
        ranges = [slice(0, size) for size in self.target.shape]
        if self.shard is not None:
            ranges[self.shard.dim] = slice(self.shard.start, self.shard.stop)
        return tuple(ranges)


class LoadableModel(Protocol):
    """What the loader asks of a model."""

    def weight_slots(self) -> Iterable[WeightSlot]:
        """Every tensor the model needs."""
        ...

    def ignored_weights(self, name: str) -> bool:
        """Whether the checkpoint may hold this tensor although no slot reads it (a tied head, MTP layers)."""
        ...


@torch.no_grad()
def load_weights(
    model: LoadableModel, checkpoint: Checkpoint | Path, *, config: ModelConfig | None = None, progress: bool = True
) -> None:
    """Copies the checkpoint's tensors into the model's slots, file by file, converted to each target's dtype.

    Of each tensor only the slot's range is read, and it is the only copy beside the target. fp8 block weights are
    dequantised on the way; their block size comes from `config`, else from the checkpoint's config.json. Before any
    tensor is read, the headers are checked: ValueError naming what is missing, left over, or of the wrong shape or
    dtype. A load that takes long shows a progress bar on stderr, in bytes, unless `progress` is False.
    """
    if isinstance(checkpoint, Path):
        checkpoint = open_checkpoint(checkpoint)
    block = config.quantization if config is not None else read_quantization(checkpoint.config)
    slots: dict[str, list[WeightSlot]] = {}
    for slot in model.weight_slots():
        slots.setdefault(slot.name, []).append(slot)
    _check_names(model, checkpoint, slots)
    for named in slots.values():
        for slot in named:
            _check_tensor(slot, checkpoint, block)
    reads = [info for info in checkpoint.tensors.values() if info.name in slots]
    terminal = sys.stderr.isatty()
    with tqdm(
        total=sum(info.num_bytes for info in reads),
        desc="Loading weights",
        unit="B",
        unit_scale=True,
        file=sys.stderr,
        disable=not progress,
        delay=0.5 if terminal else 5,  # a short load shows nothing
        mininterval=0.1 if terminal else 15,  # a log file gets a few lines, not thousands
    ) as bar:
        for _, of_file in groupby(reads, key=lambda info: info.file):  # headers were read file by file
            with ExitStack() as files:
                reader = _Reader(checkpoint.tensors, files)
                for info in of_file:
                    for slot in slots[info.name]:
                        _fill(slot, info, reader, block)
                    bar.update(info.num_bytes)


class _Reader:
    """Opens the files that are asked for, and closes them with `files`."""

    def __init__(self, tensors: Mapping[str, TensorInfo], files: ExitStack) -> None:
        self.tensors = tensors
        self.files = files
        self.opened: dict[Path, Any] = {}

    def read(self, name: str, ranges: tuple[slice, ...]) -> Tensor:
        file = self.tensors[name].file
        if file not in self.opened:
            self.opened[file] = self.files.enter_context(safe_open(file, framework="pt"))
        if not ranges:  # a scalar has no slice
            return self.opened[file].get_tensor(name)
        return self.opened[file].get_slice(name)[ranges]


def _fill(slot: WeightSlot, info: TensorInfo, reader: _Reader, block: Fp8BlockConfig | None) -> None:
    if info.dtype != FP8_DTYPE:
        slot.target.copy_(reader.read(info.name, slot.ranges))
        return
    assert block is not None  # checked with the headers
    rows, columns = slot.ranges
    scales = reader.read(info.name + SCALE_SUFFIX, tuple(slice(0, n) for n in scale_shape(info.shape, block)))
    for start, stop in _row_chunks(rows.start, rows.stop, columns.stop - columns.start):
        stored = reader.read(info.name, (slice(start, stop), columns))
        values = dequantized_rows(stored, scales, block, first_row=start, first_column=columns.start)
        slot.target[start - rows.start : stop - rows.start].copy_(values)


def _row_chunks(start: int, stop: int, row_elements: int, limit: int = 2**24) -> Iterator[tuple[int, int]]:
    """Ranges of rows with at most `limit` elements, so that a temporary in float32 stays at 64 MiB."""
    step = max(1, limit // max(1, row_elements))
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


def _check_names(model: LoadableModel, checkpoint: Checkpoint, slots: Mapping[str, list[WeightSlot]]) -> None:
    missing = [name for name in slots if name not in checkpoint.tensors]
    if missing:
        raise ValueError(
            f"the checkpoint {checkpoint.path} lacks tensors that its config.json asks for: {listed(missing)}"
        )
    left_over = [
        name
        for name, info in checkpoint.tensors.items()
        if name not in slots and not model.ignored_weights(name) and not _is_scale(name, checkpoint.tensors, model)
    ]
    if left_over:
        raise ValueError(
            f"the checkpoint {checkpoint.path} holds tensors that a model of its config.json has no place for: "
            f"{listed(left_over)}"
        )


def _is_scale(name: str, tensors: Mapping[str, TensorInfo], model: LoadableModel) -> bool:
    """Whether these are the block scales of an fp8 weight, or of one that is ignored."""
    weight = name.removesuffix(SCALE_SUFFIX)
    return weight != name and (
        (weight in tensors and tensors[weight].dtype == FP8_DTYPE) or model.ignored_weights(weight)
    )


def _check_tensor(slot: WeightSlot, checkpoint: Checkpoint, block: Fp8BlockConfig | None) -> None:
    info = checkpoint.tensors[slot.name]
    if info.shape != slot.stored_shape:
        raise ValueError(
            f"{slot.name} in {info.file.name} must have the shape {list(slot.stored_shape)} by config.json: "
            f"{list(info.shape)}"
        )
    if info.dtype in PLAIN_DTYPES:
        return
    if info.dtype != FP8_DTYPE or block is None:
        wanted = f"{', '.join(PLAIN_DTYPES)}, or {FP8_DTYPE} with weight_block_size in quantization_config"
        raise ValueError(f"{slot.name} in {info.file.name} must have one of the dtypes {wanted}: {info.dtype}")
    if len(info.shape) != 2:
        raise ValueError(f"{slot.name} in {info.file.name}: an fp8 weight must have two dimensions: {list(info.shape)}")
    scales = checkpoint.tensors.get(slot.name + SCALE_SUFFIX)
    if scales is None:
        raise ValueError(f"the checkpoint {checkpoint.path} lacks the block scales: {slot.name}{SCALE_SUFFIX}")
    if scales.shape != scale_shape(info.shape, block) or scales.dtype not in PLAIN_DTYPES:
        raise ValueError(
            f"{scales.name} in {scales.file.name} must be float, of shape {list(scale_shape(info.shape, block))}, one "
            f"scale per block of {block.block_rows} x {block.block_columns}: {scales.dtype} {list(scales.shape)}"
        )
