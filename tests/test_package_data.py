"""What a wheel has of the demo models: both checkpoints whole, their card, and none of their training."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "models" / "demo"
LIMIT = 12_000_000  # bytes of a model


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """`models/demo` of the package as setuptools builds it for a wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    commands = ["egg_info", "--egg-base", str(folder), "build_py", "--build-lib", str(folder / "lib")]
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", *commands],
        cwd=ROOT,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        check=True,
        timeout=120,
    )
    return folder / "lib" / "omni_engine" / "models" / "demo"


def test_a_wheel_has_both_models_whole_and_the_card(built):
    expected = {file.relative_to(DEMO) for file in DEMO.glob("deepseek*/*")} | {Path("README.md")}
    assert len({file.parent for file in expected}) == 3
    assert {file.relative_to(built) for file in built.rglob("*") if file.is_file()} == expected


@pytest.mark.parametrize("name", ["deepseek", "deepseek-v32"])
def test_a_model_has_at_most_12_mb(built, name):
    sizes = [file.stat().st_size for file in (built / name).iterdir()]
    assert 8_000_000 < sum(sizes) <= LIMIT
