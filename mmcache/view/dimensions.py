"""Views of a site's dimensions: outliers, and the values of one; also directions, read from files and checked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import torch

from mmcache.errors import ArgumentError, OutOfRangeError, ShapeError
from mmcache.read.store import a_store
from mmcache.system.arguments import a_name, a_path, an_index, count, layer_numbers, optional, public, shown
from mmcache.view.base import BUDGET, Name, Sampler, View, written

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from mmcache.read.store import Store

__all__ = ["Direction", "dimension", "dimensions", "load_direction", "named", "resolve_direction"]

_BARS = 80


@public(store=a_store, site=a_name, layers=optional(layer_numbers), most=count(1))
def dimensions(store: Store, site: str, *, layers: Sequence[int] | None = None, most: int = 24) -> View:
    """The outlier dimensions of each layer: those whose root mean square is many times the layer's median.

    Computed from the statistics alone. `data`: `layers`; `median` `[L]`, of the dimensions' root mean squares;
    `outliers`, the `most` largest of each layer: `layer`, `dimension`, `rms`, `ratio` (to the median), `mean`, `std`;
    `shown` `[K]`, the `most` dimensions with the largest ratio in any layer, the largest first, and their `ratios`
    `[L, K]`.

    Raises:
        UnknownSiteError, OutOfRangeError, IncompleteError, CorruptError: as for reads.
        ArgumentError: `most` below 1.
    """
    look = Sampler(store, site, layers)
    found, sampled = look.statistics()
    mean, std = found.mean.numpy()[look.slots], found.std.numpy()[look.slots]
    rms = np.hypot(mean, std)
    # NaN if no row of a layer counts.
    median = np.median(rms, axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        # If a layer's median is zero, the ratio is infinite.
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
    """The distribution of one dimension's values: mean and deviation of all tokens, and a histogram.

    The histogram covers tokens that count, as many as `budget` bytes hold. `data`: `mean`, `std`, `count` (from the
    statistics, of all tokens that count); `edges` `[81]` and `counts` `[80]`; `quantiles`, by name; `looked`, how many
    values were read; `non_finite`, how many of them the histogram leaves out.

    Raises:
        UnknownSiteError, OutOfRangeError, IncompleteError, CorruptError: as for reads.
    """
    look = Sampler(store, site, [layer], budget)
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


def check_dimension(look: Sampler, dimension: int) -> None:
    """Check that a dimension exists.

    Raises:
        OutOfRangeError: it is not 0 to `d_model` - 1.
    """
    if not 0 <= dimension < look.view.d_model:
        raise OutOfRangeError(f"dimension {shown(dimension)} not in {look.site} (d_model={look.view.d_model})")


# A dimension's number, or a vector.
Direction = int | np.ndarray | torch.Tensor


@public(file=a_path)
def load_direction(file: str | os.PathLike[str]) -> np.ndarray:
    """A direction from a `.npy` or `.safetensors` file that holds one array: float64, any shape.

    Raises:
        ArgumentError: the file cannot be read, or holds several arrays.
    """
    path = Path(file)
    try:
        if path.suffix == ".npy":
            # Never unpickled: pickle can run code.
            return np.asarray(np.load(path, allow_pickle=False), np.float64)
        with safetensors.safe_open(path, "pt") as opened:
            names = list(opened.keys())
            if len(names) != 1:
                raise ArgumentError(f"{path} holds {', '.join(names) or 'nothing'}: expected one tensor, the direction")
            found: np.ndarray = opened.get_tensor(names[0]).double().numpy()
            return found
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        if isinstance(error, ArgumentError):
            raise
        raise ArgumentError(
            f"{path} is no direction: expected a .npy or .safetensors file of one array ({error})"
        ) from error


def resolve_direction(look: Sampler, direction: Direction | None) -> np.ndarray | int | None:
    """Check a direction against a site. Returns it in the form that `Sampler.scores` takes.

    Raises:
        OutOfRangeError: there is no such dimension.
        ShapeError: a vector that is not `[d_model]`, or `[layers, d_model]` of the sampler's layers.
    """
    if direction is None:
        return None
    if isinstance(direction, int | np.integer) and not isinstance(direction, bool):
        check_dimension(look, int(direction))
        return int(direction)
    given = direction.detach().double().cpu() if isinstance(direction, torch.Tensor) else direction
    try:
        vector = np.asarray(given, float)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"direction is {shown(direction)}: expected a dimension's number, or a vector") from error
    shapes = ((look.view.d_model,), (len(look.slots), look.view.d_model))
    if vector.shape not in shapes:
        raise ShapeError(f"direction is {vector.shape}: expected {shapes[0]} or {shapes[1]} for {look.site}")
    return vector


def named(direction: Direction | None) -> int | Name | None:
    """A direction in a view's Python call: a dimension's number, or the variable `direction`."""
    return direction if direction is None or isinstance(direction, int) else Name("direction")
