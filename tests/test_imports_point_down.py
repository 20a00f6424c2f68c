"""The import rule of the six folders: arrows point down, and what the HTTP process imports is free of torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "omni_engine"
# What a folder may import beside itself: whole folders, or single modules of one.
MAY_IMPORT = {
    "server": ("engine", "scheduler", "models"),
    "engine": ("scheduler", "models", "kvcache", "ops"),
    "models": ("kvcache.spec", "ops"),
    "scheduler": ("kvcache",),
    "kvcache": (),
    "ops": (),
}
DEVICE_MODULES_OF_KVCACHE = ("kvcache.pages", "kvcache.tensors", "kvcache.transfer")  # these may import torch and ops
FROM_THE_ROOT = "__version__"  # every other name there is resolved lazily and would hide the arrow
BRINGS_TORCH = ("torch", "torch_npu", "transformers", "safetensors.torch")
TORCH_FREE_FOLDERS = ("server", "scheduler", "kvcache")
TORCH_FREE_MODULES = (
    "engine.config", "engine.inputs", "engine.outputs", "engine.errors", "engine.messages", "engine.front",
    "engine.input_processor", "engine.output_processor", "engine.core_client", "engine.async_engine",
    "engine.pooling.choice", "engine.pooling.input", "engine.pooling.outputs", "engine.pooling.state",
    "engine.pooling.scoring",
    "models.config", "models.config_parser", "models.registry", "models.tokenizer", "models.detokenizer",
    "models.chat_template", "models.checkpoint", "models.parallel", "models.pooling_config",
    "models.speculation",
)  # fmt: skip


class Import(NamedTuple):
    """One imported name: `target` is dotted, without the package's own name where it is `internal`."""

    target: str
    internal: bool
    line: int


def read_sources() -> dict[str, str]:
    """Source text by module name, e.g. engine.core; a folder's __init__ has the folder's name."""
    sources = {}
    for folder in MAY_IMPORT:
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            sources[".".join(part for part in parts if part != "__init__")] = file.read_text(encoding="utf-8")
    return sources


def is_package(module: str) -> bool:
    return (ROOT / module.replace(".", "/") / "__init__.py").is_file()


def imports_of(module: str, nodes: Iterator[ast.AST]) -> Iterator[Import]:
    """Every name that the import statements among `nodes` bring into `module`."""
    folder = module.split(".") if is_package(module) else module.split(".")[:-1]
    for node in nodes:
        if isinstance(node, ast.Import):
            for name in node.names:
                yield absolute(name.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            above = folder[: len(folder) - node.level + 1] if node.level else []
            start = ".".join([*above, *filter(None, [node.module])])
            for name in node.names:
                target = f"{start}.{name.name}".lstrip(".")
                yield Import(target, True, node.lineno) if node.level else absolute(target, node.lineno)


def absolute(target: str, line: int) -> Import:
    inside = target.split(".")[0] == PACKAGE
    return Import(target.removeprefix(PACKAGE).lstrip(".") if inside else target, inside, line)


def at_import_time(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: not those of functions, nor those for type checkers only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in node.orelse:
                yield other
                yield from at_import_time(other)
            continue
        yield node
        yield from at_import_time(node)


def begins_with(target: str, names: tuple[str, ...]) -> bool:
    return any(target == name or target.startswith(f"{name}.") for name in names)


def arrows_up(sources: Mapping[str, str]) -> list[str]:
    """The imports that break the rule, wherever they stand in a module."""
    wrong = []
    for module, source in sources.items():
        folder = module.split(".")[0]
        allowed = (folder, *MAY_IMPORT[folder], FROM_THE_ROOT)
        if begins_with(module, DEVICE_MODULES_OF_KVCACHE):
            allowed += ("ops",)
        wrong += [
            f"{module}:{found.line} imports {found.target}"
            for found in imports_of(module, ast.walk(ast.parse(source)))
            if found.internal and not begins_with(found.target, allowed)
        ]
    return wrong


def ways_to_torch(sources: Mapping[str, str], starts: list[str]) -> list[str]:
    """The chains of imports that bring torch in when one of `starts` is imported."""
    wrong = []
    chains = [(start,) for start in starts]
    seen = set(starts)
    while chains:
        chain = chains.pop()
        for found in imports_of(chain[-1], at_import_time(ast.parse(sources[chain[-1]]))):
            if not found.internal and begins_with(found.target, BRINGS_TORCH):
                wrong.append(f"{' -> '.join(chain)}:{found.line} imports {found.target}")
            elif found.internal:
                parts = found.target.split(".")
                # a module's folders are imported with it; the last part may be a module or a name in one
                for length in range(1, len(parts) + 1):
                    module = ".".join(parts[:length])
                    if module in sources and module not in seen:
                        seen.add(module)
                        chains.append((*chain, module))
    return wrong


def torch_free(sources: Mapping[str, str]) -> list[str]:
    of_folders = [
        module for module in sources
        if module.split(".")[0] in TORCH_FREE_FOLDERS and not begins_with(module, DEVICE_MODULES_OF_KVCACHE)
    ]  # fmt: skip
    return [*of_folders, *TORCH_FREE_MODULES]


def test_imports_point_down() -> None:
    assert arrows_up(read_sources()) == []


def test_every_module_of_the_six_folders_is_read() -> None:
    sources = read_sources()
    assert {module.split(".")[0] for module in sources} == set(MAY_IMPORT)
    assert set(TORCH_FREE_MODULES) <= set(sources)
    assert {"kvcache.tensors", "models.layers.attention", "models.config_parsers"} <= set(sources)


@pytest.mark.parametrize(
    ("module", "source", "target"),
    [
        ("ops.norm", "from ..engine.config import EngineArgs", "engine.config.EngineArgs"),
        ("ops.norm", "import omni_engine.models.config", "models.config"),
        ("kvcache.manager", "from ..ops import attention", "ops.attention"),
        ("kvcache.tensors", "from ..models.config import ModelConfig", "models.config.ModelConfig"),
        ("scheduler.plan", "from omni_engine.engine import core", "engine.core"),
        ("scheduler.plan", "def late():\n    from ..models import config", "models.config"),
        ("models.layers.norm", "from ...kvcache.manager import KVCacheManager", "kvcache.manager.KVCacheManager"),
        ("models.config", "from .. import Engine", "Engine"),
        ("models.config_parsers", "from ...server import app", "server.app"),
        ("engine.core", "if TYPE_CHECKING:\n    from ..server import app", "server.app"),
        ("server.app", "from ..kvcache.spec import KVPart", "kvcache.spec.KVPart"),
    ],
)  # fmt: skip
def test_an_arrow_that_points_up_is_reported(module: str, source: str, target: str) -> None:
    wrong = arrows_up({module: source})
    assert len(wrong) == 1 and wrong[0].startswith(f"{module}:") and wrong[0].endswith(f"imports {target}")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("server.app", "from .. import __version__\nfrom .errors import error_response\nimport json"),
        ("kvcache.tensors", "from ..ops.attention import gather_blocks"),
        ("models.layers.norm", "from ...kvcache.spec import KVPart\nfrom ...ops import norm\nfrom ..config import X"),
        ("models.config_parsers", "from .reader import ConfigReader"),
    ],
)
def test_an_arrow_that_points_down_is_not(module: str, source: str) -> None:
    assert arrows_up({module: source}) == []


def test_torch_free_modules_import_no_torch() -> None:
    sources = read_sources()
    assert ways_to_torch(sources, torch_free(sources)) == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch",
        "import torch.nn.functional as f",
        "from torch import nn",
        "from safetensors.torch import load_file",
        "try:\n    import torch\nexcept ImportError:\n    pass",
        "class Holder:\n    import torch",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    pass\nelse:\n    import torch",
    ],
)
def test_a_way_to_torch_is_reported_with_its_chain(source: str) -> None:
    sources = {"server.app": "from ..engine.front import Front", "engine.front": source}
    wrong = ways_to_torch(sources, ["server.app"])
    assert len(wrong) == 1 and wrong[0].startswith("server.app -> engine.front:")


def test_torch_in_functions_and_for_type_checkers_is_none() -> None:
    source = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\ndef late():\n    import torch\n"
    assert ways_to_torch({"server.app": source}, ["server.app"]) == []


@pytest.mark.parametrize(
    ("module", "has_torch"),
    [("server.cli", False), ("server.app", False), ("engine.async_engine", False), ("engine.core", True)],
)
def test_of_both_processes_only_the_core_imports_torch(module: str, has_torch: bool) -> None:
    code = f"import sys, {PACKAGE}.{module}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(has_torch)
