// What the store is, and its norm map.

import { bytes, facts, h, number, table } from "./parts.js";
import { controls, show, siteSelect } from "./frames.js";
import { normMap } from "./norms.js";

export async function overview(context, host) {
  const two = h("div", { class: "two" });
  host.append(two);
  const described = show(context, two, "overview", {}, (view, body) => {
    const data = view.data;
    body.append(facts(identity(data)), h("h3", {}, "Sites"), sitesTable(data));
    two.append(provenance(data));
  }, { title: "The store" });
  if (!context.site) return described;
  const below = h("div");
  host.append(below);
  // The text first: the map's data is asked for at the same time.
  if (Object.keys(context.facts.sites).length > 1) below.append(controls(siteSelect(context)));
  return Promise.all([described, normMap(context, below, {})]);
}

function identity(data) {
  return [
    ["Path", data.path],
    ["Kind", `${data.kind}, layout "${data.layout}"`],
    ["Complete", data.complete ? "yes" : "no: shards are missing"],
    ["Tokens", number(data.n_tokens)],
    ["Sequences", number(data.n_sequences)],
    ["Layers", ranges(data.layers)],
    ["dtype", data.dtype ?? "not known yet"],
    ["Tokens a shard", number(data.shard_tokens)],
    ["Size", bytes(data.bytes)],
  ];
}

function ranges(layers) {
  const parts = [];
  for (const layer of layers) {
    const last = parts.at(-1);
    if (last && last[1] === layer - 1) last[1] = layer;
    else parts.push([layer, layer]);
  }
  return `${layers.length}: ${parts.map(([low, high]) => (low === high ? low : `${low} to ${high}`)).join(", ") || "none"}`;
}

function sitesTable(data) {
  const rows = Object.entries(data.sites).map(([name, site]) => ({ name, ...site }));
  return table([
    { name: "Site", kind: "name", of: (row) => row.name },
    { name: "d_model", kind: "number", of: (row) => row.d_model },
    { name: "Shards", kind: "number", of: (row) => row.shards },
    { name: "Missing", kind: "number", of: (row) => row.missing },
    { name: "Size", kind: "number", of: (row) => h("span", {}, bytes(row.bytes)) },
    { name: "There", of: strip },
  ], rows, { label: "Sites", id: "sites" });
}

function strip(row) {
  const said = `${number(row.shards - row.missing)} of ${number(row.shards)} shards are there`;
  const parts = row.present.map((part) => {
    const one = h("i");
    one.style.setProperty("--there", part);
    return one;
  });
  return h("div", { class: "strip", role: "img", "aria-label": said, title: said }, parts);
}

function provenance(data) {
  const section = h("section", { class: "frame bounded", "data-view": "provenance", tabindex: "0", "aria-label": "Where it is from" }, h("header", {}, h("h2", {}, "Where it is from")));
  const plain = [];
  const groups = [];
  for (const [from, part] of [["", data.source], ["metadata", data.metadata]]) {
    for (const [name, value] of Object.entries(part ?? {})) {
      const called = from ? `${from}: ${name}` : name;
      if (value !== null && typeof value === "object" && !Array.isArray(value)) groups.push([called, value]);
      else plain.push([called, said(value)]);
    }
  }
  if (!plain.length && !groups.length) section.append(h("p", { class: "note" }, "The store does not say."));
  groups.forEach(([name, value]) => {
    const open = ["identity", "record"].includes(name) || name.startsWith("metadata");
    section.append(h("details", { open }, h("summary", {}, name), facts(Object.entries(value).map(([key, one]) => [key, said(one)]))));
  });
  if (plain.length) section.append(h("details", { open: !groups.length || !!Object.keys(data.metadata ?? {}).length }, h("summary", {}, "more"), facts(plain)));
  return section;
}

function said(value) {
  const text = typeof value === "string" ? value : JSON.stringify(value);
  return text.length > 2000 ? `${text.slice(0, 2000)}…` : text;
}
