"""Views on a terminal: statistics, norm maps, dimensions, and tokens in context."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.cells import cell_len, set_cell_size
from rich.text import Text

from mmcache.cli.render import NOTHING, ColourScale, cell, coloured, draw_pairs, draw_rows, draw_text, shown
from mmcache.text import visible

if TYPE_CHECKING:
    from rich.console import Console

    from mmcache.view import View

__all__ = [
    "draw_apart",
    "draw_dimensions",
    "draw_find",
    "draw_head",
    "draw_health",
    "draw_norms",
    "draw_sampled",
    "draw_sequence",
    "draw_show",
    "draw_statistics",
    "draw_token",
    "draw_top",
    "fitted",
    "map_width",
    "passage",
]

# On narrower terminals, a passage has its own line.
_NARROW_TEXT = 60
_HIGHLIGHT = "bold reverse"


def draw_head(console: Console, view: View) -> None:
    """Print a view's title, and which part was read if not all."""
    draw_text(console, view.title, "bold")
    draw_sampled(console, view.sampled)


def draw_sampled(console: Console, sampled: str | None) -> None:
    """Print which part was read, if not all."""
    if sampled:
        draw_text(console, f"  looked at: {sampled}", "italic")


def fitted(text: str, width: int) -> str:
    """A text in exactly `width` columns: cut with an ellipsis, or padded with spaces."""
    text = visible(text)
    return set_cell_size(text, width) if cell_len(text) <= width else set_cell_size(text, width - 1) + "…"


def _end(text: str, width: int) -> str:
    """The end of a text: cut on the left, with an ellipsis."""
    if cell_len(text) <= width:
        return text
    kept = text[-width:] if width > 0 else ""
    while kept and cell_len(kept) > width - 1:
        kept = kept[1:]
    return f"…{kept}" if width > 0 else ""


def _begin(text: str, width: int) -> str:
    """The beginning of a text: cut on the right, with an ellipsis."""
    if cell_len(text) <= width:
        return text
    return set_cell_size(text, width - 1).rstrip() + "…" if width > 0 else ""


def passage(said: dict[str, Any], width: int, *, colours: bool) -> Text:
    """A token in context, in one line of at most `width` columns: highlighted, or in «» without colours.

    Args:
        said: `before`, `text` and `after`.
        width: columns; both sides are cut equally, unless one needs less.
        colours: whether the terminal has colours.
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
    """Print a label and a passage, side by side or below each other."""
    if console.width < _NARROW_TEXT:
        draw_text(console, label.strip())
        line = passage(said, console.width - 2, colours=coloured(console))
        console.print(Text.assemble("  ", line), no_wrap=True, overflow="crop")
    else:
        line = passage(said, console.width - cell_len(label) - 2, colours=coloured(console))
        console.print(Text.assemble(label, "  ", line), no_wrap=True, overflow="crop")


def draw_show(console: Console, view: dict[str, Any]) -> None:
    """Print `view.summary.layer_view` or `row_view`, without the values; the latter with its text if known."""
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
    """Print `view.sequence`: the text, coloured by each token's number; without colours, one token per line."""
    draw_head(console, view)
    values, named = view["values"], view["flag_bits"]
    left_out = view["flags"] & sum(named.values()) != 0
    legend = f"{' or '.join(named)}, left out of the statistics"
    signed = view["by"] == "value"
    heat = ColourScale.of(values, log=not signed, signed=signed)
    draw_pairs(console, "", _sequence_about(view))
    console.print(Text.assemble(f"{view['by']} ", heat.legend(colours=coloured(console))), overflow="fold")
    if coloured(console):
        drawn = Text(overflow="fold")
        for text, value, apart in zip(view["texts"], values, left_out, strict=True):
            token = shown(text)
            token.stylize(heat.style(float(value)))
            if apart:
                token.stylize("underline")
            # Break the line where the text does.
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
    """Print `view.token`: its place, and its row at every layer; `layer` is marked."""
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
    """Print `view.top`: the largest, then examples from each band, in context."""
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
    """Print `view.find`: how many matches, and the matches in context."""
    draw_head(console, view)
    matches = view["matches"]
    wide = max((len(f"{one['position']:,}") for one in matches), default=0)
    # The sequence, and the offset in it.
    places = [f"{one['sequence']}+{one['offset']}" for one in matches]
    room = max(map(len, places), default=0)
    for one, place in zip(matches, places, strict=True):
        _draw_passage(console, f"{one['position']:>{wide},}  {place:<{room}}", one)
    if view["count"] > len(matches):
        draw_text(console, f"and {view['count'] - len(matches):,} more: raise --limit to list them")


# Columns beside a map: for a layer's number, and for the smallest and largest norm.
_LABEL, _SIDE = 5, 20
# On narrower terminals, the numbers on the right are left out.
_NARROW_CHART = 36
# From this width on, words are shown beside single tokens.
_WIDE = 60
# How many places of bad rows are printed, and outlier dimensions per layer.
_PLACES, _OUTLIERS = 10, 3
# Labels of tokens, long and short, by the view's `apart`.
_MARKS, _SHORT = ("", "special", "first", "first"), (" ", "*", "^", "^")


def draw_statistics(console: Console, view: dict[str, Any]) -> None:
    """Print `view.statistics_view`: norms and health, one layer per row."""
    rows = [
        {
            "layer": row["layer"],
            "rows": row["rows"],
            "mean_norm": f"{row['mean_norm']:.4g}",
            "from_to": f"{row['min_norm']:.3g} - {row['max_norm']:.3g}",
            "scale": f"{row['scalar_scale']:.4g}",
            "std": f"{row['std']:.3g}",
            "top_std": f"{row['largest_std']['value']:.3g} [{row['largest_std']['dimension']}]",
            "dead": row["dead_dimensions"],
            "zero": row["zero_rows"],
            "NaN/Inf": row["non_finite"] if row["first_non_finite"] < 0 else _located(row),
        }
        for row in view["layers"]
    ]
    draw_rows(console, f"{view['site']} [{view['d_model']}]", rows)
    draw_sampled(console, view["sampled"])


def _located(row: dict[str, Any]) -> str:
    return f"{row['non_finite']}, first at {row['first_non_finite']}"


def draw_health(console: Console, view: View) -> None:
    """Print `view.health`: the problems in sentences, and their places."""
    draw_head(console, view)
    problems, places = view["problems"], view["places"]
    for problem in problems or ["nothing is wrong: no NaN, infinities, rows of zeros, dead dimensions or rows far off"]:
        draw_text(console, f"  {problem}")
    for name, tokens in view["left_out"].items():
        draw_text(console, f"  flagged {name}: {tokens:,} tokens, left out of the statistics")
    for place in places[:_PLACES]:
        said = [f"{place['non_finite']:,} rows with NaN or infinity"] if place["non_finite"] else []
        if place["first_non_finite"] >= 0:
            said.append(f"the first at {place['first_non_finite']:,}")
        if place["zero_rows"]:
            said.append(f"{place['zero_rows']:,} rows of zeros")
        start, stop = place["tokens"]
        draw_text(console, f"    layer {place['layer']}, positions {start:,} to {stop - 1:,}: {', '.join(said)}")
    if len(places) > _PLACES:
        draw_text(console, f"    and {len(places) - _PLACES:,} more places, which --json lists")
    console.print()


def draw_apart(console: Console, view: View) -> None:
    """Print `view.apart`: norms of first and special tokens beside those of the others."""
    draw_head(console, view)
    kinds = [name for name in ("first", "special") if view[name]["tokens"]]
    rows = [
        {"layer": layer, "others": f"{view['others'][line]:.4g}"}
        | {f"{name}_{what}": f"{view[name][what][line]:.4g}" for name in kinds for what in ("mean", "max")}
        for line, layer in enumerate(view["layers"])
    ]
    counts = [f"{view[name]['tokens']:,} {name}" for name in kinds]
    draw_rows(console, f"mean norms: others, and {' and '.join(counts)}" if kinds else "mean norms", rows)


def draw_dimensions(console: Console, view: View) -> None:
    """Print `view.dimensions`: the largest outliers of each layer, as multiples of its median."""
    draw_head(console, view)
    rows = []
    for layer, median in zip(view["layers"], view["median"], strict=True):
        found = [one for one in view["outliers"] if one["layer"] == layer][:_OUTLIERS]
        row: dict[str, Any] = {"layer": layer, "median": f"{median:.3g}"}
        for at in range(min(_OUTLIERS, view["d_model"])):
            one = found[at] if at < len(found) else None
            row[f"{at + 1}."] = f"[{one['dimension']}] {_times(one['ratio'])}" if one else ""
        rows.append(row)
    draw_rows(console, "[dimension], its root mean square over the median", rows)


def _times(ratio: float) -> str:
    return f"{ratio:.1f}x" if ratio < 1e6 else f"{ratio:.2g}x"


def map_width(console: Console) -> int:
    """How many ranges of a norm map fit on the terminal."""
    return max(1, console.width - _LABEL - (_SIDE if console.width >= _NARROW_CHART else 0))


def draw_norms(console: Console, view: View) -> None:
    """Print `view.norms`: one layer per line; for single tokens, one token per line."""
    draw_head(console, view)
    heat = ColourScale.of(view["mean"], log=True)
    if view["level"] == "tokens":
        _draw_tokens(console, view, heat)
    else:
        _draw_map(console, view, heat)
    legend = Text.assemble("norm ", heat.legend(colours=coloured(console)))
    if not np.isfinite(view["mean"]).all():
        legend.append("  ! not finite" if view["level"] == "tokens" else f"  {NOTHING} nothing counts there")
    console.print(legend, overflow="fold")
    console.print()


def _draw_map(console: Console, view: View, heat: ColourScale) -> None:
    mean, room = view["mean"], map_width(console)
    colours, each = coloured(console), max(1, room // mean.shape[1])
    drawn = each * mean.shape[1]
    side = console.width >= _NARROW_CHART
    if side:
        console.print(Text("layer" + " " * drawn + f"{'min':>10}{'max':>10}", "bold"))
    for line, layer in enumerate(view["layers"]):
        cells = [heat.cell(float(value), each, colours=colours) for value in mean[line]]
        ends = _ends(view["min"][line], view["max"][line]) if side else ""
        console.print(Text.assemble(f"{layer:>{_LABEL - 1}} ", *cells, ends), no_wrap=True)
    first, last = f"{view['edges'][0]:,}", f"{view['edges'][-1]:,}"
    gap = max(1, drawn - len(first) - len(last))
    draw_text(console, f"{'':{_LABEL}}{first}{'':{gap}}{last}" if drawn > 1 else f"{'':{_LABEL}}{first} to {last}")


def _ends(low: np.ndarray, high: np.ndarray) -> str:
    found = [low[np.isfinite(low)], high[np.isfinite(high)]]
    if not len(found[0]):
        return f"{'-':>10}{'-':>10}"
    return f" {found[0].min():>9.3g} {found[1].max():>9.3g}"


def _draw_tokens(console: Console, view: View, heat: ColourScale) -> None:
    mean, colours = view["mean"], coloured(console)
    positions = [f"{position:,}" for position in view["edges"][:-1]]
    wide = max(map(len, positions))
    words, marks = (14, _MARKS) if console.width >= _WIDE else (6, _SHORT)
    # The widths of position, token and mark, with spaces between them.
    begin = wide + words + max(map(len, marks)) + 2
    side = _SIDE if console.width >= begin + _SIDE + len(mean) else 0
    room = max(1, console.width - begin - side)
    # If there is no room for all layers, evenly spread ones, including the first and the last.
    some = np.unique(np.linspace(0, len(mean) - 1, min(room, len(mean))).round().astype(int))
    each = max(1, min(3, room // len(some)))
    layers = [view["layers"][at] for at in some]
    what = f"layers {layers[0]} to {layers[-1]}" + ("" if len(some) == len(mean) else f", {len(some)} of {len(mean)}")
    told = "" if marks is _MARKS else " (* special, ^ first)"
    draw_text(console, f"position, token{told}, norms of {what}" + (", min and max" if side else ""), "bold")
    for at, position in enumerate(positions):
        column = mean[:, at]
        cells = [heat.cell(float(column[line]), each, colours=colours) if not math.isnan(column[line])
                 else Text("!" * each, "bold") for line in some]  # fmt: skip
        text = fitted(view["texts"][at], words)
        mark = marks[int(view["apart"][at])]
        ends = _ends(column, column) if side else ""
        begun = f"{position:>{wide}} {text} {mark:<{max(map(len, marks))}}"
        console.print(Text.assemble(begun, *cells, ends), no_wrap=True)
