// Making nodes, remembering choices, copying text. Text only ever becomes text: nothing here parses markup.

const SVG = "http://www.w3.org/2000/svg";

/** An HTML element. `name` may carry classes ("div.card.wide"); `attributes` are set as attributes, functions as event
 * listeners; children are nodes or texts, null ones are left out. */
export function make(name, attributes = {}, ...children) {
  const [tag, ...classes] = name.split(".");
  const node = document.createElement(tag);
  if (classes.length) {
    node.className = classes.join(" ");
  }
  setAttributes(node, attributes);
  append(node, children);
  return node;
}

/** The same for SVG. */
export function draw(name, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, name);
  setAttributes(node, attributes);
  append(node, children);
  return node;
}

function setAttributes(node, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") {
      node.addEventListener(name, value);
    } else if (value === true) {
      node.setAttribute(name, "");
    } else if (value !== null && value !== undefined && value !== false) {
      node.setAttribute(name, String(value));
    }
  }
}

function append(node, children) {
  for (const child of children.flat()) {
    if (child !== null && child !== undefined && child !== false) {
      node.append(child); // a string becomes a text node
    }
  }
}

export const byId = (id) => document.getElementById(id);

/** A choice that outlives the page, where the browser lets it. */
export function remember(name, value) {
  try {
    localStorage.setItem(`omni-engine.${name}`, value);
  } catch {
    // Private windows may refuse; then the choice lasts as long as the page.
  }
}

export function recall(name) {
  try {
    return localStorage.getItem(`omni-engine.${name}`);
  } catch {
    return null;
  }
}

/** Puts `text` on the clipboard; false where the browser does not let us. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Browsers offer the clipboard to secure pages only; a plain http page has the old way.
    const area = make("textarea.hidden", { readonly: true, "aria-hidden": "true" });
    area.value = text;
    const focused = document.activeElement;
    (document.querySelector("dialog[open]") ?? document.body).append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    focused?.focus();
    return done;
  }
}
