// Dimensions that stick out, one dimension's values, and the tokens at which a dimension or direction is largest.

import { facts, h, number, table } from "./parts.js";
import { AROUND, button, contexts, controls, field, layerSelect, select, show, siteSelect } from "./frames.js";

export async function dimensions(context, host) {
  const { state, site, layer } = context;
  const chosen = state.dimension;
  host.append(controls(siteSelect(context), layerSelect(context), dimensionField(context)));
  const width = chosen === undefined ? host : h("div");
  const map = show(context, host, "dimensions", { site }, (view, body, figure) => {
    body.append(h("p", { class: "note" }, "Root mean square of a dimension, in multiples of its layer's median: choose one to look closer."));
    const rows = view.data.outliers.filter((row) => String(row.layer) === String(layer)).slice(0, 12);
    const largest = h("div", {}, h("h3", {}, `Largest of layer ${layer}`), table([
      { name: "Dimension", kind: "number", of: (row) => button(String(row.dimension), () => context.go({ dimension: row.dimension }), { class: "link", "data-dimension": row.dimension }) },
      { name: "Times the median", kind: "number", of: (row) => row.ratio },
      { name: "RMS", kind: "number", of: (row) => row.rms },
      { name: "Mean", kind: "number", of: (row) => row.mean },
      { name: "Std", kind: "number", of: (row) => row.std },
    ], rows, { label: "Outlier dimensions", id: "outliers", chosen: (row) => String(row.dimension) === chosen }));
    body.append(h("div", { class: "split" }, figure, largest));
  }, { figure: true, id: "dimension-map", drawn: (view, figure) => figure.on("plotly_click", ({ points }) => {
    const [line, column] = points[0].pointIndex;
    context.go({ layer: view.data.layers[line], dimension: view.data.shown[column] });
  }) });
  if (width === host) return map;
  const asked = { site, layer, dimension: chosen };
  const one = show(context, host, "dimension", asked, (view, body, figure) => {
    const data = view.data;
    body.append(facts([["Mean", number(data.mean)], ["Std", number(data.std)], ["Values", number(data.count)]], "facts line"), figure,
      h("p", { class: "note", id: "quantiles" }, Object.entries(data.quantiles).map(([name, value]) => `${name} ${number(value)}`).join(" · ")));
    if (data.non_finite) body.append(h("p", { role: "alert" }, `${number(data.non_finite)} values are not finite, and left out.`));
  }, { figure: true });
  return Promise.all([map, one, topView(context, host, { ...asked, k: 5 })]);
}

function dimensionField(context) {
  const most = context.facts.sites[context.site]?.d_model;
  return field("dimension", "Dimension", context.state.dimension, (dimension) => context.go({ dimension }), { min: 0, max: most ? most - 1 : null, class: "short" });
}

export async function top(context, host) {
  const { state, site, layer, facts: about } = context;
  const along = about.direction && state.by === "direction" ? "direction" : "dimension";
  const kinds = [["dimension", "one dimension"], ...(about.direction ? [["direction", "the direction given"]] : [])];
  host.append(controls(
    siteSelect(context), layerSelect(context),
    select("by", "By", kinds, along, (by) => context.go({ by })),
    along === "dimension" ? dimensionField(context) : null,
    field("k", "Examples of each", state.k ?? 10, (k) => context.go({ k }), { min: 1, max: 200, class: "short" })));
  const dimension = along === "dimension" ? state.dimension ?? 0 : "";
  return topView(context, host, { site, layer, dimension, k: state.k });
}

function topView(context, host, parameters) {
  return show(context, host, "top", { ...parameters, context: AROUND }, (view, body) => {
    const { bands, looked, non_finite: bad } = view.data;
    body.append(h("p", { class: "note" }, `${number(looked)} tokens were looked at${bad ? `, ${number(bad)} of them not finite and left out` : ""}. Examples of a band are evenly spread over it.`));
    for (const band of bands) {
      if (!band.tokens) continue;
      body.append(h("section", { "data-band": band.name },
        h("h3", {}, band.name, " ", h("small", {}, `${number(band.tokens)} tokens, ${number(band.low)} to ${number(band.high)}`)),
        contexts(context, band.examples, (row) => number(row.value))));
    }
  });
}
