"""A site's numbers on a terminal: statistics, health, the norm map, outlier dimensions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.text import Text

from mmcache.cli.heat import NOTHING, Heat, coloured
from mmcache.cli.passages import draw_head, draw_sampled, fitted
from mmcache.cli.tables import draw_rows, draw_text

if TYPE_CHECKING:
    from rich.console import Console

    from mmcache.view import View

__all__ = ["draw_apart", "draw_dimensions", "draw_health", "draw_norms", "draw_statistics", "map_width"]

# Beside a map: a layer's number, and the smallest and largest norm.
_LABEL, _SIDE = 5, 20
# Below it there is no room for the numbers on the right.
_NARROW = 36
# And from here on there is room for words beside single tokens.
_WIDE = 60
# Places of bad rows that are drawn, and outlier dimensions of a layer.
_PLACES, _OUTLIERS = 10, 3
# What is said of a token, and where there is no room for words.
_MARKS, _SHORT = ("", "special", "first", "first"), (" ", "*", "^", "^")


def draw_statistics(console: Console, view: dict[str, Any]) -> None:
    """Draw `view.statistics_view`: norms and health, a layer a row."""
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
    """Draw `view.health`: what is wrong in sentences, and where."""
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
    """Draw `view.apart`: norms of first and of special tokens beside those of the others."""
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
    """Draw `view.dimensions`: the largest outliers of each layer, as multiples of its median."""
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
    """Give how many stretches a norm map has room for."""
    return max(1, console.width - _LABEL - (_SIDE if console.width >= _NARROW else 0))


def draw_norms(console: Console, view: View) -> None:
    """Draw `view.norms`: a layer a line, or, of single tokens, a token a line."""
    draw_head(console, view)
    heat = Heat.of(view["mean"], log=True)
    if view["level"] == "tokens":
        _draw_tokens(console, view, heat)
    else:
        _draw_map(console, view, heat)
    legend = Text.assemble("norm ", heat.legend(colours=coloured(console)))
    if not np.isfinite(view["mean"]).all():
        legend.append("  ! not finite" if view["level"] == "tokens" else f"  {NOTHING} nothing counts there")
    console.print(legend, overflow="fold")
    console.print()


def _draw_map(console: Console, view: View, heat: Heat) -> None:
    mean, room = view["mean"], map_width(console)
    colours, each = coloured(console), max(1, room // mean.shape[1])
    drawn = each * mean.shape[1]
    side = console.width >= _NARROW
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


def _draw_tokens(console: Console, view: View, heat: Heat) -> None:
    mean, colours = view["mean"], coloured(console)
    positions = [f"{position:,}" for position in view["edges"][:-1]]
    wide = max(map(len, positions))
    words, marks = (14, _MARKS) if console.width >= _WIDE else (6, _SHORT)
    # The position, the token and the mark, with spaces between them.
    begin = wide + words + max(map(len, marks)) + 2
    side = _SIDE if console.width >= begin + _SIDE + len(mean) else 0
    room = max(1, console.width - begin - side)
    # Of more layers than there is room for, some, the first and the last among them.
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
