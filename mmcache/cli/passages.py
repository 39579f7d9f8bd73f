"""Tokens on a terminal, among their neighbours: a row, a sequence, the tokens that stand out, what was found."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.cells import cell_len, set_cell_size
from rich.text import Text

from mmcache.cli.heat import Heat, coloured
from mmcache.cli.tables import cell, draw_pairs, draw_rows, draw_text, shown
from mmcache.text import visible

if TYPE_CHECKING:
    from rich.console import Console

    from mmcache.view import View

__all__ = [
    "draw_find",
    "draw_head",
    "draw_sampled",
    "draw_sequence",
    "draw_show",
    "draw_token",
    "draw_top",
    "fitted",
    "passage",
]

# Below it a passage has a line of its own.
_NARROW = 60
_HIGHLIGHT = "bold reverse"


def draw_head(console: Console, view: View) -> None:
    """Draw a view's title, and, where not everything was looked at, what was."""
    draw_text(console, view.title, "bold")
    draw_sampled(console, view.sampled)


def draw_sampled(console: Console, sampled: str | None) -> None:
    """Say what was looked at, where that is not everything."""
    if sampled:
        draw_text(console, f"  looked at: {sampled}", "italic")


def fitted(text: str, width: int) -> str:
    """Show a text in exactly `width` columns: cut, with an ellipsis, or filled with spaces."""
    text = visible(text)
    return set_cell_size(text, width) if cell_len(text) <= width else set_cell_size(text, width - 1) + "…"


def _end(text: str, width: int) -> str:
    """Cut a text from the left, with an ellipsis."""
    if cell_len(text) <= width:
        return text
    kept = text[-width:] if width > 0 else ""
    while kept and cell_len(kept) > width - 1:
        kept = kept[1:]
    return f"…{kept}" if width > 0 else ""


def _begin(text: str, width: int) -> str:
    """Cut a text from the right, with an ellipsis."""
    if cell_len(text) <= width:
        return text
    return set_cell_size(text, width - 1).rstrip() + "…" if width > 0 else ""


def passage(said: dict[str, Any], width: int, *, colours: bool) -> Text:
    """Draw a token among its neighbours in one line of at most `width` columns, highlighted, or «so» without colours.

    Args:
        said: `before`, `text` and `after`.
        width: columns; both sides are cut alike, and the shorter one gives its room to the other.
        colours: whether the terminal has them.
    """
    before, after = visible(said["before"]), visible(said["after"])
    text = _begin(visible(said["text"]), max(1, width - 2))
    marks = ("", "") if colours else ("«", "»")
    room = max(0, width - cell_len(text) - len("".join(marks)))
    left = max(room // 2, room - cell_len(after))
    before = _end(before, left)
    after = _begin(after, room - cell_len(before))
    return Text.assemble(before, marks[0], (text, _HIGHLIGHT if colours else ""), marks[1], after)


def _draw_passage(console: Console, label: str, said: dict[str, Any]) -> None:
    """Draw a label and a passage: beside each other, or below."""
    if console.width < _NARROW:
        draw_text(console, label.strip())
        line = passage(said, console.width - 2, colours=coloured(console))
        console.print(Text.assemble("  ", line), no_wrap=True, overflow="crop")
    else:
        line = passage(said, console.width - cell_len(label) - 2, colours=coloured(console))
        console.print(Text.assemble(label, "  ", line), no_wrap=True, overflow="crop")


def draw_show(console: Console, view: dict[str, Any]) -> None:
    """Draw `view.layer_view` or `view.row_view`, all but the values themselves; the latter with its text if known."""
    left_out = ("site", "layer", "values", "largest", "flagged", "before", "text", "after")
    pairs = {name.replace("_", " "): cell(value) for name, value in view.items() if name not in left_out}
    if view.get("flagged"):
        pairs["flagged"] = ", ".join(view["flagged"])
    if "largest" in view:
        pairs["largest"] = ", ".join(f"[{entry['dimension']}] {cell(entry['value'])}" for entry in view["largest"])
    draw_pairs(console, f"{view['site']}, layer {view['layer']}", pairs)
    if "text" in view:
        _draw_passage(console, "text", view)


def draw_sequence(console: Console, view: View) -> None:
    """Draw `view.sequence`: the text on colours that say the number of each token; without colours a token a line."""
    draw_head(console, view)
    values, named = view["values"], view["flag_bits"]
    left_out = view["flags"] & sum(named.values()) != 0
    legend = f"{' or '.join(named)}, left out of the statistics"
    signed = view["by"] == "value"
    heat = Heat.of(values, log=not signed, signed=signed)
    draw_pairs(console, "", _sequence_about(view))
    console.print(Text.assemble(f"{view['by']} ", heat.legend(colours=coloured(console))), overflow="fold")
    if coloured(console):
        drawn = Text(overflow="fold")
        for text, value, apart in zip(view["texts"], values, left_out, strict=True):
            token = shown(text)
            token.stylize(heat.style(float(value)))
            if apart:
                token.stylize("underline")
            # A line ends where the text's does, too.
            drawn.append_text(token).append("\n" if text.endswith("\n") else "")
        console.print(drawn)
        if left_out.any():
            draw_text(console, f"underlined: {legend}")
        return
    wide = len(f"{view['positions'][-1]:,}")
    for position, text, value, apart in zip(view["positions"], view["texts"], values, left_out, strict=True):
        mark = "*" if apart else " "
        label = f"{position:>{wide},} {value:>10.4g} {heat.character(float(value))}{mark}"
        shortened = _begin(visible(text), console.width - cell_len(label) - 1)
        console.print(Text(f"{label} {shortened}".rstrip()), overflow="fold")
    if left_out.any():
        draw_text(console, f"*: {legend}")


def _sequence_about(view: View) -> dict[str, str]:
    values, first = view["values"], int(view["positions"][0])
    about = {"positions": f"{first:,} to {view['positions'][-1]:,}, document {view['document']}"}
    finite = np.where(np.isfinite(values), values, -np.inf)
    if np.isfinite(values).any():
        about["median"] = f"{np.median(values[np.isfinite(values)]):.4g}"
        largest = int(np.argmax(finite))
        about["largest"] = f"{values[largest]:.4g} at {first + largest:,}: «{view['texts'][largest]}»"
    if not np.isfinite(values).all():
        about["not finite"] = f"{int((~np.isfinite(values)).sum()):,} tokens"
    return about


def draw_token(console: Console, view: View, layer: int | None = None) -> None:
    """Draw `view.token`: where it stands, and its row at every layer, one of which may be marked."""
    draw_head(console, view)
    draw_pairs(console, "", {
        "sequence": f"{view['sequence']:,}, {view['offset']:,} tokens in",
        "token": f"{view['token']}"
        + (f", {' and '.join(view['flagged'])}: left out of the statistics" if view["flagged"] else ""),
    })  # fmt: skip
    _draw_passage(console, "text", view.data)
    rows = []
    for line, number in enumerate(view["layers"]):
        largest = (f"[{one['dimension']}] {one['value']:.3g}" for one in view["largest"][line][:3])
        cosine = float(view["cosine"][line])
        rows.append(
            {
                "layer": f"{number}{' ◀' if number == layer else ''}",
                "norm": f"{view['norm'][line]:.4g}",
                "mean": f"{view['mean'][line]:.3g}",
                "std": f"{view['std'][line]:.3g}",
                "cosine": "-" if math.isnan(cosine) else f"{cosine:.3f}",
                "largest": ", ".join(largest),
            }
        )
    draw_rows(console, "cosine: with the layer before", rows)


def draw_top(console: Console, view: View) -> None:
    """Draw `view.top`: the largest, then some of each band, each token among its neighbours."""
    draw_head(console, view)
    left = f", {view['non_finite']:,} of them not finite" if view["non_finite"] else ""
    draw_text(console, f"  {view['looked']:,} tokens{left}")
    examples = [one for band in view["bands"] for one in band["examples"]]
    wide = max((len(f"{one['position']:,}") for one in examples), default=0)
    for band in view["bands"]:
        if not band["tokens"]:
            continue
        console.print()
        span = f"{band['low']:.4g} to {band['high']:.4g}"
        draw_text(console, f"{band['name']}: {band['tokens']:,} tokens, {span}", "bold")
        for one in band["examples"]:
            _draw_passage(console, f"{one['position']:>{wide},} {one['value']:>10.4g}", one)


def draw_find(console: Console, view: View) -> None:
    """Draw `view.find`: how often, and the matches among their neighbours."""
    draw_head(console, view)
    matches = view["matches"]
    wide = max((len(f"{one['position']:,}") for one in matches), default=0)
    # In which sequence, and how far in.
    places = [f"{one['sequence']}+{one['offset']}" for one in matches]
    room = max(map(len, places), default=0)
    for one, place in zip(matches, places, strict=True):
        _draw_passage(console, f"{one['position']:>{wide},}  {place:<{room}}", one)
    if view["count"] > len(matches):
        draw_text(console, f"and {view['count'] - len(matches):,} more: raise --limit to list them")
