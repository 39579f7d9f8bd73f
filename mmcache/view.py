"""What there is to see of a store, as plain data: terminal and JSON are drawn from the same."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from mmcache.sites import ResolvedSite
    from mmcache.store import Store

__all__ = ["json_ready", "layer_view", "overview", "row_view", "sites_view", "statistics_view"]

# A layer's summary reads at most this many rows.
_ROWS_READ = 1 << 14


def overview(store: Store) -> dict[str, Any]:
    """Say what a store is: identity, shape, size, completeness. Reads metadata and one listing a site, no data."""
    sites = {}
    for site in store.sites:
        shards, missing = store.n_shards(site), store.missing(site)
        sites[site] = {
            "d_model": store.d_model(site),
            "shards": shards,
            "missing": missing,
            "bytes": store.site_bytes(site),
        }
    return {
        "path": str(store.path),
        "kind": store.kind,
        "complete": not any(site["missing"] for site in sites.values()),
        "layout": store.layout,
        "dtype": None if store.dtype is None else str(store.dtype).removeprefix("torch."),
        "n_tokens": store.n_tokens,
        "n_sequences": store.n_sequences,
        "n_layers": store.n_layers,
        "layers": list(store.layers),
        "shard_tokens": store.shard_tokens,
        "bytes": sum(site["bytes"] for site in sites.values()),
        "sites": sites,
        "metadata": store.metadata,
        "source": store.source,
    }


def _summary(rows: torch.Tensor) -> dict[str, Any]:
    """Describe rows `[n, d_model]`: of the values and of the norms of those that are finite."""
    wide = rows.double()
    finite = wide.isfinite().all(dim=-1)
    wide = wide[finite]
    norms = wide.norm(dim=-1)
    said: dict[str, Any] = {"rows": len(rows), "non_finite": int((~finite).sum())}
    if len(wide):
        said |= {
            "mean": float(wide.mean()),
            "std": float(wide.std(correction=0)),
            "min": float(wide.min()),
            "max": float(wide.max()),
            "mean_norm": float(norms.mean()),
            "max_norm": float(norms.max()),
        }
    return said


def layer_view(store: Store, site: str, layer: int) -> dict[str, Any]:
    """Summarise one layer from its first rows, 16,384 at most; `sampled` says whether there are more.

    Raises:
        OutOfRangeError, UnknownSiteError, IncompleteError, CorruptError: as reading does.
    """
    rows = store[site][layer, :_ROWS_READ]
    return {
        "site": site,
        "layer": layer,
        "shape": [store.n_tokens, store.d_model(site)],
        "sampled": store.n_tokens > _ROWS_READ,
        **_summary(rows),
    }


def row_view(store: Store, site: str, layer: int, position: int) -> dict[str, Any]:
    """Show one row: where it lies, what it sums up to, its largest dimensions, and all of its values."""
    row = store[site].get_position(layer, position)
    place = store.locate(position)
    wide = row.double()
    largest = wide.abs().nan_to_num(nan=torch.inf).topk(min(8, len(row))).indices.tolist()
    return {
        "site": site,
        "layer": layer,
        "position": position % store.n_tokens,
        "sequence": place.sequence,
        "offset": place.offset,
        "token": place.token_id,
        **_summary(row[None]),
        "largest": [{"dimension": index, "value": float(wide[index])} for index in largest],
        "values": wide.tolist(),
    }


def statistics_view(store: Store, site: str) -> dict[str, Any]:
    """Give the statistics of each layer of a site, merged from its shards; reads no activations."""
    found = store[site].statistics
    scales = found.normalizer("scalar")[1][:, 0]
    layers = []
    for slot, layer in enumerate(store.layers):
        std = found.std[slot]
        layers.append(
            {
                "layer": layer,
                "rows": int(found.rows[slot]),
                "mean_norm": float(found.mean_norm[slot]),
                "min_norm": float(found.min_norm[slot]),
                "max_norm": float(found.max_norm[slot]),
                "scalar_scale": float(scales[slot]),
                "mean": float(found.mean[slot].mean()),
                "std": float(std.mean()),
                "largest_std": {"dimension": int(std.argmax()), "value": float(std.max())},
                "dead_dimensions": int((std == 0).sum()),
                "zero_rows": int(found.zero_rows[slot]),
                "non_finite": int(found.non_finite[slot]),
                "first_non_finite": int(found.first_non_finite[slot]),
                "overflow": int(found.overflow[slot]),
            }
        )
    return {"site": site, "d_model": store.d_model(site), "layers": layers}


def sites_view(sites: tuple[ResolvedSite, ...], widths: dict[str, int]) -> list[dict[str, Any]]:
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
    """Write NaN and infinities, which JSON does not have, as zarr does: "NaN", "Infinity", "-Infinity"."""
    if isinstance(data, dict):
        return {name: json_ready(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [json_ready(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return "NaN" if math.isnan(data) else "Infinity" if data > 0 else "-Infinity"
    return data
