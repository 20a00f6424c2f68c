"""Builds the libraries that stand where CANN's would, so that the shipped torch-npu can be imported without them.

torch-npu links against CANN by unversioned function names only, so a function of the right name is enough for each:
those that only have to succeed are generated from the installed wheel's symbol tables, those that must return something
are in runtime.c. All code is in one library. Beside it lies one empty library per name that the wheel asks for; a
library that is loaded already is found by that name, so loading them first needs no LD_LIBRARY_PATH.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from ...cache_folder import cache_root, private_folder
from ...file_lock import file_lock

RUNTIME = Path(__file__).with_name("runtime.c")
LIBRARY = "libnpusimulator.so"
# What torch-npu and TorchAir are linked to, and what they load by name once an op runs.
CANN_LIBRARIES = (
    "libhccl.so", "libascendcl.so", "libacl_op_compiler.so", "libge_runner.so", "libgraph.so", "libacl_tdt_channel.so",
    "libfmk_parser.so", "libascend_protobuf.so", "libopapi.so", "libnnopbase.so",
)  # fmt: skip
COMPILE_SECONDS = 120
# Looked up by name and not linked, and torch-npu does not go on without them.
LOOKED_UP = (
    "HcclCommDestroy", "aclSetCompileopt", "aclmdlRIDestroy", "aclrtDestroyStreamForce", "aclrtSetDeviceSatMode",
    "aclrtSetOpExecuteTimeOut", "aclrtSetOpWaitTimeout",
)  # fmt: skip
# Likewise, and noted when they are called.
COLLECTIVES = (
    "HcclAllGather", "HcclAllReduce", "HcclAlltoAll", "HcclAlltoAllV", "HcclBatchSendRecv", "HcclBroadcast", "HcclRecv",
    "HcclReduce", "HcclReduceScatter", "HcclScatter", "HcclSend",
)  # fmt: skip
# Of every op that goes through aclnn: `aclnnX` runs it, `aclnnXGetWorkspaceSize` prepares it.
ACLNN_NAME = re.compile(rb"(?<![\w])aclnn[A-Z]\w+(?=\0)")
WORKSPACE = "GetWorkspaceSize"
ACL_VALUES = ("Tensor", "TensorList", "IntArray", "FloatArray", "BoolArray", "Scalar", "ScalarList")


class SimulatorUnavailable(Exception):
    """Why there can be no simulator here."""


def site_packages() -> Path:
    """The folder of the installed torch and torch-npu. Raises SimulatorUnavailable."""
    specification = importlib.util.find_spec("torch_npu")
    if specification is None or specification.origin is None:
        raise SimulatorUnavailable("torch-npu is not installed in this environment")
    return Path(specification.origin).parents[1]


def tool(name: str) -> str:
    """The path of a program. Raises SimulatorUnavailable."""
    found = shutil.which(name)
    if found is None:
        raise SimulatorUnavailable(f"the NPU simulator is built with {name}, which is not installed")
    return found


def run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=COMPILE_SECONDS)
    if done.returncode:
        raise SimulatorUnavailable(f"building the NPU simulator failed: {done.stderr.strip()[-2000:]}")
    return done.stdout


def symbols(files: list[Path], kind: str) -> set[str]:
    """Dynamic symbols of shared libraries: kind `undefined` or `defined`. Versioned ones (libc's and the compiler's)
    keep their @VERSION, so that they can be told apart."""
    listing = run(tool("nm"), "-D", f"--{kind}-only", "--no-sort", *files)
    return {line.split()[-1] for line in listing.splitlines() if len(line.split()) >= 2 and not line.endswith(":")}


def missing_functions(packages: Path) -> set[str]:
    """What torch-npu's libraries need and neither torch nor they themselves nor Python have."""
    own = sorted((packages / "torch_npu").rglob("*.so"))
    needed = {name for name in symbols(own, "undefined") if "@" not in name and not name.startswith(("Py", "_Py"))}
    have = symbols([*own, *sorted((packages / "torch" / "lib").glob("*.so"))], "defined")
    system = {"__tls_get_addr", "__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}
    return needed - {name.split("@")[0] for name in have} - system


def aclnn_names(packages: Path) -> set[str]:
    """The ops that torch-npu looks up by name when they run, without their workspace functions."""
    text = (packages / "torch_npu" / "lib" / "libtorch_npu.so").read_bytes()
    names = {name.decode() for name in ACLNN_NAME.findall(text)}
    return {name.removesuffix(WORKSPACE) for name in names}


def generated_source(missing: set[str], aclnn: set[str]) -> str:
    """C code of every function that only has to be there and to succeed."""
    lines = ["void *npu_simulator_handle(void);", "void npu_simulator_record(const char *);"]
    lines += [f"long {name}(void) {{ return 0; }}" for name in sorted(missing)]
    for name in sorted(aclnn):
        lines.append(f"int {name}{WORKSPACE}(void) {{ return 0; }}")
    for name in (*sorted(aclnn), *COLLECTIVES):
        lines.append(f'int {name}(void) {{ npu_simulator_record("{name}"); return 0; }}')
    for value in ACL_VALUES:
        lines.append(f"void *aclCreate{value}(void) {{ return npu_simulator_handle(); }}")
        lines.append(f"int aclDestroy{value}(void) {{ return 0; }}")
    return "\n".join(lines) + "\n"


def build(folder: Path, packages: Path) -> None:
    """Compiles the simulator for the wheel in `packages` into `folder`."""
    compiler = [tool("gcc"), "-w", "-fPIC", "-O1"]
    with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as name:
        work = Path(name)
        run(*compiler, "-c", RUNTIME, "-o", work / "runtime.o")
        written = {line.split()[-1] for line in run(tool("nm"), "--defined-only", work / "runtime.o").splitlines()}
        source = work / "generated.c"
        source.write_text(
            generated_source(
                (missing_functions(packages) | {*LOOKED_UP}) - {*COLLECTIVES} - written, aclnn_names(packages) - written
            )
        )
        whole = work / LIBRARY
        run(*compiler, "-shared", f"-Wl,-soname,{LIBRARY}", work / "runtime.o", source, "-o", whole)
        for library in CANN_LIBRARIES:
            run(
                *compiler, "-shared", f"-Wl,-soname,{library}", "-Wl,--no-as-needed", "-Wl,-rpath,$ORIGIN",
                whole, "-o", work / library,
            )  # fmt: skip
        for library in (*CANN_LIBRARIES, LIBRARY):  # the one that says that all are there comes last
            os.replace(work / library, folder / library)


def built_folder() -> Path:
    """The folder of the built libraries, built where the cache lacks them. Raises SimulatorUnavailable."""
    packages = site_packages()
    for needed in ("gcc", "nm"):
        tool(needed)
    facts = [importlib.metadata.version(name) for name in ("torch", "torch-npu")] + [sys.version, str(packages)]
    key = hashlib.sha256("\0".join(facts).encode() + RUNTIME.read_bytes() + Path(__file__).read_bytes()).hexdigest()
    folder = cache_root() / "npu-simulator" / key[:32]
    for path in (folder.parent.parent, folder.parent, folder):
        private_folder(path)
    with file_lock(folder / "lock", timeout=COMPILE_SECONDS):
        if not (folder / LIBRARY).exists():
            build(folder, packages)
    return folder


def load() -> ctypes.CDLL:
    """Loads the simulator under CANN's names; torch-npu can be imported from now on. Raises SimulatorUnavailable."""
    folder = built_folder()
    simulator = ctypes.CDLL(str(folder / LIBRARY), mode=ctypes.RTLD_GLOBAL)
    for library in CANN_LIBRARIES:
        ctypes.CDLL(str(folder / library), mode=ctypes.RTLD_GLOBAL)
    simulator.npu_simulator_trace.restype = ctypes.c_char_p
    return simulator
