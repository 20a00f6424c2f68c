"""Builds the C++ kernels at first use, keeps the library in the user's cache, and loads it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from ..cache_folder import CacheFolderError, cache_root, private_folder
from ..file_lock import file_lock
from .child import run_child

logger = logging.getLogger("omni_engine")

SOURCES = Path(__file__).parent / "csrc"
LIBRARY, MANIFEST = "libomni_cpu.so", "manifest.json"
USING_TORCH = ("binding", "package")
VARIABLE = "OMNI_ENGINE_CPU_KERNELS"
OFF = ("0", "off", "false", "no")
COMPILE_SECONDS = 600

COMMON_FLAGS = ("-std=c++20", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno", "-Wall")
PORTABLE = "portable"  # 16-byte vectors: NEON on arm64, SSE2 on x86-64; any other machine as its compiler can
# Instruction sets in order of preference, with the features of an x86-64 CPU that each needs.
_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq", *_AVX2)
_AVX512_BF16 = (*_AVX512, "avx512_bf16")
_AMX = ("amx_tile", "amx_bf16")
FEATURES = {"amx": (*_AVX512_BF16, *_AMX), "avx512_bf16": _AVX512_BF16, "avx512": _AVX512, "avx2": _AVX2}


def _flag(feature: str) -> str:
    return f"-m{feature.replace('_', '-' if feature in _AMX else '')}"


FORM_FLAGS = {PORTABLE: (), **{form: tuple(map(_flag, needed)) for form, needed in FEATURES.items()}}


class KernelsUnavailable(Exception):
    """There are no C++ kernels here: the cause, and what to change. The plain torch bodies do the same work."""


@dataclass(frozen=True)
class Loaded:
    """The library in this process."""

    form: str
    path: Path


_lock = threading.Lock()
_loaded: Loaded | None = None
_refusal: KernelsUnavailable | None = None


def load_kernels(*, low_priority: bool = False) -> None:
    """Loads the operators `omni::…`, building them first where the cache has none. Later calls return at once.

    `low_priority`: somebody else's work goes before the compilers'. Raises KernelsUnavailable, the same on every call,
    if they are switched off, or cannot be built or loaded.
    """
    global _loaded, _refusal
    with _lock:
        if _refusal is not None:
            raise _refusal
        if _loaded is None:
            try:
                _loaded = _load(chosen_form(), low_priority)
            except KernelsUnavailable as error:
                _refusal = error
            if _refusal is not None:
                raise _refusal


def available() -> bool:
    """Whether `load_kernels` succeeds; it is called."""
    try:
        load_kernels()
    except KernelsUnavailable:
        return False
    return True


def is_built() -> bool:
    """Whether `load_kernels` would find the library and build nothing."""
    try:
        folder = library_folder(find_compiler(), chosen_form())
    except (KernelsUnavailable, OSError):
        return False
    return is_whole(folder)


def loaded() -> Loaded:
    """The library in this process, loaded if it was not yet. Raises KernelsUnavailable."""
    load_kernels()
    assert _loaded is not None
    return _loaded


def describe() -> str:
    """One line: the instruction set and the library's path, or why there are no kernels."""
    try:
        return f"{loaded().form} ({loaded().path})"
    except KernelsUnavailable as error:
        return f"none: {error}"


def chosen_form() -> str:
    """The instruction set to build for: what OMNI_ENGINE_CPU_KERNELS says, else the best that this CPU has."""
    wanted = os.environ.get(VARIABLE, "").strip().lower()
    if wanted in OFF:
        raise KernelsUnavailable(f"the C++ kernels are switched off; unset {VARIABLE} to use them: {wanted}")
    possible = possible_forms()
    if not wanted or wanted in ("1", "on", "auto"):
        return possible[0]
    if wanted not in possible:
        raise KernelsUnavailable(f"{VARIABLE} must be 0, or one of {', '.join(possible)} on this CPU: {wanted}")
    return wanted


def possible_forms() -> list[str]:
    """The instruction sets that this CPU can run, best first."""
    features = cpu_features()
    if features.issuperset(_AMX) and not may_use_tiles():
        features = features.difference(_AMX)
    return [*(form for form, needed in FEATURES.items() if features.issuperset(needed)), PORTABLE]


@functools.cache
def may_use_tiles() -> bool:
    """Asks Linux for the registers of the matrix unit, which are large and given to a process on request only."""
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    try:
        return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0
    except (OSError, AttributeError):
        return False


def cpu_features() -> frozenset[str]:
    """The features of the CPU as Linux names them on x86-64; none elsewhere."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return frozenset()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    except OSError:
        pass
    return frozenset()


def find_compiler() -> list[str]:
    """The command of a C++ compiler: $CXX, else g++, c++ or clang++ on the path."""
    named = os.environ.get("CXX", "").strip()
    for candidate in [named] if named else ["g++", "c++", "clang++"]:
        command = shlex.split(candidate)
        found = shutil.which(command[0])
        if found:
            return [found, *command[1:]]
    if named:
        raise KernelsUnavailable(f"$CXX names no program; unset it or name a C++20 compiler: {named}")
    raise KernelsUnavailable(
        "no C++ compiler to build the CPU kernels with; install g++ 11 or later (or name one in $CXX), "
        "or go on with the slower torch operators: looked for g++, c++, clang++"
    )


def units(form: str) -> dict[str, tuple[str, list[str]]]:
    """What is compiled on its own, the slowest first: name -> (source text, flags).

    The files that see torch are one unit, because reading its headers takes longer than all kernels together; they do
    no arithmetic, so they are the same for every form.
    """
    include = Path(torch.__file__).parent / "include"
    headers = [f"-isystem{include}", f"-isystem{include / 'torch/csrc/api/include'}"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    sources = sorted(SOURCES.glob("*.cpp"))
    of_torch = "".join(f'#include "{source.name}"\n' for source in sources if source.stem in USING_TORCH)
    of_form = [*COMMON_FLAGS, *FORM_FLAGS[form], "-O3"]
    result = {"torch": (of_torch, [*COMMON_FLAGS, abi, *headers, "-O1"])} if of_torch else {}
    for source in sources:
        if source.stem not in USING_TORCH:
            result[source.stem] = (f'#include "{source.name}"\n', of_form)
    return result


@functools.cache
def compiler_version(compiler: tuple[str, ...]) -> str:
    """What the compiler says of itself; asked once, as a process is started for it."""
    try:
        return subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise KernelsUnavailable(f"the C++ compiler does not run; name another in $CXX: {error}") from error


def build_key(compiler: list[str], form: str) -> str:
    """Everything that a library depends on, as one name: sources, compiler, flags, CPU features, torch."""
    version = compiler_version(tuple(compiler))
    facts = [compiler, version, form, platform.machine(), sorted(cpu_features()), torch.__version__, torch.__file__]
    facts += [units(form)]
    facts += [[file.name, hash_of(file)] for file in sorted(SOURCES.iterdir()) if file.suffix in (".cpp", ".h")]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def hash_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def is_whole(folder: Path) -> bool:
    """Whether the folder holds a library with the digest that its manifest names."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return isinstance(manifest, dict) and manifest.get("sha256") == hash_of(folder / LIBRARY)
    except (OSError, ValueError):
        return False


def library_folder(compiler: list[str], form: str) -> Path:
    """Where the library belongs that `compiler` builds for `form`."""
    return cache_root() / "kernels" / build_key(compiler, form)


def built_library(form: str, low_priority: bool = False) -> Path:
    """The path of the library for `form`, built where the cache lacks it or holds a damaged one."""
    compiler = find_compiler()
    folder = library_folder(compiler, form)
    try:
        for path in (folder.parent.parent, folder.parent, folder):
            private_folder(path)
        if not is_whole(folder):  # without the lock, so that a cache on a read-only disk is as good
            with file_lock(folder / "lock"):
                if not is_whole(folder):
                    build(compiler, form, folder, low_priority)
    except CacheFolderError as error:
        raise KernelsUnavailable(str(error)) from error
    except OSError as error:
        raise KernelsUnavailable(
            f"the CPU kernels cannot be kept ({error.strerror or error}); set OMNI_ENGINE_CACHE to a folder with room "
            f"that this user may write to: {folder}"
        ) from error
    return folder / LIBRARY


def build(compiler: list[str], form: str, folder: Path, low_priority: bool = False) -> None:
    """Compiles all sources into `folder`, where they appear at once or not at all. The caller holds the lock."""
    logger.info("Building the CPU kernels (%s) with %s; this takes about half a minute, once.", form, compiler[0])
    start = time.monotonic()
    for left in folder.glob("build-*"):  # by a builder that was killed
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as name:
        work = Path(name)
        commands, objects = [], []
        for unit, (text, flags) in units(form).items():
            source = work / f"unit_{unit}.cpp"
            source.write_text(text, encoding="utf-8")
            objects.append(f"{work / unit}.o")
            commands.append([*compiler, *flags, f"-I{SOURCES}", "-c", str(source), "-o", objects[-1]])
        with ThreadPoolExecutor(max(len(os.sched_getaffinity(0)), 1)) as pool:
            list(pool.map(lambda command: run_compiler(command, work, low_priority), commands))
        libraries = Path(torch.__file__).parent / "lib"
        run_compiler(
            [*compiler, "-shared", *objects, f"-L{libraries}", "-ltorch_cpu", "-lc10", "-o", str(work / LIBRARY)],
            work,
            low_priority,
        )
        manifest = {"sha256": hash_of(work / LIBRARY), "form": form, "torch": torch.__version__}
        (work / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
        os.replace(work / LIBRARY, folder / LIBRARY)
        os.replace(work / MANIFEST, folder / MANIFEST)
    logger.info("Built the CPU kernels in %.0f s: %s", time.monotonic() - start, folder / LIBRARY)


def run_compiler(command: list[str], scratch: Path, low_priority: bool = False) -> None:
    try:
        done = run_child(command, timeout=COMPILE_SECONDS, scratch=scratch, low_priority=low_priority)
    except (OSError, subprocess.SubprocessError) as error:
        raise KernelsUnavailable(f"the C++ compiler does not run; name another in $CXX: {error}") from error
    if done.returncode:
        raise KernelsUnavailable(
            f"the CPU kernels do not compile with {command[0]}; name a newer compiler in $CXX "
            f"(g++ 11 or clang++ 13 at least), or set {VARIABLE}=0: {done.stderr.strip()[-2000:]}"
        )


def _load(form: str, low_priority: bool) -> Loaded:
    path = built_library(form, low_priority)
    try:
        # Global, because libraries of compiled graphs look the kernels' C entries up by name.
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise KernelsUnavailable(
            f"the CPU kernels cannot be loaded; remove {path.parent} to build them anew: {error}"
        ) from error
    return Loaded(form, path)
