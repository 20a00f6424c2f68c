"""The Grafana dashboard asks for metrics and labels that the server has."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from omni_engine.engine.metrics import EngineMetrics
from omni_engine.scheduler.draft_stats import DraftStats
from omni_engine.scheduler.scheduler import SchedulerStats

DASHBOARD = Path(__file__).parents[2] / "examples" / "grafana" / "omni-engine.json"


def expressions():
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


def samples(text):
    """The labels of each sample by its name."""
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


@pytest.fixture
def served(serve):
    """What /metrics shows after a request: label names by the name of a sample."""
    found = {}

    async def scenario(client, engine):
        metrics = EngineMetrics(engine.metrics_registry, "m", 4096, {"block_size": 16}, num_drafts=2)
        drafts = DraftStats(1, 2, 1, [1, 0])
        metrics.take((), SchedulerStats(0, 0, 0, 0.0, 0, 0, 0, drafts))
        await client.get("/v1/models")
        async with client.session.get(client.address + "/metrics") as response:
            found.update(samples(await response.text()))

    serve(scenario)
    return found


def test_every_metric_of_the_dashboard_is_served(served):
    asked = {name for text in expressions() for name in re.findall(r"\b(?:vllm:|http_)\w+", text)}
    assert len(asked) > 25
    assert asked - set(served) == set()


def test_every_label_of_the_dashboard_is_served(served):
    available = set().union(*served.values())
    groups = [group for text in expressions() for group in re.findall(r"by \(([^)]*)\)", text)]
    asked = {label for group in groups for label in group.split(", ")}
    assert asked
    assert asked - available == set()


def test_panels_do_not_overlap():
    places = set()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        place = panel["gridPos"]
        columns, lines = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        cells = {(x, y) for x in columns for y in lines}
        assert place["x"] + place["w"] <= 24
        assert not cells & places, panel["title"]
        places |= cells
