// Where a text or a token stands.

import { h, number } from "./parts.js";
import { AROUND, button, contexts, controls, select, show } from "./frames.js";

export async function search(context, host) {
  const { state } = context;
  const byId = state.id !== undefined && state.text === undefined || state.find === "id";
  const asked = byId ? state.id : state.text;
  const input = h("input", { id: "query", type: "search", value: asked ?? "", autocomplete: "off", spellcheck: "false", inputmode: byId ? "numeric" : null });
  const find = () => context.go(byId ? { id: input.value.trim(), text: "" } : { text: input.value, id: "" });
  input.addEventListener("keydown", (event) => { if (event.key === "Enter") find(); });
  host.append(controls(
    select("find", "Look for", [["text", "a text"], ["id", "a token id"]], byId ? "id" : "text", (kind) => context.go({ find: kind === "id" ? "id" : "", id: "", text: "" })),
    h("label", {}, byId ? "Token id" : "Text, upper and lower case told apart", input),
    button("Search", find, { class: "strong", id: "search" })));
  if (asked === undefined || asked === "") {
    host.append(h("p", { class: "note" }, "Matches may begin and end within tokens; none goes across the end of a sequence."));
    return null;
  }
  return show(context, host, "find", { ...(byId ? { id: asked } : { text: asked }), context: AROUND }, (view, body) => {
    const { count, sequences, matches } = view.data;
    body.append(h("p", { id: "count" }, `${number(count)} ${count === 1 ? "match" : "matches"} in ${number(sequences)} ${sequences === 1 ? "sequence" : "sequences"}`
      + (matches.length < count ? `; the first ${number(matches.length)}:` : "")));
    body.append(contexts(context, matches, (row) => `sequence ${number(row.sequence)}`));
  });
}
