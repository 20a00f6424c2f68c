// Small charts over time in SVG: lines, steps and stacked areas, with a cursor that the pointer or the arrow keys move.

import { draw, make } from "./dom.js";
import { number, text } from "./i18n.js";

const HEIGHT = 132; // pixels
const LEFT = 54; // room for the numbers at the grid lines
const BOTTOM = 18; // room for the times
const TOP = 6;
const RIGHT = 6;
const NUM_GRID_LINES = 3;

/** The next "round" number from `value` on: 1, 2, 2.5 or 5 times a power of ten; whole ones only if `whole`. */
export function niceCeiling(value, whole) {
  if (!(value > 0)) {
    return 1;
  }
  const power = 10 ** Math.floor(Math.log10(value));
  const steps = whole && power === 1 ? [1, 2, 3, 4, 5, 6, 8, 10] : [1, 2, 2.5, 5, 10];
  const found = steps.find((step) => step * power >= value * (1 - 1e-9)) * power;
  return whole ? Math.max(1, Math.ceil(found)) : found;
}

/**
 * A chart of `series`, each {name, words, area, stacked, stepped}: what it shows of a point is the point's field `name`
 * (null: nothing there). A point has `time`, in seconds. `format` gives a value for people; `whole` counts things;
 * `note()` stands beside the legend.
 */
export class TimeChart {
  constructor({ title, series, format = (value) => number(value, 1), note = () => "", span = 120, whole = false }) {
    Object.assign(this, { title, series, format, note, span, whole });
    this.points = [];
    this.cursor = null; // index of a point
    this.svg = draw("svg", { class: "plot", height: HEIGHT, tabindex: 0, role: "img" });
    this.legend = make("div.legend");
    this.heading = make("h3");
    this.node = make("section.card", {}, make("header", {}, this.heading, this.legend), this.svg);
    this.svg.addEventListener("pointermove", (event) => this.pointAt(event.offsetX));
    this.svg.addEventListener("pointerleave", () => this.move(null));
    this.svg.addEventListener("blur", () => this.move(null));
    this.svg.addEventListener("keydown", (event) => this.press(event));
    new ResizeObserver(() => this.render()).observe(this.node);
  }

  update(points) {
    this.points = points;
    if (this.cursor !== null && this.cursor >= points.length) {
      this.cursor = null;
    }
    this.render();
  }

  press(event) {
    const last = this.points.length - 1;
    const at = this.cursor ?? last + 1;
    const goal = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: last, Escape: null }[event.key];
    if (goal === undefined || last < 0) {
      return;
    }
    event.preventDefault();
    this.move(goal === null ? null : Math.max(0, Math.min(last, goal)));
  }

  pointAt(x) {
    if (!this.points.length || !this.x) {
      return;
    }
    let best = 0;
    this.points.forEach((point, index) => {
      if (Math.abs(this.x(point.time) - x) < Math.abs(this.x(this.points[best].time) - x)) {
        best = index;
      }
    });
    this.move(best);
  }

  move(cursor) {
    if (cursor !== this.cursor) {
      this.cursor = cursor;
      this.render();
    }
  }

  /** The value that stands in the legend: under the cursor, or the latest. */
  shown(name) {
    return this.points[this.cursor ?? this.points.length - 1]?.[name] ?? null;
  }

  render() {
    const width = this.svg.clientWidth;
    const values = this.series.map(({ name }) => this.shown(name));
    const words = this.series.map(({ words: key }) => text(key));
    const told = values.map((value, index) => `${words[index]} ${value === null ? "–" : this.format(value)}`);
    this.heading.textContent = text(this.title);
    this.svg.setAttribute("aria-label", `${text("chart.keys", { title: text(this.title) })} ${told.join(", ")}`);
    this.legend.replaceChildren(
      ...this.series.map((one, index) =>
        make(`span.s${index}`, {}, make("i", { "aria-hidden": "true" }), `${words[index]} `, make("b", {}, values[index] === null ? "–" : this.format(values[index]))),
      ),
      ...[this.note()].filter(Boolean).map((words) => make("span", {}, words)),
    );
    if (!width) {
      return; // hidden
    }
    const end = this.points.length ? this.points[this.points.length - 1].time : 0;
    const top = niceCeiling(this.largest(), this.whole);
    this.x = (time) => LEFT + ((time - end + this.span) / this.span) * (width - LEFT - RIGHT);
    this.y = (value) => TOP + (1 - value / top) * (HEIGHT - TOP - BOTTOM);
    this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.svg.replaceChildren(...this.grid(width, top), ...this.areas(), ...this.cursorLine());
  }

  largest() {
    const tops = this.points.map((point) => {
      const values = this.series.map(({ name }) => point[name] ?? 0);
      return this.series[0].stacked ? values.reduce((sum, value) => sum + value, 0) : Math.max(...values);
    });
    return Math.max(0, ...tops);
  }

  grid(width, top) {
    const nodes = [];
    for (let line = 0; line <= NUM_GRID_LINES - 1; line += 1) {
      const value = (top * line) / (NUM_GRID_LINES - 1);
      const y = this.y(value);
      const isTold = !this.whole || Number.isInteger(value);
      nodes.push(draw("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y, y2: y }));
      if (isTold) {
        nodes.push(draw("text", { class: "tick", x: LEFT - 6, y: y + 4, "text-anchor": "end" }, this.format(value)));
      }
    }
    for (const [share, anchor] of [[0, "start"], [0.5, "middle"], [1, "end"]]) {
      const ago = this.span * (1 - share);
      const words = ago ? text("chart.ago", { seconds: number(ago) }) : text("chart.now");
      const x = LEFT + share * (width - LEFT - RIGHT);
      nodes.push(draw("text", { class: "tick", x, y: HEIGHT - 4, "text-anchor": anchor }, words));
    }
    return nodes;
  }

  areas() {
    const nodes = [];
    const base = this.points.map(() => 0);
    this.series.forEach((one, index) => {
      const pieces = [[]]; // between gaps
      this.points.forEach((point, place) => {
        const value = point[one.name];
        if (value === null || value === undefined) {
          pieces.push([]);
          return;
        }
        const low = one.stacked ? base[place] : 0;
        pieces[pieces.length - 1].push([this.x(point.time), this.y(low + value), this.y(low)]);
        base[place] = low + value;
      });
      for (const piece of pieces.filter((found) => found.length)) {
        const upper = path(piece.map(([x, y]) => [x, y]), one.stepped);
        if (one.area) {
          const lower = path(piece.map(([x, , y]) => [x, y]).reverse(), false).replace("M", "L");
          nodes.push(draw("path", { class: `area s${index}`, d: `${upper}${lower}Z` }));
        }
        if (piece.length === 1) {
          nodes.push(draw("circle", { class: `dot s${index}`, cx: piece[0][0], cy: piece[0][1], r: 2 }));
        }
        nodes.push(draw("path", { class: `line s${index}`, d: upper }));
      }
    });
    return nodes;
  }

  cursorLine() {
    if (this.cursor === null) {
      return [];
    }
    const x = this.x(this.points[this.cursor].time);
    return [draw("line", { class: "cursor", x1: x, x2: x, y1: TOP, y2: HEIGHT - BOTTOM })];
  }
}

function path(points, stepped) {
  let made = "";
  points.forEach(([x, y], index) => {
    const [px, py] = [x.toFixed(1), y.toFixed(1)];
    made += index === 0 ? `M${px},${py}` : stepped ? `H${px}V${py}` : `L${px},${py}`;
  });
  return made;
}

/** Horizontal bars: rows of {name, value, told}; `value` is a share of the longest, or of 1 if `ofOne`. */
export class BarChart {
  constructor(title) {
    this.title = title;
    this.heading = make("h3");
    this.note = make("div.legend");
    this.body = make("div.bars");
    this.node = make("section.card", {}, make("header", {}, this.heading, this.note), this.body);
  }

  update(rows, { empty, ofOne = false, note = "" }) {
    this.heading.textContent = text(this.title);
    this.note.textContent = note;
    if (!rows.length) {
      this.body.replaceChildren(make("p.hint", {}, empty));
      return;
    }
    const longest = ofOne ? 1 : Math.max(...rows.map((row) => row.value));
    this.body.replaceChildren(
      make("dl", {}, ...rows.map((row) => {
        const bar = make("i");
        bar.style.width = `${longest ? (100 * row.value) / longest : 0}%`;
        return make("div", {}, make("dt", {}, row.name), make("dd", {}, make("span.meter", { "aria-hidden": "true" }, bar), make("b", {}, row.told)));
      })),
    );
  }
}
