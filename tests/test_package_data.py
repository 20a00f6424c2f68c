"""What a wheel and an sdist have beside the modules: demo models, sources of kernels and simulated NPU, the page."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "models" / "demo"
SIMULATOR = ROOT / "ops" / "npu" / "simulator" / "runtime.c"
SOURCES = ROOT / "ops" / "cpu" / "csrc"
PAGE = ROOT / "server" / "ui" / "static"
LIMIT = 12_000_000  # bytes of a model


@pytest.fixture(scope="module")
def packaged(tmp_path_factory) -> Path:
    """A folder with `lib`, the package as setuptools builds it for a wheel, and `dist`, the sdist."""
    folder = tmp_path_factory.mktemp("wheel")
    commands = ["egg_info", "--egg-base", str(folder), "build_py", "--build-lib", str(folder / "lib")]
    commands += ["sdist", "--formats", "tar", "--dist-dir", str(folder / "dist")]
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", *commands],
        cwd=ROOT,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        check=True,
        timeout=120,
    )
    return folder


@pytest.fixture(scope="module")
def built(packaged) -> Path:
    """`models/demo` of the wheel."""
    return packaged / "lib" / "omni_engine" / "models" / "demo"


def test_a_wheel_has_both_models_whole_and_the_card(built):
    expected = {file.relative_to(DEMO) for file in DEMO.glob("deepseek*/*")} | {Path("README.md")}
    assert len({file.parent for file in expected}) == 3
    assert {file.relative_to(built) for file in built.rglob("*") if file.is_file()} == expected


@pytest.mark.parametrize("name", ["deepseek", "deepseek-v32"])
def test_a_model_has_at_most_12_mb(built, name):
    sizes = [file.stat().st_size for file in (built / name).iterdir()]
    assert 8_000_000 < sum(sizes) <= LIMIT


def test_a_wheel_has_the_source_of_the_simulated_npu(packaged):
    assert (packaged / "lib/omni_engine/ops/npu/simulator/runtime.c").read_bytes() == SIMULATOR.read_bytes()


@pytest.mark.parametrize(
    ("folder", "some"), [(SOURCES, {"binding.cpp", "tiles.h"}), (PAGE, {"index.html", "style.css", "chat.js"})]
)
def test_wheel_and_sdist_have_the_sources_of_the_kernels_and_the_page(packaged, folder, some):
    names = {file.name for file in folder.iterdir()}
    assert some < names
    place = folder.relative_to(ROOT)
    assert {file.name for file in (packaged / "lib/omni_engine" / place).iterdir()} == names
    (archive,) = (packaged / "dist").iterdir()
    with tarfile.open(archive) as tar:
        listed = [member.name for member in tar.getmembers() if member.isfile()]
    assert {Path(name).name for name in listed if f"/{place}/" in name} == names
