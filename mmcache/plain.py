"""Plain data: what JSON can say."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from mmcache.sites import ResolvedSite

__all__ = ["json_ready", "sites_table"]


def sites_table(sites: tuple[ResolvedSite, ...], widths: dict[str, int]) -> list[dict[str, Any]]:
    """Say, for each site of a model, which module's input or output it is, and its shape."""
    return [
        {
            "site": site.name,
            "modules": f"{site.modules[0]}:{site.side}"
            + (f" … {site.modules[-1]}:{site.side}" if len(site.modules) > 1 else ""),
            "n_layers": len(site.layers),
            "shape": ["batch", "seq", widths[site.name]],
        }
        for site in sites
    ]


def json_ready(data: Any) -> Any:
    """Write arrays as lists; NaN and infinities, which JSON has not, as zarr does: "NaN", "Infinity", "-Infinity"."""
    if isinstance(data, dict):
        return {name: json_ready(value) for name, value in data.items()}
    if isinstance(data, np.ndarray):
        if data.dtype.kind != "f" or np.isfinite(data).all():
            return data.tolist()
        data = data.tolist()
    if isinstance(data, np.generic):
        data = data.item()
    if isinstance(data, list | tuple):
        return [json_ready(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return "NaN" if math.isnan(data) else "Infinity" if data > 0 else "-Infinity"
    return data
