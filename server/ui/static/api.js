// Talking to the server: the API key, streams of server-sent events, and a request as a curl command.

import { byId } from "./dom.js";

const KEY = "omni-engine.key"; // in sessionStorage: this tab, until it is closed
const listeners = [];
let key = readKey();
let asking = null;

/** What the server said no with: its own message, or ours where it could not be reached ("network"). */
export class ApiError extends Error {
  constructor(message, status, body = "") {
    super(message);
    this.status = status;
    this.body = body;
  }
}

function readKey() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return "";
  }
}

function keepKey(value) {
  key = value;
  try {
    sessionStorage.setItem(KEY, value);
  } catch {
    // Then it lasts as long as the page.
  }
  for (const listener of listeners) {
    listener(key);
  }
}

export const hasKey = () => key !== "";

export function onKey(listener) {
  listeners.push(listener);
}

/** Asks for the key; whether one was given. Several requests that need one wait for the same answer. */
export function askForKey(wrong = false) {
  asking ??= new Promise((resolve) => {
    const dialog = byId("key");
    const input = byId("key-input");
    let given = false;
    byId("key-wrong").hidden = !wrong;
    input.value = key;
    byId("key-form").onsubmit = (event) => {
      event.preventDefault();
      given = true;
      keepKey(input.value.trim());
      dialog.close();
    };
    byId("key-cancel").onclick = () => dialog.close();
    dialog.onclose = () => {
      asking = null;
      resolve(given);
    };
    dialog.showModal();
    input.select();
  });
  return asking;
}

function headers(hasBody) {
  return {
    ...(hasBody ? { "Content-Type": "application/json" } : {}),
    ...(key ? { Authorization: `Bearer ${key}` } : {}),
  };
}

/** A response with status 200; asks for the key where the server wants one. Throws ApiError, and AbortError. */
async function request(path, body, signal) {
  for (;;) {
    const tried = key;
    let response;
    try {
      response = await fetch(path, {
        method: body ? "POST" : "GET",
        headers: headers(body),
        body: body ? JSON.stringify(body) : undefined,
        signal,
        cache: "no-store",
      });
    } catch (error) {
      if (error.name === "AbortError") {
        throw error;
      }
      throw new ApiError("network", 0);
    }
    if (response.ok) {
      return response;
    }
    if (response.status === 401) {
      if (key !== tried || (await askForKey(tried !== ""))) {
        continue; // with the key that has been given meanwhile
      }
      throw new ApiError("unauthorized", 401);
    }
    const text = await response.text().catch(() => "");
    throw new ApiError(messageIn(text) ?? `HTTP ${response.status}`, response.status, text);
  }
}

function messageIn(text) {
  try {
    const { error } = JSON.parse(text);
    return typeof error === "string" ? error : (error?.message ?? null);
  } catch {
    return null;
  }
}

export async function getJson(path) {
  return (await request(path)).json();
}

/** Whether requests are served: ready, loading, dead or unreachable. */
export async function health() {
  try {
    const response = await fetch("health", { cache: "no-store" });
    if (response.ok) {
      return "ready";
    }
    return (await response.json()).status;
  } catch {
    return "unreachable";
  }
}

/** The events of a stream as {data, text}: parsed, and as they came. [DONE] ends it; ApiError("cut") if it never came. */
export async function* events(path, body, signal) {
  const response = await request(path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) {
        throw new ApiError("cut", 0);
      }
      pending += value;
      const blocks = pending.split("\n\n");
      pending = blocks.pop();
      for (const block of blocks) {
        if (block === "data: [DONE]") {
          yield { data: null, text: block };
          return;
        }
        if (block.startsWith("data: ")) {
          yield { data: JSON.parse(block.slice("data: ".length)), text: block };
        }
      }
    }
  } catch (error) {
    if (error instanceof ApiError || error.name === "AbortError") {
      throw error;
    }
    throw new ApiError("cut", 0);
  } finally {
    reader.cancel().catch(() => {});
  }
}

const quote = (word) => `'${word.replaceAll("'", "'\\''")}'`;

/** The same request for a shell. The key itself is left out: it is taken from the variable API_KEY. */
export function curl(path, body) {
  const lines = [`curl -N ${quote(new URL(path, document.baseURI).href)}`, "-H 'Content-Type: application/json'"];
  if (key) {
    lines.push('-H "Authorization: Bearer $API_KEY"');
  }
  lines.push(`-d ${quote(JSON.stringify(body, null, 2))}`);
  return lines.join(" \\\n  ");
}
