// The page itself: its state is the address, and each panel is drawn anew from it.

import { enter } from "./access.js";
import { address, clear, dark, forget, h, load, number, request } from "./parts.js";
import { overview } from "./overview.js";
import { health, norms } from "./norms.js";
import { dimensions, top } from "./dimensions.js";
import { lens, text } from "./text.js";
import { search } from "./search.js";

const PANELS = {
  overview: ["Overview", overview],
  health: ["Health", health],
  norms: ["Norms", norms],
  dimensions: ["Dimensions", dimensions],
  text: ["Text", text],
  top: ["Top", top],
  search: ["Search", search],
  lens: ["Lens", lens],
};

const host = document.getElementById("panel");
let facts = null;
let running = new AbortController();

function stateOf() {
  return Object.fromEntries(new URLSearchParams(location.search));
}

function write(changes, replace) {
  const query = new URLSearchParams(location.search);
  for (const [name, value] of Object.entries(changes)) {
    if (value === "" || value === null || value === undefined) query.delete(name);
    else query.set(name, value);
  }
  const asked = query.toString();
  history[replace ? "replaceState" : "pushState"](null, "", asked ? `/?${asked}` : "/");
}

function contextOf(state, signal) {
  return {
    facts,
    state,
    site: state.site ?? Object.keys(facts.sites)[0] ?? "",
    layer: state.layer ?? facts.layers[0] ?? 0,
    load: (where) => load(where, signal),
    alive: () => !signal.aborted,
    // Show another state of the page.
    go: (changes) => { write(changes); render(); },
    // Write it down only: the panel shows it by itself.
    note: (changes) => { write(changes); Object.assign(state, changes); },
  };
}

async function render() {
  running.abort();
  running = new AbortController();
  const { signal } = running;
  delete document.body.dataset.ready;
  const state = stateOf();
  const name = shown(state.panel) ? state.panel : "overview";
  const focused = document.activeElement?.id;
  for (const tab of document.querySelectorAll("[role=tab]")) {
    tab.setAttribute("aria-selected", String(tab.dataset.panel === name));
    tab.tabIndex = tab.dataset.panel === name ? 0 : -1;
  }
  host.setAttribute("aria-labelledby", `tab-${name}`);
  host.dataset.shown = name;
  document.title = `${PANELS[name][0]} · ${facts.name} · mmcache`;
  clear(host);
  const drawn = PANELS[name][1](contextOf(state, signal), host);
  if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
  try {
    await drawn;
  } catch (error) {
    if (error.name !== "AbortError") host.append(h("p", { role: "alert" }, error.message));
  }
  if (!signal.aborted) document.body.dataset.ready = "1";
}

function shown(name) {
  return Object.hasOwn(PANELS, name ?? "") && (name !== "lens" || facts.lens);
}

function makeTabs() {
  const tabs = document.getElementById("tabs");
  const open = (panel) => { write({ panel: panel === "overview" ? "" : panel }); render(); };
  tabs.replaceChildren(...Object.entries(PANELS).filter(([name]) => shown(name)).map(([name, [said]]) =>
    h("button", { type: "button", role: "tab", id: `tab-${name}`, "data-panel": name, "aria-controls": "panel", onclick: () => open(name) }, said)));
  tabs.addEventListener("keydown", (event) => {
    const all = [...tabs.children];
    const at = all.indexOf(document.activeElement);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1 + all.length, Home: 0, End: all.length - 1 }[event.key];
    if (to === undefined || at < 0) return;
    event.preventDefault();
    const next = all[to % all.length];
    next.focus();
    open(next.dataset.panel);
  });
}

function begin(found) {
  facts = found;
  document.getElementById("name").textContent = facts.name;
  const sites = Object.keys(facts.sites).length;
  document.getElementById("summary").textContent =
    `${number(facts.n_tokens)} tokens in ${number(facts.n_sequences)} sequences · ${facts.layers.length} layers · ${sites} ${sites === 1 ? "site" : "sites"}`;
  makeTabs();
  render();
}

// Data in a tab of their own, at their own address.
async function showData() {
  const answer = await request(location.href);
  document.body.replaceChildren(h("pre", { class: "data" }, await answer.text()));
  document.body.dataset.ready = "1";
}

function showPage() {
  addEventListener("popstate", () => { if (facts) render(); });
  dark.addEventListener("change", () => { forget(); if (facts) render(); });
  // Both at once: the first sight of a store waits for no second question.
  load(address("overview", {})).catch(() => null);
  load("page.json").then(begin, (error) => host.replaceChildren(h("p", { role: "alert" }, error.message)));
}

// An address with a token, opened where the page is already.
addEventListener("hashchange", () => location.reload());
await enter();
if (location.pathname === "/") showPage();
else showData();
