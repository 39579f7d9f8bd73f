"""What a store is, from its metadata and one listing a site. No torch is loaded for it, so that it takes no time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mmcache.errors import IncompleteError
from mmcache.format.manifest import read_manifest
from mmcache.storage.connection import placed
from mmcache.storage.listing import listed_shards
from mmcache.storage.mirror import Mirror
from mmcache.system.arguments import a_path, public

if TYPE_CHECKING:
    import os
    from pathlib import Path

    from mmcache.format.manifest import Manifest

__all__ = ["overview"]

# Stretches of the tokens for each of which it is said how much of it is there.
_STRETCHES = 100


@public(path=a_path)
def overview(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Say what the store at `path`, a folder or an address in a bucket, is: identity, shape, size, completeness.

    Reads no data.

    Of each site: its width, shards, missing shards, bytes, and of up to 100 stretches of its tokens the part of the
    shards that is there (`present`).

    Raises:
        StoreNotFoundError, CorruptError, VersionError: there is no store that can be read.
        IncompleteError: it is still being planned.
        AccessError, RemoteError: object storage refuses, or gives no answer.
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
    # A stretch of blocks each, as even as can be.
    edges = np.arange(stretches + 1) * blocks // stretches
    counts = np.zeros(stretches, np.int64)
    for _, block in listed_shards(folder, manifest, site, manifest.n_tokens or 0):
        counts += np.bincount(np.searchsorted(edges, block, side="right") - 1, minlength=stretches)
    parts = counts / (np.diff(edges) * len(manifest.slots(site)))
    return said | {"missing": said["shards"] - int(counts.sum()), "present": parts.tolist()}
