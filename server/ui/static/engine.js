// The engine live: tiles, charts, facts and the start-up table, fed by the stream `ui/live` while they are looked at.

import { ApiError, events } from "./api.js";
import { BarChart, TimeChart } from "./charts.js";
import { byId, make } from "./dom.js";
import { duration, label, number, onLanguage, text } from "./i18n.js";

const SPAN = 120; // seconds that charts show
const RETRY_MILLISECONDS = [500, 1000, 2000, 5000];
let engine = null; // the last event about the engine
let points = [];
let controller = null; // of the stream, while the view is looked at
let tell = () => {};
const charts = {};
const tiles = {};

/** Builds the view. `status` is called with what the stream says of the engine. */
export function startEngine(status) {
  tell = status;
  const seconds = { format: duration };
  const count = { whole: true, format: (value) => number(value, 1) };
  charts.requests = new TimeChart({
    title: "chart.requests", ...count,
    series: [
      { name: "running", words: "chart.requests.running", area: true, stepped: true },
      { name: "waiting", words: "chart.requests.waiting", stepped: true },
    ],
  });
  charts.tokens = new TimeChart({
    title: "chart.tokens",
    series: [
      { name: "generation", words: "chart.tokens.generation", area: true },
      { name: "prompt", words: "chart.tokens.prompt" },
    ],
  });
  charts.kv = new TimeChart({
    title: "chart.kv", ...count, note: freeBlocks,
    series: [
      { name: "pinned", words: "chart.kv.used", area: true, stacked: true, stepped: true },
      { name: "cached", words: "chart.kv.cached", area: true, stacked: true, stepped: true },
    ],
  });
  charts.batch = new TimeChart({
    title: "chart.batch", ...count,
    series: [
      { name: "batch", words: "chart.batch.batch", area: true, stepped: true },
      { name: "gear", words: "chart.batch.gear", stepped: true },
    ],
  });
  charts.first = new TimeChart({
    title: "chart.first", ...seconds,
    series: [
      { name: "firstMedian", words: "chart.first.median" },
      { name: "firstWorst", words: "chart.first.worst" },
    ],
  });
  charts.perToken = new TimeChart({
    title: "chart.per_token", ...seconds,
    series: [
      { name: "tokenSeconds", words: "chart.per_token.token" },
      { name: "stepSeconds", words: "chart.per_token.step" },
    ],
  });
  charts.gears = new BarChart("chart.gears");
  charts.drafts = new BarChart("chart.drafts");
  for (const name of ["running", "waiting", "generation", "prompt", "first", "perToken", "kv", "prefix"]) {
    const key = name === "perToken" ? "per_token" : name;
    tiles[name] = make("b", {}, "–");
    byId("tiles").append(make("div.tile", { id: `tile-${name}` }, tiles[name], label(make("span"), `tile.${key}`)));
  }
  charts.start = make("section.card.wide", { id: "start" });
  charts.facts = make("section.card", { id: "facts" });
  byId("charts").append(
    charts.requests.node, charts.tokens.node, charts.kv.node, charts.batch.node, charts.first.node,
    charts.perToken.node, charts.gears.node, charts.drafts.node, charts.facts, charts.start,
  );
  onLanguage(render);
  render();
}

/** Begins or ends to look. Nothing is asked of the server while nobody does. */
export function look(wanted) {
  if (wanted === (controller !== null)) {
    return;
  }
  if (wanted) {
    controller = new AbortController();
    follow(controller.signal);
  } else {
    controller.abort();
    controller = null;
  }
}

async function follow(signal) {
  note("live.connecting");
  for (let attempt = 0; !signal.aborted; attempt += 1) {
    try {
      for await (const { data } of events("ui/live", null, signal)) {
        if (data) {
          attempt = 0;
          take(data);
        }
      }
    } catch (error) {
      if (signal.aborted) {
        return;
      }
      if (!(error instanceof ApiError)) {
        throw error;
      }
      if (error.status === 401) {
        note("error.unauthorized");
        return;
      }
    }
    if (engine?.status !== "dead") {
      note("live.lost");
    }
    tell("unreachable");
    const wait = RETRY_MILLISECONDS[Math.min(attempt, RETRY_MILLISECONDS.length - 1)];
    await new Promise((resolve) => setTimeout(resolve, wait));
  }
}

function take(event) {
  if (event.event === "engine") {
    engine = event;
    tell(event.status);
    if (event.status === "loading") {
      note("live.loading");
    } else if (event.status === "dead") {
      note("live.dead", { message: event.message ?? "" });
    } else {
      note(null);
    }
  } else {
    points.push(pointOf(event));
    points = points.filter((point) => point.time > event.time - SPAN - 2 * engine.interval);
  }
  render();
}

function note(key, values = {}) {
  const node = byId("engine-note");
  node.hidden = key === null;
  node.classList.toggle("bad", key === "live.dead" || key === "live.lost");
  if (key !== null) {
    label(node, key, values);
  }
}

function median(values) {
  const sorted = [...values].sort((one, other) => one - other);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

function pointOf({ time, load }) {
  const firsts = load.first_token_seconds;
  return {
    time,
    load,
    running: load.num_running,
    waiting: load.num_waiting,
    generation: load.num_generation_tokens / load.seconds,
    prompt: load.num_prompt_tokens / load.seconds,
    pinned: load.num_blocks_pinned,
    cached: load.num_blocks_cached,
    batch: load.largest_batch,
    gear: Math.max(0, ...Object.keys(load.steps_by_gear).map(Number)),
    firstMedian: firsts.length ? median(firsts) : null,
    firstWorst: firsts.length ? Math.max(...firsts) : null,
    tokenSeconds: load.token_seconds,
    stepSeconds: load.num_steps ? load.step_seconds / load.num_steps : null,
  };
}

const total = (field) => points.reduce((sum, point) => sum + point.load[field], 0);

function render() {
  for (const chart of Object.values(charts)) {
    if (chart instanceof TimeChart) {
      chart.update(points);
    }
  }
  renderTiles();
  renderGears();
  renderDrafts();
  renderStart();
  renderFacts();
}

function renderTiles() {
  const point = points[points.length - 1];
  if (!point) {
    return;
  }
  const firsts = points.flatMap((one) => one.load.first_token_seconds);
  const waits = points.filter((one) => one.tokenSeconds !== null);
  const queries = total("num_prefix_queries");
  const share = (part, whole) => `${number((100 * part) / whole, 1)} %`;
  const told = {
    running: number(point.running),
    waiting: number(point.waiting),
    generation: number(point.generation, 1),
    prompt: number(point.prompt, 1),
    first: firsts.length ? duration(median(firsts)) : "–",
    perToken: waits.length ? duration(waits[waits.length - 1].tokenSeconds) : "–",
    kv: engine.num_blocks ? share(point.pinned, engine.num_blocks) : "–",
    prefix: queries ? share(total("num_prefix_hits"), queries) : "–",
  };
  for (const [name, value] of Object.entries(told)) {
    tiles[name].textContent = value;
  }
}

function freeBlocks() {
  const point = points[points.length - 1];
  if (!point || !engine.num_blocks) {
    return "";
  }
  const free = engine.num_blocks - point.pinned - point.cached;
  return text("chart.kv.free", { free: number(free) });
}

function renderGears() {
  const steps = new Map();
  for (const { load } of points) {
    for (const [gear, count] of Object.entries(load.steps_by_gear)) {
      steps.set(Number(gear), (steps.get(Number(gear)) ?? 0) + count);
    }
  }
  const rows = [...steps.entries()]
    .sort(([one], [other]) => one - other)
    .map(([gear, count]) => ({ name: gear ? number(gear) : text("chart.gears.none"), value: count, told: number(count) }));
  const preempted = total("num_preemptions");
  const remark = preempted ? text("preemptions", { count: number(preempted) }) : "";
  charts.gears.update(rows, { empty: text("chart.gears.empty"), note: remark });
}

function renderDrafts() {
  let [drafts, drafted, accepted] = [0, 0, 0];
  const positions = [];
  for (const { load } of points) {
    if (load.drafts) {
      drafts += load.drafts.num_drafts;
      drafted += load.drafts.num_draft_tokens;
      accepted += load.drafts.num_accepted_tokens;
      load.drafts.num_accepted_per_position.forEach((count, place) => {
        positions[place] = (positions[place] ?? 0) + count;
      });
    }
  }
  const percent = (share) => `${number(100 * share, 1)} %`;
  const rows = drafts
    ? positions.map((count, place) => ({
        name: text("chart.drafts.position", { position: place + 1 }), value: count / drafts, told: percent(count / drafts),
      }))
    : [];
  const off = engine?.num_drafts === 0;
  charts.drafts.update(rows, {
    empty: text(off ? "chart.drafts.off" : "chart.drafts.empty"),
    ofOne: true,
    note: drafted ? `${text("chart.drafts.rate")} ${percent(accepted / drafted)}` : "",
  });
}

function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const power = Math.min(units.length - 1, Math.max(0, Math.floor(Math.log2(count || 1) / 10)));
  return `${number(count / 1024 ** power, power ? 1 : 0)} ${units[power]}`;
}

function renderStart() {
  const start = engine?.start ?? [];
  const heading = make("header", {}, make("h3", {}, text("chart.start")));
  if (!start.length) {
    charts.start.replaceChildren(heading, make("p.hint", {}, text("chart.start.waiting")));
    return;
  }
  const spans = start.map(({ phases }) => phases.reduce((sum, phase) => sum + phase.seconds, 0));
  const longest = Math.max(...spans);
  const rows = start.flatMap(({ process, phases }, index) => {
    let begun = longest - spans[index]; // all end when the engine is ready
    return phases.map((phase, place) => {
      const bar = make("i");
      bar.style.marginInlineStart = `${(100 * begun) / longest}%`;
      bar.style.width = `${(100 * phase.seconds) / longest}%`;
      begun += phase.seconds;
      return make(
        "tr",
        {},
        make("th", { scope: "row" }, place ? "" : process),
        make("td", {}, phase.name),
        make("td.track", { "aria-hidden": "true" }, make("span.meter", {}, bar)),
        make("td.right", {}, number(phase.seconds, 2, 2)),
        make("td.right", {}, phase.num_bytes === null ? "" : bytes(phase.num_bytes)),
      );
    });
  });
  const column = (key, name = "th") => make(name, { scope: "col" }, text(key));
  charts.start.replaceChildren(
    heading,
    make("div.table", { tabindex: "0" }, make(
      "table.start",
      {},
      make("thead", {}, make("tr", {}, column("chart.start.process"), column("chart.start.phase"), make("th.track"), column("chart.start.seconds", "th.right"), column("chart.start.bytes", "th.right"))),
      make("tbody", {}, ...rows),
    )),
  );
}

function renderFacts() {
  const heading = make("header", {}, make("h3", {}, text("facts")));
  const facts = [];
  if (engine) {
    facts.push(["version", engine.version]);
    const tokens = (count) => text("facts.tokens", { tokens: number(count) });
    if (engine.num_blocks) {
      facts.push(
        ["context", tokens(engine.max_model_len)],
        ["blocks", number(engine.num_blocks)],
        ["block_size", number(engine.block_size)],
        ["capacity", tokens(engine.num_blocks * engine.block_size)],
        ["gears", engine.gears.join(" · ") || text("facts.none")],
        ["drafts", engine.num_drafts ? number(engine.num_drafts) : text("facts.none")],
      );
    }
  }
  charts.facts.replaceChildren(
    heading,
    make("dl.facts", {}, ...facts.map(([key, value]) => make("div", {}, make("dt", {}, text(`facts.${key}`)), make("dd", {}, value)))),
  );
}
