"""The metadata of a store in a bucket: one listing of its objects, and local copies in a folder like the store's own.

The folder has an empty file for each shard in the bucket, so that code that lists a store's folder works on it too. At
each refresh, every copy is compared with the checksum noted when it was fetched; one that differs is fetched again.

A listing sorts the keys: shards, metadata, and strange keys, which have a form that no store's key has or conflict with
a file of the store. Other objects, such as somebody's notes, are ignored.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import crc32c

from mmcache.errors import BucketNotFoundError, CorruptError, MmcacheError, StoreNotFoundError
from mmcache.format.manifest import METADATA_LIMIT, Manifest, read_manifest
from mmcache.format.names import RESERVED, STATISTICS_FOLDER, TOKENIZER_FOLDER
from mmcache.format.signed_json import ROOT, check_signed
from mmcache.system.atomic import publish
from mmcache.system.files import list_names, make_folder, read_file, remove_file
from mmcache.system.no_symlinks import make_empty

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future

    from mmcache.storage.object_store import ObjectStore

__all__ = ["FOLDERS", "MetadataCopies", "StoreListing", "is_metadata", "manifest_of", "read_if_there"]

# Folders of metadata, and the most parts that a key in them may have.
FOLDERS, _DEEPEST = (STATISTICS_FOLDER, TOKENIZER_FOLDER), 8
# Last parts of metadata keys: below such a name a store has no objects.
_FILES = (ROOT, "tokenizer.json", "0")


def read_if_there(bucket: ObjectStore, key: str) -> bytes | None:
    """The bytes of a small object, such as the root; None if it does not exist. Errors as `ObjectStore.read`."""
    try:
        return bucket.read_whole(key, METADATA_LIMIT)
    except BucketNotFoundError:
        raise
    except StoreNotFoundError:
        return None


def manifest_of(bucket: ObjectStore, root: bytes) -> Manifest:
    """The manifest in the bytes of a root, checked. Errors as `read_manifest`."""
    where = bucket.where(ROOT)
    return Manifest.from_attributes(check_signed(root, where), where)


def is_metadata(key: str) -> bool:
    """Whether an object with such a key is metadata of a store."""
    parts = key.split("/")
    known = (parts[-1] == ROOT and len(parts) <= 2) or (parts[0] in FOLDERS and 1 < len(parts) <= _DEEPEST)
    return known and all(map(_is_name, parts))


def _is_name(part: str) -> bool:
    """Whether a part of a key can be the name of a file of a store."""
    return part[:1] not in ("", ".") and _is_plain(part)


def _is_plain(part: str) -> bool:
    return part.isprintable() and len(part.encode(errors="replace")) < 256


def _above(key: str) -> list[str]:
    """The folders that a key is in."""
    parts = key.split("/")
    return ["/".join(parts[:depth]) for depth in range(1, len(parts))]


class StoreListing:
    """The result of one listing of a bucket, or of its folder `under`; blocks until it is complete.

    Errors as `ObjectStore.names`.

    `metadata` maps each metadata key to its tag, `shards` each array to the names of its shards; `strange` has the keys
    that no store has.
    """

    def __init__(self, bucket: ObjectStore, under: str = "") -> None:
        self.metadata: dict[str, str | None] = {}
        self.shards: dict[str, set[str]] = {}
        self.strange: list[str] = []
        # Other keys count only if not empty: some tools make an empty object for a folder.
        sizes: dict[str, int] = {}
        for key, size, tag in itertools.chain.from_iterable(bucket.names(under)):
            parts = key.split("/")
            if len(parts) == 2 and parts[1].startswith("c.") and all(map(_is_name, parts)):
                self.shards.setdefault(parts[0], set()).add(parts[1])
            elif is_metadata(key):
                self.metadata[key], sizes[key] = tag, size
            elif not any(part.startswith(".") for part in parts):
                if not all(map(_is_plain, parts)):
                    self.strange.append(key)
                elif size:
                    sizes[key] = size
        self._part(sizes)

    def _part(self, sizes: dict[str, int]) -> None:
        """Where one key is a file and also a folder of other keys, keep only one: a folder cannot hold both."""
        folders = {folder for key in self.metadata for folder in _above(key)}
        for key in folders & self.metadata.keys():
            if not sizes[key] or key.rpartition("/")[2] not in _FILES:
                del self.metadata[key]
        for key in list(self.metadata):
            if any(folder in self.metadata for folder in _above(key)):
                del self.metadata[key]
        folders |= self.shards.keys()
        for key, size in sizes.items():
            if key not in self.metadata and size and (key in folders or any(map(self._is_file, _above(key)))):
                self.strange.append(key)

    def _is_file(self, key: str) -> bool:
        array, _, name = key.partition("/")
        return key in self.metadata or name in self.shards.get(array, ())


# A JSON file with the tag of each copy's object, and the size and checksum of the bytes fetched.
_NOTES = ".tags.json"


class MetadataCopies:
    """The local copies of one store's metadata. For one thread of one process at a time.

    Args:
        bucket: the store's.
        folder: where the copies are.
        submit: runs a function in another thread.
    """

    def __init__(self, bucket: ObjectStore, folder: Path, submit: Callable[..., Future[bytes]]) -> None:
        self._bucket, self._folder, self._submit = bucket, folder, submit
        # Strange keys; and the root's tags by listing and by reading, if they differed.
        self.strange: tuple[str, ...] = ()
        self._disagreed: tuple[str | None, str | None] | None = None

    def refresh(self, *, again: bool = False) -> str:
        """Update the copies to the bucket's current state; blocks until then. The id of the store.

        Args:
            again: fetch everything, even if the copies are intact.

        Raises:
            StoreNotFoundError: there is no store, or no bucket.
            AccessError, RemoteError: as `ObjectStore.read`.
            CorruptError: the root is damaged.
        """
        if again:
            remove_file(self._folder, _NOTES)
        while (store := self._refreshed()) is None:
            pass
        return store

    def _refreshed(self) -> str | None:
        """As `refresh`; None if the root changed after the listing: it may name shards that were not listed."""
        found = StoreListing(self._bucket)
        metadata = found.metadata
        if ROOT not in metadata:
            raise StoreNotFoundError(
                2, "no mmcache store there (a store is a prefix with a zarr.json)", self._bucket.url
            )
        known = self._notes()
        wanted = [key for key, tag in metadata.items() if not self._is_whole(key, tag, known.get(key))]
        for key in {*filter(is_metadata, known), *self._below()} - metadata.keys():
            self._clear_way(key)
            remove_file(self._folder, key)
        notes = {key: known[key] for key in metadata.keys() - set(wanted)}
        # The root is fetched last, so that all it names is already here.
        others = [key for key in wanted if key != ROOT]
        for key, coming in [(key, self._submit(self._bucket.read_whole, key, METADATA_LIMIT)) for key in others]:
            try:
                notes[key] = self._keep(key, metadata[key], coming.result())
            except StoreNotFoundError:
                # It was just removed, or its key ends with a slash, which the client strips.
                found.strange.append(key)
        if ROOT in wanted:
            root, tag = self._bucket.read_tagged(ROOT, METADATA_LIMIT)
            if tag != metadata[ROOT] and self._disagreed != (metadata[ROOT], tag):
                self._disagreed = metadata[ROOT], tag
                return None
            notes[ROOT] = self._keep(ROOT, tag, root)
        with self.naming():
            manifest = read_manifest(self._folder)
        publish(self._folder, _NOTES, json.dumps(notes).encode())
        for array in (*manifest.sites, *RESERVED):
            self._name_shards(array, found.shards.get(array, set()))
        self.strange = (*self._bucket.refused, *found.strange)
        return manifest.store

    def _notes(self) -> dict[str, list[Any]]:
        # The file may be from another version, or damaged by a power failure.
        with contextlib.suppress(MmcacheError, ValueError, TypeError, RecursionError):
            return dict(json.loads(read_file(self._folder / _NOTES, METADATA_LIMIT)))
        return {}

    def _is_whole(self, key: str, tag: str | None, noted: Any) -> bool:
        """Whether the copy is intact, and of the object that now has this tag."""
        if tag is None or not isinstance(noted, list) or noted[:1] != [tag]:
            return False
        with contextlib.suppress(MmcacheError, OSError):
            self._clear_way(key)
            return noted == _note(tag, read_file(self._folder / key, METADATA_LIMIT))
        return False

    def _keep(self, key: str, tag: str | None, data: bytes) -> list[Any]:
        self._clear_way(key)
        make_folder(self._folder, key.rpartition("/")[0])
        publish(self._folder, key, data)
        return _note(tag, data)

    def _below(self) -> Iterator[str]:
        """The keys of all copies in the folders of metadata."""
        for name in FOLDERS:
            self._clear_way(f"{name}/")
            for folder, _, files in os.walk(self._folder / name):
                for file in files:
                    key = Path(folder, file).relative_to(self._folder).as_posix()
                    if is_metadata(key):
                        yield key

    def _clear_way(self, key: str) -> None:
        """Remove symbolic links among the folders of a copy; the copies can be fetched again."""
        parts = key.split("/")
        for depth in range(1, len(parts)):
            if self._folder.joinpath(*parts[:depth]).is_symlink():
                remove_file(self._folder, "/".join(parts[:depth]))

    @contextlib.contextmanager
    def naming(self) -> Iterator[None]:
        """In a CorruptError about a copy, name the object in the bucket instead."""
        try:
            yield
        except CorruptError as error:
            raise type(error)(str(error).replace(str(self._folder), self._bucket.url)) from error

    def _name_shards(self, array: str, there: set[str]) -> None:
        """Make an empty file for each shard in the bucket, and remove those of other shards."""
        self._clear_way(f"{array}/")
        here = {name for name in list_names(self._folder / array) if name.startswith("c.")}
        if there - here:
            make_folder(self._folder, array)
            make_empty(self._folder, array, there - here)
        for name in here - there:
            remove_file(self._folder, f"{array}/{name}")


def _note(tag: str | None, data: bytes) -> list[Any]:
    return [tag, len(data), crc32c.crc32c(data)]
