"""The SVG plot: every point at its place on logarithmic axes, and text that cannot break the file."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from omni_engine.server.bench.plot import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Line, _ticks, line_plot

SVG = "{http://www.w3.org/2000/svg}"


def draw(*lines, title="a model"):
    return ElementTree.fromstring(line_plot(title, "requests", "ms", lines))


def points(root):
    return [
        [tuple(map(float, point.split(","))) for point in line.get("points").split()]
        for line in root.iter(f"{SVG}polyline")
    ]


def texts(root):
    return [element.text for element in root.iter(f"{SVG}text")]


def test_equal_factors_are_equal_distances():
    root = draw(Line("eager", [(1, 10.0), (8, 20.0), (64, 40.0)]))
    ((first, second, third),) = points(root)
    assert first[0] == LEFT and third[0] == WIDTH - RIGHT
    assert second[0] == pytest.approx((first[0] + third[0]) / 2)
    assert second[1] == pytest.approx((first[1] + third[1]) / 2, abs=0.2)
    assert first[1] == HEIGHT - BOTTOM and TOP < third[1] < second[1] < first[1]  # 50 is the topmost tick


def test_a_bound_is_dashed_and_has_no_marks():
    root = draw(Line("graph", [(1, 2.0), (8, 3.0)]), Line("floor", [(1, 1.0), (8, 1.0)], is_bound=True))
    assert [line.get("stroke-dasharray") is not None for line in root.iter(f"{SVG}polyline")] == [False, True]
    assert len(list(root.iter(f"{SVG}circle"))) == 2
    assert {"graph", "floor", "requests", "ms", "1", "8", "0.5"} - set(texts(root)) == {"0.5"}


def test_one_point_alone_is_drawn():
    ((point,),) = points(draw(Line("eager", [(4, 3.0)])))
    assert point[0] == (LEFT + WIDTH - RIGHT) / 2
    assert TOP <= point[1] <= HEIGHT - BOTTOM


def test_names_are_text_and_no_markup():
    assert "a<b>&c" in texts(draw(Line("eager", [(1, 1.0)]), title="a<b>&c"))


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(1, 5, [1, 2, 5]), (0.3, 4, [0.2, 0.5, 1, 2, 5]), (7, 7, [5, 10]), (0.004, 0.006, [0.002, 0.005, 0.01])],
)
def test_ticks_enclose_the_values(low, high, ticks):
    assert _ticks(low, high) == ticks
