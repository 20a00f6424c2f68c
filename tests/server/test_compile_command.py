"""`omni-engine compile`: its arguments, what it prints, its exit status; the compiling itself is a fake's."""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import pytest

from omni_engine.engine.config import EngineArgs
from omni_engine.server.cli import main


class Key(NamedTuple):
    num_requests: int
    tokens_per_request: int
    sampler: str


DONE = SimpleNamespace(key=Key(8, 1, "greedy"), from_cache=False, seconds=2.5, num_bytes=1536, error=None)
THERE = SimpleNamespace(key=Key(16, 1, "greedy"), from_cache=True, seconds=0.01, num_bytes=1536, error=None)
FAILED = SimpleNamespace(key=Key(16, 1, "split"), from_cache=False, seconds=1.0, num_bytes=0, error="no\x1bpe")


@pytest.fixture
def compiling(monkeypatch):
    """Answers of `compile_missing`, and the arguments that it got."""
    fake = SimpleNamespace(answers=[DONE, THERE], args=[])

    def compile_missing(args, on_progress):
        fake.args.append(args)
        for number, graph in enumerate(fake.answers):
            on_progress(number, len(fake.answers), str(graph.key))
        on_progress(len(fake.answers), len(fake.answers), "")
        return fake.answers

    module = ModuleType("omni_engine.engine.graphs.compile")
    module.compile_missing = compile_missing
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return fake


def test_engine_flags_are_those_of_serve(compiling, capsys):
    assert main(["compile", "m", "--dtype", "float32", "--max_num_seqs", "8", "--disable-tqdm"]) == 0
    assert compiling.args == [EngineArgs(model="m", dtype="float32", max_num_seqs=8)]


def test_the_table_says_what_became_of_each_graph(compiling, capsys):
    assert main(["compile", "m"]) == 0
    output, errors = capsys.readouterr()
    head, *rows, total = output.splitlines()
    assert head.split() == ["gear", "sampler", "status", "seconds", "size"]
    assert [row.split() for row in rows] == [
        ["8", "x", "1", "greedy", "compiled", "2.5", "1.5", "KiB"],
        ["16", "x", "1", "greedy", "was", "there", "0.0", "1.5", "KiB"],
    ]
    assert total.startswith("2 graphs in ")
    assert "2/2" in errors  # the bar


def test_a_graph_that_cannot_be_compiled_fails_the_command(compiling, capsys):
    compiling.answers = [DONE, FAILED]
    assert main(["compile", "m", "--disable-tqdm"]) == 1
    output, errors = capsys.readouterr()
    assert "failed: no?pe" in output
    assert errors.startswith("omni-engine compile: error: 1 of 2 graphs cannot be compiled") and errors.count("\n") == 1


def test_json_has_a_record_per_graph(compiling, capsys):
    compiling.answers = [DONE, FAILED]
    assert main(["compile", "m", "--json", "--disable-tqdm"]) == 1
    records = json.loads(capsys.readouterr().out)
    assert [(record["num_requests"], record["error"]) for record in records] == [(8, None), (16, "no\x1bpe")]
    assert records[0] == {
        "num_requests": 8, "tokens_per_request": 1, "sampler": "greedy",
        "from_cache": False, "seconds": 2.5, "bytes": 1536, "error": None,
    }  # fmt: skip
