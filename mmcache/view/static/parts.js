// What every panel is made of: elements, numbers as text, data, figures.
// Texts of the store only ever become text nodes and attributes that hold no code: nothing here parses HTML.

import { authorization } from "./access.js";

export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined).map(asNode));
  return element;
}

function asNode(child) {
  return child instanceof Node ? child : document.createTextNode(String(child));
}

// Numbers come as numbers, or as "NaN", "Infinity" and "-Infinity", which JSON has no numbers for.
export function number(value, digits = 5) {
  if (value === null || value === undefined) return "";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value)) return value.toLocaleString("en-US");
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-4 || size >= 1e7) ? value.toExponential(digits - 2) : String(Number(value.toPrecision(digits)));
}

export function bytes(count) {
  const units = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let at = 0;
  while (count >= 1024 && at < units.length - 1) { count /= 1024; at += 1; }
  return at ? `${count.toFixed(1)} ${units[at]}` : `${count} bytes`;
}

export function visible(text) {
  return text.replaceAll("\n", "↵\n").replaceAll("\t", "⇥\t").replaceAll("\r", "␍");
}

export function table(columns, rows, options = {}) {
  const cell = (tag, column, content) => h(tag, { class: column.kind, scope: tag === "th" ? "col" : null }, content);
  const body = rows.map((row) => h("tr", { class: options.chosen?.(row) ? "chosen" : null },
    columns.map((column) => {
      const found = column.of(row);
      return cell("td", column, found instanceof Node ? found : column.kind === "number" ? number(found) : String(found ?? ""));
    })));
  return h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": options.label ?? "table" },
    h("table", { id: options.id }, h("thead", {}, h("tr", {}, columns.map((column) => cell("th", column, column.name)))), h("tbody", {}, body)));
}

export function facts(pairs, kind = "facts") {
  return h("dl", { class: kind }, pairs.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
}

export const dark = matchMedia("(prefers-color-scheme: dark)");

export function address(panel, parameters) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(parameters)) {
    if (value !== undefined && value !== null && value !== "") query.set(name, value);
  }
  const asked = query.toString();
  return `${panel}.json${asked ? `?${asked}` : ""}`;
}

const kept = new Map();

export function request(where, signal) {
  return fetch(where, { signal, headers: authorization() });
}

// Ask for data; what was asked for lately is kept, so that going back takes no time.
export async function load(where, signal) {
  if (kept.has(where)) return kept.get(where);
  const answer = await request(where, signal);
  const type = answer.headers.get("content-type") ?? "";
  const found = type.startsWith("application/json") ? await answer.json() : { error: await answer.text() };
  if (!answer.ok) throw new Error(found.error ?? `the server answered ${answer.status}`);
  kept.set(where, found);
  if (kept.size > 40) kept.delete(kept.keys().next().value);
  return found;
}

export function forget() {
  kept.clear();
}

// Text comes before figures: plotly.js is asked for when there is something to read.
export function painted() {
  return new Promise((done) => {
    requestAnimationFrame(() => setTimeout(done));
    // No frames are drawn in a tab that is not seen.
    setTimeout(done, 200);
  });
}

let library = null;

function plotly(source) {
  library ??= new Promise((done, failed) => {
    const script = h("script", { src: source, onload: () => done(window.Plotly), onerror: () => failed(new Error("plotly.js did not come")) });
    document.head.append(script);
  });
  return library;
}

export async function draw(element, figure, source, { drag = false } = {}) {
  await painted();
  const Plotly = await plotly(source);
  if (!element.isConnected) return;
  const layout = structuredClone(figure.layout);
  // The heading above says it.
  delete layout.title;
  layout.margin = { ...layout.margin, t: figure.data.some((trace) => trace.name) ? 34 : layout.shapes ? 26 : 10 };
  layout.dragmode = drag ? "zoom" : false;
  layout.autosize = true;
  if (element.clientWidth < 500) {
    layout.margin = { ...layout.margin, l: 40, r: 4 };
    for (const trace of figure.data) if (trace.colorbar) trace.colorbar = { ...trace.colorbar, title: undefined, thickness: 8 };
  }
  await Plotly.newPlot(element, structuredClone(figure.data), layout, {
    responsive: true, displaylogo: false, showTips: false, doubleClick: false,
    modeBarButtonsToRemove: ["zoom2d", "pan2d", "select2d", "lasso2d", "zoomIn2d", "zoomOut2d", "autoScale2d", "resetScale2d"],
  });
}

// Figures of views that went leave their listeners otherwise.
export function clear(host) {
  if (window.Plotly) for (const element of host.querySelectorAll(".js-plotly-plot")) window.Plotly.purge(element);
  host.replaceChildren();
}
