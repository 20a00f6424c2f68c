"""Graphs in a file: what is exported can be imported, only with trust, and nothing else than that can."""

from __future__ import annotations

import errno
import io
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from omni_engine.engine.graphs.archive import ArchiveError
from omni_engine.engine.graphs.cache import GraphCache, GraphCacheError
from omni_engine.engine.graphs.entry import BrokenEntryError
from omni_engine.engine.graphs.key import CacheKey


@pytest.fixture
def cache(tmp_path: Path) -> GraphCache:
    return GraphCache(tmp_path / "cache")


@pytest.fixture
def three(cache: GraphCache) -> list[CacheKey]:
    """Entries of 100, 200 and 300 bytes."""
    keys = [CacheKey({"n": number}) for number in (1, 2, 3)]
    for number, key in enumerate(keys, start=1):
        content = b"x" * number * 100

        def build(path: Path, content: bytes = content) -> None:
            path.write_bytes(content)

        cache.store(key, build, {"model": "tiny"})
    return keys


@pytest.fixture
def archive(cache: GraphCache, three: list[CacheKey], tmp_path: Path) -> Path:
    cache.export(tmp_path / "graphs.tar", cache.entries())
    return tmp_path / "graphs.tar"


def members(path: Path) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(path, "r:") as file:
        return [(member, file.extractfile(member).read()) for member in file]


def rewrite(path: Path, new: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    with tarfile.open(path, "w:") as file:
        for member, content in new:
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))


def test_what_is_exported_can_be_imported(cache: GraphCache, archive: Path, three: list[CacheKey], tmp_path: Path):
    other = GraphCache(tmp_path / "other")
    result = other.import_(archive, trust=True)
    assert {entry.digest for entry in result.stored} == {key.digest for key in three} and result.kept == []
    for key in three:
        mine, its = cache.find(key), other.find(key)
        assert its.path.read_bytes() == mine.path.read_bytes() and its.details == mine.details
    assert {path.stat().st_mode & 0o77 for path in other.root.rglob("*")} == {0}
    assert len(list(other.folder.iterdir())) == 3


def test_without_trust_nothing_is_imported(archive: Path, tmp_path: Path) -> None:
    other = GraphCache(tmp_path / "other")
    with pytest.raises(ValueError, match=r"executable code.*--trust: /"):
        other.import_(archive, trust=False)
    assert not other.root.exists()


def test_graphs_that_are_there_are_kept_and_broken_ones_replaced(
    cache: GraphCache, archive: Path, three: list[CacheKey]
) -> None:
    kept = cache.find(three[0])
    os.utime(kept.path, (1, 1))
    cache.find(three[1]).path.write_bytes(b"cut")
    result = cache.import_(archive, trust=True)
    assert [entry.digest for entry in result.stored] == [three[1].digest]
    assert kept.path.stat().st_mtime == 1
    assert all(cache.find(key) for key in three)


def test_a_broken_graph_is_not_exported(cache: GraphCache, three: list[CacheKey], tmp_path: Path) -> None:
    entries = cache.entries()
    entries[0].path.write_bytes(b"y" * entries[0].num_bytes)
    with pytest.raises(BrokenEntryError, match=rf"graph prune: {entries[0].digest}"):
        cache.export(tmp_path / "graphs.tar", entries)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def link_to(target: str, kind: bytes) -> Callable[[Path, tarfile.TarInfo], None]:
    def change(path: Path, package: tarfile.TarInfo) -> None:
        content = [(member, data) for member, data in members(path) if member.name != package.name]
        package.type, package.linkname = kind, target
        rewrite(path, [*content, (package, b"")])

    return change


def named(name: str) -> Callable[[Path, tarfile.TarInfo], None]:
    def change(path: Path, package: tarfile.TarInfo) -> None:
        rewrite(path, [*members(path), (tarfile.TarInfo(name.format(digest=package.name[:64])), b"evil")])

    return change


def without_package(path: Path, package: tarfile.TarInfo) -> None:
    rewrite(path, [item for item in members(path) if item[0].name != package.name])


def altered_package(path: Path, package: tarfile.TarInfo) -> None:
    rewrite(path, [(m, b"y" * len(data) if m.name == package.name else data) for m, data in members(path)])


def huge_manifest(path: Path, package: tarfile.TarInfo) -> None:
    manifest = package.name.replace("graph.pt2", "manifest.json")
    rewrite(path, [(m, data + b" " * 2**20 if m.name == manifest else data) for m, data in members(path)])


def cut_in_a_file(path: Path, package: tarfile.TarInfo) -> None:
    os.truncate(path, package.offset_data + package.size - 1)


def cut_between_files(path: Path, package: tarfile.TarInfo) -> None:
    os.truncate(path, package.offset_data + 512)


def not_a_tar(path: Path, package: tarfile.TarInfo) -> None:
    path.write_bytes(b"PK" + bytes(5000))


def compressed(path: Path, package: tarfile.TarInfo) -> None:
    content = members(path)
    with tarfile.open(path, "w:gz") as file:
        for member, data in content:
            file.addfile(member, io.BytesIO(data))


def without_contents(path: Path, package: tarfile.TarInfo) -> None:
    rewrite(path, members(path)[1:])


def sparse(path: Path, package: tarfile.TarInfo) -> None:
    content = members(path)
    for member, data in content:
        if member.name == package.name:
            member.pax_headers = {"GNU.sparse.map": f"0,{len(data)}", "GNU.sparse.size": str(2**40)}
    with tarfile.open(path, "w:", format=tarfile.PAX_FORMAT) as file:
        for member, data in content:
            file.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        pytest.param(link_to("/etc/passwd", tarfile.SYMTYPE), "something else than a plain file", id="symlink"),
        pytest.param(link_to("contents.json", tarfile.LNKTYPE), "something else than a plain file", id="hard link"),
        pytest.param(link_to("", tarfile.FIFOTYPE), "something else than a plain file", id="pipe"),
        pytest.param(link_to("", tarfile.DIRTYPE), "something else than a plain file", id="folder"),
        pytest.param(named("../evil"), "does not belong there, '../evil'", id="parent"),
        pytest.param(named("{digest}/../../evil"), "does not belong there", id="parent inside"),
        pytest.param(named("/tmp/evil"), "does not belong there, '/tmp/evil'", id="absolute"),
        pytest.param(named("{digest}/evil.so"), "does not belong there", id="unexpected name"),
        pytest.param(named("{digest}/graph.pt2"), "does not belong there", id="same file twice"),
        pytest.param(named("f" * 64 + "/graph.pt2"), "does not belong there", id="unlisted entry"),
        pytest.param(without_package, "is incomplete, it lacks", id="missing package"),
        pytest.param(altered_package, "holds a broken graph", id="altered package"),
        pytest.param(huge_manifest, "where 1048576 are the most", id="huge manifest"),
        pytest.param(sparse, "something else than a plain file", id="sparse"),
        pytest.param(cut_in_a_file, "not an archive of omni-engine graphs", id="cut in a file"),
        pytest.param(cut_between_files, "is incomplete, it lacks", id="cut between files"),
        pytest.param(not_a_tar, "not an archive of omni-engine graphs", id="not a tar"),
        pytest.param(compressed, "not an archive of omni-engine graphs", id="compressed"),
        pytest.param(without_contents, "does not begin with contents.json", id="no contents"),
    ],
)
def test_a_changed_archive_is_refused_whole(
    archive: Path, tmp_path: Path, change: Callable[[Path, tarfile.TarInfo], None], problem: str
) -> None:
    middle = members(archive)[4][0]
    assert middle.name.endswith("/graph.pt2")
    change(archive, middle)
    other = GraphCache(tmp_path / "other")
    with pytest.raises(ArchiveError) as raised:
        other.import_(archive, trust=True)
    assert problem in str(raised.value) and str(raised.value).endswith(f": {archive}")
    assert list(other.folder.iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "graphs.tar", "other"]


def test_an_archive_that_is_not_there_is_told(cache: GraphCache, tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=r"cannot be read \(No such file or directory\): .*none.tar"):
        cache.import_(tmp_path / "none.tar", trust=True)


def test_an_export_that_fails_leaves_the_old_file(
    cache: GraphCache, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = archive.read_bytes()

    def fail(*words: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        cache.export(archive, cache.entries()[:1])
    assert archive.read_bytes() == before and sorted(os.listdir(archive.parent)) == ["cache", "graphs.tar"]


def test_a_full_disk_during_an_import_is_told(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*words: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfileobj", fail)
    other = GraphCache(tmp_path / "other")
    with pytest.raises(GraphCacheError, match="no room for compiled graphs"):
        other.import_(archive, trust=True)
    assert list(other.folder.iterdir()) == []
