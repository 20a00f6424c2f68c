"""resolve_model: folders, and model ids in the local hub cache, without any network."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from omni_engine.models.checkpoint import fetch_command, open_checkpoint, resolve_model

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any connection fails the test; HF_HUB_OFFLINE is off, so nothing else would hold one back."""

    def refuse(*arguments: object, **keywords: object) -> None:
        raise AssertionError(f"the network was used: {arguments}")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with one complete model, acme/tiny."""
    hub = tmp_path / "hub"
    snapshot = hub / "models--acme--tiny" / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (hub / "models--acme--tiny" / "refs").mkdir()
    (hub / "models--acme--tiny" / "refs" / "main").write_text(REVISION)
    blobs = hub / "models--acme--tiny" / "blobs"
    blobs.mkdir()
    (blobs / "c").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    (snapshot / "config.json").symlink_to("../../blobs/c")
    save_file({"a": torch.ones(2)}, blobs / "w")
    (snapshot / "model.safetensors").symlink_to("../../blobs/w")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    return hub


def test_an_existing_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path


def test_a_model_id_is_found_in_the_cache_and_opened_through_its_links(cache: Path) -> None:
    path = resolve_model("acme/tiny")
    assert path == cache / "models--acme--tiny" / "snapshots" / REVISION
    assert list(open_checkpoint(path).tensors) == ["a"]


def test_a_commit_is_found_as_a_revision(cache: Path) -> None:
    assert resolve_model("acme/tiny", REVISION).name == REVISION


def test_the_download_folder_goes_before_the_default_cache(cache: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    cache.rename(other)
    assert resolve_model("acme/tiny", download_dir=str(other)).is_dir()
    with pytest.raises(FileNotFoundError):
        resolve_model("acme/tiny")


def test_a_model_that_is_not_cached_is_answered_with_the_command_that_fetches_it(cache: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"`hf download acme/large`: acme/large$"):
        resolve_model("acme/large")


def test_a_revision_that_is_not_cached_is_part_of_the_command(cache: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"at revision v2 is not.*`hf download acme/tiny --revision v2`"):
        resolve_model("acme/tiny", "v2")


def test_offline_mode_is_said(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE is set"):
        resolve_model("acme/large")


def test_a_shard_missing_from_a_snapshot_is_named_with_the_command(cache: Path) -> None:
    path = resolve_model("acme/tiny")
    (path / "model.safetensors").rename(path / "x.safetensors")
    index = {"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=rf"`hf download acme/tiny --revision {REVISION}`: y\.safetensors$"):
        open_checkpoint(path)


def test_a_link_to_a_blob_that_was_never_finished_is_a_missing_shard(cache: Path) -> None:
    (cache / "models--acme--tiny" / "blobs" / "w").unlink()
    with pytest.raises(FileNotFoundError, match="hf download acme/tiny"):
        open_checkpoint(resolve_model("acme/tiny"))


@pytest.mark.parametrize(
    "model", ["./nowhere", "../nowhere", "/no/where", "a/b/c", "~/nowhere-at-all", "nowhere-at-all/"]
)
def test_a_path_that_does_not_exist_is_no_model_id(cache: Path, model: str) -> None:
    with pytest.raises(FileNotFoundError, match="no such checkpoint folder"):
        resolve_model(model)


def test_a_file_is_refused_and_gguf_by_name(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(b"")
    (tmp_path / "m.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match="not a file"):
        resolve_model(str(tmp_path / "m.safetensors"))
    with pytest.raises(ValueError, match="GGUF"):
        resolve_model(str(tmp_path / "m.gguf"))


def test_no_model_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="model must be"):
        resolve_model("")


def test_the_cache_of_hf_home_is_used_in_a_fresh_process(cache: Path) -> None:
    environment = {**os.environ, "HF_HOME": str(cache.parent), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    code = "from omni_engine.models.checkpoint import resolve_model; print(resolve_model('acme/tiny'))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith(REVISION)


def test_the_command_names_the_download_folder() -> None:
    assert fetch_command("a/b", "r", "/d") == "hf download a/b --revision r --cache-dir /d"
