"""A store's metadata as plain data (`overview`), and stores, sites and caches as HTML. Does not import torch."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from mmcache.errors import IncompleteError
from mmcache.format.manifest import read_manifest
from mmcache.storage.connection import placed
from mmcache.storage.listing import listed_shards
from mmcache.storage.mirror import Mirror
from mmcache.system.arguments import a_path, public
from mmcache.text import ranges, size

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from mmcache.format.manifest import Manifest

__all__ = ["cache_html", "overview", "site_html", "store_html"]

# The most token ranges for which completeness is reported.
_STRETCHES = 100


@public(path=a_path)
def overview(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Identity, shape, size and completeness of the store at `path`, a folder or an address in a bucket.

    Reads only metadata and lists shards. For each site: its width, shards, missing shards, bytes, and `present`: for
    each of up to 100 ranges of its tokens, the fraction of shards that exist.

    Raises:
        StoreNotFoundError, CorruptError, VersionError: there is no readable store.
        IncompleteError: it is still being planned.
        AccessError, RemoteError: object storage refuses, or does not answer.
    """
    place = placed(path)
    folder = _folder(place) if isinstance(place, str) else place
    where = str(place)
    manifest = read_manifest(folder)
    if manifest.kind == "planned" and manifest.n_tokens is None:
        raise IncompleteError(f"{where} is still being planned: run the same `mmcache extract` again")
    sites = {site: _site(folder, manifest, site) for site in manifest.sites}
    return {
        "path": where,
        "kind": manifest.kind,
        "complete": not any(site["missing"] for site in sites.values()),
        "layout": manifest.layout,
        "dtype": manifest.dtype,
        "n_tokens": manifest.n_tokens or 0,
        "n_sequences": manifest.n_sequences,
        "n_layers": len(manifest.layers),
        "layers": list(manifest.layers),
        "shard_tokens": manifest.shard_tokens,
        "bytes": sum(site["bytes"] for site in sites.values()),
        "sites": sites,
        "metadata": manifest.metadata,
        "source": manifest.source,
    }


def _folder(url: str) -> Path:
    mirror = Mirror(url)
    mirror.bucket.warn_of(mirror.strange)
    return mirror.folder


def _site(folder: Path, manifest: Manifest, site: str) -> dict[str, Any]:
    said = {"d_model": manifest.sites[site], "shards": manifest.n_shards(site), "bytes": manifest.array_bytes(site)}
    if manifest.shard_tokens is None or not said["shards"]:
        return said | {"missing": 0, "present": []}
    blocks = manifest.spec(site).blocks(manifest.n_tokens or 0)
    stretches = min(_STRETCHES, blocks)
    # Ranges of blocks, as even as possible.
    edges = np.arange(stretches + 1) * blocks // stretches
    counts = np.zeros(stretches, np.int64)
    for _, block in listed_shards(folder, manifest, site, manifest.n_tokens or 0):
        counts += np.bincount(np.searchsorted(edges, block, side="right") - 1, minlength=stretches)
    parts = counts / (np.diff(edges) * len(manifest.slots(site)))
    return said | {"missing": said["shards"] - int(counts.sum()), "present": parts.tolist()}


_LEFT = ' style="text-align: left"'


def store_html(store: Any) -> str:
    """A `Store` as HTML: identity, completeness and sites."""
    missing = {site: store.missing(site) for site in store.sites}
    rows = []
    for site, gone in missing.items():
        shards = store.n_shards(site)
        shape = f"[{store.n_layers}, {store.n_tokens}, {store.d_model(site)}]"
        rows.append((site, shape, f"{shards - gone:,} of {shards:,}", size(store.site_bytes(site))))
    about = {
        "path": store.where,
        "store": f"{store.kind}, layout {store.layout}, {_complete(sum(missing.values()))}",
        "tokens": f"{store.n_tokens:,} in {store.n_sequences:,} sequences",
        "layers": _layers(store.layers),
        "dtype": store.dtype,
        "size": size(sum(store.site_bytes(site) for site in store.sites)),
    }
    return _pairs("mmcache.Store", about) + _table(("site", "shape", "shards", "size"), rows)


def site_html(view: Any) -> str:
    """A `SiteView` as HTML: shape and completeness."""
    folder = view._folder  # noqa: SLF001 -- the class takes this function as its method
    shards = folder.spec.blocks(folder.rows) * (len(view.layers) if view._layout == "layer" else 1)  # noqa: SLF001
    there = folder.count()
    about = {
        **_rows(view),
        "layers": _layers(view.layers),
        "layout": view._layout,  # noqa: SLF001 -- as above
        "shards": f"{there:,} of {shards:,}, {_complete(shards - there)}",
    }
    return _pairs("mmcache.SiteView", about)


def cache_html(path: object, state: str, view: Any) -> str:
    """A `FullActivationCache` as HTML; `view` is None if the cache is empty or closed."""
    return _pairs("mmcache.FullActivationCache", {"path": path, "cache": state, **(_rows(view) if view else {})})


def _rows(view: Any) -> dict[str, Any]:
    n_layers, n_tokens, d_model = view.shape
    return {
        "site": view.name,
        "shape": f"[{n_layers}, {n_tokens}, {d_model}]",
        "dtype": view.dtype,
        "size": size(n_layers * n_tokens * d_model * view.dtype.itemsize),
    }


def _complete(missing: int) -> str:
    return f"not complete: {missing:,} shards are missing" if missing else "complete"


def _layers(layers: tuple[int, ...]) -> str:
    return f"{len(layers)} ({ranges(layers)})" if layers else "0"


def _pairs(title: str, pairs: Mapping[str, Any]) -> str:
    lines = (f"<tr><th{_LEFT}>{escape(name)}</th>{_cell(value)}</tr>" for name, value in pairs.items())
    return f"<table><caption{_LEFT}><b>{escape(title)}</b></caption><tbody>{''.join(lines)}</tbody></table>"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    names = "".join(f"<th{_LEFT}>{escape(name)}</th>" for name in head)
    lines = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<table><thead><tr>{names}</tr></thead><tbody>{lines}</tbody></table>"


def _cell(value: object) -> str:
    return f"<td{_LEFT}>{escape(str(value))}</td>"
