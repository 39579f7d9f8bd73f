"""Stores copied to and from object storage, whole or in part: gone on with where it stopped, and checked on the way.

Whatever is copied comes before the root's `zarr.json`: until that is there, no reader believes any of it. What is there
already is compared by small reads (size, first page, and all from the checksums on), and left alone.
"""

from __future__ import annotations

import errno
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from mmcache.errors import (
    ArgumentError,
    CorruptError,
    DiskFullError,
    IncompleteError,
    StoreExistsError,
    StoreNotFoundError,
)
from mmcache.format.manifest import METADATA_LIMIT, read_manifest
from mmcache.format.names import RESERVED, check_no_links
from mmcache.format.signed_json import ROOT
from mmcache.ops.endpoints import BucketPlace, FolderPlace, metadata
from mmcache.ops.part import ALL, blocks_of, chosen_sites, joined
from mmcache.ops.receiver import Receiver
from mmcache.ops.sender import Sender
from mmcache.read.store import Store
from mmcache.storage.connection import placed
from mmcache.storage.object_store import Bucket
from mmcache.system.arguments import a_callable, a_path, names, optional, public
from mmcache.system.atomic import remove_drafts
from mmcache.system.files import free_bytes, make_folder, read_file, sync_folder
from mmcache.system.locks import FolderLock

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from mmcache.format.manifest import Manifest
    from mmcache.ops.part import Blocks, Numbers

__all__ = ["Transferred", "pull", "push"]


@dataclass(frozen=True)
class Transferred:
    """What a push or a pull did.

    Attributes:
        source: what was copied from, a folder or an address.
        destination: what it was copied to.
        shards: shards that were copied, those of tokens, flags and sequences among them.
        there: shards that were there already, and the same.
        bytes: bytes of all files that were copied.
        missing: shards that were asked for, and that the source does not have (yet).
    """

    source: str
    destination: str
    shards: int
    there: int
    bytes: int
    missing: int


@public(path=a_path, url=a_path, sites=optional(names), progress=optional(a_callable))
def push(
    path: str | os.PathLike[str],
    url: str,
    *,
    sites: Sequence[str] | None = None,
    sequences: Numbers | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Transferred:
    """Copy a store, or a part of it, into object storage. Blocks until all of it is there.

    Called again, it goes on: shards that are there and the same are left alone, and sites or sequences that were not
    copied before are added. Each shard is verified before it is sent, so that damage does not travel. A store that grew
    is brought up to date. Of a store that is still being filled, what there is is copied. Killed in the middle of an
    upload, it may leave an object below `.uploads/`, which nothing reads. It takes about 200 MiB of memory.

    Args:
        path: the store's folder.
        url: the place, such as `s3://bucket/acts`; who reads it must not be given sites by two pushes at a time, since
            the later one's root counts.
        sites: which of them; None for all.
        sequences: only the blocks of tokens in which these lie: `(first, stop)`, a slice, a range or numbers; None for
            all. Positions stay what they were, and the copy is an incomplete store, for `partial=True`.
        progress: called with the bytes of shards that are done, and of how many, from several threads.

    Raises:
        StoreExistsError: another store is there, or another shard under a shard's name; what differs is named.
        StoreNotFoundError, VersionError: there is no store, or no bucket.
        IncompleteError: the store is still being planned, or has lost tokens, flags or sequences.
        CorruptError: a file of it is damaged.
        UnknownSiteError, OutOfRangeError, ArgumentError: there are no such sites or sequences; `url` is no address.
        AccessError, RemoteError: the server refuses, or gives no answer.
    """
    if isinstance(folder := placed(path), str):
        raise ArgumentError(f"{folder} is an address: push copies from a folder, `mmcache pull` to one")
    manifest, text = _read_root(folder)
    _planned(manifest, str(folder))
    names = chosen_sites(manifest, sites, str(folder))
    bucket = Bucket(url)
    place = BucketPlace(bucket)

    def root() -> Manifest:
        return joined(manifest, names, _root_of(place, bucket.url), bucket.url)

    there = _root_of(place, bucket.url)
    joined(manifest, names, there, bucket.url)
    blocks = _blocks(Store(folder, manifest), sequences)
    for _ in metadata(folder, manifest, names):
        pass  # damage in it is better met before the shards are sent
    carrier = Sender(folder, bucket, manifest, there, progress)
    arrays = _arrays(manifest, names)
    carrier.plan(arrays, blocks)
    carrier.copy(arrays)
    written = sum(len(data) for key, data in metadata(folder, manifest, names) if place.write(key, data))
    bucket.warn_of(bucket.refused)
    # Others may have pushed other sites meanwhile.
    written += _commit(place, root(), manifest, text)
    return Transferred(str(folder), bucket.url, carrier.copied, carrier.there, carrier.bytes + written, carrier.missing)


@public(url=a_path, path=a_path, sites=optional(names), progress=optional(a_callable))
def pull(
    url: str,
    path: str | os.PathLike[str],
    *,
    sites: Sequence[str] | None = None,
    sequences: Numbers | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Transferred:
    """Copy a store, or a part of it, from object storage into a folder. Blocks until all of it is durable.

    Called again, it goes on, and adds, as `push`. Every checksum of a shard is compared before the shard gets its name;
    one that does not match is fetched once more. Shards that are there, but damaged, are replaced. It takes about 200
    MiB of memory.

    Args:
        url: the store, such as `s3://bucket/acts`.
        path: the folder. It may hold other sites or sequences of the same store.
        sites: which of them; None for all.
        sequences: as in `push`: only the blocks of tokens in which these lie.
        progress: as in `push`.

    Raises:
        StoreExistsError: another store is there, or a shard of one; what differs is named.
        StoreNotFoundError, VersionError: there is no store, or no bucket.
        IncompleteError: the store is still being planned, or has lost tokens, flags or sequences.
        CorruptError: an object is damaged, and was when it was fetched again.
        LockedError: a writer has the folder, or another pull. LinkError: in the folder there is a symbolic link.
        DiskFullError: there is no room; the error says how much it takes, and how much is free.
        UnknownSiteError, OutOfRangeError, ArgumentError: there are no such sites or sequences; `url` is no address.
        AccessError, RemoteError: the server refuses, or gives no answer.
        WriteError: the disk refused.
    """
    if isinstance(folder := placed(path), str):
        raise ArgumentError(f"{folder} is an address: pull copies into a folder, `mmcache push` from one")
    if folder.exists() and not folder.is_dir():
        raise StoreExistsError(errno.EEXIST, "that is a file: a store needs a folder", str(folder))
    bucket = Bucket(url)
    place = BucketPlace(bucket)
    found = place.root()
    if found is None:
        raise StoreNotFoundError(
            errno.ENOENT, "no mmcache store there (below a store's address is a zarr.json)", bucket.url
        )
    manifest, text = found
    _planned(manifest, bucket.url)
    names = chosen_sites(manifest, sites, bucket.url)
    check_no_links(folder, manifest.sites)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(TemporaryDirectory()))
        make_folder(folder)
        stack.callback(FolderLock(folder).release)
        there = _root_in(folder)
        root = joined(manifest, names, there, str(folder))
        carrier = Receiver(bucket, folder, manifest, there, progress)
        carrier.stage(scratch, names, sequences=sequences is not None)
        with place.naming(scratch):
            blocks = _blocks(Store(scratch, manifest), sequences)
        arrays = _arrays(manifest, names)
        carrier.plan(arrays, blocks)
        _check_room(folder, carrier.bytes_to_copy)
        for array in (*names, *(RESERVED if manifest.has_tokens else ())):
            make_folder(folder, array)
            remove_drafts(folder, array)
        carrier.copy(arrays)
        for array in arrays:
            sync_folder(folder / array)
        target = FolderPlace(folder)
        written = sum(len(data) for key, data in metadata(scratch, manifest, names) if target.write(key, data))
        written += _commit(target, root, manifest, text)
    bucket.warn_of(bucket.refused)
    return Transferred(bucket.url, str(folder), carrier.copied, carrier.there, carrier.bytes + written, carrier.missing)


def _read_root(folder: Path) -> tuple[Manifest, bytes]:
    """Read the root, and its bytes: both of the same commit, though a writer may be at work."""
    manifest = read_manifest(folder)
    while True:
        text = read_file(folder / ROOT, METADATA_LIMIT)
        before, manifest = manifest, read_manifest(folder)
        if manifest == before:
            return manifest, text


def _planned(manifest: Manifest, where: str) -> Manifest:
    if manifest.kind == "planned" and manifest.n_tokens is None:
        raise IncompleteError(f"{where} is still being planned: run the same `mmcache extract` again, then copy it")
    return manifest


def _arrays(manifest: Manifest, sites: Sequence[str]) -> list[str]:
    """List the arrays that have shards to be copied: first those of which every shard's tokens can be told."""
    names = [*(RESERVED if manifest.has_tokens else ()), *(sites if manifest.shard_tokens else ())]
    return [array for array in names if manifest.rows(array)]


def _blocks(store: Store, sequences: Numbers | None) -> Blocks:
    return ALL if sequences is None else blocks_of(store.sequences, sequences, store.shard_tokens or 1)


def _root_of(place: BucketPlace, url: str) -> Manifest | None:
    try:
        found = place.root()
    except CorruptError as error:
        raise _unreadable(url, error) from error
    return None if found is None else found[0]


def _root_in(folder: Path) -> Manifest | None:
    try:
        return read_manifest(folder)
    except StoreNotFoundError:
        return None
    except CorruptError as error:
        raise _unreadable(str(folder), error) from error


def _unreadable(where: str, error: CorruptError) -> StoreExistsError:
    return StoreExistsError(
        errno.EEXIST, f"what is there cannot be read ({error}), and nothing is copied over it: choose another", where
    )


def _commit(place: BucketPlace | FolderPlace, root: Manifest, ours: Manifest, text: bytes) -> int:
    """Write the root, which makes a store of what was copied; give its bytes, 0 where it says so already."""
    data = text if root == ours else root.to_json()
    return len(data) if place.write(ROOT, data) else 0


def _check_room(folder: Path, needed: int) -> None:
    free = free_bytes(folder)
    if needed > free:
        raise DiskFullError(
            errno.ENOSPC,
            f"the shards to be copied take {needed} bytes ({needed / 2**30:.1f} GiB), and {free} "
            f"({free / 2**30:.1f} GiB) are free: make room, or copy fewer sites or sequences",
            str(folder),
        )
