"""Where caches are, and which folders are trusted with code."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from omni_engine.ops.cache_folder import CacheFolderError, cache_root, private_folder


@pytest.mark.parametrize(
    ("environment", "root"),
    [
        ({"OMNI_ENGINE_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"OMNI_ENGINE_CACHE": "~/a"}, "/home/me/a"),
        ({"OMNI_ENGINE_CACHE": "", "XDG_CACHE_HOME": "/b"}, "/b/omni-engine"),
        ({"XDG_CACHE_HOME": "relative"}, "/home/me/.cache/omni-engine"),
        ({}, "/home/me/.cache/omni-engine"),
    ],
)
def test_the_root_is_as_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], root: str
) -> None:
    for name in ("OMNI_ENGINE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **environment}.items():
        monkeypatch.setenv(name, value)
    assert cache_root() == Path(root)


def test_a_folder_is_made_for_its_owner_only_whatever_the_mask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        made = private_folder(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    assert made.stat().st_mode & 0o777 == 0o700
    assert private_folder(made) == made


def test_a_folder_that_others_can_read_is_taken(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    assert private_folder(tmp_path) == tmp_path


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
def test_a_folder_that_others_can_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    with pytest.raises(CacheFolderError, match=rf"others may write .*chmod 700 it.*: {tmp_path}$"):
        private_folder(tmp_path)


def test_a_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(
        CacheFolderError, match=rf"belongs to user {os.getuid()}, .*; set OMNI_ENGINE_CACHE.*: {tmp_path}$"
    ):
        private_folder(tmp_path)
