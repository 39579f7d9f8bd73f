"""Copy stores to and from object storage, whole or in part: resumable, and verified during the copy.

The root's `zarr.json` is written last; without it, readers ignore everything else. What the target has already is
compared by small reads (size, header page, and everything from the checksums on), and not copied again.

A part of a store is some of its sites, some blocks of its tokens, and a root that describes them. Shards do not name
the store's other sites, so the shards of a part are byte for byte those of the whole store. Only the root differs: it
lists fewer sites. Parts of the same store that are copied to one place combine into a larger part.
"""

from __future__ import annotations

import errno
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from mmcache.errors import (
    ArgumentError,
    CorruptError,
    DiskFullError,
    IncompleteError,
    OutOfRangeError,
    StoreExistsError,
    StoreNotFoundError,
    UnknownSiteError,
)
from mmcache.format.manifest import METADATA_LIMIT, read_manifest
from mmcache.format.names import RESERVED, check_no_links
from mmcache.format.signed_json import ROOT
from mmcache.ops.copy_shards import Downloader, Uploader
from mmcache.ops.endpoints import BucketEndpoint, FolderEndpoint, metadata
from mmcache.read.store import Store
from mmcache.storage.connection import placed
from mmcache.storage.object_store import ObjectStore
from mmcache.system.arguments import a_callable, a_path, names, optional, public, shown
from mmcache.system.atomic import remove_drafts
from mmcache.system.files import free_bytes, make_folder, read_file, sync_folder
from mmcache.system.locks import FolderLock

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from mmcache.format.manifest import Manifest
    from mmcache.read.tokens import Sequences

__all__ = ["ALL", "Blocks", "Numbers", "Transferred", "blocks_of", "chosen_sites", "joined", "pull", "push"]

Numbers: TypeAlias = "tuple[int, int] | slice | range | Sequence[int]"

_FIELDS = ("store", "kind", "layout", "has_tokens", "special_tokens", "uses", "dtype", "shard_tokens")
# Fields of `source` that determine the bits of a row.
_SOURCE = ("tokens", "numerics")
_SHOWN = 60


@dataclass(frozen=True)
class Blocks:
    """Some blocks of tokens, as ranges: `firsts` `[n]`, ascending; `lasts` `[n]`, the last block up to each."""

    firsts: np.ndarray
    lasts: np.ndarray

    def of(self, blocks: np.ndarray) -> np.ndarray:
        """Which of the given blocks, `[n]`, are among these: `[n]` bool."""
        place = np.searchsorted(self.firsts, blocks, side="right") - 1
        return (place >= 0) & (self.lasts[place] >= blocks)

    def count(self, blocks: int) -> int:
        """The number of these below `blocks`."""
        lasts = np.minimum(self.lasts, blocks - 1)
        before = np.concatenate([[-1], lasts[:-1]])
        return int(np.maximum(0, lasts - np.maximum(before, self.firsts - 1)).sum())


ALL = Blocks(np.zeros(1, np.int64), np.full(1, 2**62))


def chosen_sites(manifest: Manifest, sites: Sequence[str] | None, where: str) -> tuple[str, ...]:
    """The sites asked for, each once; all of them for None.

    Raises:
        UnknownSiteError: there is no such site.
        ArgumentError: `sites` is empty.
    """
    if sites is None:
        return tuple(manifest.sites)
    names = (sites,) if isinstance(sites, str) else tuple(dict.fromkeys(sites))
    for site in names:
        if site not in manifest.sites:
            raise UnknownSiteError(f"site {site!r} not in {where} (sites: {', '.join(manifest.sites)})")
    if not names:
        raise ArgumentError("sites is empty: name some, or leave it out for all of them")
    return names


def blocks_of(sequences: Sequences, asked: Numbers, shard_tokens: int) -> Blocks:
    """The blocks of tokens in which some sequences lie.

    Args:
        sequences: those of the store.
        asked: `(first, stop)`, a slice, a range, or numbers of sequences.
        shard_tokens: tokens per block.

    Raises:
        OutOfRangeError: there is no such sequence.
        ArgumentError: not numbers, or none at all.
    """
    spans = sequences.numpy()[_numbers(asked, len(sequences))]
    spans = spans[spans[:, 1] > spans[:, 0]]
    firsts, lasts = spans[:, 0] // shard_tokens, (spans[:, 1] - 1) // shard_tokens
    return Blocks(firsts, np.maximum.accumulate(lasts))


def _numbers(asked: Numbers, total: int) -> np.ndarray:
    if isinstance(asked, slice):
        asked = range(*asked.indices(total))
    elif isinstance(asked, tuple):
        if len(asked) != 2:
            raise ArgumentError(f"sequences is {shown(asked)}: expected (first, stop), or a list of numbers")
        asked = range(*asked)
    # The ends of a range are enough to check it, however long it is.
    ends = asked if not isinstance(asked, range) else [asked[0], asked[-1]] if asked else []
    try:
        numbers = np.asarray(ends)
    except ValueError:  # lists of several lengths
        numbers = np.empty(0)
    if not numbers.size or numbers.dtype.kind not in "iu" or numbers.ndim != 1:
        raise ArgumentError(f"sequences is {shown(asked)}: expected numbers of sequences, at least one")
    outside = numbers[(numbers < -total) | (numbers >= total)]
    if outside.size:
        raise OutOfRangeError(f"sequence {outside[0]} not in store (n_sequences={total})")
    found: np.ndarray = np.unique(np.asarray(asked, np.int64) % total)
    return found


def joined(ours: Manifest, sites: Sequence[str], there: Manifest | None, where: str) -> Manifest:
    """The root of a place that gets some sites of a store, merged with the root that it has.

    Args:
        ours: the store that is copied.
        sites: which of its sites.
        there: the root that the place has; None if it has none.
        where: the place, for the error.

    Raises:
        StoreExistsError: it holds another store, or sites that the new root would no longer describe. The error names
            the differences.
    """
    if there is None:
        return _narrowed(ours, ours, sites)
    wrong = _differences(ours, there)
    if wrong:
        raise StoreExistsError(
            errno.EEXIST, f"another store is there ({'; '.join(wrong)}): choose another place, or move it away", where
        )
    left = [site for site in there.sites if site not in sites]
    if left and _size(ours) != _size(there):
        raise StoreExistsError(
            errno.EEXIST,
            f"{_size(there)} tokens and layers of {', '.join(left)} count there, and {_size(ours)} here: copy these "
            f"sites too, since one root counts for all",
            where,
        )
    return _narrowed(ours, there, [*sites, *left])


def _size(manifest: Manifest) -> tuple[int, int, int]:
    return manifest.n_tokens or 0, manifest.n_sequences, len(manifest.layers)


def _narrowed(ours: Manifest, there: Manifest, sites: Sequence[str]) -> Manifest:
    """A root for some sites of two roots, ours first: with all of our sites it equals our root."""
    names = [site for site in (*ours.sites, *(site for site in there.sites if site not in ours.sites)) if site in sites]
    source = dict(ours.source)
    modules, others = (_dict(manifest.source.get("modules")) for manifest in (ours, there))
    if modules:
        source["modules"] = {site: found for site, found in (others | modules).items() if site in names}
    if "accepted" in source:
        more = [numerics for numerics in there.source.get("accepted", []) if numerics not in source["accepted"]]
        source["accepted"] = [*source["accepted"], *more]
    widths, inner = there.sites | ours.sites, there.inner_tokens | ours.inner_tokens
    return replace(
        ours,
        sites={site: widths[site] for site in names},
        inner_tokens={site: inner[site] for site in names if site in inner},
        source=source,
    )


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _differences(ours: Manifest, there: Manifest) -> list[str]:
    """The fields in which two roots differ or ours is behind: name, and both values."""
    fields = {name: (getattr(there, name), getattr(ours, name)) for name in _FIELDS}
    for name in _SOURCE:
        fields[name] = (there.source.get(name), ours.source.get(name))
    old, new = (_dict(manifest.source.get("identity")) for manifest in (there, ours))
    fields |= {name: (old.get(name), new.get(name)) for name in old | new}
    for site in ours.sites.keys() & there.sites.keys():
        modules = [_dict(manifest.source.get("modules")).get(site) for manifest in (there, ours)]
        fields[f"d_model of {site}"] = there.sites[site], ours.sites[site]
        fields[f"inner_tokens of {site}"] = there.inner_tokens.get(site), ours.inner_tokens.get(site)
        fields[f"modules of {site}"] = modules[0], modules[1]
    if there.kind == "grown" and not there.n_tokens:
        # A grown store has no geometry before its first rows.
        fields = {name: fields[name] for name in _FIELDS[:-2]}
    wrong = [f"{name}: {_short(a)} there, {_short(b)} here" for name, (a, b) in fields.items() if a != b]
    return wrong + _behind(ours, there)


def _behind(ours: Manifest, there: Manifest) -> list[str]:
    """Differences in counts and layers: a plan's are final, a grown store's may only grow."""
    counts = {name: (getattr(there, name), getattr(ours, name)) for name in ("n_tokens", "n_sequences")}
    wrong = [
        f"{name}: {a} there, {b} here"
        for name, (a, b) in counts.items()
        if (a != b if ours.kind == "planned" else (a or 0) > (b or 0))
    ]
    first = ours.layers[: len(there.layers)] if ours.kind == "grown" and ours.layout == "layer" else ours.layers
    return wrong if there.layers == first else [*wrong, f"layers: {there.layers} there, {ours.layers} here"]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


@dataclass(frozen=True)
class Transferred:
    """What `push` or `pull` did.

    Attributes:
        source: the folder or address that was copied from.
        destination: the address or folder that was copied to.
        shards: how many shards were copied, including those of tokens, flags and sequences.
        there: how many equal shards the destination had already.
        bytes: bytes of all files that were copied.
        missing: how many of the shards asked for the source does not have (yet).
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
    """Copy a store, or a part of it, into object storage. Blocks until everything is there.

    Run again to resume: equal shards are not copied again, and sites or sequences that were not copied before are
    added. Each shard is verified before it is sent, so damaged shards are not copied. A copy of a store that grew is
    brought up to date. Of a store that is still being filled, the shards that exist are copied. If killed during an
    upload, it may leave an object below `.uploads/`, which nothing reads. It uses about 200 MiB of memory.

    Args:
        path: the store's folder.
        url: the address, such as `s3://bucket/acts`. Do not push different sites to it from two processes at the same
            time: the root that is written last counts.
        sites: the sites to copy; None for all.
        sequences: copy only the blocks of tokens in which these lie: `(first, stop)`, a slice, a range or numbers; None
            for all. Positions do not change; the copy is an incomplete store, to be opened with `partial=True`.
        progress: called with the bytes of shards done and the total, from several threads.

    Raises:
        StoreExistsError: `url` has another store, or another shard under a shard's name; the error names the
            differences.
        StoreNotFoundError, VersionError: there is no store, or no bucket.
        IncompleteError: the store is still being planned, or has lost tokens, flags or sequences.
        CorruptError: a file of the store is damaged.
        UnknownSiteError, OutOfRangeError: there are no such sites or sequences.
        ArgumentError: `url` is not an address, or an argument is invalid.
        AccessError, RemoteError: the server refuses the request, or does not answer.
    """
    if isinstance(folder := placed(path), str):
        raise ArgumentError(f"{folder} is an address: push copies from a folder, `mmcache pull` to one")
    manifest, text = _read_root(folder)
    _planned(manifest, str(folder))
    names = chosen_sites(manifest, sites, str(folder))
    bucket = ObjectStore(url)
    place = BucketEndpoint(bucket)

    def root() -> Manifest:
        return joined(manifest, names, _root_of(place, bucket.url), bucket.url)

    there = _root_of(place, bucket.url)
    joined(manifest, names, there, bucket.url)
    blocks = _blocks(Store(folder, manifest), sequences)
    for _ in metadata(folder, manifest, names):
        pass  # find damage in these files before sending any shard
    carrier = Uploader(folder, bucket, manifest, there, progress)
    arrays = _arrays(manifest, names)
    carrier.plan(arrays, blocks)
    carrier.copy(arrays)
    written = sum(len(data) for key, data in metadata(folder, manifest, names) if place.write(key, data))
    bucket.warn_of(bucket.refused)
    # Read the root again: another process may have pushed other sites meanwhile.
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

    Run again to resume, or to add sites or sequences, as `push`. Every checksum of a shard is checked before the shard
    gets its name; one that does not match is fetched once more. Damaged shards in the folder are replaced. It uses
    about 200 MiB of memory.

    Args:
        url: the store, such as `s3://bucket/acts`.
        path: the folder. It may hold other sites or sequences of the same store.
        sites: the sites to copy; None for all.
        sequences: as in `push`: only the blocks of tokens in which these lie.
        progress: as in `push`.

    Raises:
        StoreExistsError: the folder has another store, or a shard of one; the error names the differences.
        StoreNotFoundError, VersionError: there is no store, or no bucket.
        IncompleteError: the store is still being planned, or has lost tokens, flags or sequences.
        CorruptError: an object is damaged, even after it was fetched again.
        LockedError: a writer or another pull holds the folder.
        LinkError: the folder contains a symbolic link.
        DiskFullError: there is not enough room; the error names the bytes needed and free.
        UnknownSiteError, OutOfRangeError: there are no such sites or sequences.
        ArgumentError: `url` or `path` is invalid, or another argument.
        AccessError, RemoteError: the server refuses the request, or does not answer.
        WriteError: the disk refused.
    """
    if isinstance(folder := placed(path), str):
        raise ArgumentError(f"{folder} is an address: pull copies into a folder, `mmcache push` from one")
    if folder.exists() and not folder.is_dir():
        raise StoreExistsError(errno.EEXIST, "that is a file: a store needs a folder", str(folder))
    bucket = ObjectStore(url)
    place = BucketEndpoint(bucket)
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
        carrier = Downloader(bucket, folder, manifest, there, progress)
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
        target = FolderEndpoint(folder)
        written = sum(len(data) for key, data in metadata(scratch, manifest, names) if target.write(key, data))
        written += _commit(target, root, manifest, text)
    bucket.warn_of(bucket.refused)
    return Transferred(bucket.url, str(folder), carrier.copied, carrier.there, carrier.bytes + written, carrier.missing)


def _read_root(folder: Path) -> tuple[Manifest, bytes]:
    """The root and its bytes, from the same commit even while a writer is at work."""
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
    """The arrays that have shards: tokens, flags and sequences first, which the check of a site's shards needs."""
    names = [*(RESERVED if manifest.has_tokens else ()), *(sites if manifest.shard_tokens else ())]
    return [array for array in names if manifest.rows(array)]


def _blocks(store: Store, sequences: Numbers | None) -> Blocks:
    return ALL if sequences is None else blocks_of(store.sequences, sequences, store.shard_tokens or 1)


def _root_of(place: BucketEndpoint, url: str) -> Manifest | None:
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


def _commit(place: BucketEndpoint | FolderEndpoint, root: Manifest, ours: Manifest, text: bytes) -> int:
    """Write the root, which completes the store. Returns its bytes; 0 if the same root is there already."""
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
