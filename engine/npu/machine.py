"""What a machine with NPUs must have before anything can run: versions, folders, device files, read without torch."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from ... import __version__

DRIVER_VERSION = Path("/usr/local/Ascend/driver/version.info")
DEVICES = Path("/dev")
CANN_LIBRARY = "libascendcl.so"  # one of those that torch-npu is linked to
CANN_VARIABLES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")
_VERSION = re.compile(r"^\s*version\s*=\s*(\S+)", re.IGNORECASE | re.MULTILINE)
_MISSING = "not installed"


@dataclass(frozen=True)
class Fact:
    """Something about the machine, and what is wrong with it: "" if nothing is."""

    name: str
    value: str
    problem: str = ""


def machine_facts(is_simulated: bool) -> list[Fact]:
    """Nothing here needs to be right on a machine that only simulates an NPU, but for the versions of the packages."""
    facts = [
        Fact("machine", f"{platform.machine()}, {platform.system()} {platform.release()}"),
        Fact("python", platform.python_version()),
        Fact("omni-engine", __version__),
        Fact("torch", _installed("torch")),
        _torch_npu(),
        *(Fact(name, _installed(name)) for name in ("numpy", "packaging", "protobuf")),
    ]
    if is_simulated:
        return [*facts, Fact("CANN", "simulated"), Fact("devices", "simulated")]
    return [*facts, _cann(), _library(), _driver(), _device_files()]


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return _MISSING


def _torch_npu() -> Fact:
    torch, torch_npu = _installed("torch"), _installed("torch-npu")
    if torch_npu == _MISSING:
        return Fact("torch-npu", torch_npu, "pip install omni-engine[npu] in an environment of its own")
    wanted = torch_npu.split(".post")[0].split("rc")[0]
    if torch.split("+")[0] != wanted:
        return Fact("torch-npu", torch_npu, f"it needs torch {wanted}; install that, or the torch-npu of torch {torch}")
    return Fact("torch-npu", torch_npu)


def _cann() -> Fact:
    for variable in CANN_VARIABLES:
        folder = os.environ.get(variable)
        if folder:
            versions = (_version(path) for path in sorted(Path(folder).glob("**/ascend_*_install.info")))
            version = next(filter(None, versions), "version not told")
            problem = "" if Path(folder).is_dir() else f"the folder of {variable} does not exist"
            return Fact("CANN", f"{version}, {variable}={folder}", problem)
    return Fact("CANN", "not in the environment", "source the set_env.sh of the CANN toolkit in this shell")


def _library() -> Fact:
    folders = [Path(part) for part in os.environ.get("LD_LIBRARY_PATH", "").split(":") if part]
    found = [folder / CANN_LIBRARY for folder in folders if (folder / CANN_LIBRARY).exists()]
    if not found:
        return Fact(CANN_LIBRARY, "not in LD_LIBRARY_PATH", "source the set_env.sh of the CANN toolkit in this shell")
    return Fact(CANN_LIBRARY, str(found[0]))


def _driver() -> Fact:
    tool = shutil.which("npu-smi") or "no npu-smi in PATH"
    version = _version(DRIVER_VERSION)
    if not version:
        problem = "install the NPU driver, or in a container mount it from the host"
        return Fact("driver", f"none at {DRIVER_VERSION}, {tool}", problem)
    return Fact("driver", f"{version}, {tool}")


def _device_files() -> Fact:
    files = [path for path in sorted(DEVICES.glob("davinci*")) if path.name.removeprefix("davinci").isdecimal()]
    if not files:
        return Fact("devices", f"none in {DEVICES}", "no NPU, or a container that was started without --device")
    locked = [path.name for path in files if not os.access(path, os.R_OK | os.W_OK)]
    problem = f"this user may not use them, see the group of the files: {', '.join(locked)}" if locked else ""
    return Fact("devices", f"{len(files)} in {DEVICES}", problem)


def _version(path: Path) -> str:
    try:
        match = _VERSION.search(path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return ""
    return match[1] if match else ""
