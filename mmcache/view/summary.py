"""A layer, a row and a site's statistics, in a few numbers each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mmcache.format.token_flags import named_flags
from mmcache.read.store import a_store
from mmcache.system.arguments import a_name, an_index, public
from mmcache.view.base import Sampler

if TYPE_CHECKING:
    from mmcache.read.store import Store

__all__ = ["layer_view", "row_view", "statistics_view"]

# A layer's summary reads at most this many rows.
_ROWS_READ = 1 << 14


def _summary(rows: torch.Tensor) -> dict[str, Any]:
    """Statistics of rows `[n, d_model]`: of the values and norms of the finite rows."""
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


@public(store=a_store, site=a_name, layer=an_index)
def layer_view(store: Store, site: str, layer: int) -> dict[str, Any]:
    """A summary of one layer, from its first rows, 16,384 at most; `sampled` says whether there are more.

    Raises:
        OutOfRangeError, UnknownSiteError, IncompleteError, CorruptError: as for reads.
    """
    rows = store[site][layer, :_ROWS_READ]
    return {
        "site": site,
        "layer": layer,
        "shape": [store.n_tokens, store.d_model(site)],
        "sampled": store.n_tokens > _ROWS_READ,
        **_summary(rows),
    }


@public(store=a_store, site=a_name, layer=an_index, position=an_index)
def row_view(store: Store, site: str, layer: int, position: int) -> dict[str, Any]:
    """One row: its place, a summary, its largest dimensions, and all of its values."""
    row = store[site].get_position(layer, position)
    place = store.locate(position)
    position %= store.n_tokens
    wide = row.double()
    largest = wide.abs().nan_to_num(nan=torch.inf).topk(min(8, len(row))).indices.tolist()
    return {
        "site": site,
        "layer": layer,
        "position": position,
        "sequence": place.sequence,
        "offset": place.offset,
        "token": place.token_id,
        "flagged": named_flags(int(store.read_flags(position, position + 1)[0]), store.flag_bits),
        **_summary(row[None]),
        "largest": [{"dimension": index, "value": float(wide[index])} for index in largest],
        "values": wide.tolist(),
    }


@public(store=a_store, site=a_name)
def statistics_view(store: Store, site: str) -> dict[str, Any]:
    """The statistics of each layer of a site, merged from its shards, or from as many as 64 MiB allow.

    Reads no activations. `sampled` says what was left out, or is None.
    """
    found, sampled = Sampler(store, site).statistics()
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
                # With one row, every dimension would count as dead.
                "dead_dimensions": int(((std == 0) & (found.count[slot] > 1)).sum()),
                "zero_rows": int(found.zero_rows[slot]),
                "non_finite": int(found.non_finite[slot]),
                "first_non_finite": int(found.first_non_finite[slot]),
                "overflow": int(found.overflow[slot]),
            }
        )
    return {"site": site, "d_model": store.d_model(site), "layers": layers, "sampled": sampled}
