// Health, and the norm map: from the whole store down to single tokens.

import { h, number, table, visible } from "./parts.js";
import { button, controls, field, NO_FIGURE, show, siteSelect } from "./frames.js";

export async function health(context, host) {
  host.append(controls(siteSelect(context)));
  await show(context, host, "health", { site: context.site }, (view, body, figure) => {
    const { layers, places, far, left_out, problems } = view.data;
    body.append(problems.length
      ? h("ul", { class: "problems", id: "problems" }, problems.map((problem) => h("li", {}, problem)))
      : h("p", { id: "no-problems" }, "No NaN, no infinities, no rows of zeros, no dead dimensions, no rows far from the rest."));
    if (left_out.first) body.append(h("p", { id: "left-out" }, `${number(left_out.first)} tokens are flagged as the first of their sequence, and left out of the statistics.`));
    const some = (told) => layers.some((row) => told(row) > 0);
    body.append(problems.length ? figure : "", h("h3", {}, "Layers"), table([
      { name: "Layer", kind: "number", of: (row) => row.layer },
      { name: "Rows that count", kind: "number", of: (row) => row.rows },
      { name: "Not finite", kind: "number", of: (row) => row.non_finite },
      some((row) => row.non_finite) && { name: "First at", kind: "number", of: (row) => (row.first_non_finite < 0 ? "" : place(context, row.first_non_finite)) },
      { name: "Rows of zeros", kind: "number", of: (row) => row.zero_rows },
      { name: "Overflow in the cast", kind: "number", of: (row) => row.overflow },
      { name: "Dead dimensions", kind: "number", of: (row) => row.n_dead },
      some((row) => row.n_dead) && { name: "Which", kind: "long", of: (row) => row.dead.slice(0, 12).map((one) => one.dimension).join(", ") + (row.n_dead > 12 ? " …" : "") },
    ].filter(Boolean), layers, { label: "Health of layers" }));
    if (places.length) body.append(h("h3", {}, "Where"), table([
      { name: "Layer", kind: "number", of: (row) => row.layer },
      { name: "From", kind: "number", of: (row) => row.tokens[0] },
      { name: "To", kind: "number", of: (row) => row.tokens[1] },
      { name: "Not finite", kind: "number", of: (row) => row.non_finite },
      { name: "First at", kind: "number", of: (row) => (row.first_non_finite < 0 ? "" : place(context, row.first_non_finite)) },
      { name: "Rows of zeros", kind: "number", of: (row) => row.zero_rows },
    ], places, { label: "Where rows are not finite, or all zeros" }));
    if (far.length) body.append(h("h3", {}, "Far from the rest"), table([
      { name: "Layer", kind: "number", of: (row) => row.layer },
      { name: "Rows", of: (row) => (row.exact ? "" : "at least ") + number(row.rows) },
      { name: "Median norm", kind: "number", of: (row) => row.median },
      { name: "Largest norm", kind: "number", of: (row) => row.max_norm },
      { name: "First at", kind: "number", of: (row) => (row.first < 0 ? "" : place(context, row.first)) },
    ], far, { label: "Rows whose norms are over 20 times the median" }));
    return problems.length ? view : NO_FIGURE;
  }, { figure: true });
}

function place(context, position) {
  return button(number(position), () => openToken(context, position), { class: "link" });
}

function openToken(context, position) {
  context.go({ panel: "text", position, sequence: "", from: "" });
}

export async function norms(context, host) {
  const { state, facts } = context;
  const [start, stop] = [Number(state.start ?? 0), Number(state.stop ?? facts.n_tokens)];
  const width = stop - start;
  // Where a step further in would show no less.
  const near = Math.min(8, facts.sites[context.site]?.map_tokens || 1);
  const to = (from) => {
    const first = Math.max(0, Math.min(Math.round(from), facts.n_tokens - width));
    context.go({ start: first, stop: first + width });
  };
  host.append(controls(
    siteSelect(context),
    field("start", "From position", start, (value) => context.go({ start: value }), { min: 0, max: facts.n_tokens - 1 }),
    field("stop", "To before", stop, (value) => context.go({ stop: value }), { min: 1, max: facts.n_tokens }),
    h("div", { class: "group" },
      button("Whole store", () => context.go({ start: "", stop: "" }), { id: "whole" }),
      button("Zoom out", () => zoomOut(context, start, stop), { id: "zoom-out", disabled: width >= facts.n_tokens }),
      button("Zoom in", () => zoomTo(context, start, stop, (start + stop) / 2), { id: "zoom-in", disabled: width <= near }),
      button("Earlier", () => to(start - width), { id: "earlier", disabled: start <= 0 }),
      button("Later", () => to(start + width), { id: "later", disabled: stop >= facts.n_tokens }))));
  const below = h("div");
  host.append(below);
  await normMap(context, below, { start: state.start, stop: state.stop });
  if (context.alive()) await show(context, host, "apart", { site: context.site }, (view, body) => {
    const { first, special } = view.data;
    body.append(h("p", { class: "note" },
      `Mean norms of ${number(first.tokens)} first tokens of sequences and ${number(special.tokens)} BOS or special tokens, at which attention sinks sit, beside all others.`));
  }, { figure: true });
}

// Draw the map; a click goes on into a stretch, and from single tokens to the text.
export function normMap(context, host, range) {
  const drag = matchMedia("(pointer: fine)").matches;
  return show(context, host, "norms", { site: context.site, ...range }, (view, body, figure) => {
    const { edges, level } = view.data;
    const each = edges[1] - edges[0];
    body.append(h("p", { class: "note" }, level === "tokens"
      ? "Each column is one token: choose one to see it in its text. Those marked on top are left out of the colours."
      : `Each column is ${number(each)} tokens, from statistics alone: choose one${drag ? ", or drag over some," : ""} to zoom in.`), figure);
    if (level === "tokens") body.append(tokenRow(context, view.data));
  }, { figure: true, brief: true, id: "norm-map", drag, drawn: (view, figure) => listen(context, view.data, figure) });
}

function listen(context, data, figure) {
  const { edges, level } = data;
  figure.on("plotly_click", ({ points, event }) => {
    const column = points[0].pointIndex[1];
    if (level === "tokens") openToken(context, edges[column]);
    else zoomInto(context, edges, column, positionAt(figure, event) ?? (edges[column] + edges[column + 1]) / 2);
  });
  figure.on("plotly_relayout", (changed) => {
    if (changed["xaxis.range[0]"] === undefined) return;
    const [low, high] = [changed["xaxis.range[0]"], changed["xaxis.range[1]"]].map(Math.round);
    const total = context.facts.n_tokens;
    if (high > low) context.go({ panel: "norms", start: Math.max(0, Math.min(low, total - 1)), stop: Math.max(1, Math.min(high, total)) });
  });
}

function positionAt(figure, event) {
  const axis = figure._fullLayout?.xaxis;
  return axis?.p2d ? axis.p2d(event.clientX - figure.getBoundingClientRect().left - axis._offset) : null;
}

function zoomInto(context, edges, column, position) {
  const [low, high] = [edges[column], edges[column + 1]];
  const { map_tokens: room, chunk_tokens: chunk } = context.facts.sites[context.site];
  if (high - low <= room || (edges.length > 2 && high - low > chunk)) context.go({ panel: "norms", start: low, stop: high });
  else zoomTo(context, low, high, position);
}

// Within one inner chunk there is nothing between the chunk and its tokens: go to those around a position.
function zoomTo(context, low, high, position) {
  const { map_tokens: room, chunk_tokens: chunk } = context.facts.sites[context.site];
  if (room < 1) { openToken(context, Math.floor(position)); return; }
  const width = Math.min(high - low, Math.max(high - low > 2 * chunk ? Math.round((high - low) / 4) : 0, room));
  const last = high - width;
  const start = Math.max(low, Math.min(Math.round(position - width / 2), last));
  const narrower = width === high - low && width > 8 && width <= room ? Math.ceil(width / 4) : width;
  const from = narrower === width ? start : Math.max(low, Math.round(position - narrower / 2));
  context.go({ panel: "norms", start: from, stop: from + narrower });
}

function zoomOut(context, start, stop) {
  const total = context.facts.n_tokens;
  const width = Math.min(total, Math.max((stop - start) * 4, 16));
  const from = Math.max(0, Math.min(Math.round((start + stop - width) / 2), total - width));
  if (width >= total) context.go({ start: "", stop: "" });
  else context.go({ start: from, stop: from + width });
}

// The tokens under the map, for those who use keys.
function tokenRow(context, data) {
  const row = h("p", { class: "text", "aria-label": "Tokens of the map" });
  data.texts.forEach((text, at) => {
    const position = data.edges[at];
    const open = () => openToken(context, position);
    row.append(h("span", {
      class: data.apart[at] ? "token apart" : "token", role: "button", tabindex: at ? "-1" : "0", "data-token-position": position,
      title: `position ${number(position)}`, onclick: open, onkeydown: (event) => { if (event.key === "Enter") open(); else step(event); },
    }, visible(text) || "·"));
  });
  return row;
}

// One token can be reached by Tab, the others from there by arrows.
export function step(event) {
  const to = { ArrowRight: event.target.nextElementSibling, ArrowLeft: event.target.previousElementSibling }[event.key];
  if (!to?.matches(".token")) return;
  event.preventDefault();
  event.target.tabIndex = -1;
  to.tabIndex = 0;
  to.focus();
}
