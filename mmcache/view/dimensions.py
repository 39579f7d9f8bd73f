"""The dimensions of a site: which of them stick out, and how the values of one are spread."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mmcache.errors import OutOfRangeError
from mmcache.read.store import a_store
from mmcache.system.arguments import a_name, an_index, count, layer_numbers, optional, public, shown
from mmcache.view.base import View, written
from mmcache.view.look import BUDGET, Look

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmcache.read.store import Store

__all__ = ["dimension", "dimensions"]

_BARS = 80


@public(store=a_store, site=a_name, layers=optional(layer_numbers), most=count(1))
def dimensions(store: Store, site: str, *, layers: Sequence[int] | None = None, most: int = 24) -> View:
    """Find the outlier dimensions of each layer: those whose root mean square is many times the layer's median.

    From the statistics alone. `data`: `layers`; `median` `[L]`, of the dimensions' root mean squares; `outliers`, for
    each layer its `most` largest: `layer`, `dimension`, `rms`, `ratio` (to the median), `mean`, `std`; `shown` `[K]`,
    the dimensions that are among the `most` largest ratios of any layer, the largest first, and `ratios` `[L, K]`.

    Raises:
        UnknownSiteError, OutOfRangeError, IncompleteError, CorruptError: as reading does.
        ArgumentError: `most` below 1.
    """
    look = Look(store, site, layers)
    found, sampled = look.statistics()
    mean, std = found.mean.numpy()[look.slots], found.std.numpy()[look.slots]
    rms = np.hypot(mean, std)
    # NaN where no row of a layer counts.
    median = np.median(rms, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        # A layer whose median is zero has outliers without measure.
        ratios = np.where(rms == 0, 0.0, rms / median[:, None])
    ranked = np.argsort(-np.nan_to_num(ratios, nan=-1.0), axis=1, kind="stable")[:, :most]
    outliers = [
        {
            "layer": layer,
            "dimension": int(at),
            "rms": float(rms[line, at]),
            "ratio": float(ratios[line, at]),
            "mean": float(mean[line, at]),
            "std": float(std[line, at]),
        }
        for line, layer in enumerate(look.layers)
        for at in ranked[line]
    ]
    largest = np.nan_to_num(ratios, nan=-1.0).max(axis=0)
    shown = np.argsort(-largest, kind="stable")[:most]
    data = {
        "site": site, "layers": look.layers, "d_model": look.view.d_model, "median": median, "outliers": outliers,
        "shown": shown, "ratios": ratios[:, shown],
    }  # fmt: skip
    python = written(dimensions, site, layers=None if layers is None else list(layers), most=most)
    return View("dimensions", f"Outlier dimensions of {site}", python, data, sampled, look.bytes_read)


@public(store=a_store, site=a_name, layer=an_index, dimension=an_index, budget=count(1))
def dimension(store: Store, site: str, layer: int, dimension: int, *, budget: int = BUDGET) -> View:
    """Show how the values of one dimension are spread: mean and deviation of all tokens, and a histogram.

    The histogram is of tokens that count, as many as `budget` bytes hold. `data`: `mean`, `std`, `count` (from the
    statistics, of all tokens that count); `edges` `[81]` and `counts` `[80]`; `quantiles`, by name; `looked`, how many
    values the histogram is of; `non_finite`, how many of them it leaves out.

    Raises:
        UnknownSiteError, OutOfRangeError, IncompleteError, CorruptError: as reading does.
    """
    look = Look(store, site, [layer], budget)
    check_dimension(look, dimension)
    found, _ = look.statistics()
    sample = look.sample()
    values = look.scores(sample.positions, dimension)[:, 0]
    finite = values[np.isfinite(values)]
    counts, edges = np.histogram(finite, bins=_BARS) if len(finite) else (np.zeros(_BARS, int), np.arange(_BARS + 1.0))
    named = {"min": 0.0, "1 %": 0.01, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "99 %": 0.99, "max": 1.0}
    slot = look.slots[0]
    data: dict[str, Any] = {
        "site": site,
        "layer": layer,
        "dimension": dimension,
        "mean": float(found.mean[slot, dimension]),
        "std": float(found.std[slot, dimension]),
        "count": int(found.count[slot, dimension]),
        "edges": edges,
        "counts": counts,
        "quantiles": {name: float(np.quantile(finite, at)) for name, at in named.items()} if len(finite) else {},
        "looked": len(values),
        "non_finite": len(values) - len(finite),
    }
    return View(
        "dimension",
        f"Dimension {dimension} of {site}, layer {layer}",
        f"mmcache.view.dimension(store, {site!r}, {layer}, {dimension})",
        data,
        sample.said,
        look.bytes_read,
    )


def check_dimension(look: Look, dimension: int) -> None:
    """Refuse a dimension that is not there.

    Raises:
        OutOfRangeError: it is not 0 to `d_model` - 1.
    """
    if not 0 <= dimension < look.view.d_model:
        raise OutOfRangeError(f"dimension {shown(dimension)} not in {look.site} (d_model={look.view.d_model})")
