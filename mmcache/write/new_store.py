"""What a new store may be: what is made can be opened, written to and verified, or is refused before it is there."""

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

# More than any model has; the lists of them that JSON and headers have room for are shorter.
MOST_LAYERS, _MOST_WIDTH = 1 << 16, 1 << 28
# What is staged holds a row at least, and the ring has four such pieces.
_MOST_ROW_BYTES = 1 << 31
# Left free in the root, for what is added to it later.
_SPARE = 1 << 20


def site_widths(name: str, value: Any) -> dict[str, int]:
    """Sites of a new store and their `d_model`, as an argument.

    Raises:
        ArgumentError: they are no dict of names to whole numbers, or none at all.
    """
    if not isinstance(value, Mapping) or not value:
        raise ArgumentError(f"{name} is {shown(value)}: expected a dict of site name to d_model")
    for site in value:
        check_site_name(site)
    width = count(1, _MOST_WIDTH)
    return {site: width(f"d_model of {site!r}", one) for site, one in value.items()}


def row_sizes(manifest: Manifest) -> list[int]:
    """Bytes of a row of each site: of one layer, or of all of them in the token layout."""
    size = BY_NAME[manifest.dtype or ""].size
    return [size * math.prod(manifest.row_shape(site)) for site in manifest.sites]


def check_new(manifest: Manifest) -> None:
    """Refuse what could be written down, and not be used: a root too large, rows too long, names too long.

    Args:
        manifest: a store that is to be made, with its geometry if that is known already.

    Raises:
        ArgumentError: what it is that makes no sense, or does not fit.
    """
    _check_root(manifest)
    if manifest.shard_tokens is None:
        return
    # The fewer tokens come first, the smaller and the more are the inner chunks.
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
    # They differ in the site's width alone.
    site = next(iter(manifest.sites))
    _check_size(array_json(manifest, site, 0), ARRAY_LIMIT - _SPARE // 64, f"the zarr.json of {site}", ("layers",))


def _check_size(text: bytes, most: int, what: str, parts: Iterable[str]) -> None:
    if len(text) > most:
        raise ArgumentError(f"{what} would take {len(text)} bytes, and may take {most}: fewer {' or '.join(parts)}")
