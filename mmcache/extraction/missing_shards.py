"""The missing shards of a planned store: which, their bytes, and whether the disk has room."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import numpy as np

from mmcache.errors import DiskFullError
from mmcache.extraction.staging_claims import is_staging
from mmcache.format.shard import Layout
from mmcache.storage.listing import present_shards
from mmcache.system.files import free_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mmcache.format.manifest import Manifest

__all__ = ["bytes_to_write", "check_room", "missing_of", "shards_from"]


def missing_of(path: Path, manifest: Manifest, sites: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """The missing shards of some sites of a plan (None: all): `[slots, blocks]` bool by site."""
    names = manifest.sites if sites is None else sites
    found = {site: present_shards(path, manifest, site, manifest.n_tokens or 0) for site in names}
    return {site: np.logical_not(there, out=there) for site, there in found.items()}


def bytes_to_write(manifest: Manifest, shards: dict[str, np.ndarray]) -> int:
    """The total bytes of some shards (`[slots, blocks]` bool by site) as files."""
    needed = 0
    for site, which in shards.items():
        spec, total = manifest.spec(site), manifest.n_tokens or 0
        # All shards but those of the last block are full, and so have the same size.
        for block, count in ((0, which[:, :-1].sum()), (which.shape[1] - 1, which[:, -1:].sum())):
            if count:
                needed += int(count) * Layout(spec, spec.rows_in_block(block, total)).size
    return needed


def shards_from(path: Path, manifest: Manifest, first: int) -> dict[str, np.ndarray]:
    """The shards of each site that exist, from block `first` on: `[slots, blocks]` bool."""
    found = {site: present_shards(path, manifest, site, manifest.n_tokens or 0) for site in manifest.sites}
    for there in found.values():
        there[:, :first] = False
    return found


def check_room(
    path: Path,
    manifest: Manifest,
    missing: dict[str, np.ndarray] | None = None,
    *,
    replacing: tuple[Manifest, int] | None = None,
) -> None:
    """Refuse if the disk has no room for the missing shards.

    Does nothing for a staging folder, which never holds all of them: `BucketOutput.check_room` checks that.

    Args:
        path: the store.
        manifest: its plan, which may not be written yet.
        missing: of each site, `[slots, blocks]` bool; None to list the folder.
        replacing: the previous plan and a block: shards of that plan from that block on will be removed first.

    Raises:
        DiskFullError: with the bytes needed and free.
    """
    if is_staging(path):
        return
    missing, free = missing_of(path, manifest) if missing is None else missing, free_bytes(path)
    if replacing is not None:
        old, first = replacing
        free += bytes_to_write(old, shards_from(path, old, first))
        for site in missing:
            missing[site][:, first:] = True
    needed = bytes_to_write(manifest, missing)
    if needed > free:
        raise DiskFullError(
            errno.ENOSPC,
            f"the shards that are missing take {needed} bytes ({needed / 2**30:.1f} GiB), and {free} "
            f"({free / 2**30:.1f} GiB) are free: make room, or store fewer sites, layers or tokens "
            f"(which is another plan, and needs another path)",
            str(path),
        )
