// Markdown to nodes. What a model writes is text: HTML in it stays visible text, links lead to http, https and mailto
// only, and images become links, since the page loads nothing from elsewhere.

import { copyText, make } from "./dom.js";
import { label } from "./i18n.js";

const MAX_DEPTH = 12; // of lists, quotes and emphasis in each other; deeper ones are plain text
const MAX_TRIES = 50; // ends of emphasis that are looked at
const MAX_LINK_TEXT = 1000;
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`\s]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})(?:\s+(.*?))?(?:\s+#+)?\s*$/;
const RULE = /^ {0,3}(?:(?:-[ \t]*){3,}|(?:\*[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(?:( {1,4})(?=\S)|[ \t]*$|[ \t]+)/;
const TABLE_RULE = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
const INDENTED = /^(?: {4}|\t)/;
const ENTITIES = { "&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&#39;": "'", "&nbsp;": "\u00a0" };
const SAFE_SCHEMES = new Set(["http:", "https:", "mailto:"]);
const PUNCTUATION = /[!-/:-@[-`{-~]/;

/** Shows a growing text in `container`: only blocks whose source has changed are made anew. */
export class MarkdownView {
  constructor(container) {
    this.container = container;
    this.sources = [];
  }

  update(source) {
    const blocks = splitBlocks(source.split("\n"));
    blocks.forEach((block, index) => {
      if (this.sources[index] === block.source) {
        return;
      }
      const node = renderBlock(block, 0);
      const old = this.container.children[index];
      if (old) {
        old.replaceWith(node);
      } else {
        this.container.append(node);
      }
      this.sources[index] = block.source;
    });
    while (this.container.children.length > blocks.length) {
      this.container.lastElementChild.remove();
    }
    this.sources.length = blocks.length;
  }
}

/** All of `source` as nodes. */
export function renderMarkdown(source, depth = 0) {
  return splitBlocks(source.split("\n")).map((block) => renderBlock(block, depth));
}

/** The top-level blocks: {kind, lines, source} and what their kind needs. */
function splitBlocks(lines) {
  const blocks = [];
  let at = 0;
  const take = (kind, end, rest = {}) => {
    const own = lines.slice(at, end);
    blocks.push({ kind, lines: own, source: `${kind}\n${own.join("\n")}`, ...rest });
    at = end;
  };
  while (at < lines.length) {
    const line = lines[at];
    const fence = FENCE.exec(line);
    const heading = fence ? null : HEADING.exec(line);
    if (!line.trim()) {
      at += 1;
    } else if (fence) {
      take("code", endOfFence(lines, at, fence[1]), { mark: fence[1], language: fence[2] });
    } else if (heading) {
      take("heading", at + 1, { level: heading[1].length, text: heading[2] ?? "" });
    } else if (RULE.test(line)) {
      take("rule", at + 1);
    } else if (INDENTED.test(line)) {
      let end = at + 1;
      while (end < lines.length && (INDENTED.test(lines[end]) || (!lines[end].trim() && INDENTED.test(lines[end + 1] ?? "")))) {
        end += 1;
      }
      take("indented", end);
    } else if (QUOTE.test(line)) {
      let end = at + 1;
      // A line of the quote's last paragraph may lack the mark.
      while (end < lines.length && (QUOTE.test(lines[end]) || (!startsBlock(lines, end) && lines[end - 1].replace(QUOTE, "").trim()))) {
        end += 1;
      }
      take("quote", end);
    } else if (ITEM.test(line)) {
      take("list", endOfList(lines, at));
    } else if (isTable(lines, at)) {
      let end = at + 2;
      while (end < lines.length && lines[end].includes("|")) {
        end += 1;
      }
      take("table", end);
    } else {
      let end = at + 1;
      while (end < lines.length && !startsBlock(lines, end)) {
        end += 1;
      }
      take("paragraph", end);
    }
  }
  return blocks;
}

function startsBlock(lines, at) {
  const line = lines[at];
  return (
    !line.trim() || FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line) ||
    isTable(lines, at)
  );
}

function isTable(lines, at) {
  return lines[at].includes("|") && at + 1 < lines.length && lines[at + 1].includes("|") && TABLE_RULE.test(lines[at + 1]);
}

function closesFence(line, mark) {
  const text = line.trim();
  return text.length >= mark.length && text.startsWith(mark) && text === mark[0].repeat(text.length);
}

function endOfFence(lines, at, mark) {
  let end = at + 1;
  while (end < lines.length && !closesFence(lines[end], mark)) {
    end += 1;
  }
  return Math.min(end + 1, lines.length);
}

const indentOf = (line) => line.length - line.trimStart().length;

/** Where the marker of an item ends and its text begins. */
function contentColumn(found) {
  const marker = found[1].length + found[2].length;
  return marker + (found[3]?.length ?? 1);
}

function endOfList(lines, start) {
  const ordered = /\d/.test(ITEM.exec(lines[start])[2]);
  let column = contentColumn(ITEM.exec(lines[start]));
  let end = start + 1;
  for (; end < lines.length; end += 1) {
    const line = lines[end];
    const next = lines[end + 1] ?? "";
    if (!line.trim()) {
      const goes = next.trim() && (indentOf(next) >= column || isSameList(next, ordered));
      if (!goes) {
        break;
      }
    } else if (isSameList(line, ordered)) {
      column = contentColumn(ITEM.exec(line));
    } else if (indentOf(line) < column && (startsBlock(lines, end) || !lines[end - 1].trim())) {
      break;
    }
  }
  return end;
}

function isSameList(line, ordered) {
  const found = ITEM.exec(line);
  return found !== null && !RULE.test(line) && /\d/.test(found[2]) === ordered;
}

function renderBlock(block, depth) {
  switch (block.kind) {
    case "code": {
      const closed = block.lines.length > 1 && closesFence(block.lines[block.lines.length - 1], block.mark);
      return codeBlock(block.lines.slice(1, closed ? -1 : undefined), block.language);
    }
    case "indented":
      return codeBlock(block.lines.map((line) => line.replace(INDENTED, "")), "");
    case "heading": {
      const node = make(`h${Math.min(block.level + 2, 6)}`); // the page's own headings stand above
      addInline(node, block.text, depth);
      return node;
    }
    case "rule":
      return make("hr");
    case "quote":
      return quote(block, depth);
    case "list":
      return depth < MAX_DEPTH ? list(block, depth) : paragraph(block.lines, depth);
    case "table":
      return table(block, depth);
    default:
      return paragraph(block.lines, depth);
  }
}

function codeBlock(lines, language) {
  const text = lines.join("\n");
  const button = label(make("button.quiet", { type: "button" }), "copy");
  button.addEventListener("click", async () => {
    label(button, (await copyText(text)) ? "copied" : "copy.failed");
    setTimeout(() => label(button, "copy"), 1500);
  });
  return make(
    "figure.code",
    { translate: "no" },
    make("figcaption", {}, make("span", {}, language), button),
    make("pre", { tabindex: "0" }, make("code", {}, text)),
  );
}

function paragraph(lines, depth) {
  const node = make("p");
  addInline(node, lines.map((line) => line.trimStart()).join("\n"), depth);
  return node;
}

function quote({ lines }, depth) {
  const inner = lines.map((line) => line.replace(QUOTE, ""));
  if (depth >= MAX_DEPTH) {
    return paragraph(inner, depth);
  }
  return make("blockquote", {}, ...renderMarkdown(inner.join("\n"), depth + 1));
}

function list({ lines }, depth) {
  const first = ITEM.exec(lines[0]);
  const ordered = /\d/.test(first[2]);
  const start = ordered ? Number.parseInt(first[2], 10) : 1;
  const node = make(ordered ? "ol" : "ul", start === 1 ? {} : { start });
  const items = [];
  let column = 0;
  for (const line of lines) {
    const found = isSameList(line, ordered) && (!items.length || indentOf(line) < column) ? ITEM.exec(line) : null;
    if (found) {
      column = contentColumn(found);
      items.push([line.slice(column)]);
    } else {
      items[items.length - 1].push(line.slice(Math.min(column, indentOf(line))));
    }
  }
  const loose = items.some((item) => item.includes("")); // a list ends before the blank line behind it
  for (const item of items) {
    const children = renderMarkdown(item.join("\n"), depth + 1);
    const tight = !loose && children[0]?.tagName === "P" ? [...children[0].childNodes, ...children.slice(1)] : children;
    node.append(make("li", {}, ...tight));
  }
  return node;
}

function cells(line) {
  const row = line.trim().replace(/^\|/, "").replace(/\|$/, "");
  return row.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function table({ lines }, depth) {
  const aligns = cells(lines[1]).map((cell) => {
    const [left, right] = [cell.startsWith(":"), cell.endsWith(":")];
    return left && right ? "center" : right ? "right" : "left";
  });
  const row = (name, line) => {
    const node = make("tr");
    const own = cells(line);
    aligns.forEach((align, index) => {
      const cell = make(`${name}.${align}`);
      addInline(cell, own[index] ?? "", depth);
      node.append(cell);
    });
    return node;
  };
  const body = lines.slice(2).map((line) => row("td", line));
  return make("div.table", { tabindex: "0" }, make("table", {}, make("thead", {}, row("th", lines[0])), make("tbody", {}, ...body)));
}

/** Adds `source` to `node`: code, emphasis, links; everything else as text. */
function addInline(node, source, depth) {
  let plain = "";
  let at = 0;
  const exhausted = new Set(); // delimiters of which there are no more: looking again would make long texts slow
  const flush = () => {
    if (plain) {
      node.append(plain);
      plain = "";
    }
  };
  const find = (mark, from) => {
    if (exhausted.has(mark)) {
      return -1;
    }
    const found = source.indexOf(mark, from);
    if (found < 0) {
      exhausted.add(mark);
    }
    return found;
  };
  const nest = (name, inner, end) => {
    flush();
    const child = make(name);
    addInline(child, inner, depth + 1);
    node.append(child);
    at = end;
  };
  const before = (index) => (index ? source[index - 1] : " ");
  while (at < source.length) {
    const character = source[at];
    if (character === "\\" && PUNCTUATION.test(source[at + 1] ?? "")) {
      plain += source[at + 1];
      at += 2;
      continue;
    }
    if (character === "\n") {
      const hard = /(?: {2,}|\\)$/.test(plain);
      plain = plain.replace(/(?: +|\\)$/, "");
      flush();
      node.append(hard ? make("br") : "\n");
      at += 1;
      continue;
    }
    if (character === "`") {
      const mark = /^`+/.exec(source.slice(at, at + 16))[0];
      const end = find(mark, at + mark.length);
      if (end > 0) {
        flush();
        let code = source.slice(at + mark.length, end).replaceAll("\n", " ");
        if (code.startsWith(" ") && code.endsWith(" ") && code.trim()) {
          code = code.slice(1, -1);
        }
        node.append(make("code", { translate: "no" }, code));
        at = end + mark.length;
        continue;
      }
      plain += mark;
      at += mark.length;
      continue;
    }
    if (depth < MAX_DEPTH && (character === "*" || character === "_" || character === "~")) {
      const run = source.startsWith(character.repeat(3), at) ? 3 : source.startsWith(character.repeat(2), at) ? 2 : 1;
      const mark = character.repeat(character === "~" ? Math.min(run, 2) : run);
      const opens = character === "*" || !/\w/.test(before(at)) ? /\S/.test(source[at + mark.length] ?? " ") : false;
      if (opens && (character !== "~" || run > 1)) {
        let end = find(mark, at + mark.length + 1);
        for (let tries = 0; end > 0 && !closes(source, end, mark); tries += 1) {
          end = tries < MAX_TRIES ? find(mark, end + 1) : -1;
        }
        if (end > 0) {
          const name = character === "~" ? "del" : run > 1 ? "strong" : "em";
          const inner = source.slice(at + mark.length, end);
          nest(name, mark.length === 3 ? `*${inner}*` : inner, end + mark.length);
          continue;
        }
      }
      plain += mark;
      at += mark.length;
      continue;
    }
    if (character === "[" || (character === "!" && source[at + 1] === "[")) {
      const link = readLink(source, character === "!" ? at + 1 : at, find);
      if (link) {
        flush();
        node.append(anchor(link.address, link.text || link.address, depth));
        at = link.end;
        continue;
      }
    }
    if (character === "<" || character === "h") {
      const bare = /^(?:<((?:https?:\/\/|mailto:)[^\s<>]{1,2000})>|(https?:\/\/[^\s<>"'`]{1,2000}))/.exec(source.slice(at, at + 2010));
      if (bare && (bare[1] || !/\w/.test(before(at)))) {
        const address = bare[1] ?? bare[2].replace(/[).,:;!?*_~\]]+$/, "");
        flush();
        node.append(anchor(address, null, depth));
        at += bare[1] ? bare[0].length : address.length;
        continue;
      }
    }
    const entity = character === "&" ? /^&(?:amp|lt|gt|quot|#39|nbsp);/.exec(source.slice(at, at + 6)) : null;
    plain += entity ? ENTITIES[entity[0]] : character;
    at += entity ? entity[0].length : 1;
  }
  flush();
}

function closes(source, at, mark) {
  const after = source[at + mark.length] ?? " ";
  if (!/\S/.test(source[at - 1])) {
    return false;
  }
  if (mark.length === 1 && (after === mark || source[at - 1] === mark)) {
    return false; // half of a double one
  }
  return mark[0] !== "_" || !/\w/.test(after);
}

/** [text](address "title") at `at`. */
function readLink(source, at, find) {
  const middle = find("](", at + 1);
  if (middle < 0 || middle - at > MAX_LINK_TEXT || source.slice(at + 1, middle).includes("\n\n")) {
    return null;
  }
  const text = source.slice(at + 1, middle);
  const rest = /^\s*<?((?:[^\s<>()]|\([^\s<>()]*\))*)>?(?:\s+"[^"\n]{0,500}")?\s*\)/.exec(source.slice(middle + 2, middle + 2600));
  return rest && !text.includes("[") ? { text, address: rest[1], end: middle + 2 + rest[0].length } : null;
}

/** A link that leads out of the page, or its text where the address is not one to follow. */
function anchor(address, text, depth) {
  const node = isSafe(address)
    ? make("a", { href: address, target: "_blank", rel: "noopener noreferrer nofollow" })
    : make("span.nolink");
  if (text === null || depth >= MAX_DEPTH) {
    node.append(text ?? address);
  } else {
    addInline(node, text, Math.max(depth + 1, MAX_DEPTH - 2));
  }
  return node;
}

function isSafe(address) {
  try {
    return SAFE_SCHEMES.has(new URL(address).protocol);
  } catch {
    return false; // relative ones would lead into this server
  }
}
