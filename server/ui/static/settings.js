// The system prompt and the sampling parameters: the form, and what it adds to a request.

import { byId, make, recall, remember } from "./dom.js";
import { label, onLanguage, text } from "./i18n.js";

// Empty means: not in the request, so the server's default holds.
const NUMBERS = [
  { name: "temperature", min: 0, step: 0.1 },
  { name: "top_p", min: 0, max: 1, step: 0.05 },
  { name: "top_k", min: -1, step: 1 },
  { name: "min_p", min: 0, max: 1, step: 0.05 },
  { name: "max_tokens", min: 1, step: 1 },
  { name: "seed", step: 1 },
  { name: "presence_penalty", min: -2, max: 2, step: 0.1 },
  { name: "frequency_penalty", min: -2, max: 2, step: 0.1 },
  { name: "repetition_penalty", min: 0, step: 0.1 },
];
const DEFAULTS = { logprobs: true, top_logprobs: "5" };
let values = { ...DEFAULTS };

/** Builds the form, filled with what was set last. */
export function showSettings() {
  try {
    values = { ...DEFAULTS, ...JSON.parse(recall("settings") ?? "{}") };
  } catch {
    values = { ...DEFAULTS };
  }
  fillForm();
  onLanguage(setPlaceholders);
}

function fillForm() {
  const system = make("textarea", { id: "set-system", rows: 4, "data-i18n-placeholder": "set.system.hint" });
  const stop = make("textarea", { id: "set-stop", rows: 2, "data-i18n-placeholder": "set.stop.hint" });
  const logprobs = make("input", { id: "set-logprobs", type: "checkbox" });
  const alternatives = make("input", { id: "set-top_logprobs", type: "number", min: 0, max: 20, step: 1 });
  bind(system, "system");
  bind(stop, "stop");
  bind(alternatives, "top_logprobs");
  logprobs.checked = values.logprobs;
  logprobs.addEventListener("change", () => change("logprobs", logprobs.checked));
  const numbers = NUMBERS.map(({ name, ...limits }) => {
    const input = make("input", { id: `set-${name}`, type: "number", inputmode: "decimal", ...limits, "data-default": true });
    bind(input, name);
    return field(name, input);
  });
  const reset = label(make("button.quiet", { type: "button", click: resetForm }), "set.reset");
  byId("settings-form").replaceChildren(
    field("system", system),
    group("set.sampling", make("div.grid", {}, ...numbers), field("stop", stop)),
    group("set.inspect", make("div.check", {}, logprobs, caption("logprobs")), field("top_logprobs", alternatives)),
    reset,
  );
  setPlaceholders();
}

function caption(name) {
  return label(make("label", { for: `set-${name}` }), `set.${name}`);
}

function field(name, input) {
  return make("div.field", {}, caption(name), input);
}

function group(key, ...children) {
  return make("fieldset", {}, label(make("legend"), key), ...children);
}

function bind(input, name) {
  input.value = values[name] ?? "";
  input.addEventListener("input", () => change(name, input.value));
}

function change(name, value) {
  values[name] = value;
  remember("settings", JSON.stringify(values));
}

function resetForm() {
  values = { ...DEFAULTS };
  remember("settings", JSON.stringify(values));
  fillForm();
  byId("set-system").focus();
}

function setPlaceholders() {
  for (const input of byId("settings-form").querySelectorAll("[data-default]")) {
    input.placeholder = text("set.default");
  }
  for (const input of byId("settings-form").querySelectorAll("[data-i18n-placeholder]")) {
    input.placeholder = text(input.dataset.i18nPlaceholder);
  }
}

/** The first message that the system prompt makes: none, or one. */
export function systemMessages() {
  return values.system?.trim() ? [{ role: "system", content: values.system }] : [];
}

/** What the settings add to the body of a request. */
export function requestFields() {
  const fields = {};
  for (const { name } of NUMBERS) {
    const value = Number(values[name]);
    if (values[name] !== undefined && String(values[name]).trim() !== "" && Number.isFinite(value)) {
      fields[name] = value;
    }
  }
  const stops = (values.stop ?? "").split("\n").filter((line) => line !== "");
  if (stops.length) {
    fields.stop = stops;
  }
  if (values.logprobs) {
    fields.logprobs = true;
    fields.top_logprobs = Number(values.top_logprobs) || 0;
  }
  return fields;
}
