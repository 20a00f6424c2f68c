"""Registering architectures: from code, and by entry point of an installed package."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from omni_engine.models import registry
from omni_engine.models.config import ModelConfig
from omni_engine.models.config_parser import parse_config
from omni_engine.models.registry import ModelRegistry, register_model, resolve, supported_architectures

RAW: dict[str, Any] = {
    "architectures": ["PenguinForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
BUILT_IN = [
    "DeepseekV2ForCausalLM",
    "DeepseekV32ForCausalLM",
    "DeepseekV3ForCausalLM",
    "GlmMoeDsaForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
]


@pytest.fixture(autouse=True)
def restored_registry() -> Iterator[None]:
    supported_architectures()  # installed plugins stay
    before = dict(registry._models)
    yield
    registry._models.clear()
    registry._models.update(before)


class Penguin:
    """A model class."""


def test_the_built_in_architectures_are_supported() -> None:
    assert set(BUILT_IN) <= set(ModelRegistry.get_supported_archs())


@pytest.mark.parametrize("architecture", BUILT_IN)
def test_a_built_in_class_and_its_parser_can_be_imported(architecture: str) -> None:
    assert resolve(architecture).load_class().__name__ == architecture
    assert callable(resolve(architecture).load_config_parser())


def test_an_architecture_may_share_the_config_of_another() -> None:
    register_model("PenguinForCausalLM", Penguin, config="LlamaForCausalLM")
    config = parse_config(RAW)
    assert config.architecture == "PenguinForCausalLM" and config.num_heads == 4
    assert resolve("PenguinForCausalLM").load_class() is Penguin


def test_a_parser_of_its_own_is_used() -> None:
    def parse(raw: Any) -> ModelConfig:
        return parse_config({**raw, "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 9})

    register_model("PenguinForCausalLM", Penguin, config=parse)
    config = parse_config(RAW)
    assert config.num_layers == 9 and config.architecture == "PenguinForCausalLM"


def test_import_paths_are_resolved_when_they_are_needed() -> None:
    register_model("PenguinForCausalLM", "no.such.module:Penguin", config="no.such.module:parse")
    with pytest.raises(ImportError, match=r"no\.such\.module:Penguin, registered for PenguinForCausalLM"):
        resolve("PenguinForCausalLM").load_class()
    with pytest.raises(ImportError, match=r"no\.such\.module:parse, registered for PenguinForCausalLM"):
        parse_config(RAW)


def test_a_built_in_class_can_be_replaced_and_keeps_its_parser(caplog: pytest.LogCaptureFixture) -> None:
    ModelRegistry.register_model("LlamaForCausalLM", Penguin)
    assert resolve("LlamaForCausalLM").load_class() is Penguin
    assert parse_config({**RAW, "architectures": ["LlamaForCausalLM"]}).num_layers == 2
    assert "the model of LlamaForCausalLM is replaced" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("", Penguin, "LlamaForCausalLM"), "an architecture is a name"),
        (("X", "penguins.Penguin", "LlamaForCausalLM"), 'package.module:Class"'),
        (("X", "penguins:", "LlamaForCausalLM"), 'package.module:Class"'),
        (("X", "os;evil:Penguin", "LlamaForCausalLM"), 'package.module:Class"'),
        (("X", Penguin, None), "needs config="),
        (("X", Penguin, "X"), "being registered"),
        (("X", Penguin, "a b:c"), "package.module:function"),
    ],
)
def test_a_registration_that_cannot_work_is_refused_at_once(arguments: tuple[Any, ...], words: str) -> None:
    architecture, model, config = arguments
    with pytest.raises(ValueError, match=words):
        register_model(architecture, model, config=config)


def test_a_parser_that_returns_something_else_is_refused() -> None:
    register_model("PenguinForCausalLM", Penguin, config=lambda raw: raw)  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match="must return a ModelConfig: dict"):
        parse_config(RAW)


def install(site: Path, name: str, source: str) -> None:
    """Installs a wheel of one module and one entry point into `site`, without building and without an index."""
    info = f"{name}-1.0.dist-info"
    files = {
        f"{name}.py": source,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": f"[omni_engine.models]\npenguin = {name}:register\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    wheel = site.parent / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
    command = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run([sys.executable, *command], check=True, capture_output=True)


def run_python(site: Path, code: str) -> subprocess.CompletedProcess[str]:
    paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_an_installed_package_adds_its_architecture(tmp_path: Path) -> None:
    install(
        tmp_path / "site",
        "penguins",
        "from omni_engine.models.registry import register_model\n"
        "class Penguin: pass\n"
        "def register():\n"
        "    print('registered')\n"
        "    register_model('PenguinForCausalLM', 'penguins:Penguin', config='LlamaForCausalLM')\n",
    )
    code = (
        "from omni_engine.models.config_parser import parse_config\n"
        "from omni_engine.models.registry import resolve, supported_architectures\n"
        f"print(parse_config({RAW!r}).architecture)\n"
        "print(resolve('PenguinForCausalLM').load_class().__module__, 'LlamaForCausalLM' in supported_architectures())"
    )
    done = run_python(tmp_path / "site", code)
    assert done.stdout.split() == ["registered", "PenguinForCausalLM", "penguins", "True"], done.stderr
    assert "PenguinForCausalLM" not in supported_architectures()  # the control: not installed here


def test_a_broken_package_is_named_at_every_lookup(tmp_path: Path) -> None:
    install(tmp_path / "site", "brokenbird", "def register():\n    raise KeyError('wing')\n")
    code = (
        "from omni_engine.models.registry import resolve\n"
        "for _ in range(2):\n"
        "    try:\n        resolve('LlamaForCausalLM')\n"
        "    except RuntimeError as error:\n        print(error)\n"
    )
    done = run_python(tmp_path / "site", code)
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and lines[0] == lines[1]
    assert "penguin = brokenbird:register of brokenbird" in lines[0] and "KeyError: 'wing'" in lines[0]
