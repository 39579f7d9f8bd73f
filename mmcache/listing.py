"""Which shards an array should have and has, from one listing of its folder."""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING

from mmcache.files import list_names

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from mmcache.manifest import Manifest

__all__ = ["expected_shards", "missing_shards", "present_shards"]

# No leading zeros: `c.00.1.0` is no shard's name. Eighteen digits: no name makes a number of a megabyte.
_SHARD_KEY = re.compile(r"c\.(0|[1-9]\d{0,17})\.(0|[1-9]\d{0,17})\.0", re.ASCII)


def expected_shards(manifest: Manifest, array: str, rows: int) -> Iterator[tuple[int, int]]:
    """Name the shards of an array of `rows` rows, as (slot, block)."""
    return itertools.product(manifest.slots(array), range(manifest.spec(array).blocks(rows)))


def missing_shards(path: Path, manifest: Manifest, array: str, rows: int) -> list[tuple[int, int]]:
    """List the shards that an array of `rows` rows should have and has not, as (slot, block), from one listing."""
    names = set(list_names(path / array))
    return [
        (slot, block)
        for slot, block in expected_shards(manifest, array, rows)
        if manifest.shard_key(array, block, slot) not in names
    ]


def present_shards(path: Path, manifest: Manifest, site: str, *, expected: bool = True) -> list[tuple[int, int]]:
    """List the shards of a site that are there, as (slot, block), from one listing: bounded by what is there.

    Only those that it should have, or else only those that it should not.
    """
    slots, blocks = len(manifest.slots(site)), manifest.spec(site).blocks(manifest.n_tokens or 0)
    keys = (_SHARD_KEY.fullmatch(name) for name in list_names(path / site))
    found = ((int(key[1]), int(key[2])) for key in keys if key)
    return [(slot, block) for slot, block in found if (slot < slots and block < blocks) == expected]
