// The page: its two views, the status of the server, theme and language.

import { askForKey, getJson, hasKey, health, onKey } from "./api.js";
import { setLongest, startChat } from "./chat.js";
import { byId, recall, remember } from "./dom.js";
import { look, startEngine } from "./engine.js";
import { currentLanguage, label, setLanguage, text, translate } from "./i18n.js";
import { showSettings } from "./settings.js";

const VIEWS = ["chat", "engine"];
const THEMES = ["auto", "light", "dark"];
const POLL_MILLISECONDS = 1000;
let view = "chat";
let polling = null;

function showView(name, focus = false) {
  view = name;
  for (const other of VIEWS) {
    const tab = byId(`tab-${other}`);
    const selected = other === name;
    tab.setAttribute("aria-selected", String(selected));
    tab.tabIndex = selected ? 0 : -1;
    byId(`view-${other}`).hidden = !selected;
    if (selected && focus) {
      tab.focus();
    }
  }
  watch();
}

/** The engine is looked at while its view is in front, in a tab that is. */
function watch() {
  look(view === "engine" && document.visibilityState === "visible");
}

function startTabs() {
  for (const name of VIEWS) {
    const tab = byId(`tab-${name}`);
    tab.addEventListener("click", () => {
      location.hash = name;
    });
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (step) {
        event.preventDefault();
        const next = VIEWS[(VIEWS.indexOf(view) + step + VIEWS.length) % VIEWS.length];
        location.hash = next;
        showView(next, true);
      }
    });
  }
  const fromAddress = () => {
    const name = location.hash.slice(1);
    if (VIEWS.includes(name)) {
      showView(name);
    }
  };
  window.addEventListener("hashchange", fromAddress);
  document.addEventListener("visibilitychange", watch);
  showView("chat");
  fromAddress();
}

function showStatus(status) {
  byId("status").dataset.status = status;
  label(byId("status-text"), `status.${status}`);
  if (status !== "ready") {
    poll();
  }
}

/** Asks for the health until requests are served, and then no more. */
function poll() {
  polling ??= setTimeout(async () => {
    polling = null;
    await checkHealth();
  }, POLL_MILLISECONDS);
}

async function checkHealth() {
  const status = await health();
  const was = byId("status").dataset.status;
  showStatus(status);
  if (status === "ready" && was !== "ready") {
    await showModel();
  }
}

async function showModel() {
  try {
    const { data } = await getJson("v1/models");
    const model = data[0];
    byId("model").textContent = model.id;
    document.title = `${model.id} · omni-engine`;
    setLongest(model.max_model_len);
  } catch {
    // The status says what is wrong with the server; without a key there is no name.
  }
}

function startTheme() {
  const stored = recall("theme");
  let theme = THEMES.includes(stored) ? stored : "auto";
  const button = byId("theme");
  const show = () => {
    button.setAttribute("data-i18n-label", `theme.${theme}`);
    button.setAttribute("aria-label", text(`theme.${theme}`));
    button.title = text(`theme.${theme}`);
    if (theme === "auto") {
      delete document.documentElement.dataset.theme;
    } else {
      document.documentElement.dataset.theme = theme;
    }
  };
  button.addEventListener("click", () => {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    remember("theme", theme);
    show();
  });
  show();
}

function startLanguage() {
  const button = byId("language");
  const show = () => {
    button.textContent = currentLanguage() === "en" ? "中文" : "English";
    button.lang = currentLanguage() === "en" ? "zh-Hans" : "en";
  };
  button.addEventListener("click", () => {
    setLanguage(currentLanguage() === "en" ? "zh" : "en");
    show();
  });
  translate(document);
  show();
}

function startSettingsButton() {
  const button = byId("settings-button");
  const panel = byId("settings");
  const set = (open) => {
    button.setAttribute("aria-expanded", String(open));
    panel.classList.toggle("open", open);
  };
  button.addEventListener("click", () => set(button.getAttribute("aria-expanded") !== "true"));
  panel.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      set(false);
      button.focus();
    }
  });
}

function startKeyButton() {
  const button = byId("key-button");
  const show = () => {
    button.hidden = !hasKey();
  };
  onKey(show);
  show();
  button.addEventListener("click", async () => {
    if (await askForKey()) {
      await showModel();
    }
  });
}

showSettings();
startLanguage();
startTheme();
startSettingsButton();
startKeyButton();
startChat(checkHealth);
startEngine(showStatus);
startTabs();
checkHealth();
byId("prompt").focus();
