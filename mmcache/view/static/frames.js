// A view in its frame: what it is, what was sampled, the Python that makes it, its data; and the controls above it.

import { address, dark, draw, h, number } from "./parts.js";

// What `fill` gives where there is nothing to draw.
export const NO_FIGURE = Symbol("no figure");

// Show a view. `fill(view, body, figure)` puts in what there is to read; the figure comes behind it unless it is placed.
export async function show(context, host, panel, parameters, fill, options = {}) {
  const section = h("section", { class: "frame", "data-view": panel }, h("p", { class: "waiting" }, "Reading …"));
  host.append(section);
  try {
    const drawing = { figure: options.figure ? 1 : "", dark: options.figure && dark.matches ? 1 : "", brief: options.brief ? 1 : "" };
    const view = await context.load(address(panel, { ...parameters, ...drawing }));
    const body = h("div");
    const figure = h("div", { class: "figure", id: options.id });
    section.replaceChildren(...heading(context, view, address(panel, parameters), options.title), body);
    if (fill(view, body, figure) === NO_FIGURE || !options.figure) return view;
    figure.style.minHeight = `${view.figure.layout.height ?? 300}px`;
    if (!figure.isConnected) body.append(figure);
    await draw(figure, view.figure, context.facts.plotly, { drag: options.drag });
    if (figure.isConnected) options.drawn?.(view, figure);
    return view;
  } catch (error) {
    if (error.name !== "AbortError") section.replaceChildren(h("p", { role: "alert" }, error.message));
    return null;
  }
}

function heading(context, view, data, title) {
  const said = `${context.facts.python}\n${view.python}`;
  const python = h("div", { class: "python", hidden: true }, h("pre", { tabindex: "0" }, h("code", {}, said)),
    h("button", { type: "button", onclick: (event) => copy(said, event.target) }, "Copy"));
  const toggle = h("button", { type: "button", "aria-expanded": "false", onclick: () => {
    python.hidden = !python.hidden;
    toggle.setAttribute("aria-expanded", String(!python.hidden));
  } }, "Python");
  return [
    h("header", {}, h("h2", {}, title ?? view.title), toggle, h("a", { href: data, target: "_blank", rel: "noopener" }, "JSON")),
    view.sampled ? h("p", { class: "sampled" }, view.sampled) : "",
    python,
  ];
}

async function copy(text, button) {
  let said = "Copied";
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without leave for the clipboard, the text is selected instead: Ctrl-C takes it.
    getSelection().selectAllChildren(button.previousElementSibling);
    said = "Selected";
  }
  button.textContent = said;
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}

export function controls(...children) {
  return h("div", { class: "controls" }, ...children);
}

function labelled(name, control) {
  return h("label", {}, name, control);
}

export function select(id, name, options, value, onchange) {
  const element = h("select", { id, onchange: () => onchange(element.value) },
    options.map(([key, said]) => h("option", { value: key, selected: String(key) === String(value) }, said)));
  return labelled(name, element);
}

export function field(id, name, value, onchange, more = {}) {
  const element = h("input", { id, type: "number", value: value ?? "", onchange: () => onchange(element.value.trim()), ...more });
  return labelled(name, element);
}

export function button(said, onclick, more = {}) {
  return h("button", { type: "button", onclick, ...more }, said);
}

export function siteSelect(context) {
  const sites = Object.keys(context.facts.sites);
  return select("site", "Site", sites.map((site) => [site, site]), context.site, (site) => context.go({ site }));
}

export function layerSelect(context) {
  return select("layer", "Layer", context.facts.layers.map((layer) => [layer, layer]), context.layer, (layer) => context.go({ layer }));
}

// Tokens in their contexts: each opens the text there.
export function contexts(context, rows, valueOf) {
  return h("ul", { class: "contexts" }, rows.map((row) => h("li", {},
    h("span", { class: "value" }, valueOf(row)),
    button(number(row.position), () => context.go(placeOf(row)), { class: "link", "data-position": row.position, "aria-label": `position ${row.position}` }),
    // Laid out in the direction of what is written, so that what comes before stands where it is read first.
    h("span", { class: "context line", dir: "auto" }, h("bdi", { class: "before" }, h("bdi", {}, flat(row.before))), h("mark", {}, flat(row.text) || "·"), h("bdi", {}, flat(row.after))))));
}

function flat(text) {
  return text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll("\r", "␍");
}

// Tokens before and behind one in its context: a letter each, as in models of bytes, they fill a line.
export const AROUND = 48;

// Where in the text panel a token is shown.
export const SHOWN = 1024;

export function placeOf(row) {
  return { panel: "text", position: row.position, sequence: row.sequence, from: Math.floor(row.offset / SHOWN) * SHOWN || "" };
}
