"""torch-npu and TorchAir as shipped, on a machine without an NPU: skips where torch-npu or gcc is missing."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parent


def load_module(name: str) -> ModuleType:
    """A module that lies beside the tests, which are in no package."""
    full_name = f"npu_tests_{name}"
    if full_name not in sys.modules:
        specification = importlib.util.spec_from_file_location(full_name, next(FOLDER.rglob(f"{name}.py")))
        assert specification is not None and specification.loader is not None
        module = importlib.util.module_from_spec(specification)
        sys.modules[full_name] = module
        specification.loader.exec_module(module)
    return sys.modules[full_name]


@functools.cache
def loaded() -> ctypes.CDLL | str:
    """The C side of the simulator, built once per machine and loaded before torch-npu is imported; or why not."""
    from omni_engine.ops.npu.simulator import build

    try:
        return build.load()
    except build.SimulatorUnavailable as reason:
        return str(reason)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite-golden", action="store_true", help="write the histograms of nodes anew")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Here and not in a fixture, so that the report has one line for all."""
    if isinstance(reason := loaded(), str):
        pytest.skip(reason)


@pytest.fixture(scope="session")
def simulator() -> ctypes.CDLL:
    simulator = loaded()
    assert not isinstance(simulator, str)
    return simulator


@pytest.fixture(scope="session")
def graphs(simulator) -> ModuleType:
    """`graphs.lower(function, *arguments)`, with the NPU library loaded for the simulated device."""
    import torch

    from omni_engine.ops.npu import library
    from omni_engine.ops.npu.simulator import graphs as module

    library.load(torch.device("npu:0"))
    return module


@pytest.fixture(scope="session")
def references(graphs) -> ModuleType:
    """CPU kernels of torch-npu's operators, written from their documentation and registered."""
    import torch

    from omni_engine.ops.npu import library

    library.load(torch.device("cpu"))
    return load_module("references")


@pytest.fixture
def trace(simulator):
    """`trace()`: the names of what ran on the device since the last call."""
    import torch

    def names() -> list[str]:
        torch.npu.synchronize()
        found = []
        while name := simulator.npu_simulator_trace(len(found)):
            found.append(name.decode())
        simulator.npu_simulator_clear()
        return found

    names()
    return names
