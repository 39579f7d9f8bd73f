"""Checks of a new store: one that could not be opened, written to or verified is refused before it is made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mmcache.errors import ArgumentError, CorruptError
from mmcache.format.dtypes import BY_NAME
from mmcache.format.manifest import ARRAY_LIMIT, ROOT_LIMIT, Manifest, array_json
from mmcache.format.names import check_site_name
from mmcache.format.shard import Layout
from mmcache.format.signed_json import check_signed
from mmcache.system.arguments import count, shown

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["MOST_LAYERS", "check_new", "row_sizes", "site_widths"]

# More than any model has; JSON and headers have room for fewer.
MOST_LAYERS, _MOST_WIDTH = 1 << 16, 1 << 28
# A staging slot holds at least one row, and the ring has four slots.
_MOST_ROW_BYTES = 1 << 31
# Left free in the root for later additions.
_SPARE = 1 << 20


def site_widths(name: str, value: Any) -> dict[str, int]:
    """The checked argument `sites`: each site of a new store and its `d_model`.

    Raises:
        ArgumentError: not a dict of names to integers, or empty.
    """
    if not isinstance(value, Mapping) or not value:
        raise ArgumentError(f"{name} is {shown(value)}: expected a dict of site name to d_model")
    for site in value:
        check_site_name(site)
    width = count(1, _MOST_WIDTH)
    return {site: width(f"d_model of {site!r}", one) for site, one in value.items()}


def row_sizes(manifest: Manifest) -> list[int]:
    """Bytes of a row of each site: of one layer, or in the token layout of all layers."""
    size = BY_NAME[manifest.dtype or ""].size
    return [size * math.prod(manifest.row_shape(site)) for site in manifest.sites]


def check_new(manifest: Manifest) -> None:
    """Refuse a store that could be described but not used: its root is too large, its rows or names too long.

    Args:
        manifest: of the new store, with its geometry if that is known already.

    Raises:
        ArgumentError: names what is invalid or too large.
    """
    _check_root(manifest)
    if manifest.shard_tokens is None:
        return
    # The fewer tokens are appended first, the smaller the inner chunks, and the more of them.
    _check_root(manifest.with_geometry(manifest.shard_tokens, 1))
    for site, size in zip(manifest.sites, row_sizes(manifest), strict=True):
        if size > _MOST_ROW_BYTES:
            raise ArgumentError(
                f"a row of {site!r} takes {size} bytes ({manifest.layout} layout, {len(manifest.layers)} layers): "
                f"expected at most {_MOST_ROW_BYTES}; store fewer layers, or layout='layer'"
            )
    _check_arrays(manifest)
    for site in manifest.sites:
        spec = manifest.spec(site)
        try:
            Layout(spec, spec.shard_rows).header(manifest.shard_metadata(site, 1 << 30))
        except CorruptError as error:
            raise ArgumentError(f"{error}, fewer layers, or layout='layer'") from error


def _check_root(manifest: Manifest) -> None:
    try:
        text = manifest.to_json()
    except (ValueError, RecursionError) as error:
        raise ArgumentError(f"what the store says of itself cannot be kept as JSON: {error!r}") from error
    _check_size(text, ROOT_LIMIT - _SPARE, "the root's zarr.json", ("layers", "sites", "special tokens", "metadata"))
    try:
        Manifest.from_attributes(check_signed(text, "the new store"), "the new store")
    except CorruptError as error:
        raise ArgumentError(f"such a store could not be opened again: {error}") from error


def _check_arrays(manifest: Manifest) -> None:
    # The sites' arrays differ only in width.
    site = next(iter(manifest.sites))
    _check_size(array_json(manifest, site, 0), ARRAY_LIMIT - _SPARE // 64, f"the zarr.json of {site}", ("layers",))


def _check_size(text: bytes, most: int, what: str, parts: Iterable[str]) -> None:
    if len(text) > most:
        raise ArgumentError(f"{what} would take {len(text)} bytes, and may take {most}: fewer {' or '.join(parts)}")
