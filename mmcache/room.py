"""What is missing of a planned store, and whether there is room for it."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from mmcache.errors import DiskFullError
from mmcache.files import free_bytes
from mmcache.format import Layout
from mmcache.listing import missing_shards

if TYPE_CHECKING:
    from pathlib import Path

    from mmcache.manifest import Manifest

__all__ = ["bytes_to_write", "check_room", "missing_of", "shards_from"]


def missing_of(path: Path, manifest: Manifest) -> dict[str, list[tuple[int, int]]]:
    """List the missing shards of each site of a plan, as (slot, block)."""
    return {site: missing_shards(path, manifest, site, manifest.n_tokens or 0) for site in manifest.sites}


def bytes_to_write(manifest: Manifest, missing: dict[str, list[tuple[int, int]]]) -> int:
    """Add up the sizes of the files of shards that are missing."""
    needed = 0
    for site, shards in missing.items():
        spec = manifest.spec(site)
        rows = [spec.rows_in_block(block, manifest.n_tokens or 0) for _, block in shards]
        needed += sum(Layout(spec, some).size * rows.count(some) for some in set(rows))
    return needed


def shards_from(path: Path, manifest: Manifest, first: int) -> dict[str, list[tuple[int, int]]]:
    """List the shards of each site that are there, as (slot, block), from block `first` on."""
    found = {}
    for site, missing in missing_of(path, manifest).items():
        blocks = range(first, manifest.spec(site).blocks(manifest.n_tokens or 0))
        found[site] = sorted({(slot, block) for slot in manifest.slots(site) for block in blocks} - set(missing))
    return found


def check_room(
    path: Path, manifest: Manifest, *, replacing: tuple[Manifest, int] | None = None
) -> dict[str, list[tuple[int, int]]]:
    """List the missing shards of each site, as (slot, block), and refuse if the disk has no room for them.

    Args:
        path: the store.
        manifest: its plan, which need not have been written yet.
        replacing: the plan before it and a block: shards of that plan from there on will be removed first.

    Raises:
        DiskFullError: with the bytes needed and free.
    """
    missing, free = missing_of(path, manifest), free_bytes(path)
    if replacing is not None:
        old, first = replacing
        free += bytes_to_write(old, shards_from(path, old, first))
        anew = shards_from(path, manifest, first)
        missing = {site: sorted({*shards, *anew[site]}) for site, shards in missing.items()}
    needed = bytes_to_write(manifest, missing)
    if needed > free:
        raise DiskFullError(
            errno.ENOSPC,
            f"the shards that are missing take {needed} bytes ({needed / 2**30:.1f} GiB), and {free} "
            f"({free / 2**30:.1f} GiB) are free: make room, or store fewer sites, layers or tokens "
            f"(which is another plan, and needs another path)",
            str(path),
        )
    return missing
