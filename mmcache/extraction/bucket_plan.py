"""Sync the plan of a store in a bucket with its local staging folder.

In the staging folder, an empty file stands for each shard that the bucket has. So code that lists or plans a store's
folder works there unchanged; reading an empty shard is an error. The bucket is authoritative: a shard that it lacks is
missing, whatever is in the folder.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from mmcache.errors import (
    CorruptError,
    MmcacheError,
    PlanMismatchError,
    ReadOnlyError,
    StoreExistsError,
)
from mmcache.extraction.staging_claims import MARKER, STAGING, is_staging
from mmcache.format.manifest import METADATA_LIMIT, Manifest, is_store, read_manifest
from mmcache.format.names import RESERVED, STATISTICS_FOLDER, TOKENIZER_FOLDER, check_no_links
from mmcache.format.shard import Layout
from mmcache.format.signed_json import ROOT
from mmcache.storage.bucket_metadata import StoreListing, manifest_of, read_if_there
from mmcache.storage.listing import in_order, present_shards
from mmcache.storage.tokenizer_file import TOKENIZER
from mmcache.system.atomic import publish, remove_drafts
from mmcache.system.files import list_names, make_folder, read_file, remove_file, remove_tree
from mmcache.system.no_symlinks import make_empty
from mmcache.system.threads import ThreadPool

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator
    from pathlib import Path

    from mmcache.storage.object_store import ObjectStore

__all__ = ["BucketFolder", "Listing", "is_column", "read_planned", "shard_numbers"]

_KEY = re.compile(r"c\.(0|[1-9]\d{0,17})\.(0|[1-9]\d{0,17})\.0", re.ASCII)
_COLUMN = re.compile(r"c\.(0|[1-9]\d{0,17})(\.0)?", re.ASCII)


def read_planned(bucket: ObjectStore, folder: Path) -> Manifest | None:
    """The plan in the bucket, or else the one begun in the staging folder, or None; writes nothing.

    Raises:
        AccessError, RemoteError, CorruptError: as `ObjectStore.read`; or the plan is damaged.
    """
    root = read_if_there(bucket, ROOT)
    if root is not None:
        return manifest_of(bucket, root)
    return read_manifest(folder) if is_staging(folder) and is_store(folder) else None


def shard_numbers(name: str) -> tuple[int, int] | None:
    """Slot and block in the name of a site's shard; None for any other name."""
    match = _KEY.fullmatch(name)
    return None if match is None else (int(match[1]), int(match[2]))


def is_column(name: str) -> bool:
    """Whether a name is that of a shard of tokens, flags or sequences."""
    return _COLUMN.fullmatch(name) is not None


@dataclass
class Listing:
    """The content of a bucket, as consistent as a listing can be.

    `root` and `manifest` are None if there is no store. `plan` has the sizes in bytes of the plan's other objects,
    `there` which shards of each site exist, `[slots, blocks]` bool, and `strange` the objects in the way of a new site.
    """

    root: bytes | None
    manifest: Manifest | None
    plan: dict[str, int] = field(default_factory=dict)
    there: dict[str, np.ndarray] = field(default_factory=dict)
    strange: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, bucket: ObjectStore, sites: Collection[str]) -> Listing:
        """List a bucket; blocks until done.

        Args:
            bucket: that of the store.
            sites: the sites that a job makes; the bucket may have none of them yet.

        Raises:
            ReadOnlyError: the store was not made by `extract`.
            CorruptError: its root is damaged, or a shard has the wrong size.
            AccessError, RemoteError: as `ObjectStore.read`.
        """
        root = read_if_there(bucket, ROOT)
        while True:
            manifest = None if root is None else manifest_of(bucket, root)
            if manifest is not None and manifest.kind != "planned":
                raise ReadOnlyError(f"{bucket.url} holds a store that was not made by extract: choose another prefix")
            found = cls(root, manifest)
            try:
                found._list(bucket, sites)
            except CorruptError:
                # If the plan was changed meanwhile, the sizes are those of the new one: list again.
                before, root = root, read_if_there(bucket, ROOT)
                if before == root:
                    raise
            else:
                return found

    def _list(self, bucket: ObjectStore, sites: Collection[str]) -> None:
        sizes = self._sizes()
        arrays = {*RESERVED, *(sites if self.manifest is None else self.manifest.sites)}
        fresh = {*arrays, TOKENIZER_FOLDER} if self.manifest is None else set(sites) - arrays
        for key, size, _ in itertools.chain.from_iterable(bucket.names()):
            array, _, name = key.partition("/")
            numbers = shard_numbers(name) if array in self.there else None
            if numbers is not None:
                there, (slot, block) = self.there[array], numbers
                if slot < there.shape[0] and block < there.shape[1]:
                    wanted = sizes[array][block == there.shape[1] - 1]
                    if size != wanted:
                        raise CorruptError(
                            f"{bucket.where(key)} has {size} bytes, and the shard that belongs there {wanted}: remove "
                            f"the object, and run the same command again"
                        )
                    there[slot, block] = True
            elif key == TOKENIZER or (array in arrays and (name == ROOT or (array in RESERVED and is_column(name)))):
                self.plan[key] = size
            elif array in fresh and name != ROOT:
                self.strange.append(bucket.where(key))

    def _sizes(self) -> dict[str, tuple[int, int]]:
        """Bytes of a full shard and of the last one, by site; also initialises `there` with False."""
        manifest, sizes = self.manifest, {}
        if manifest is not None and manifest.n_tokens is not None:
            total = manifest.n_tokens
            for site in manifest.sites:
                spec = manifest.spec(site)
                blocks = spec.blocks(total)
                self.there[site] = np.zeros((len(manifest.slots(site)), blocks), bool)
                full, last = (Layout(spec, spec.rows_in_block(block, total)).size for block in (0, blocks - 1))
                sizes[site] = (full, last)
        return sizes

    def refuse(self, bucket: ObjectStore, sites: Collection[str]) -> None:
        """Refuse to make sites if other objects are in their way.

        Raises:
            StoreExistsError: there is no store, and something is in its way.
            PlanMismatchError: there is a store, and something is in the way of a new site.
        """
        if not self.strange:
            return
        if self.manifest is None:
            raise StoreExistsError(
                errno.EEXIST, f"there is no store, and {self.strange[0]} is in its way: choose another prefix",
                bucket.url,
            )  # fmt: skip
        fresh = ", ".join(sorted(set(sites) - set(self.manifest.sites)))
        raise PlanMismatchError(
            f"{self.strange[0]} is in the way of {fresh}, which is no site of that store yet: move it away"
        )


# Concurrent requests.
_THREADS = 4
# Least time between two listings: seconds, and a multiple of the duration of one.
_LIST_AGAIN, _SHARE = 10.0, 50
# Seconds by which file times and the process's clock may differ.
_CLOCKS = 0.1
# The last root seen in the bucket: if the bucket has none now, it was emptied.
_SEEN = f"{STAGING}/seen"


class BucketFolder:
    """A staging folder that mirrors a store in a bucket. `fetch` and `send` need the folder's lock.

    Args:
        bucket: that of the store.
        folder: created by the first `mark`.
    """

    def __init__(self, bucket: ObjectStore, folder: Path) -> None:
        self.bucket, self.folder = bucket, folder
        self._root: bytes | None = None
        self._manifest: Manifest | None = None
        # The bucket's shards as of the last fetch, and the plan's files that are equal to its objects.
        self._there: dict[str, np.ndarray] = {}
        self._equal: dict[str, tuple[int, ...]] = {}
        self._next = 0.0

    def mark(self, sites: Collection[str]) -> None:
        """Create the folder and write the store's address into it; `sites` are those that the job makes.

        Raises:
            StoreExistsError: the folder belongs to another store, or has other content.
            LinkError: a file or folder of it is a symbolic link.
            WriteError: it cannot be created.
        """
        check_no_links(self.folder, sites)
        # Listed before the check for the marker: another process may be creating the folder, marker first.
        names = set(list_names(self.folder))
        if is_staging(self.folder):
            said = read_file(self.folder / STAGING / MARKER, METADATA_LIMIT).decode(errors="replace").strip()
            if said == self.bucket.url:
                return
            why = f"this is the staging folder of {said}, not of {self.bucket.url}"
        elif names - {STAGING} or (self.folder.exists() and not self.folder.is_dir()):
            why = f"this holds something else: what is made for {self.bucket.url} needs a folder of its own"
        else:
            make_folder(self.folder, STAGING)
            publish(self.folder, f"{STAGING}/{MARKER}", f"{self.bucket.url}\n".encode())
            return
        raise StoreExistsError(errno.EEXIST, f"{why}: choose another with --staging (staging=…)", str(self.folder))

    def fetch(self, sites: Collection[str]) -> list[str]:
        """Make the folder equal to the bucket. Returns the keys of local shards that were not sent; blocks.

        Args:
            sites: the sites that the job makes; the bucket may have none of them yet.

        Raises:
            StoreExistsError, PlanMismatchError: other objects are in the way.
            ReadOnlyError: the store was not made by `extract`.
            CorruptError: its root is damaged, or a shard has the wrong size.
            AccessError, RemoteError, WriteError: as `ObjectStore.read`; or this folder cannot be written to.
        """
        listed = self._listed(sites)
        self._root, self._manifest, self._there = listed.root, listed.manifest, listed.there
        check_no_links(self.folder, () if self._manifest is None else self._manifest.sites)
        listed.refuse(self.bucket, sites)
        if self._root is None or self._manifest is None:
            if (self.folder / _SEEN).exists():
                self.forget()
            if is_store(self.folder) and (manifest := read_manifest(self.folder)).n_tokens is not None:
                self._name_shards(manifest, {}, ours=True)
            return []
        here = read_file(self.folder / ROOT, METADATA_LIMIT) if is_store(self.folder) else b""
        ours = here == self._root or self._is_this_plan(here)
        _together(lambda key: self._fetch_file(key, listed.plan[key], trusted=here == self._root), listed.plan)
        if here != self._root:
            publish(self.folder, ROOT, self._root)
        publish(self.folder, _SEEN, self._root)
        if self._manifest.n_tokens is None:
            return []
        return self._name_shards(self._manifest, listed.there, ours=ours)

    def _listed(self, sites: Collection[str]) -> Listing:
        began = time.monotonic()
        found = Listing.of(self.bucket, sites)
        ended = time.monotonic()
        self._next = ended + max(_LIST_AGAIN, _SHARE * (ended - began))
        return found

    def _is_this_plan(self, here: bytes) -> bool:
        """Whether shards of `here`, the root in the folder so far, belong to the bucket's plan."""
        ours, manifest = None, self._manifest
        with suppress(MmcacheError):
            ours = manifest_of(self.bucket, here)
        if ours is None or manifest is None:
            return False
        same = [(m.store, m.n_tokens, m.shard_tokens, m.source.get("tokenised")) for m in (ours, manifest)]
        return same[0] == same[1]

    def _fetch_file(self, key: str, size: int, *, trusted: bool) -> None:
        file = self.folder / key
        if not trusted or not file.exists() or file.stat().st_size != size:
            data = self.bucket.read_whole(key, METADATA_LIMIT)
            above = key.rpartition("/")[0]
            make_folder(self.folder, above)
            remove_drafts(self.folder, above)
            publish(self.folder, key, data)
        self._equal[key] = _identity(file)

    def _name_shards(self, manifest: Manifest, there: dict[str, np.ndarray], *, ours: bool) -> list[str]:
        """Make an empty file for each shard in the bucket, remove others. Returns the keys of unsent shards."""
        unsent = []
        for site in manifest.sites:
            shape = (len(manifest.slots(site)), manifest.spec(site).blocks(manifest.n_tokens or 0))
            wanted, here = there.get(site, np.zeros(shape, bool)), np.zeros(shape, bool)
            for name, size in _sizes(self.folder / site):
                numbers = shard_numbers(name)
                if numbers is None:
                    continue
                slot, block = numbers
                inside = slot < shape[0] and block < shape[1]
                if inside and size and ours and not wanted[slot, block]:
                    unsent.append(f"{site}/{name}")
                elif not inside or size or not wanted[slot, block]:
                    remove_file(self.folder, f"{site}/{name}")
                    continue
                here[slot, block] = True
            self._stubs(manifest, site, wanted & ~here)
        return unsent

    def _stubs(self, manifest: Manifest, site: str, which: np.ndarray) -> None:
        if which.any():
            make_folder(self.folder, site)
            keys = (manifest.shard_key(site, block, slot) for slot, block in in_order(which))
            make_empty(self.folder, site, keys)

    def refresh(self, manifest: Manifest) -> None:
        """List the bucket again if the last listing is old enough; blocks for one listing.

        Raises:
            PlanMismatchError: the bucket has another plan now, or none.
            CorruptError, AccessError, RemoteError: as `fetch`.
        """
        if time.monotonic() < self._next:
            return
        clock = time.time()
        listed = self._listed(())
        if listed.root != self._root:
            now, ours = listed.manifest, manifest
            if now is None or any(
                getattr(now, name) != getattr(ours, name) for name in ("n_tokens", "n_sequences", "shard_tokens")
            ):
                raise PlanMismatchError(
                    f"{self.bucket.url} was given another plan while it was filled, or was removed. Run the command "
                    f"that changed it, or the one of the plan that is there now"
                )
            self._root = listed.root
        for site in manifest.sites:
            here = present_shards(self.folder, manifest, site, manifest.n_tokens or 0)
            there = listed.there.get(site, np.zeros_like(here))
            self._stubs(manifest, site, there & ~here)
            for slot, block in in_order(here & ~there):
                key = f"{site}/{manifest.shard_key(site, block, slot)}"
                # A shard that was sent after the listing began is not in it.
                with suppress(FileNotFoundError):
                    status = (self.folder / key).lstat()
                    if not status.st_size and status.st_mtime < clock - _CLOCKS:
                        remove_file(self.folder, key)

    def unsent(self, manifest: Manifest) -> dict[str, int]:
        """Keys and bytes of the shards that are still in this folder."""
        found = ((site, name, size) for site in manifest.sites for name, size in _sizes(self.folder / site))
        return {f"{site}/{name}": size for site, name, size in found if size and shard_numbers(name)}

    def send(self) -> bool:
        """Upload the plan in this folder, its root last; False if another machine uploaded a plan first.

        Raises:
            StoreExistsError: the bucket has another object under a key of the plan.
            AccessError, RemoteError: as `ObjectStore.read`.
        """
        root, old = read_file(self.folder / ROOT, METADATA_LIMIT), self._manifest
        manifest = read_manifest(self.folder)
        if old is not None and root != self._root:
            self.bucket.delete(list(self._dropped(old)))
        replaced = set() if old is None else {*old.sites, *RESERVED, TOKENIZER_FOLDER}
        changed = [key for key in self._files(manifest) if self._equal.get(key) != _identity(self.folder / key)]
        _together(lambda key: self._send_file(key, replace=key.partition("/")[0] in replaced), changed)
        if old is None:
            if not self.bucket.put(ROOT, root, replace=False) and read_if_there(self.bucket, ROOT) != root:
                return False
        elif root != self._root:
            self.bucket.put(ROOT, root)
        publish(self.folder, _SEEN, root)
        self._root, self._manifest = root, manifest
        return True

    def _dropped(self, old: Manifest) -> Iterator[str]:
        for site, there in self._there.items():
            here = present_shards(self.folder, old, site, old.n_tokens or 0)
            yield from (f"{site}/{old.shard_key(site, block, slot)}" for slot, block in in_order(there & ~here))

    def _files(self, manifest: Manifest) -> Iterator[str]:
        for array in (*manifest.sites, *RESERVED):
            yield f"{array}/{ROOT}"
        for array in RESERVED:
            yield from (f"{array}/{name}" for name in list_names(self.folder / array) if is_column(name))
        if (self.folder / TOKENIZER).exists():
            yield TOKENIZER

    def _send_file(self, key: str, *, replace: bool) -> None:
        file = self.folder / key
        data, identity = read_file(file, METADATA_LIMIT), _identity(file)
        if not self.bucket.put(key, data, replace=False) and not self._has(key, data):
            if not replace:
                raise StoreExistsError(
                    errno.EEXIST, f"{self.bucket.where(key)} is in the way of a new store: choose another prefix",
                    self.bucket.url,
                )  # fmt: skip
            self.bucket.put(key, data)
        self._equal[key] = identity

    def _has(self, key: str, data: bytes) -> bool:
        try:
            return self.bucket.read_whole(key, len(data)) == data
        except CorruptError:
            return False

    def fetch_statistics(self) -> None:
        """Download the merged statistics. Errors as `fetch`."""
        for key in StoreListing(self.bucket, STATISTICS_FOLDER).metadata:
            make_folder(self.folder, key.rpartition("/")[0])
            publish(self.folder, key, self.bucket.read_whole(key, METADATA_LIMIT), durable=False)

    def send_statistics(self, site: str) -> None:
        """Upload the merged statistics of a site, its `zarr.json` last as the commit. Errors as `send`."""
        above, last = f"{STATISTICS_FOLDER}/{ROOT}", f"{STATISTICS_FOLDER}/{site}/{ROOT}"
        files = (self.folder / STATISTICS_FOLDER / site).rglob("*")
        keys = {file.relative_to(self.folder).as_posix() for file in files if file.is_file()} - {last}
        for key in (above, *sorted(key for key in keys if not key.endswith(".tmp")), last):
            self.bucket.put(key, read_file(self.folder / key, METADATA_LIMIT))

    def forget(self) -> None:
        """Remove the plan and the shards; keep the marker of the folder."""
        for name in list_names(self.folder):
            if name != STAGING:
                if (self.folder / name).is_dir() and not (self.folder / name).is_symlink():
                    remove_tree(self.folder / name)
                else:
                    remove_file(self.folder, name)
        remove_file(self.folder, _SEEN)
        self._equal.clear()


def _together(work: Callable[[str], None], keys: Iterable[str]) -> None:
    """Call `work` for each key, in a few threads; blocks until all are done, and raises the first failure."""
    crew = ThreadPool(_THREADS, "plan")
    try:
        for done in [crew.submit(work, key) for key in keys]:
            done.result()
    finally:
        crew.close()


def _identity(file: Path) -> tuple[int, ...]:
    status = file.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _sizes(folder: Path) -> Iterator[tuple[str, int]]:
    """Names and bytes of a folder's shards; none if there is no such folder."""
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("c."):
                # Another process may have replaced or removed it.
                with suppress(FileNotFoundError):
                    yield entry.name, entry.stat(follow_symlinks=False).st_size
