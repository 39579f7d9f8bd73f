"""The plotly figure of each view, for notebooks and the page."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from plotly.graph_objects import Figure
from plotly.offline import get_plotlyjs, get_plotlyjs_version

from mmcache.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mmcache.view.base import View

__all__ = [
    "DARK",
    "LIGHT",
    "Style",
    "colourbar",
    "draw",
    "heat",
    "label",
    "layout",
    "log_range",
    "logs",
    "plotly_js",
    "token_label",
]

# The longest text in a figure, in characters.
_LONGEST = 120


@dataclass(frozen=True)
class Style:
    """Colours of a figure, as in CSS.

    Attributes:
        paper: background.
        ink: text.
        faint: grids and gaps.
        series: lines and bars.
        scale: plotly's name of the colour scale.
    """

    paper: str
    ink: str
    faint: str
    series: tuple[str, ...]
    scale: str


LIGHT = Style("#ffffff", "#24292f", "#e3e6ea", ("#2f6db5", "#c9671a", "#3c8a4e", "#a8456f"), "Viridis")
DARK = Style("#16191d", "#d7dce2", "#2c3138", ("#6ea8e8", "#e39a55", "#74c088", "#dc86ab"), "Viridis")


def label(text: object) -> str:
    """A text of the store, escaped for plotly, which interprets HTML tags, entities and TeX in every label."""
    told = str(text)
    told = told if len(told) <= _LONGEST else told[: _LONGEST - 1] + "…"
    return escape(told, quote=False).replace("$", "&#36;")


def token_label(text: str) -> str:
    """A token with visible spaces and line ends, escaped for plotly."""
    return "'" + label(text.replace("\n", "↵").replace("\t", "⇥").replace("\r", "␍")) + "'"


def layout(title: str, sampled: str | None, style: Style, more: dict[str, Any]) -> dict[str, Any]:
    """The layout of all figures, updated with `more`: its axes are completed, everything else replaced."""
    axis = {
        "gridcolor": style.faint, "linecolor": style.faint, "zerolinecolor": style.faint, "automargin": True,
        "ticks": "",
    }  # fmt: skip
    told: dict[str, Any] = {"text": label(title), "x": 0, "xref": "paper", "font": {"size": 14}}
    if sampled:
        told["subtitle"] = {"text": label(sampled)}
    base: dict[str, Any] = {
        "title": told,
        # This layout sets everything that plotly's template would.
        "template": "none",
        "paper_bgcolor": style.paper,
        "plot_bgcolor": style.paper,
        "font": {"color": style.ink, "family": "system-ui, sans-serif", "size": 12},
        "colorway": list(style.series),
        "hoverlabel": {"font": {"family": "system-ui, sans-serif"}},
        "margin": {"l": 56, "r": 16, "t": 60, "b": 44},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 1, "xanchor": "right"},
        "xaxis": {},
        "yaxis": {},
    }
    base |= more
    for name in [name for name in base if name.startswith(("xaxis", "yaxis"))]:
        base[name] = axis | base[name]
    return base


def logs(values: np.ndarray) -> np.ndarray:
    """log10 of values: NaN stays a gap; zero and below become minus infinity, which `log_range` ignores."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(values <= 0, -np.inf, np.log10(values))


def log_range(found: np.ndarray) -> tuple[float, float]:
    """The lowest and highest finite value, never equal."""
    finite = found[np.isfinite(found)]
    if not len(finite):
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    return (low, high) if high - low > 1e-3 else (low - 0.01, high + 0.01)


def heat(z: np.ndarray, low: float, high: float, style: Style, **more: Any) -> dict[str, Any]:
    """A heatmap of log10 values: infinities get the colours of the ends, NaN is a gap."""
    return {
        "type": "heatmap", "z": np.clip(z, low, high).astype(np.float32), "zmin": low, "zmax": high,
        "colorscale": style.scale, "hoverongaps": False, **more,
    }  # fmt: skip


def colourbar(low: float, high: float, title: str) -> dict[str, Any]:
    """A colour bar for a log10 scale, labelled with the values themselves."""
    ticks = [
        math.log10(step) + decade
        for decade in range(math.floor(low), math.ceil(high) + 1)
        for step in ((1, 2, 5) if high - low < 4 else (1,))
    ]
    ticks = [tick for tick in ticks if low <= tick <= high]
    if len(ticks) < 3:
        ticks = np.linspace(low, high, 5).tolist()
    return {
        "title": {"text": title, "side": "right"}, "thickness": 12, "outlinewidth": 0,
        "tickvals": ticks, "ticktext": [f"{10**tick:.3g}" for tick in ticks],
    }  # fmt: skip


# A figure's traces, and its additions to the layout.
_Parts = tuple[list[dict[str, Any]], dict[str, Any]]
_APART = {0: "", 1: "BOS or special", 2: "first of its sequence", 3: "first of its sequence, BOS or special"}
_LAYER = {"title": {"text": "layer"}, "type": "category"}


def draw(view: View, *, dark: bool = False) -> Figure:
    """The figure of a view. Texts of the store are escaped, so that none is taken as markup.

    Args:
        view: made by a function of `mmcache.view`.
        dark: light on dark instead of dark on light.

    Raises:
        ArgumentError: views of this kind have no figure.
    """
    chart = _CHARTS.get(view.name)
    if chart is None:
        raise ArgumentError(f"a view of {view.name!r} has no figure: these have one: {', '.join(_CHARTS)}")
    style = DARK if dark else LIGHT
    traces, more = chart(view, style)
    return Figure({"data": traces, "layout": layout(view.title, view.sampled, style, more)})


def plotly_js() -> tuple[str, bytes]:
    """The version of plotly.js in the Python package, and its text (5 MB)."""
    return get_plotlyjs_version(), get_plotlyjs().encode()


def _rows_height(rows: int) -> int:
    return 170 + min(max(24 * rows, 120), 560)


def _health(view: View, style: Style) -> _Parts:
    names = [str(one["layer"]) for one in view["layers"]]
    kinds = {
        "non_finite": "rows with NaN or infinity", "zero_rows": "rows of zeros", "n_dead": "dead dimensions",
        "n_far": "rows far from the rest",
    }  # fmt: skip
    bars = [
        {
            "type": "bar", "name": told, "x": names, "y": np.array([one[kind] for one in view["layers"]]),
            "marker": {"color": colour},
        }
        for (kind, told), colour in zip(kinds.items(), (style.series[at] for at in (3, 1, 0, 2)), strict=True)
    ]  # fmt: skip
    return bars, {
        "xaxis": _LAYER, "yaxis": {"title": {"text": "how many"}, "rangemode": "tozero"}, "barmode": "group",
        "height": 300,
    }  # fmt: skip


def _norms(view: View, style: Style) -> _Parts:
    edges, mean = view["edges"], np.asarray(view["mean"], float)
    z, names = logs(mean), [str(layer) for layer in view["layers"]]
    single = view["level"] == "tokens"
    apart = view["apart"] if single else np.zeros(len(edges) - 1, int)
    low, high = log_range(z[:, apart == 0] if (apart == 0).any() else z)
    if single:
        said = [f"position {at:,} · {token_label(text)}{f' · {_APART[int(kind)]}' if kind else ''}"
                for at, text, kind in zip(edges, view["texts"], apart, strict=False)]  # fmt: skip
        numbers, told = mean[..., None], "norm %{customdata[0]:.5g}"
    else:
        said = [f"positions {a:,} to {b:,}" for a, b in pairwise(edges)]
        numbers = np.stack([mean, view["min"], view["max"], view["rows"]], axis=-1)
        told = (
            "mean %{customdata[0]:.5g}<br>from %{customdata[1]:.5g} to %{customdata[2]:.5g}"
            "<br>rows that count: %{customdata[3]:,.0f}"
        )
    # For single tokens, x has the centres of the cells, so that a click names the token.
    x = edges[:-1] if single else edges
    traces = [
        heat(
            z, low, high, style, x=x, y=names, customdata=numbers.astype(np.float32), hovertext=[said] * len(names),
            hovertemplate=f"%{{hovertext}}<br>layer %{{y}}<br>{told}<extra></extra>",
            colorbar=colourbar(low, high, "norm"),
        )
    ]  # fmt: skip
    more: dict[str, Any] = {
        "xaxis": {"title": {"text": "position"}, "tickformat": ",d", "showgrid": False},
        "yaxis": {**_LAYER, "showgrid": False},
        "height": _rows_height(len(names)),
    }
    if apart.any():
        traces.append(_marks(edges, apart, said, style))
        more["yaxis"]["domain"] = [0, 0.94]
        bare = dict.fromkeys(("showticklabels", "showgrid", "showline", "zeroline"), False)
        more["yaxis2"] = {"domain": [0.955, 1], "fixedrange": True, **bare}
    return traces, more


def _marks(edges: np.ndarray, apart: np.ndarray, said: Sequence[str], style: Style) -> dict[str, Any]:
    """A line above the map that marks the columns of first and special tokens."""
    return {
        "type": "heatmap", "x": edges[:-1], "y": ["apart"], "z": np.where(apart, 1.0, np.nan)[None], "yaxis": "y2",
        "colorscale": [[0, style.series[1]], [1, style.series[1]]], "showscale": False, "hovertext": [list(said)],
        "hovertemplate": "%{hovertext}<extra>left out of the colour range</extra>", "hoverongaps": False,
    }  # fmt: skip


def _line(name: str, x: Sequence[object], y: Any, colour: str, **more: Any) -> dict[str, Any]:
    return {
        "type": "scatter", "mode": "lines+markers", "name": name, "x": [str(one) for one in x],
        "y": np.asarray(y, float), "line": {"color": colour}, "connectgaps": False, **more,
    }  # fmt: skip


def _apart(view: View, style: Style) -> _Parts:
    first, special = view["first"], view["special"]
    lines = [
        _line("others", view["layers"], view["others"], style.series[0]),
        _line(f"first of a sequence ({first['tokens']:,})", view["layers"], first["mean"], style.series[1]),
        _line(f"BOS or special ({special['tokens']:,})", view["layers"], special["mean"], style.series[3],
              line={"color": style.series[3], "dash": "dot"}),
    ]  # fmt: skip
    return lines, {"xaxis": _LAYER, "yaxis": {"title": {"text": "mean norm"}, "type": "log"}, "height": 300}


def _dimensions(view: View, style: Style) -> _Parts:
    ratios = np.asarray(view["ratios"], float)
    z = logs(ratios)
    low, high = log_range(z)
    names, shown = [str(layer) for layer in view["layers"]], [str(int(at)) for at in view["shown"]]
    trace = heat(
        z, low, high, style, x=shown, y=names, customdata=ratios[..., None],
        hovertemplate="dimension %{x}<br>layer %{y}<br>%{customdata[0]:.4g} times the median<extra></extra>",
        colorbar=colourbar(low, high, "times the median"),
    )  # fmt: skip
    return [trace], {
        "xaxis": {"title": {"text": "dimension"}, "type": "category", "showgrid": False},
        "yaxis": {**_LAYER, "showgrid": False}, "height": _rows_height(len(names)),
    }  # fmt: skip


def _dimension(view: View, style: Style) -> _Parts:
    edges, mean, std = np.asarray(view["edges"], float), view["mean"], view["std"]
    bars = {
        "type": "bar", "x": (edges[1:] + edges[:-1]) / 2, "y": view["counts"], "width": np.diff(edges),
        "marker": {"color": style.series[0], "line": {"width": 0}}, "customdata": np.stack([edges[:-1], edges[1:]], 1),
        "hovertemplate": "%{customdata[0]:.4g} to %{customdata[1]:.4g}<br>%{y:,} tokens<extra></extra>",
    }  # fmt: skip
    marked = ((mean, "solid", "mean"), (mean - std, "dot", "-std"), (mean + std, "dot", "+std"))
    lines = [
        {"type": "line", "x0": at, "x1": at, "y0": 0, "y1": 1, "yref": "paper",
         "line": {"color": style.series[1], "width": 1.5, "dash": dash},
         "label": {"text": told, "textposition": "end", "textangle": 0, "font": {"color": style.ink}}}
        for at, dash, told in marked
        if np.isfinite(at)
    ]  # fmt: skip
    return [bars], {
        "xaxis": {"title": {"text": "value"}}, "yaxis": {"title": {"text": "tokens"}}, "shapes": lines,
        "bargap": 0, "height": 280, "showlegend": False,
    }  # fmt: skip


def _sequence(view: View, style: Style) -> _Parts:
    said = [token_label(text) for text in view["texts"]]
    bars = {
        "type": "bar", "x": view["positions"], "y": np.asarray(view["values"], float), "hovertext": said,
        "marker": {"color": style.series[0]},
        "hovertemplate": "position %{x:,}<br>%{hovertext}<br>%{y:.5g}<extra></extra>",
    }  # fmt: skip
    return [bars], {
        "xaxis": {"title": {"text": "position"}, "tickformat": ",d"}, "yaxis": {"title": {"text": label(view["by"])}},
        "bargap": 0, "height": 280, "showlegend": False,
    }  # fmt: skip


def _token(view: View, style: Style) -> _Parts:
    layers = view["layers"]
    lines = [
        _line("norm", layers, view["norm"], style.series[0]),
        _line("cosine with the layer before", layers, view["cosine"], style.series[1], yaxis="y2"),
    ]
    return lines, {
        "xaxis": {**_LAYER, "anchor": "y2"}, "yaxis": {"title": {"text": "norm"}, "domain": [0.55, 1]},
        "yaxis2": {"title": {"text": "cosine"}, "domain": [0, 0.45], "range": [-1.05, 1.05]}, "height": 340,
    }  # fmt: skip


def _contexts(rows: Sequence[tuple[str, int, dict[str, Any]]], first: str, style: Style) -> _Parts:
    """A table of tokens in context: a text for the first column, the position, and the passage."""
    columns = [
        [label(told) for told, _, _ in rows],
        [f"{position:,}" for _, position, _ in rows],
        [label(_visible(said["before"])[-40:]) for _, _, said in rows],
        [f"<b>{label(_visible(said['text']))}</b>" for _, _, said in rows],
        [label(_visible(said["after"])[:40]) for _, _, said in rows],
    ]
    table = {
        "type": "table", "columnwidth": [1.4, 0.8, 3, 1.2, 3],
        "header": {"values": [first, "position", "before", "token", "after"], "align": "left",
                   "fill": {"color": style.faint}, "font": {"color": style.ink}},
        "cells": {"values": columns, "align": ["left", "left", "right", "left", "left"],
                  "fill": {"color": style.paper}, "font": {"color": style.ink}},
    }  # fmt: skip
    return [table], {"height": 160 + min(24 * len(rows), 600), "margin": {"l": 8, "r": 8, "t": 60, "b": 8}}


def _visible(text: str) -> str:
    return text.replace("\n", "↵").replace("\t", "⇥").replace("\r", "␍")


def _top(view: View, style: Style) -> _Parts:
    rows = [
        (f"{band['name']}: {one['value']:.5g}", one["position"], one)
        for band in view["bands"]
        for one in band["examples"]
    ]
    return _contexts(rows, "value", style)


def _find(view: View, style: Style) -> _Parts:
    rows = [(f"sequence {one['sequence']:,}", one["position"], one) for one in view["matches"]]
    return _contexts(rows, "where", style)


def _lens(view: View, style: Style) -> _Parts:
    chances, texts = np.asarray(view["probabilities"], float), view["texts"]
    names = [str(layer) for layer in view["layers"]]
    trace = {
        "type": "heatmap", "z": chances, "zmin": 0, "zmax": 1, "colorscale": style.scale, "hoverongaps": False,
        "x": np.arange(1, chances.shape[1] + 1), "y": names,
        "text": [[token_label(text) for text in line] for line in texts], "texttemplate": "%{text}",
        "customdata": np.asarray(view["tokens"])[..., None],
        "hovertemplate": "layer %{y}, rank %{x}<br>%{text} (id %{customdata[0]})<br>"
                         "probability %{z:.4f}<extra></extra>",
        "colorbar": {"title": {"text": "probability", "side": "right"}, "thickness": 12, "outlinewidth": 0},
    }  # fmt: skip
    return [trace], {
        "xaxis": {"title": {"text": "rank"}, "dtick": 1, "showgrid": False}, "yaxis": {**_LAYER, "showgrid": False},
        "height": _rows_height(len(names)),
    }  # fmt: skip


_CHARTS: dict[str, Callable[[View, Style], _Parts]] = {
    "health": _health,
    "norms": _norms,
    "apart": _apart,
    "dimensions": _dimensions,
    "dimension": _dimension,
    "sequence": _sequence,
    "token": _token,
    "top": _top,
    "find": _find,
    "lens": _lens,
}
