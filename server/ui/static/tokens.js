// The tokens of an answer, tinted by their probability; a card tells the likeliest alternatives of the one under the
// pointer or the focus.

import { byId, make } from "./dom.js";
import { number, text } from "./i18n.js";

const LEVELS = [0.9, 0.6, 0.3, 0.1]; // of probability, best first: the tint is the number of those not reached
const MARGIN = 8; // pixels between card, token and window

/** A token so that its spaces and line breaks can be seen. */
function visible(token) {
  return token.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣") || "∅";
}

function percent(logprob) {
  const share = Math.exp(logprob) * 100;
  return `${number(share, share < 1 ? 2 : 1)} %`;
}

/** Shows `entries`, the logprobs of a chat completion, as one focusable span per token. */
export function renderTokens(entries) {
  if (!entries.length) {
    return make("p.hint", {}, text("token.none"));
  }
  const spans = entries.map((entry) => {
    const probability = Math.exp(entry.logprob);
    const level = LEVELS.filter((bound) => probability < bound).length;
    const span = make(`span.token.p${level}`, { tabindex: "-1", role: "button", "aria-describedby": "token-card" });
    const breaks = entry.token.split("\n").length - 1;
    span.append(breaks ? entry.token.replaceAll("\n", "↵") : entry.token);
    span.entry = entry;
    return breaks ? [span, make("br")] : [span];
  });
  const flat = spans.flat();
  flat[0].tabIndex = 0;
  const box = make("div.tokens", { role: "group", "aria-label": text("token.keys"), translate: "no" }, ...flat);
  box.addEventListener("pointerover", ({ target }) => target.entry && showCard(target));
  box.addEventListener("pointerleave", hideCard);
  box.addEventListener("focusin", ({ target }) => target.entry && showCard(target));
  box.addEventListener("focusout", hideCard);
  box.addEventListener("keydown", moveFocus);
  return box;
}

function moveFocus(event) {
  const tokens = [...event.currentTarget.querySelectorAll(".token")];
  const at = tokens.indexOf(event.target);
  const steps = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: tokens.length - 1 };
  if (event.key === "Escape") {
    hideCard();
    return;
  }
  const next = tokens[steps[event.key]];
  if (at < 0 || !next) {
    return;
  }
  event.preventDefault();
  event.target.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

function showCard(span) {
  const card = byId("token-card");
  const { entry } = span;
  const alternatives = entry.top_logprobs;
  const known = alternatives.some((other) => other.token === entry.token && other.logprob === entry.logprob);
  const row = (item, chosen, note) => {
    const meter = make("i");
    meter.style.width = `${Math.exp(item.logprob) * 100}%`;
    return make(
      chosen ? "li.chosen" : "li",
      {},
      make("code", {}, visible(item.token)),
      make("span.meter", { "aria-hidden": "true" }, meter),
      make("span.share", {}, percent(item.logprob)),
      note && make("small", {}, note),
    );
  };
  card.replaceChildren(
    make(
      "ol",
      {},
      ...alternatives.map((item) => row(item, item.token === entry.token && item.logprob === entry.logprob)),
      known ? null : row(entry, true, alternatives.length ? text("token.rank") : text("token.probability")),
    ),
  );
  card.hidden = false;
  place(card, span.getClientRects()[0] ?? span.getBoundingClientRect());
}

function place(card, anchor) {
  const { width, height } = card.getBoundingClientRect();
  const left = Math.max(MARGIN, Math.min(anchor.left, window.innerWidth - width - MARGIN));
  const below = anchor.bottom + MARGIN;
  card.style.left = `${left}px`;
  card.style.top = `${below + height + MARGIN > window.innerHeight ? Math.max(MARGIN, anchor.top - height - MARGIN) : below}px`;
}

export function hideCard() {
  byId("token-card").hidden = true;
}
