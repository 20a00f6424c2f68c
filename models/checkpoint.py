"""A checkpoint folder on disk: finding it, reading its JSON files, and knowing its tensors before any is loaded."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .config_parser import merge_overrides
from .config_parsers.quantization import refuse_tool_files
from .config_parsers.reader import listed, shown
from .safetensors_header import TensorInfo, read_header

MAX_JSON_BYTES = 64 * 1024 * 1024  # the index of a 1000-shard model has about 10 MB
SCALE_SUFFIX = "_scale_inv"  # X.weight_scale_inv holds the block scales of X.weight
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
# A name of the hub: at most one "/", so that "./a", "../a", "/a" and "a/b/c" are paths.
MODEL_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds. `config` and `generation_config` are raw JSON objects, overrides merged in; `tensors` by
    name, from the safetensors headers (empty where the folder was opened without weights)."""

    path: Path
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any] | None = None
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)

    @property
    def stored_dtype(self) -> str | None:
        """float32, bfloat16 or float16, whichever most of the elements have; fp8 counts as the bfloat16 it becomes.

        None without such tensors. For a config.json that does not say its dtype.
        """
        names = {"F32": "float32", "BF16": "bfloat16", "F8_E4M3": "bfloat16", "F16": "float16"}
        counts: dict[str, int] = {}
        for info in self.tensors.values():
            if info.dtype in names:
                counts[names[info.dtype]] = counts.get(names[info.dtype], 0) + info.num_elements
        return max(counts, key=counts.__getitem__, default=None)


def resolve_model(model: str, revision: str | None = None, download_dir: str | None = None) -> Path:
    """The folder of a checkpoint: an existing folder as it is, else a model id looked up in the local hub cache.

    Never uses the network. What is missing raises FileNotFoundError with the command that fetches it; a file in the
    place of a folder raises ValueError.
    """
    if not model:
        raise ValueError(f"model must be a checkpoint folder or a model id: {model!r}")
    path = Path(os.path.expanduser(model))
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix == ".gguf":
            raise ValueError(f"GGUF files are not supported, use a folder with config.json and safetensors: {model}")
        raise ValueError(f"model must be a folder that holds config.json and safetensors, not a file: {model}")
    if not MODEL_ID.fullmatch(model) or ".." in model or "--" in model or Path(model).suffix == ".gguf":
        raise FileNotFoundError(f"no such checkpoint folder (and no model id, which is name or owner/name): {model}")
    return _cached_snapshot(model, revision, download_dir)


def _cached_snapshot(model: str, revision: str | None, download_dir: str | None) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    cache = download_dir or constants.HF_HUB_CACHE
    try:
        # local_files_only: the cache is read and nothing is asked of the network, HF_HUB_OFFLINE or not
        return Path(snapshot_download(model, revision=revision, cache_dir=cache, local_files_only=True))
    except HFValidationError as error:
        raise ValueError(f"not a model id, which is name or owner/name ({error}): {model}") from error
    except (LocalEntryNotFoundError, FileNotFoundError) as error:
        version = f" at revision {revision}" if revision else ""
        raise FileNotFoundError(
            f"no such folder, and the model{version} is not in the hub cache {cache}; fetch it first with "
            f"`{fetch_command(model, revision, download_dir)}`"
            + (" (on a machine that may use the network: HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else "")
            + f": {model}"
        ) from error


def fetch_command(model: str, revision: str | None = None, download_dir: str | None = None) -> str:
    """The shell command that downloads a model into the hub cache."""
    words = ["hf", "download", model]
    if revision:
        words += ["--revision", revision]
    if download_dir:
        words += ["--cache-dir", download_dir]
    return " ".join(words)


def _fetch_hint(folder: Path) -> str:
    """What to do about a file that is missing: for a snapshot of the hub cache, the command that completes it."""
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        model = folder.parent.parent.name.removeprefix("models--").replace("--", "/")
        return f"complete the download with `{fetch_command(model, folder.name)}`"
    return "copy the whole checkpoint"


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. ValueError naming the file where it is too large, broken, or no object."""
    size = file.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(f"{file} must have at most {MAX_JSON_BYTES} bytes: {size}")
    try:
        value = json.loads(file.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} must be UTF-8 JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} must hold a JSON object: {shown(value)}")
    return value


def open_checkpoint(
    path: Path, *, hf_overrides: Mapping[str, Any] | None = None, with_weights: bool = True
) -> Checkpoint:
    """Reads the JSON files of a folder and the headers of its weights; no tensor is read.

    `with_weights=False` (load format dummy) asks for config.json only. FileNotFoundError for what is missing,
    ValueError for what is broken or of a kind that is not supported.
    """
    config_file = path / "config.json"
    if not config_file.is_file():
        if (path / "adapter_config.json").is_file():
            raise FileNotFoundError(f"a LoRA adapter is no checkpoint, give the folder of its base model: {path}")
        raise FileNotFoundError(f"the checkpoint has no config.json; {_fetch_hint(path)}: {path}")
    config = merge_overrides(read_json(config_file), hf_overrides or {})
    generation_file = path / "generation_config.json"
    generation = read_json(generation_file) if generation_file.is_file() else None
    if not with_weights:
        return Checkpoint(path, config, generation)
    refuse_tool_files(path)
    return Checkpoint(path, config, generation, read_tensor_headers(path))


def read_tensor_headers(folder: Path) -> dict[str, TensorInfo]:
    """The tensors of a folder's weights by name, by the headers of their files; errors as of `open_checkpoint`."""
    index_file = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    weight_map: dict[str, str] = {}
    if single.is_file():  # before an index, as transformers looks for them
        files = [single]
    elif index_file.is_file():
        weight_map = _weight_map(index_file)
        files = [folder / name for name in sorted(set(weight_map.values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{index_file.name} names {len(files)} files and {len(missing)} of them are not in {folder}; "
                f"{_fetch_hint(folder)}: {listed(missing)}"
            )
    else:
        files = _loose_files(folder)
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for info in read_header(file):
            other = tensors.setdefault(info.name, info)
            if other is not info:
                raise ValueError(
                    f"a tensor must be in one file only, it is in {other.file.name} and {file.name} of {folder}: "
                    f"{info.name}"
                )
    for name, file_name in weight_map.items():
        if name not in tensors or tensors[name].file.name != file_name:
            raise ValueError(f"{index_file.name} says {file_name} holds a tensor that is not there: {name}")
    return tensors


def _weight_map(index_file: Path) -> dict[str, str]:
    weight_map = read_json(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index_file} must have an object weight_map from tensor to file: {shown(weight_map)}")
    for name, file_name in weight_map.items():
        # a plain name: an index must not lead out of its folder
        if (
            not isinstance(file_name, str)
            or not file_name.endswith(".safetensors")
            or os.path.basename(file_name) != file_name
            or "\\" in file_name
            or "\0" in file_name
        ):
            raise ValueError(
                f"{index_file} must name safetensors files of its own folder, without a path, for {name}: {file_name!r}"
            )
    return weight_map


def _loose_files(folder: Path) -> list[Path]:
    """Every safetensors file of a folder without index; what else it may hold is refused by name."""
    files = sorted(file for file in folder.glob("*.safetensors") if file.is_file())
    numbered = [re.fullmatch(r"(.+)-(\d+)-of-(\d+)\.safetensors", file.name) for file in files]
    shards = {match[2]: match[3] for match in numbered if match}
    if shards and len(shards) < max(int(total) for total in shards.values()):
        raise FileNotFoundError(
            f"shards of the checkpoint are missing, and its index; {_fetch_hint(folder)}: "
            f"{listed([file.name for file in files])}"
        )
    if files:
        return files
    if any(folder.glob("*.gguf")):
        raise ValueError(f"GGUF weights are not supported, use the safetensors version of the model: {folder}")
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise ValueError(
            "weights in pickle files are never read, since a pickle can run code; convert them to safetensors, e.g. "
            "with transformers' save_pretrained, or take the model's safetensors version: "
            f"{listed(pickles)} in {folder}"
        )
    raise FileNotFoundError(f"the checkpoint has no *.safetensors files; {_fetch_hint(folder)}: {folder}")
