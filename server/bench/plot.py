"""Lines over a logarithmic grid as an SVG file, drawn with nothing but text.

A benchmark has to draw wherever it runs, and a few lines need no library: the file opens in every browser, and its
text can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 720, 440
LEFT, RIGHT, TOP, BOTTOM = 76, 20, 48, 56  # margins around the grid
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # told apart by colour-blind eyes too
FLOOR_COLOUR = "#444444"
FONT = 'font-family="sans-serif" font-size="12"'


@dataclass(frozen=True)
class Line:
    """Points (x, y), both above 0, in the order of x. A bound is drawn dashed and grey."""

    name: str
    points: Sequence[tuple[float, float]]
    is_bound: bool = False


def line_plot(title: str, x_label: str, y_label: str, lines: Sequence[Line]) -> str:
    """The text of an SVG file. There must be a point; the grid has a line for every x there is."""
    xs = sorted({x for line in lines for x, _ in line.points})
    ys = [y for line in lines for _, y in line.points]
    y_ticks = _ticks(min(ys), max(ys))
    across = _scale(xs[0], xs[-1], LEFT, WIDTH - RIGHT)
    up = _scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" {FONT}>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(WIDTH / 2, 20, title, "middle", 'font-weight="bold"'),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 14, x_label, "middle"),
        _text(16, (TOP + HEIGHT - BOTTOM) / 2, y_label, "middle", f'transform="rotate(-90 16 {HEIGHT / 2:.0f})"'),
    ]
    for x in xs:
        parts.append(_rule(across(x), TOP, across(x), HEIGHT - BOTTOM))
        parts.append(_text(across(x), HEIGHT - BOTTOM + 18, f"{x:g}", "middle"))
    for y in y_ticks:
        parts.append(_rule(LEFT, up(y), WIDTH - RIGHT, up(y)))
        parts.append(_text(LEFT - 8, up(y) + 4, f"{y:g}", "end"))
    colours = iter(COLOURS * (len(lines) // len(COLOURS) + 1))
    for index, line in enumerate(lines):
        colour = FLOOR_COLOUR if line.is_bound else next(colours)
        stroke = f'stroke="{colour}" stroke-width="2"' + (' stroke-dasharray="6 4"' if line.is_bound else "")
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in line.points)
        parts.append(f'<polyline points="{path}" fill="none" {stroke}/>')
        if not line.is_bound:
            parts += [
                f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="3.5" fill="{colour}"/>' for x, y in line.points
            ]
        legend = LEFT + 8 + index * (WIDTH - LEFT - RIGHT) / len(lines)
        parts.append(f'<line x1="{legend:.1f}" y1="36" x2="{legend + 24:.1f}" y2="36" {stroke}/>')
        parts.append(_text(legend + 30, 40, line.name, "start"))
    return "\n".join([*parts, "</svg>", ""])


def _scale(low: float, high: float, start: float, end: float):
    """Maps [low, high] to [start, end] by logarithm; a range of one value to the middle."""
    if low == high:
        return lambda value: (start + end) / 2
    return lambda value: start + (end - start) * math.log(value / low) / math.log(high / low)


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, from the last at or under `low` to the first at or over `high`."""
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    # Powers of ten as text, or 10 ** -3 times 5 would be 0.005000000000000001.
    steps = [float(f"{digit}e{decade}") for decade in decades for digit in (1, 2, 5)]
    first = max(index for index, step in enumerate(steps) if step <= low)
    last = min(index for index, step in enumerate(steps) if step >= high)
    return steps[first : max(last, first + 1) + 1]


def _text(x: float, y: float, text: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{escape(text)}</text>'


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#dddddd"/>'
