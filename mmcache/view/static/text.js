// The text of a sequence, each token coloured by a number; one token through the layers; and the lens.

import { address, facts, h, number, table, visible } from "./parts.js";
import { button, controls, field, layerSelect, placeOf, select, SHOWN, show, siteSelect } from "./frames.js";
import { step } from "./norms.js";

export async function text(context, host) {
  const { state, site, layer } = context;
  if (state.position !== undefined && state.sequence === undefined) {
    // Only the position is known, as from the norm map: where it lies comes with the token.
    const found = await context.load(address("token", { site, position: state.position }));
    if (!context.alive()) return null;
    const { position, sequence, from } = placeOf(found.data);
    Object.assign(state, { position: String(position), sequence: String(sequence), ...(from ? { from: String(from) } : {}) });
  }
  const by = state.by ?? "norm";
  const asked = { site, layer, sequence: state.sequence ?? 0, by, dimension: by === "dimension" ? state.dimension ?? 0 : "", start: state.from };
  host.append(bar(context, by));
  const beside = h("div", { class: "beside" });
  const aside = h("div", { class: "aside" });
  const main = h("div");
  beside.append(main, aside);
  host.append(beside);
  const choose = async (position) => {
    delete document.body.dataset.ready;
    aside.replaceChildren();
    await tokenView(context, aside, position);
    // Below the text, where the window is narrow.
    aside.scrollIntoView({ block: "nearest" });
    if (context.alive()) document.body.dataset.ready = "1";
  };
  return Promise.all([
    show(context, main, "sequence", asked, (view, body) => fillText(context, view.data, body, choose)),
    state.position === undefined
      ? aside.append(h("p", { class: "note frame hint" }, "Choose a token to see it at every layer."))
      : tokenView(context, aside, state.position),
  ]);
}

function bar(context, by) {
  const { state, facts: about } = context;
  const at = Number(state.sequence ?? 0);
  const kinds = [["norm", "norm"], ["dimension", "one dimension"], ...(about.direction ? [["direction", "the direction given"]] : []), ["difference", "difference from the layer before"]];
  const to = (sequence) => context.go({ sequence, from: "", position: "" });
  const most = about.sites[context.site]?.d_model;
  return controls(
    siteSelect(context), layerSelect(context),
    select("by", "Colour by", kinds, by, (chosen) => context.go({ by: chosen })),
    by === "dimension" ? field("dimension", "Dimension", state.dimension ?? 0, (dimension) => context.go({ dimension }), { min: 0, max: most ? most - 1 : null, class: "short" }) : null,
    field("sequence", `Sequence, of ${number(about.n_sequences)}`, at, to, { min: 0, max: about.n_sequences - 1, class: "short" }),
    h("div", { class: "group" },
      button("Previous", () => to(at - 1), { id: "previous", disabled: at <= 0 }),
      button("Next", () => to(at + 1), { id: "next", disabled: at >= about.n_sequences - 1 })));
}

function fillText(context, data, body, choose) {
  const { positions, texts, values, flags, flag_bits, start, length } = data;
  const left_out = Object.values(flag_bits).reduce((all, bit) => all | bit, 0);
  // First and special tokens have norms that would leave no colours for the others.
  const apart = positions.map((_, at) => (flags[at] & left_out) !== 0 || start + at === 0);
  const colours = scale(values.filter((value, at) => !apart[at] && typeof value === "number"), data.by);
  const running = h("p", { class: "text", id: "text" });
  const chosen = Number(context.state.position ?? -1);
  const reachable = Math.max(0, positions.indexOf(chosen));
  const pick = (position, element) => {
    running.querySelector("[aria-current]")?.removeAttribute("aria-current");
    element.setAttribute("aria-current", "true");
    context.note({ position, sequence: data.sequence, from: start || "" });
    choose(position);
  };
  positions.forEach((position, at) => {
    const value = values[at];
    const element = h("span", {
      class: ["token", apart[at] ? "apart" : "", typeof value === "number" ? "" : "missing"].join(" ").trim(),
      role: "button", tabindex: at === reachable ? "0" : "-1", "data-token-position": position, "data-value": value,
      "aria-current": position === chosen ? "true" : null,
      title: `position ${number(position)} · id ${data.tokens[at]} · ${number(value)}`,
      onclick: () => pick(position, element),
      onkeydown: (event) => { if (event.key === "Enter") pick(position, element); else step(event); },
    }, visible(texts[at]) || "·");
    if (typeof value === "number") colours.paint(element, value);
    running.append(element);
  });
  body.append(colours.legend, h("p", { class: "note" }, `Document ${number(data.document)}, ${number(length)} tokens. First, BOS and special tokens are dotted, and left out of the range of colours.`));
  if (length > positions.length) body.append(h("div", { class: "controls" },
    button("Earlier", () => context.go({ from: Math.max(0, start - SHOWN) || "" }), { disabled: start === 0 }),
    button("Later", () => context.go({ from: start + SHOWN }), { disabled: start + SHOWN >= length })));
  body.append(running);
}

// Colours for numbers, and what they mean: one hue from low to high, or two around zero.
function scale(values, by) {
  const sorted = values.toSorted((one, two) => one - two);
  const at = (part) => sorted[Math.round(part * (sorted.length - 1))] ?? 0;
  const both = by === "value";
  const [low, high] = both ? [0, Math.max(Math.abs(at(0.01)), Math.abs(at(0.99)))] : [at(0.01), at(0.99)];
  const share = (value) => (high > low ? Math.min(1, Math.max(0, ((both ? Math.abs(value) : value) - low) / (high - low))) : 0);
  const ends = both ? [-high, 0, high] : [low, (low + high) / 2, high];
  const legend = h("div", { class: "legend", id: "legend" }, both ? "value" : by === "norm" ? "norm" : "norm of the difference",
    h("span", {}, number(ends[0], 4)), h("span", { class: `bar ${both ? "both" : "one"}` }), h("span", {}, number(ends[2], 4)),
    h("span", {}, `(middle ${number(ends[1], 4)}; colours go from the 1st to the 99th percentile)`));
  const paint = (element, value) => {
    element.style.setProperty("--strength", (0.75 * share(value)).toFixed(3));
    if (both && value < 0) element.style.setProperty("--hue", "var(--cool)");
  };
  return { legend, paint };
}

function tokenView(context, host, position) {
  return show(context, host, "token", { site: context.site, position }, (view, body, figure) => {
    const data = view.data;
    body.append(
      h("p", { class: "context" }, visible(data.before), h("mark", { id: "token-text" }, visible(data.text) || "·"), visible(data.after)),
      facts([
        ["Position", number(data.position)], ["Sequence", `${number(data.sequence)}, token ${number(data.offset)} of it`], ["Token id", String(data.token)],
        ...(data.flagged.length ? [["Flagged", `${data.flagged.join(", ")}: left out of statistics`]] : []),
      ]),
      figure,
      h("h3", {}, "Layers, and their largest dimensions"),
      table([
        { name: "Layer", kind: "number", of: (row) => row.layer },
        { name: "Norm", kind: "number", of: (row) => row.norm },
        { name: "Cosine", kind: "number", of: (row) => (row.cosine === "NaN" ? "" : row.cosine) },
        { name: "Largest", of: (row) => h("span", {}, row.largest.slice(0, 3).flatMap((one, at) => [at ? ", " : "", h("span", { class: "whole" },
          button(String(one.dimension), () => context.go({ panel: "dimensions", layer: row.layer, dimension: one.dimension }), { class: "link" }), ` (${number(one.value, 3)})`)])) },
      ], data.layers.map((layer, at) => ({ layer, norm: data.norm[at], cosine: data.cosine[at], largest: data.largest[at] })), { label: "The token at every layer", id: "token-layers" }));
    if (context.facts.lens) body.append(h("p", {}, button("See it through the lens", () => context.go({ panel: "lens", position }))));
  }, { figure: true, id: "token-figure" });
}

export async function lens(context, host) {
  const { state, site, facts: about } = context;
  const position = Number(state.position ?? 0);
  const to = (next) => context.go({ position: next, sequence: "", from: "" });
  host.append(controls(
    siteSelect(context),
    field("position", "Position", position, to, { min: 0, max: about.n_tokens - 1 }),
    field("k", "Tokens of each layer", state.k ?? 8, (k) => context.go({ k }), { min: 1, max: 50, class: "short" }),
    h("div", { class: "group" },
      button("Previous", () => to(position - 1), { id: "previous", disabled: position <= 0 }),
      button("Next", () => to(position + 1), { id: "next", disabled: position >= about.n_tokens - 1 }))));
  return show(context, host, "lens", { site, position: state.position ?? 0, k: state.k }, (view, body, figure) => {
    const data = view.data;
    body.append(h("p", { class: "context" }, visible(data.before), h("mark", {}, visible(data.text) || "·"), visible(data.after)), figure,
      table([
        { name: "Layer", kind: "number", of: (row) => row.layer },
        { name: "Entropy (nats)", kind: "number", of: (row) => row.entropy },
        { name: "Rank of the next", kind: "number", of: (row) => (row.rank < 0 ? "" : row.rank + 1) },
        { name: "Likeliest", kind: "wide", of: (row) => h("span", { class: "context" }, row.texts.map((one, at) => `${at ? "  " : ""}${visible(one).trim() || "␣"} ${number(row.chances[at], 2)}`).join("")) },
      ], data.layers.map((layer, at) => ({ layer, entropy: data.entropy[at], rank: data.next_rank[at], texts: data.texts[at], chances: data.probabilities[at] })), { label: "The lens at every layer", id: "lens-layers" }));
  }, { figure: true, id: "lens-map" });
}
