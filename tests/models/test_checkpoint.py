"""Opening a checkpoint folder: which files count, and what is said where they are missing or broken."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from omni_engine.models.checkpoint import MAX_JSON_BYTES, open_checkpoint, read_json


def make_folder(folder: Path, files: dict[str, dict[str, torch.Tensor]], index: dict[str, str] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "rope": {"a": 1, "b": 2}}))
    for name, tensors in files.items():
        save_file(tensors, folder / name)
    if index is not None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


A = {"a": torch.ones(2, 3)}
B = {"b": torch.ones(4, dtype=torch.bfloat16)}


def test_a_single_file_is_read(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_folder(tmp_path / "m", {"model.safetensors": A}))
    assert {name: info.shape for name, info in checkpoint.tensors.items()} == {"a": (2, 3)}
    assert checkpoint.generation_config is None


def test_an_index_says_which_files_count(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", {"x.safetensors": A, "y.safetensors": B, "consolidated.safetensors": A})
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}})
    )
    checkpoint = open_checkpoint(folder)
    assert sorted(checkpoint.tensors) == ["a", "b"]
    assert [info.file.name for info in checkpoint.tensors.values()] == ["x.safetensors", "y.safetensors"]


def test_without_an_index_every_safetensors_file_counts(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", {"x.safetensors": A, "y.safetensors": B})
    assert sorted(open_checkpoint(folder).tensors) == ["a", "b"]


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", {"x.safetensors": A, "y.safetensors": A})
    with pytest.raises(ValueError, match=r"one file only.*x\.safetensors and y\.safetensors.*: a$"):
        open_checkpoint(folder)


def test_missing_shards_are_counted_and_named(tmp_path: Path) -> None:
    index = {"a": "x.safetensors", "b": "y.safetensors", "c": "z.safetensors"}
    folder = make_folder(tmp_path / "m", {"x.safetensors": A}, index)
    with pytest.raises(FileNotFoundError, match=r"names 3 files and 2 of them.*: y\.safetensors, z\.safetensors$"):
        open_checkpoint(folder)


def test_a_missing_index_with_missing_shards_is_noticed(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", {"model-00001-of-00002.safetensors": A})
    with pytest.raises(FileNotFoundError, match="shards of the checkpoint are missing"):
        open_checkpoint(folder)


def test_all_shards_without_an_index_are_enough(tmp_path: Path) -> None:
    files = {"model-00001-of-00002.safetensors": A, "model-00002-of-00002.safetensors": B}
    assert sorted(open_checkpoint(make_folder(tmp_path / "m", files)).tensors) == ["a", "b"]


def test_an_index_that_names_a_tensor_its_file_lacks_is_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", {"x.safetensors": A}, {"a": "x.safetensors", "zz": "x.safetensors"})
    with pytest.raises(ValueError, match=r"x\.safetensors holds a tensor that is not there: zz$"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "d/x.safetensors", "a\\x.safetensors", 5])
def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path, name: Any) -> None:
    save_file(A, tmp_path / "x.safetensors")
    folder = make_folder(tmp_path / "m", {}, {"a": name})
    with pytest.raises(ValueError, match="safetensors files of its own folder"):
        open_checkpoint(folder)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": ["a"]}])
def test_an_index_without_a_weight_map_is_refused(tmp_path: Path, index: dict[str, Any]) -> None:
    folder = make_folder(tmp_path / "m", {})
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="weight_map"):
        open_checkpoint(folder)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        open_checkpoint(tmp_path)


def test_an_adapter_folder_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="LoRA adapter"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("file", "error", "words"),
    [
        ("pytorch_model.bin", ValueError, "pickle.*convert them to safetensors.*pytorch_model.bin"),
        ("model.pth", ValueError, "pickle.*model.pth"),
        ("model-q4.gguf", ValueError, "GGUF"),
        ("readme.md", FileNotFoundError, r"no \*.safetensors"),
    ],
)
def test_a_folder_without_safetensors_is_told_what_to_do(
    tmp_path: Path, file: str, error: type[Exception], words: str
) -> None:
    folder = make_folder(tmp_path / "m", {})
    (folder / file).write_bytes(b"x")
    with pytest.raises(error, match=words):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("file", "tool"),
    [
        ("quant_model_description_w8a8_dynamic.json", "msModelSlim"),
        ("quant_model_description.json", "msModelSlim"),
        ("hf_quant_config.json", "modelopt"),
        ("quantize_config.json", "gptq"),
        ("quant_config.json", "awq"),
    ],
)
def test_the_files_of_quantization_tools_are_refused_by_name(tmp_path: Path, file: str, tool: str) -> None:
    folder = make_folder(tmp_path / "m", {"model.safetensors": A})
    (folder / file).write_text("{}")
    with pytest.raises(ValueError, match=f"quantization method {tool} is not supported.*{file}"):
        open_checkpoint(folder)


def test_overrides_are_merged_into_the_config(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", {"model.safetensors": A})
    assert open_checkpoint(folder, hf_overrides={"rope": {"b": 3}}).config["rope"] == {"a": 1, "b": 3}


def test_dummy_weights_need_no_weight_files(tmp_path: Path) -> None:
    assert open_checkpoint(make_folder(tmp_path / "m", {}), with_weights=False).tensors == {}


def test_stored_dtype_counts_fp8_as_what_it_becomes(tmp_path: Path) -> None:
    tensors = {
        "w.weight": torch.zeros(200, 300, dtype=torch.float8_e4m3fn),
        "w.weight_scale_inv": torch.zeros(2, 3),
        "norm.weight": torch.zeros(10, dtype=torch.bfloat16),
        "mtp.weight": torch.zeros(1000, dtype=torch.bfloat16),
    }
    checkpoint = open_checkpoint(make_folder(tmp_path / "m", {"model.safetensors": tensors}))
    assert checkpoint.stored_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"{", "UTF-8 JSON"), (b"\xff", "UTF-8 JSON"), (b"[1]", r"JSON object: \[1\]"), (b"[" * 100_000, "UTF-8 JSON")],
)
def test_a_json_file_that_is_no_object_is_refused_by_name(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"config.json must .*{words}"):
        read_json(tmp_path / "config.json")


def test_a_huge_json_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as stream:
        stream.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(ValueError, match="at most"):
        read_json(tmp_path / "config.json")


def test_nothing_that_a_front_end_imports_loads_torch() -> None:
    modules = ("checkpoint", "config_parser", "generation_config", "registry", "safetensors_header")
    code = "import sys\n" + "".join(f"import omni_engine.models.{name}\n" for name in modules)
    code += "from omni_engine.models.registry import resolve\nresolve('LlamaForCausalLM').load_config_parser()\n"
    code += "print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
