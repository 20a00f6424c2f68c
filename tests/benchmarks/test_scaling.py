"""benchmarks/scaling.py: which points it takes, what it reads, and that its picture shows them."""

from __future__ import annotations

import importlib
import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])  # to which the module adds
    yield importlib.import_module("scaling")
    for name in ("scaling", "bounds", "checkpoints", "workloads"):
        sys.modules.pop(name, None)


def pairs(points):
    return [(point.batch, point.context) for point in points]


def test_no_point_is_taken_twice(scaling):
    points = scaling.wanted_points([1, 8, 256], [128, 1024])
    assert pairs(points) == [(1, 128), (8, 128), (256, 128), (1, 1024), (8, 1024)]


def test_a_point_needs_the_blocks_of_all_its_requests_to_their_last_token(scaling):
    assert scaling.Point(8, 128).num_blocks(1) == 8 * 9
    assert scaling.Point(8, 127).num_blocks(1) == 8 * 8


def test_the_picture_is_one_svg_with_a_line_for_every_series(scaling):
    points = scaling.wanted_points([1, 8, 256], [128, 1024])
    for point in points:
        point.bound_ms, point.token_ms, point.host_us = 2.0, [4.0, 5.0, 3.0], [100.0]
    svg = ElementTree.fromstring(scaling.picture(points, 128))
    lines = svg.findall(".//{http://www.w3.org/2000/svg}polyline")
    assert [len(line.attrib["points"].split()) for line in lines] == [3, 3, 3, 2, 2, 2, 2, 2, 2]
    assert "| 256 | 128 | 4.00 (3.00 to 5.00) | 2.00 | 50% | 100 |" in scaling.table(points)


@pytest.mark.full  # it compiles graphs
def test_a_run_measures_every_point_over_blocks_that_it_has_written(scaling, monkeypatch, tmp_path, capsys):
    tiny = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    tiny |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
    monkeypatch.setitem(scaling.SHAPES, scaling.MODEL, ("llama", 1e4, tiny))
    missing = []

    def look(core, timed, point, steps, measure=scaling.measure):
        parts = [part for parts in timed.graphs.caches for part in parts]
        for part in parts:
            part.fill_(float("nan"))
        measure(core, timed, point, steps)
        written = min(int((~part.flatten(1).isnan().any(1)).sum()) for part in parts)
        missing.append(point.batch * (point.context // scaling.BLOCK_SIZE) - written)

    monkeypatch.setattr(scaling, "measure", look)
    words = ["--batch-sizes", "1", "2", "--contexts", "32", "64", "--rounds", "2", "--steps", "2"]
    monkeypatch.setattr(sys, "argv", ["scaling", "--output", str(tmp_path / "scaling.svg"), *words])
    scaling.main()
    saved = json.loads((tmp_path / "scaling.json").read_text())
    assert pairs(scaling.wanted_points([1, 2], [32, 64])) == [(p["batch"], p["context"]) for p in saved["points"]]
    assert all(len(p["token_ms"]) == len(p["host_us"]) == 2 and min(p["token_ms"]) > 0 for p in saved["points"])
    assert "| 8 | 64 |" in capsys.readouterr().out
    assert (tmp_path / "scaling.svg").read_text().startswith("<svg")
    assert len(missing) == 2 * 5 and max(missing) <= 0
