"""Stores, sites and caches in a notebook: small tables, every text in them escaped, no colours of their own."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from mmcache.text import ranges, size

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["cache_html", "site_html", "store_html"]

_LEFT = ' style="text-align: left"'


def store_html(store: Any) -> str:
    """Draw a `Store`: what it is, how much of it is there, and its sites."""
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
    """Draw a `SiteView`: its shape, and how much of it is there."""
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
    """Draw a `FullActivationCache`; `view` is None where it holds nothing, or is closed."""
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
