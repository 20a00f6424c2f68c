"""The graph cache: what is stored is found again, what was altered is refused, and processes do not race."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from omni_engine.engine.graphs import cache as graph_cache
from omni_engine.engine.graphs import entry as graph_entry
from omni_engine.engine.graphs.cache import GraphCache, GraphCacheError
from omni_engine.engine.graphs.entry import BrokenEntryError, GraphEntry
from omni_engine.engine.graphs.key import CacheKey, installed_versions
from omni_engine.ops.file_lock import file_lock

KEY = CacheKey({"model": {"layers": 2}, "num_requests": 8, "torch": "2.13.0"})
OTHER_KEY = CacheKey({**KEY.fields, "num_requests": 16})
CONTENT = bytes(range(256)) * 4096  # 1 MiB


@pytest.fixture
def cache(tmp_path: Path) -> GraphCache:
    return GraphCache(tmp_path / "cache")


def write(content: bytes = CONTENT) -> Callable[[Path], None]:
    def build(path: Path) -> None:
        path.write_bytes(content)

    return build


def leftovers(cache: GraphCache) -> list[str]:
    return [path.name for path in cache.folder.iterdir() if path.name.startswith(".")]


def in_process(code: str, *words: object) -> subprocess.Popen[str]:
    """A Python process that runs `code`, with what it needs imported and its words in `sys.argv`."""
    start = f"import os, sys, time\nfrom pathlib import Path\nfrom {graph_cache.__name__} import *\n"
    start += "cache, key = GraphCache(sys.argv[1]), CacheKey({'n': 1})\n"
    return subprocess.Popen(
        [sys.executable, "-c", start + code, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output_of(process: subprocess.Popen[str]) -> str:
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return output.strip()


# The key


def test_a_key_does_not_depend_on_the_order_of_its_fields() -> None:
    assert CacheKey({"a": 1, "b": [1, 2]}) == CacheKey({"b": (1, 2), "a": 1})


@pytest.mark.parametrize("value", [2, 1.0, "1", True, [1], None])
def test_a_key_depends_on_values_and_their_types(value: object) -> None:
    assert CacheKey({"a": value}) != CacheKey({"a": 1})


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, b"x", object()])
def test_a_key_of_what_json_does_not_hold_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="only what JSON can"):
        CacheKey({"a": value})


def test_a_key_is_not_changed_by_its_maker_afterwards() -> None:
    fields = {"a": [1]}
    key = CacheKey(fields)
    fields["a"].append(2)
    assert key == CacheKey(key.fields) == CacheKey({"a": [1]})


def test_installed_versions_change_with_an_edit_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from omni_engine.engine.graphs import key as graph_key

    (tmp_path / "ops").mkdir()
    (tmp_path / "ops" / "norm.py").write_text("a = 1")
    monkeypatch.setattr(graph_key, "_PACKAGE", tmp_path)
    before = installed_versions.__wrapped__()
    assert before == installed_versions.__wrapped__()
    (tmp_path / "ops" / "norm.py").write_text("a = 2")
    after = installed_versions.__wrapped__()
    assert {name for name in before if before[name] != after[name]} == {"code"}


# Stored and found


def test_what_is_stored_is_found_by_another_object(cache: GraphCache) -> None:
    assert cache.find(KEY) is None
    stored = cache.store(KEY, write(), {"compile_seconds": 1.5})
    other = GraphCache(cache.root)
    found = other.find(CacheKey(dict(reversed(KEY.fields.items()))))
    assert found.path.read_bytes() == CONTENT and found.path.name == "graph.pt2"
    assert (found.digest, found.fields, found.num_bytes) == (KEY.digest, KEY.fields, len(CONTENT))
    assert found.details["compile_seconds"] == 1.5 and abs(found.created - time.time()) < 60
    assert found.path == stored.path
    assert (cache.num_stored, cache.num_found, other.num_stored, other.num_found) == (1, 0, 0, 1)
    assert other.find(OTHER_KEY) is None


def test_the_time_to_compile_is_kept(cache: GraphCache, tmp_path: Path) -> None:
    def build(path: Path) -> None:
        path.write_bytes(b"x")
        time.sleep(0.02)

    assert 0.02 <= cache.store(KEY, build, {}).details["compile_seconds"] < 20
    (tmp_path / "made.pt2").write_bytes(CONTENT)
    assert "compile_seconds" not in cache.store(OTHER_KEY, tmp_path / "made.pt2", {}).details


def test_a_package_that_is_a_file_already_is_copied(cache: GraphCache, tmp_path: Path) -> None:
    (tmp_path / "made.pt2").write_bytes(CONTENT)
    cache.store(KEY, tmp_path / "made.pt2", {})
    assert cache.find(KEY).path.read_bytes() == CONTENT
    assert (tmp_path / "made.pt2").exists()


def test_nobody_else_may_enter_what_is_made(cache: GraphCache) -> None:
    def build(path: Path) -> None:
        path.write_bytes(b"x")
        path.chmod(0o666)

    entry = cache.store(KEY, build, {})
    modes = {path.name: path.stat().st_mode & 0o777 for path in (cache.root, cache.folder, *entry.folder.iterdir())}
    assert modes == {"cache": 0o700, "graphs": 0o700, "graph.pt2": 0o600, "manifest.json": 0o600}
    assert entry.folder.stat().st_mode & 0o777 == 0o700


def test_a_sound_entry_is_not_replaced(cache: GraphCache) -> None:
    cache.store(KEY, write(b"first"), {})
    assert cache.store(KEY, write(b"second"), {}).path.read_bytes() == b"first"
    assert cache.num_stored == 1


def test_a_broken_entry_is_replaced(cache: GraphCache) -> None:
    cache.store(KEY, write(b"first"), {}).path.write_bytes(b"fIrst")
    assert cache.store(KEY, write(b"second"), {}).path.read_bytes() == b"second"
    assert cache.find(KEY) is not None


def test_errors_of_the_compiler_pass_and_leave_nothing(cache: GraphCache) -> None:
    def build(path: Path) -> None:
        path.write_bytes(CONTENT)
        raise FileNotFoundError(errno.ENOENT, "no such compiler", "c++")

    with pytest.raises(FileNotFoundError, match="no such compiler"):
        cache.store(KEY, build, {})
    with pytest.raises(RuntimeError, match="wrote no package"):
        cache.store(KEY, lambda path: None, {})
    assert list(cache.folder.iterdir()) == []


def test_finding_makes_no_folder(cache: GraphCache) -> None:
    assert cache.find(KEY) is None and cache.verify() == [] and cache.prune(all=True) == []
    assert not cache.root.exists()


def test_finding_is_told_at_debug(cache: GraphCache, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger=graph_cache.__name__)
    cache.find(KEY)
    cache.store(KEY, write(), {})
    cache.find(KEY)
    assert [record.getMessage() for record in caplog.records] == [
        f"graph {what}: {KEY.digest}" for what in ("not found", "stored", "found")
    ]


# What is refused


def truncate(entry: GraphEntry) -> None:
    os.truncate(entry.path, entry.num_bytes - 1)


def alter_a_byte(entry: GraphEntry) -> None:
    with entry.path.open("r+b") as file:
        file.seek(entry.num_bytes // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def edit_manifest(entry: GraphEntry, **changes: object) -> None:
    path = entry.folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def alter_the_key(entry: GraphEntry) -> None:
    edit_manifest(entry, fields={**entry.fields, "num_requests": 9})


def alter_the_details(entry: GraphEntry) -> None:
    edit_manifest(entry, details={"compile_seconds": 0})


def cut_the_manifest(entry: GraphEntry) -> None:
    os.truncate(entry.folder / "manifest.json", 100)


def swell_the_manifest(entry: GraphEntry) -> None:
    with (entry.folder / "manifest.json").open("a") as file:
        file.write(" " * graph_entry.MAX_MANIFEST_BYTES)


def seal_another_key(entry: GraphEntry) -> None:
    (entry.folder / "manifest.json").unlink()
    graph_entry.seal_entry(entry.folder, OTHER_KEY, {})


def lose_the_package(entry: GraphEntry) -> None:
    entry.path.unlink()


def link_the_package(entry: GraphEntry) -> None:
    elsewhere = entry.folder.parents[1] / "elsewhere"
    entry.path.rename(elsewhere)
    entry.path.symlink_to(elsewhere)


def link_the_folder(entry: GraphEntry) -> None:
    elsewhere = entry.folder.parents[1] / "elsewhere"
    entry.folder.rename(elsewhere)
    entry.folder.symlink_to(elsewhere)


def put_a_pipe(entry: GraphEntry) -> None:
    entry.path.unlink()
    os.mkfifo(entry.path, 0o600)


def open_the_package(entry: GraphEntry) -> None:
    entry.path.chmod(0o620)


def open_the_manifest(entry: GraphEntry) -> None:
    (entry.folder / "manifest.json").chmod(0o602)


def open_the_folder(entry: GraphEntry) -> None:
    entry.folder.chmod(0o770)


DAMAGES = [
    (truncate, "graph.pt2 has 1048575 bytes instead of 1048576"),
    (alter_a_byte, "content of graph.pt2 is not what was stored"),
    (alter_the_key, "content of manifest.json is not what was stored"),
    (alter_the_details, "content of manifest.json is not what was stored"),
    (cut_the_manifest, "manifest.json is not a manifest"),
    (swell_the_manifest, "more than any manifest"),
    (seal_another_key, "the key in manifest.json is another graph's"),
    (lose_the_package, "graph.pt2 is missing"),
    (link_the_package, "graph.pt2 is a link"),
    (link_the_folder, "it is not a folder"),
    (put_a_pipe, "graph.pt2 is not a plain file"),
    (open_the_package, "graph.pt2 can be written to by others"),
    (open_the_manifest, "manifest.json can be written to by others"),
    (open_the_folder, "the folder can be written to by others"),
]


@pytest.mark.parametrize(("damage", "problem"), DAMAGES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_damaged_entry_is_refused_named_removed_and_rebuilt(
    cache: GraphCache, caplog: pytest.LogCaptureFixture, damage: Callable[[GraphEntry], None], problem: str
) -> None:
    entry = cache.store(KEY, write(), {})
    cache.store(OTHER_KEY, write(), {})
    damage(entry)
    told = {found.digest: reason for found, reason in cache.verify()}
    assert problem in (told[KEY.digest] or "") and told[OTHER_KEY.digest] is None
    assert cache.find(KEY) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert problem in caplog.text and str(entry.folder) in caplog.text
    assert not os.path.lexists(entry.folder) and leftovers(cache) == []
    cache.store(KEY, write(), {})
    assert cache.find(KEY) is not None and cache.find(OTHER_KEY) is not None


def test_an_entry_of_another_user_is_not_read(cache: GraphCache, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = cache.store(KEY, write(), {})
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(BrokenEntryError, match=rf"the folder belongs to another user \({os.getuid()}\)"):
        graph_entry.read_entry(entry.folder, contents=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("which", ["graph.pt2", "manifest.json", "."])
def test_an_entry_of_another_user_is_refused(cache: GraphCache, caplog: pytest.LogCaptureFixture, which: str) -> None:
    entry = cache.store(KEY, write(), {})
    os.chown(entry.folder / which, 12345, -1)
    assert cache.find(KEY) is None
    assert "belongs to another user (12345)" in caplog.text


def test_a_cache_of_another_user_is_refused(cache: GraphCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.store(KEY, write(), {})
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    for use in (lambda: cache.find(KEY), lambda: cache.store(KEY, write(), {}), cache.check_folder, cache.verify):
        with pytest.raises(GraphCacheError, match="belongs to user"):
            use()
    monkeypatch.undo()
    assert cache.find(KEY) is not None  # and nothing was removed


@pytest.mark.parametrize("which", ["root", "folder"])
@pytest.mark.parametrize("mode", [0o720, 0o702])
def test_a_cache_that_others_can_write_to_is_refused(cache: GraphCache, which: str, mode: int) -> None:
    cache.store(KEY, write(), {})
    getattr(cache, which).chmod(mode)
    with pytest.raises(
        GraphCacheError, match=r"others may write to the cache folder .*chmod 700 it.*OMNI_ENGINE_CACHE"
    ):
        cache.find(KEY)


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMNI_ENGINE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(GraphCacheError, match=r"set OMNI_ENGINE_CACHE to one, for user: \d+$"):
        GraphCache()


def test_the_folder_is_fixed_before_a_link_to_it_is_turned(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "one")
    (tmp_path / "one").mkdir(mode=0o700)
    cache = GraphCache(tmp_path / "link")
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to(tmp_path / "two")
    cache.store(KEY, write(), {})
    assert not (tmp_path / "two").exists() and GraphCache(tmp_path / "one").find(KEY) is not None


# A disk that cannot be written to


def test_a_full_disk_is_told_and_nothing_is_left(cache: GraphCache) -> None:
    code = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
for build in (lambda path: path.write_bytes(b"x" * 10000) and None, Path(sys.argv[2])):
    try:
        cache.store(key, build, {})
    except GraphCacheError as error:
        print(error)
"""
    big = cache.root.parent / "big"
    big.write_bytes(b"x" * 10000)
    told = output_of(in_process(code, cache.root, big)).splitlines()
    assert len(told) == 2
    for line in told:
        assert "no room for compiled graphs" in line and "graph prune" in line and line.endswith(f": {cache.folder}")
    assert list(cache.folder.iterdir()) == []


@pytest.mark.parametrize("step", ["fsync", "rename", "mkdir"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_an_error_at_any_step_leaves_nothing(
    cache: GraphCache, monkeypatch: pytest.MonkeyPatch, step: str, number: int
) -> None:
    cache.check_folder()

    def fail(path: object, *words: object, **options: object) -> None:
        if not isinstance(path, int) and os.path.isdir(path):
            raise FileExistsError(errno.EEXIST, "exists", path)
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(os, step, (lambda *words: fail(0)) if step == "rename" else fail)
        with pytest.raises(GraphCacheError, match=r"OMNI_ENGINE_CACHE to .*: /"):
            cache.store(KEY, write(), {})
    assert list(cache.folder.iterdir()) == []
    cache.store(KEY, write(), {})


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = GraphCache(tmp_path / "file" / "cache")
    with pytest.raises(GraphCacheError, match=r"Not a directory.*set OMNI_ENGINE_CACHE"):
        cache.check_folder()


def test_a_cache_that_is_only_readable_is_used(cache: GraphCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.store(KEY, write(), {})

    def refuse(*words: object, **options: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for name in ("utime", "rename", "unlink", "chmod"):
        monkeypatch.setattr(os, name, refuse)
    assert cache.find(KEY) is not None


# Several processes


def test_of_two_that_store_at_once_one_does_and_both_find(cache: GraphCache) -> None:
    code = """
print("ready", flush=True)
while not Path(sys.argv[2]).exists():
    time.sleep(0.001)
for number in range(20):
    key = CacheKey({"n": number})
    content = str(number).encode() * 1000
    entry = cache.store(key, lambda path: path.write_bytes(content) and None, {})
    assert cache.find(key).path.read_bytes() == content
print(cache.num_stored, cache.num_found)
"""
    gun = cache.root.parent / "gun"
    processes = [in_process(code, cache.root, gun) for _ in range(3)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    gun.touch()
    counts = [tuple(map(int, output_of(process).split())) for process in processes]
    assert sum(stored for stored, _ in counts) == 20
    assert {found for _, found in counts} == {20}
    assert len(cache.entries()) == 20 and leftovers(cache) == []


BUILD = """
with cache.building(key) as entry:
    if entry is None:
        print("compiling", flush=True)
        time.sleep(float(sys.argv[2]))
        cache.store(key, lambda path: path.write_bytes(b"x") and None, {})
print(cache.num_stored, cache.num_found)
"""


def test_two_that_need_the_same_graph_compile_it_once(cache: GraphCache) -> None:
    first = in_process(BUILD, cache.root, 0.5)
    assert first.stdout.readline() == "compiling\n"
    second = in_process(BUILD, cache.root, 0.5)
    assert (output_of(first), output_of(second)) == ("1 0", "0 1")
    assert leftovers(cache) == []


def test_who_waits_too_long_for_another_is_told(cache: GraphCache) -> None:
    with (
        cache.building(KEY),
        pytest.raises(GraphCacheError, match=rf"process {os.getpid()} has not freed"),
        cache.building(KEY, timeout=0.1),
    ):
        pass
    with cache.building(KEY, timeout=0.1) as entry:
        assert entry is None


def test_other_graphs_do_not_wait(cache: GraphCache) -> None:
    with cache.building(KEY), cache.building(OTHER_KEY, timeout=0) as entry:
        assert entry is None


def test_nothing_is_given_its_name_or_removed_while_another_does_so(cache: GraphCache) -> None:
    alter_a_byte(cache.store(OTHER_KEY, write(), {}))
    began = threading.Event()
    find = threading.Thread(target=lambda: GraphCache(cache.root).find(OTHER_KEY))
    with contextlib.ExitStack() as stack:

        def build(path: Path) -> None:
            path.write_bytes(CONTENT)
            stack.enter_context(file_lock(cache.folder / ".lock"))
            began.set()

        store = threading.Thread(target=lambda: cache.store(KEY, build, {}))
        store.start()
        assert began.wait(10)
        find.start()
        store.join(0.3)
        find.join(0.3)
        assert store.is_alive() and find.is_alive()
        assert not (cache.folder / KEY.digest).exists() and (cache.folder / OTHER_KEY.digest).exists()
    store.join(10)
    find.join(10)
    assert (cache.folder / KEY.digest).exists() and not (cache.folder / OTHER_KEY.digest).exists()


def test_a_meanwhile_stored_graph_is_kept(cache: GraphCache) -> None:
    def build(path: Path) -> None:
        GraphCache(cache.root).store(KEY, write(b"faster"), {})
        path.write_bytes(b"slower")

    assert cache.store(KEY, build, {}).path.read_bytes() == b"faster"
    assert cache.num_stored == 0 and leftovers(cache) == []


KILLED_BUILD = """
def build(path):
    path.write_bytes(b"half")
    print("compiling", flush=True)
    time.sleep(60)
with cache.building(key):
    cache.store(key, build, {})
"""


@pytest.mark.parametrize("number", [1, 2])  # the same graph, and another one
def test_a_killed_builder_frees_its_lock_and_is_swept(cache: GraphCache, number: int) -> None:
    process = in_process(KILLED_BUILD, cache.root)
    assert process.stdout.readline() == "compiling\n"
    key = CacheKey({"n": number})
    cache.store(OTHER_KEY, write(), {})
    assert len(leftovers(cache)) == 2  # of a builder that lives: its lock and its folder
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(leftovers(cache)) == 2
    with cache.building(key, timeout=5) as entry:
        assert entry is None
        cache.store(key, write(), {})
    assert cache.find(key) is not None and leftovers(cache) == []


# Pruning


@pytest.fixture
def three(cache: GraphCache) -> list[CacheKey]:
    """Entries of 100, 200 and 300 bytes, used 3, 2 and 1 hours ago, by torch 1, 2 and 3."""
    keys = [CacheKey({"torch": str(number)}) for number in (1, 2, 3)]
    for number, key in enumerate(keys, start=1):
        entry = cache.store(key, write(b"x" * number * 100), {})
        used = time.time() - 3600 * (4 - number)
        os.utime(entry.folder, (used, used))
    return keys


@pytest.mark.parametrize(
    ("rules", "gone"),
    [
        ({}, []),
        ({"all": True}, [1, 2, 3]),
        ({"older_than": 1.5 * 3600}, [1, 2]),
        ({"keep_current": {"torch": "2"}}, [1, 3]),
        ({"keep_current": {"torch": "2", "code": "x"}}, [1, 2, 3]),
        ({"max_bytes": 600}, []),
        ({"max_bytes": 599}, [1]),
        ({"max_bytes": 300}, [1, 2]),
        ({"max_bytes": 0}, [1, 2, 3]),
        ({"older_than": 2.5 * 3600, "keep_current": {"torch": "1"}}, [1, 2, 3]),
        ({"digests": [CacheKey({"torch": "2"}).digest]}, [2]),
    ],
)
def test_prune_removes_what_its_rules_name(
    cache: GraphCache, three: list[CacheKey], rules: dict[str, object], gone: list[int]
) -> None:
    planned = cache.prune(**rules, dry_run=True)
    assert len(cache.entries()) == 3
    removed = cache.prune(**rules)
    assert [reason for _, reason in removed] == [reason for _, reason in planned]
    assert sorted(int(entry.fields["torch"]) for entry, _ in removed) == gone
    assert [cache.find(key) is None for key in three] == [number in gone for number in (1, 2, 3)]


def test_to_find_a_graph_is_to_use_it(cache: GraphCache, three: list[CacheKey]) -> None:
    cache.find(three[0])
    assert [entry.fields["torch"] for entry, _ in cache.prune(older_than=1800)] == ["3", "2"]


def test_prune_always_removes_what_is_broken(cache: GraphCache, three: list[CacheKey]) -> None:
    alter = cache.find(three[1])
    alter.path.write_bytes(b"y" * 200)
    ((entry, reason),) = cache.prune()
    assert entry.digest == three[1].digest and reason.startswith("broken: ")
    assert not entry.folder.exists()


def test_prune_leaves_alone_what_is_no_graph(cache: GraphCache, three: list[CacheKey]) -> None:
    (cache.folder / "notes").write_text("mine")
    cache.prune(all=True)
    assert [path.name for path in cache.folder.iterdir()] == ["notes"]
