"""How figures look: colours for light and dark, axes, and what of a text may go into them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

__all__ = ["DARK", "LIGHT", "Style", "colourbar", "heat", "label", "layout", "log_range", "logs", "token_label"]

# Letters of a text that a figure shows.
_LONGEST = 120


@dataclass(frozen=True)
class Style:
    """Colours of a figure, as CSS writes them.

    Attributes:
        paper: behind everything.
        ink: text.
        faint: grids and gaps.
        series: lines and bars.
        scale: from low to high.
    """

    paper: str
    ink: str
    faint: str
    series: tuple[str, ...]
    scale: str


LIGHT = Style("#ffffff", "#24292f", "#e3e6ea", ("#2f6db5", "#c9671a", "#3c8a4e", "#a8456f"), "Viridis")
DARK = Style("#16191d", "#d7dce2", "#2c3138", ("#6ea8e8", "#e39a55", "#74c088", "#dc86ab"), "Viridis")


def label(text: object) -> str:
    """Make a text of the store safe for plotly, which takes `<b>` and `<a>`, entities and TeX in every label."""
    told = str(text)
    told = told if len(told) <= _LONGEST else told[: _LONGEST - 1] + "…"
    return escape(told, quote=False).replace("$", "&#36;")


def token_label(text: str) -> str:
    """Write a token so that its spaces and line ends are seen, safe for plotly."""
    return "'" + label(text.replace("\n", "↵").replace("\t", "⇥").replace("\r", "␍")) + "'"


def layout(title: str, sampled: str | None, style: Style, more: dict[str, Any]) -> dict[str, Any]:
    """Give what figures have in common, and `more`: axes are completed, other things replaced."""
    axis = {
        "gridcolor": style.faint, "linecolor": style.faint, "zerolinecolor": style.faint, "automargin": True,
        "ticks": "",
    }  # fmt: skip
    told: dict[str, Any] = {"text": label(title), "x": 0, "xref": "paper", "font": {"size": 14}}
    if sampled:
        told["subtitle"] = {"text": label(sampled)}
    base: dict[str, Any] = {
        "title": told,
        # Ours says all that plotly's own would.
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
    """Give log10: NaN stays a gap, zero and less are minus infinity, for `log_range` to bound."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(values <= 0, -np.inf, np.log10(values))


def log_range(found: np.ndarray) -> tuple[float, float]:
    """Give the lowest and highest of the finite ones, never the same."""
    finite = found[np.isfinite(found)]
    if not len(finite):
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    return (low, high) if high - low > 1e-3 else (low - 0.01, high + 0.01)


def heat(z: np.ndarray, low: float, high: float, style: Style, **more: Any) -> dict[str, Any]:
    """Make a heatmap whose colour is a log10: infinities take the ends of the scale, NaN is a gap."""
    return {
        "type": "heatmap", "z": np.clip(z, low, high).astype(np.float32), "zmin": low, "zmax": high,
        "colorscale": style.scale, "hoverongaps": False, **more,
    }  # fmt: skip


def colourbar(low: float, high: float, title: str) -> dict[str, Any]:
    """Make a bar for a log10 colour scale that says the values themselves."""
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
