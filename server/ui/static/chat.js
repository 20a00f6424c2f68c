// The conversation: what was said, how an answer arrives, and how it is stopped, asked again and looked into.

import { ApiError, curl, events } from "./api.js";
import { byId, copyText, make } from "./dom.js";
import { duration, label, number, text } from "./i18n.js";
import { MarkdownView } from "./markdown.js";
import { requestFields, systemMessages } from "./settings.js";
import { hideCard, renderTokens } from "./tokens.js";

const PATH = "v1/chat/completions";
const NEAR_THE_END = 80; // pixels; who has scrolled further up is not pulled down
let turns = []; // of both sides, in order
let running = null; // the AbortController of the answer that is arriving
let longest = null; // tokens, as the server says
let onFailure = () => {};

/** Connects the form and its buttons. `failed` is called when a request failed, so that the status can be looked at. */
export function startChat(failed) {
  onFailure = failed;
  const prompt = byId("prompt");
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  prompt.addEventListener("keydown", (event) => {
    // While an input method composes a character, Enter belongs to it.
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send();
    }
  });
  prompt.addEventListener("input", fitPrompt);
  byId("stop").addEventListener("click", stop);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !event.isComposing && running && !document.querySelector("dialog[open]")) {
      stop();
    }
  });
  byId("new-chat").addEventListener("click", () => {
    stop();
    cut(0);
    byId("usage").textContent = "";
    prompt.focus();
  });
  for (const button of document.querySelectorAll("[data-copy]")) {
    button.addEventListener("click", () => copyWith(button, byId(button.dataset.copy).textContent));
  }
  for (const button of document.querySelectorAll("[data-close]")) {
    button.addEventListener("click", () => button.closest("dialog").close());
  }
  byId("messages").addEventListener("scroll", hideCard, { passive: true });
}

export function setLongest(tokens) {
  longest = tokens;
}

function fitPrompt() {
  const prompt = byId("prompt");
  prompt.style.height = "auto";
  prompt.style.height = `${Math.min(prompt.scrollHeight + 2, window.innerHeight * 0.4)}px`;
}

async function copyWith(button, content) {
  const before = button.dataset.i18n;
  label(button, (await copyText(content)) ? "copied" : "copy.failed");
  setTimeout(() => label(button, before), 1500);
}

function send() {
  const prompt = byId("prompt");
  const content = prompt.value;
  if (running || !content.trim()) {
    return;
  }
  prompt.value = "";
  fitPrompt();
  add(new UserTurn(content));
  answer();
}

function stop() {
  running?.abort();
}

function add(turn) {
  turns.push(turn);
  byId("empty").hidden = true;
  byId("messages").append(turn.node);
  scrollDown(true);
}

/** Forgets the turns from number `first` on. */
function cut(first) {
  for (const turn of turns.splice(first)) {
    turn.node.remove();
  }
  byId("empty").hidden = turns.length > 0;
  hideCard();
}

function scrollDown(always = false) {
  const box = byId("messages");
  if (always || box.scrollHeight - box.scrollTop - box.clientHeight < NEAR_THE_END) {
    box.scrollTop = box.scrollHeight;
  }
}

function announce(key, values) {
  byId("announcer").textContent = text(key, values);
}

function setRunning(controller) {
  running = controller;
  const had = document.activeElement;
  byId("send").hidden = controller !== null;
  byId("stop").hidden = controller === null;
  if (had === byId("send") || had === byId("stop")) {
    byId("prompt").focus(); // the focus must not vanish with the button
  }
  for (const turn of turns) {
    turn.showActions();
  }
}

/** Asks for an answer to what has been said so far. */
async function answer() {
  const body = {
    messages: [...systemMessages(), ...turns.flatMap((turn) => turn.messages())],
    stream: true,
    stream_options: { include_usage: true },
    ...requestFields(),
  };
  const turn = new ModelTurn(body);
  const controller = new AbortController();
  add(turn);
  setRunning(controller);
  announce("announce.answering");
  try {
    for await (const { data, text: line } of events(PATH, body, controller.signal)) {
      turn.received.push(line);
      if (data?.error) {
        throw new ApiError(data.error.message, data.error.code);
      }
      if (data) {
        turn.take(data);
      }
    }
    turn.finish();
    announce("announce.done", { tokens: turn.numTokens });
  } catch (error) {
    if (error.name === "AbortError") {
      turn.finish("stopped");
      announce("announce.stopped");
    } else if (error instanceof ApiError) {
      turn.fail(error);
      onFailure();
    } else {
      turn.fail(new ApiError(String(error), 0));
      throw error;
    }
  } finally {
    setRunning(null);
    scrollDown();
  }
}

class UserTurn {
  constructor(content) {
    this.content = content;
    this.edit = label(make("button.quiet", { type: "button", click: () => this.askAgain() }), "edit");
    this.edit.setAttribute("data-i18n-label", "edit.label");
    this.edit.setAttribute("aria-label", text("edit.label"));
    this.node = make(
      "article.turn.user",
      {},
      make("header", {}, label(make("h2"), "role.user")),
      make("div.said", {}, make("div.text", {}, content), make("div.actions", {}, this.edit)),
    );
  }

  messages() {
    return [{ role: "user", content: this.content }];
  }

  showActions() {
    this.edit.disabled = running !== null;
  }

  askAgain() {
    const prompt = byId("prompt");
    prompt.value = this.content;
    cut(turns.indexOf(this));
    fitPrompt();
    prompt.focus();
  }
}

class ModelTurn {
  constructor(body) {
    this.body = body;
    this.received = []; // the events as they came
    this.content = "";
    this.reasoning = "";
    this.calls = [];
    this.tokens = []; // entries of logprobs
    this.numTokens = 0;
    this.error = null;
    this.ending = null;
    this.showsTokens = false;
    this.frame = 0;
    this.sent = performance.now();
    this.first = this.last = this.thought = null;
    this.build();
  }

  build() {
    const button = (key, listener) => label(make("button.quiet", { type: "button", click: listener }), key);
    this.summary = label(make("summary"), "thinking");
    this.thinking = make("div.reasoning");
    this.details = make("details.thinking", { hidden: true }, this.summary, this.thinking);
    this.prose = make("div.prose");
    this.calling = make("div.calls");
    this.tokenBox = make("div", { hidden: true });
    this.problem = make("div.problem", { role: "alert", hidden: true });
    this.facts = make("span.facts");
    this.again = button("regenerate", () => this.askAgain());
    this.copy = button("copy", () => copyWith(this.copy, this.content));
    this.toggle = button("view.tokens", () => this.toggleTokens());
    this.toggle.setAttribute("aria-pressed", "false");
    this.raw = button("raw", () => this.showRaw());
    this.raw.setAttribute("data-i18n-label", "raw.label");
    this.raw.setAttribute("aria-label", text("raw.label"));
    this.actions = make("div.actions", {}, this.again, this.copy, this.toggle, this.raw, this.facts);
    this.view = new MarkdownView(this.prose);
    this.thoughts = new MarkdownView(this.thinking);
    this.node = make(
      "article.turn.model",
      { "aria-busy": "true" },
      make("header", {}, label(make("h2"), "role.assistant")),
      this.details, this.prose, this.calling, this.tokenBox, this.problem, this.actions,
    );
  }

  messages() {
    return this.content || !this.error ? [{ role: "assistant", content: this.content }] : [];
  }

  take(chunk) {
    if (chunk.usage) {
      this.numTokens = chunk.usage.completion_tokens;
      this.usage = chunk.usage;
    }
    const choice = chunk.choices[0];
    if (!choice) {
      return;
    }
    const { delta } = choice;
    const tokens = choice.logprobs?.content ?? [];
    if (delta.content || delta.reasoning || delta.tool_calls || tokens.length) {
      this.last = performance.now();
      this.first ??= this.last;
    }
    if ((delta.content || delta.tool_calls) && this.reasoning && this.thought === null) {
      this.thought = performance.now();
    }
    this.content += delta.content ?? "";
    this.reasoning += delta.reasoning ?? "";
    this.tokens.push(...tokens);
    for (const piece of delta.tool_calls ?? []) {
      const call = (this.calls[piece.index] ??= { name: "", text: "" });
      call.name += piece.function?.name ?? "";
      call.text += piece.function?.arguments ?? "";
    }
    this.ending = choice.finish_reason ?? this.ending;
    this.frame ||= requestAnimationFrame(() => this.render());
  }

  render() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    this.view.update(this.content);
    if (this.reasoning) {
      this.details.hidden = false;
      this.thoughts.update(this.reasoning);
      if (this.thought !== null) {
        label(this.summary, "thought", { seconds: number((this.thought - this.first) / 1000, 1) });
      }
    }
    this.calling.replaceChildren(
      ...this.calls.map((call) =>
        make("details.call", {}, label(make("summary"), "tool.call", { name: call.name }), make("pre", {}, call.text)),
      ),
    );
    if (this.showsTokens) {
      this.tokenBox.replaceChildren(renderTokens(this.tokens));
    }
    scrollDown();
  }

  finish(ending = this.ending) {
    this.ending = ending;
    if (this.reasoning) {
      this.thought ??= performance.now();
    }
    this.node.setAttribute("aria-busy", "false");
    this.render();
    this.showFacts();
  }

  fail(error) {
    this.error = error;
    const known = { network: "error.network", unauthorized: "error.unauthorized", cut: "error.cut" }[error.message];
    const message = make("p");
    if (known) {
      label(message, known);
    } else {
      message.textContent = error.message;
    }
    this.problem.replaceChildren(label(make("strong"), "error.title"), message);
    this.problem.hidden = false;
    if (error.body) {
      this.received.push(error.body);
    }
    this.finish("error");
  }

  showFacts() {
    const parts = [];
    if (this.ending === "stopped" || this.ending === "length") {
      parts.push(["answer." + this.ending, {}]);
    }
    const count = this.numTokens || this.tokens.length;
    if (count) {
      parts.push(["answer.tokens", { tokens: number(count) }]);
    }
    if (count > 1 && this.last > this.first) {
      parts.push(["answer.rate", { rate: number(((count - 1) * 1000) / (this.last - this.first), 1) }]);
    }
    if (this.first !== null) {
      parts.push(["answer.first", { seconds: duration((this.first - this.sent) / 1000) }]);
    }
    this.facts.replaceChildren(...parts.map(([key, values]) => label(make("span"), key, values)));
    if (this.usage && longest) {
      label(byId("usage"), "usage", { used: number(this.usage.total_tokens), total: number(longest) });
    }
  }

  showActions() {
    const arriving = this.node.getAttribute("aria-busy") === "true";
    this.actions.hidden = arriving;
    this.again.hidden = turns[turns.length - 1] !== this;
    this.again.disabled = running !== null;
    this.toggle.hidden = !this.body.logprobs;
  }

  askAgain() {
    if (running) {
      return;
    }
    cut(turns.indexOf(this));
    byId("prompt").focus();
    answer();
  }

  toggleTokens() {
    this.showsTokens = !this.showsTokens;
    this.toggle.setAttribute("aria-pressed", String(this.showsTokens));
    this.prose.hidden = this.showsTokens;
    this.details.hidden = this.showsTokens || !this.reasoning;
    this.tokenBox.hidden = !this.showsTokens;
    this.tokenBox.replaceChildren(this.showsTokens ? renderTokens(this.tokens) : "");
    label(this.toggle, this.showsTokens ? "view.text" : "view.tokens");
  }

  showRaw() {
    byId("raw-request").textContent = curl(PATH, this.body);
    byId("raw-response").textContent = this.received.join("\n\n");
    byId("raw").showModal();
  }
}
