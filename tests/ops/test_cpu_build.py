"""Building, keeping and loading the C++ kernels: mostly with a small library in their place."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from omni_engine.ops.cpu import build
from omni_engine.ops.cpu.build import KernelsUnavailable
from omni_engine.ops.cpu.child import run_child

ROOT = Path(__file__).parents[2]


def has_compiler() -> bool:
    try:
        build.find_compiler()
    except KernelsUnavailable:
        return False
    return True


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler here")


@pytest.fixture
def answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The sources of a library that answers 42, in the place of the kernels', with a cache of its own."""
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "answer.h").write_text("constexpr int kAnswer = 42;\n")
    source = '#include "answer.h"\nextern "C" __attribute__((visibility("default"))) int answer() { return kAnswer; }\n'
    (sources / "answer.cpp").write_text(source)
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setattr(build, "_loaded", None)
    monkeypatch.setattr(build, "_refusal", None)
    monkeypatch.setenv("OMNI_ENGINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(build.VARIABLE, raising=False)
    return sources


def answer_of(library: Path) -> int:
    # A copy, because the loader knows files by name and would not read a replaced one again.
    copy = library.with_name(f"{time.monotonic_ns()}.so")
    copy.write_bytes(library.read_bytes())
    return ctypes.CDLL(str(copy)).answer()


@needs_compiler
def test_a_library_is_built_once(answers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = build.built_library(build.PORTABLE)
    assert answer_of(library) == 42
    assert library.parent.stat().st_mode & 0o777 == 0o700
    assert not (library.parent / "lock").exists() and not [*library.parent.glob("build-*")]
    monkeypatch.setattr(build, "build", None)
    monkeypatch.setattr(build, "file_lock", None)  # nor is anything written, so a read-only cache will do
    assert build.built_library(build.PORTABLE) == library


@needs_compiler
def test_a_changed_source_is_built_anew(answers: Path) -> None:
    first = build.built_library(build.PORTABLE)
    (answers / "answer.h").write_text("constexpr int kAnswer = 43;\n")
    second = build.built_library(build.PORTABLE)
    assert first != second and answer_of(second) == 43


@needs_compiler
@pytest.mark.parametrize("damage", ["truncated", "altered", "manifest", "no manifest", "list", "no library"])
def test_a_damaged_library_is_built_anew(answers: Path, damage: str) -> None:
    library = build.built_library(build.PORTABLE)
    content, manifest = library.read_bytes(), library.with_name(build.MANIFEST)
    if damage == "truncated":
        library.write_bytes(content[:-100])
    elif damage == "altered":
        library.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "manifest":
        manifest.write_text(json.dumps({"sha256": "0" * 64}))
    elif damage == "list":
        manifest.write_text("[]")
    else:
        (manifest if damage == "no manifest" else library).unlink()
    assert not build.is_whole(library.parent)
    assert answer_of(build.built_library(build.PORTABLE)) == 42


@needs_compiler
def test_what_a_killed_builder_left_is_removed(answers: Path) -> None:
    folder = build.library_folder(build.find_compiler(), build.PORTABLE)
    (folder / "build-killed").mkdir(parents=True, mode=0o700)
    for made in (folder, *folder.parents[:2]):
        made.chmod(0o700)
    build.built_library(build.PORTABLE)
    assert sorted(path.name for path in folder.iterdir()) == [build.LIBRARY, build.MANIFEST]


@needs_compiler
def test_of_two_processes_one_builds_and_the_other_waits(answers: Path, tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    log = tmp_path / "log"
    real = build.find_compiler()[0]
    # slow, so that the second process comes while the first one builds; both start at the same moment
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *--version*) ;; *) echo "$*" >> {log}; sleep 0.5 ;; esac\nexec {real} "$@"\n'
    )
    compiler.chmod(0o755)
    code = (
        "import pathlib, sys, time\nfrom omni_engine.ops.cpu import build\nbuild.SOURCES = pathlib.Path(sys.argv[1])\n"
        "print('ready', flush=True); sys.stdin.readline()\nprint(build.built_library(build.PORTABLE))"
    )
    command = [sys.executable, "-c", code, str(answers)]
    processes = [
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "CXX": str(compiler)}
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    paths = {process.communicate(timeout=60)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert len(paths) == 1 and answer_of(Path(paths.pop().strip())) == 42
    assert len(log.read_text().splitlines()) == 2  # one file compiled, one library linked


@pytest.mark.parametrize("low_priority", [False, True])
def test_the_compilers_of_a_killed_process_end_with_it(tmp_path: Path, low_priority: bool) -> None:
    """Those too that a compiler has started."""
    code = (
        "import pathlib, sys\nfrom omni_engine.ops.cpu.child import run_child\n"
        f"script = 'trap \"\" TERM; sleep 600 & echo $! $(nice) > {tmp_path}/started.new;' "
        f"'mv {tmp_path}/started.new {tmp_path}/started; wait'\n"
        f"run_child(['sh', '-c', script], timeout=600, scratch=pathlib.Path('{tmp_path}'), low_priority={low_priority})"
    )
    builder = subprocess.Popen([sys.executable, "-c", code])
    started = tmp_path / "started"
    wait_until(started.exists)
    pid, niceness = map(int, started.read_text().split())
    assert is_running(pid)
    assert niceness == (19 if low_priority else os.nice(0))
    builder.kill()
    builder.wait()
    wait_until(lambda: not is_running(pid))


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_a_compiler_says_and_returns_is_told(tmp_path: Path) -> None:
    script = 'echo "$TMPDIR"; echo no >&2; read line; exit 3'
    done = run_child(["sh", "-c", script], timeout=60, scratch=tmp_path, low_priority=True)
    assert (done.returncode, done.stdout, done.stderr) == (3, f"{tmp_path}\n", "no\n")
    assert run_child([str(tmp_path / "none")], timeout=60, scratch=tmp_path, low_priority=False).returncode == 127


def test_a_compiler_that_does_not_end_is_ended(tmp_path: Path) -> None:
    started = tmp_path / "started"
    script = f"sleep 600 & echo $! > {started}; wait"
    with pytest.raises(subprocess.TimeoutExpired):
        run_child(["sh", "-c", script], timeout=1, scratch=tmp_path, low_priority=False)
    pid = int(started.read_text())
    wait_until(lambda: not is_running(pid))


def refusal() -> str:
    """What `load_kernels` says, twice the same."""
    with pytest.raises(KernelsUnavailable) as first:
        build.load_kernels()
    assert not build.available() and build.describe() == f"none: {first.value}"
    with pytest.raises(KernelsUnavailable) as second:
        build.load_kernels()
    assert second.value is first.value
    return str(first.value)


def test_without_a_compiler_the_message_names_one(answers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert "install g++ 11 or later" in refusal()


def test_a_compiler_that_is_not_there_is_named(answers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/no/such/g++ -pipe")
    assert refusal() == "$CXX names no program; unset it or name a C++20 compiler: /no/such/g++ -pipe"


@needs_compiler
def test_a_source_that_does_not_compile_is_told_with_the_compilers_words(answers: Path) -> None:
    (answers / "answer.cpp").write_text("int answer() { return unknown_name; }\n")
    text = refusal()
    assert "name a newer compiler in $CXX" in text and "unknown_name" in text


@pytest.mark.parametrize("value", ["0", "off", "OFF", "false"])
def test_the_kernels_can_be_switched_off(answers: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(build.VARIABLE, value)
    assert refusal() == f"the C++ kernels are switched off; unset {build.VARIABLE} to use them: {value.lower()}"


def test_an_instruction_set_that_the_cpu_lacks_is_refused(answers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(build.VARIABLE, "avx512")
    monkeypatch.setattr(build, "cpu_features", lambda: frozenset(build.FEATURES["avx2"]))
    assert refusal() == f"{build.VARIABLE} must be 0, or one of avx2, portable on this CPU: avx512"


@pytest.mark.parametrize(
    ("features", "form"),
    [
        (build.FEATURES["amx"], "amx"),
        (build.FEATURES["avx512_bf16"], "avx512_bf16"),
        (build.FEATURES["avx512"], "avx512"),
        (build.FEATURES["avx2"], "avx2"),
        (("avx2",), "portable"),
        ((), "portable"),
    ],
)
def test_the_best_instruction_set_of_the_cpu_is_chosen(
    monkeypatch: pytest.MonkeyPatch, features: tuple[str, ...], form: str
) -> None:
    monkeypatch.delenv(build.VARIABLE, raising=False)
    monkeypatch.setattr(build, "cpu_features", lambda: frozenset(features))
    monkeypatch.setattr(build, "may_use_tiles", lambda: True)
    assert build.chosen_form() == form


def test_without_the_systems_leave_the_matrix_unit_stays_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(build.VARIABLE, raising=False)
    monkeypatch.setattr(build, "cpu_features", lambda: frozenset(build.FEATURES["amx"]))
    monkeypatch.setattr(build, "may_use_tiles", lambda: False)
    assert build.chosen_form() == "avx512_bf16"


@needs_compiler
def test_a_cache_of_another_user_is_refused(answers: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert f"belongs to user {os.getuid()}" in refusal()


@needs_compiler
def test_a_cache_that_others_may_write_to_is_refused(answers: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    assert "others may write to the cache folder" in refusal()


@needs_compiler
@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EACCES])
def test_a_cache_that_cannot_be_written_to_is_told(answers: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(build, "build", refuse)
    text = refusal()
    assert os.strerror(number) in text and "set OMNI_ENGINE_CACHE to a folder" in text


@needs_compiler
def test_a_library_that_does_not_load_is_told(answers: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(build, "built_library", lambda form, low_priority: broken)
    assert f"remove {tmp_path} to build them anew" in refusal()


needs_avx2 = pytest.mark.skipif("avx2" not in build.possible_forms(), reason="no x86-64 CPU with AVX2")


@needs_compiler
@needs_avx2
@pytest.mark.parametrize(
    ("form", "unit"),
    [
        ("amx", "prefill"),  # these two have all that the others have
        ("avx512_bf16", "mla"),
        *(
            pytest.param(form, unit, marks=pytest.mark.full)
            for form in ("amx", "avx512_bf16", "avx512")
            for unit in ("attention", "experts", "linear", "mla", "prefill")
        ),
    ],
)
def test_forms_compile_where_they_cannot_run(form: str, unit: str, tmp_path: Path) -> None:
    text, flags = build.units(form)[unit]
    source = tmp_path / "unit.cpp"
    source.write_text(text)
    # without optimisation: here it is the instructions that matter
    command = [*build.find_compiler(), *flags, "-O0", f"-I{build.SOURCES}", "-c", str(source)]
    build.run_compiler([*command, "-o", str(tmp_path / "unit.o")], tmp_path)


EMULATED = (*build.FORM_FLAGS["avx2"], "-Wno-psabi", "-include", str(Path(__file__).with_name("avx512_emulated.h")))


@needs_compiler
@pytest.mark.full
@pytest.mark.parametrize(
    ("form", "flags"),
    [
        ("portable", ()),
        pytest.param("avx2", build.FORM_FLAGS["avx2"], marks=needs_avx2),
        pytest.param("avx512_bf16", EMULATED, marks=needs_avx2),
        pytest.param("amx", (*EMULATED, "-D__AMX_BF16__=1"), marks=needs_avx2),
    ],
)
def test_every_form_equals_the_plain_bodies(form: str, flags: tuple[str, ...], tmp_path: Path) -> None:
    code = (
        "import sys, pytest\nfrom omni_engine.ops.cpu import build\n"
        f"build.FORM_FLAGS[{form!r}] = {flags!r}\nbuild.possible_forms = lambda: [{form!r}]\n"
        "result = pytest.main(['-q', '-p', 'no:cacheprovider', 'tests/ops/test_cpu_kernels.py'])\n"
        f"assert build._loaded.form == {form!r}\nsys.exit(result)"
    )
    environment = {**os.environ, "OMNI_ENGINE_CACHE": str(tmp_path), build.VARIABLE: form}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
