"""The results as a picture: ratios with their spread, and how costs grow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from benchmarks.measure import Row, Series

__all__ = ["draw"]

_OURS, _PEER, _SELF = "#2b6cb0", "#b7791f", "#718096"


def _logarithmic(axes: Any, which: str) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter  # noqa: PLC0415 -- an extra

    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.7g}"))
    axis.set_minor_formatter(NullFormatter())


def _ratios(axes: Any, rows: Sequence[Row], title: str, *, logarithmic: bool) -> None:
    colours = {"limit": _OURS, "peer": _PEER, "self": _SELF}
    for place, row in enumerate(reversed(rows)):
        # On a logarithmic scale, bars start from 1, to either side.
        start = 1.0 if logarithmic else 0.0
        axes.barh(place, row.ratio - start, left=start, color=colours[row.kind], height=0.62)
        axes.errorbar(row.ratio, place, xerr=row.spread / 2, color="#1a202c", capsize=2, linewidth=1)
        if row.goal is not None:
            axes.plot([row.goal] * 2, [place - 0.4, place + 0.4], color="#c53030", linewidth=1.6)
    axes.set_yticks(range(len(rows)), [row.name for row in reversed(rows)], fontsize=8)
    axes.axvline(1, color="#1a202c", linewidth=0.8)
    if logarithmic:
        _logarithmic(axes, "x")
    axes.set_title(title, fontsize=9, loc="left")
    axes.tick_params(axis="x", labelsize=8)


def _grown(axes: Any, series: Series) -> None:
    for line, values in series.values.items():
        axes.plot(series.xs, values, marker="o", markersize=3, linewidth=1.2, label=line)
    _logarithmic(axes, "x")
    _logarithmic(axes, "y")
    axes.set_xlabel(series.axis, fontsize=8)
    axes.set_ylabel(series.unit, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=7, frameon=False)
    low, high = axes.get_ylim()
    # Wide limits, so that a constant cost looks constant.
    axes.set_ylim(low / 3, high * 3)


def draw(path: Path, rows: Sequence[Row], series: Sequence[Series]) -> None:
    """Write the picture to a file, PNG or SVG by its name.

    Raises:
        ImportError: matplotlib is not installed (the extra `bench`).
    """
    import matplotlib as mpl  # noqa: PLC0415 -- an extra

    mpl.use("agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    mpl.rcParams["svg.hashsalt"] = "mmcache"
    panels = [
        # A row with a limit but no goal for its ratio is not a comparison of speeds.
        (
            [row for row in rows if row.kind != "peer" and (row.limit is None or row.goal is not None)],
            "the limit",
            False,
        ),
        ([row for row in rows if row.kind == "peer"], "the peer", True),
    ]
    panels = [panel for panel in panels if panel[0]]
    below = -(-len(series) // 3)
    heights = [0.6 + 0.24 * max(len(some) for some, _, _ in panels)] if panels else []
    heights += [2.3 * below] if below else []
    figure = plt.figure(figsize=(12, max(1.0, sum(heights))), layout="constrained")
    parts = list(figure.subfigures(max(1, len(heights)), 1, height_ratios=heights or [1], squeeze=False)[:, 0])
    if panels:
        above = parts.pop(0).subplots(1, len(panels), squeeze=False)[0]
        for axes, (some, beside, logarithmic) in zip(above, panels, strict=True):
            _ratios(axes, some, f"speed over that of {beside} (1: as fast); red: the goal", logarithmic=logarithmic)
    if series:
        places = parts.pop(0).subplots(below, 3, squeeze=False).ravel()
        for axes, one in zip(places, series, strict=False):
            _grown(axes, one)
        for axes in places[len(series) :]:
            axes.set_axis_off()
    figure.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
