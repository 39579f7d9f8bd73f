"""Opening a store for reading: a folder, or an address in a bucket."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmcache.errors import ArgumentError, CorruptError, IncompleteError
from mmcache.format.manifest import read_manifest
from mmcache.read.store import Store
from mmcache.storage.connection import placed
from mmcache.storage.mirror import Mirror
from mmcache.system.arguments import a_folder, a_path, a_switch, count, optional, public

if TYPE_CHECKING:
    import os
    from pathlib import Path

__all__ = ["open_store", "reopened"]


@public(
    path=a_path,
    partial=a_switch,
    check=a_switch,
    cache_dir=optional(a_folder),
    cache_bytes=optional(count(1)),
)
def open_store(
    path: str | os.PathLike[str],
    *,
    partial: bool = False,
    check: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    cache_bytes: int | None = None,
) -> Store:
    """Open a store for reading, from its metadata and one listing a site alone.

    Args:
        path: the store's folder, or its address in a bucket, such as `s3://bucket/acts` (also `gs://`, `az://`,
            `file://`), with credentials as each ecosystem finds them.
        partial: open a store of which shards are missing; reading rows that are not there then raises
            `IncompleteError`.
        check: read rows without mapping them, and compare the checksum of every inner chunk (of up to 4 MiB) that
            they lie in. Far slower where rows are scattered. Without it, a file that is cut short in the course of a
            read ends the process (SIGBUS), and checksums of rows are for `verify` to compare.
        cache_dir: for a store in a bucket, the folder that what comes from there is kept in, which any number of
            stores and of the user's processes may share; None for `$MMCACHE_CACHE`, or the user's cache folder. Shards
            come no faster than its disk takes them.
        cache_bytes: what its shards may take there: those least used go first. None for a quarter of the room that is
            free, up to 64 GiB.

    Raises:
        StoreNotFoundError: there is no store, or no bucket.
        IncompleteError: shards are missing, and `partial` is false.
        CorruptError: the metadata is damaged, or shards that were committed are gone and `partial` is false.
        VersionError: a format version that this library does not read.
        AccessError, RemoteError: object storage refuses, or gives no answer.
        ArgumentError: a cache for a store that is no address, or that is another user's or for everybody to write to;
            obstore is not installed.
    """
    place = placed(path)
    if isinstance(place, str):
        mirror = Mirror(place, cache_dir, cache_bytes)
        mirror.bucket.warn_of(mirror.strange)
        return _opened(mirror.folder, mirror, partial=partial, check=check)
    if cache_dir is not None or cache_bytes is not None:
        raise ArgumentError(f"{path} is a folder, and needs no cache: cache_dir and cache_bytes are for addresses")
    return _opened(place, None, partial=partial, check=check)


def _opened(folder: Path, remote: Mirror | None, *, partial: bool, check: bool) -> Store:
    manifest = read_manifest(folder)
    store = Store(folder, manifest, check=check, remote=remote)
    if manifest.kind == "planned" and manifest.n_tokens is None:
        raise IncompleteError(f"{store.where} is still being planned: run the same `mmcache extract` again")
    for site in () if partial else store.sites:
        if not (gone := store.missing(site)):
            continue
        all_of_them = store.n_shards(site)
        if manifest.kind == "grown":
            raise CorruptError(
                f"{store.where}: {gone} of {all_of_them} shards of {site} are gone. Restore them, or open it with "
                f"partial=True to read the others; `mmcache verify` lists them"
            )
        raise IncompleteError(
            f"{store.where} is not complete: {gone} of {all_of_them} shards of {site} are missing. Run the same "
            f"`mmcache extract` again to go on, or open it with partial=True"
        )
    return store


def reopened(store: Store) -> Store:
    """Open a store once more, as it is now, with maps of its own; it may be partial by now. Errors as `open_store`."""
    return _opened(store.path, store.remote, partial=True, check=store.check)
