"""The modules of benchmarks/peers, which are no package."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

PEERS = Path(__file__).parents[2] / "benchmarks" / "peers"


@pytest.fixture
def peers(monkeypatch):
    """The modules of the folder, imported as its command does, and forgotten afterwards."""
    monkeypatch.syspath_prepend(str(PEERS))
    names = [path.stem for path in PEERS.glob("*.py")]
    assert not set(names) & set(sys.modules)
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names if name != "worker"})
    for name in names:
        sys.modules.pop(name, None)
