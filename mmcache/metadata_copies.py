"""The metadata of a store in a bucket, copied into a folder that looks like the store's own.

An empty file stands there for each shard that the bucket has: so what lists a store's folder lists this one. Each copy
is compared with the checksum that was noted when it came, whenever the bucket is looked at; one that differs is fetched
again.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import crc32c

from mmcache.draft import publish
from mmcache.errors import CorruptError, MmcacheError, StoreNotFoundError
from mmcache.files import list_names, make_folder, read_file, remove_file
from mmcache.manifest import read_manifest
from mmcache.names import RESERVED, STATISTICS_FOLDER, TOKENIZER_FOLDER
from mmcache.signed import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future

    from mmcache.bucket import Bucket

__all__ = ["MetadataCopies"]

# Metadata is small; what is larger below such names is no store's.
_LIMIT = 256 << 20
# Of each copy: the object's tag, and the size and checksum of what came.
_NOTES = ".tags.json"
_FOLDERS, _DEEPEST = (STATISTICS_FOLDER, TOKENIZER_FOLDER), 8


class MetadataCopies:
    """The metadata of one store that is here. By one thread of one process at a time.

    Args:
        bucket: the store's.
        folder: where the copies are; made if it is not there.
        submit: does something in another thread.
    """

    def __init__(self, bucket: Bucket, folder: Path, submit: Callable[..., Future[bytes]]) -> None:
        self._bucket, self._folder, self._submit = bucket, folder, submit
        make_folder(folder)

    def refresh(self, *, again: bool = False) -> str:
        """Make the folder what the bucket has now, and give the store's own name; blocks until then.

        Args:
            again: fetch all of it, whatever is here.

        Raises:
            StoreNotFoundError: there is no store, or no bucket.
            AccessError, RemoteError: as `Bucket.read`.
            CorruptError: the root is damaged.
        """
        if again:
            remove_file(self._folder / _NOTES)
        while (store := self._refreshed()) is None:
            pass
        return store

    def _refreshed(self) -> str | None:
        """As `refresh`; None where another root came meanwhile, which may name shards that were not listed."""
        listed = self._listed()
        metadata = listed.pop("")
        if ROOT not in metadata:
            raise StoreNotFoundError(
                2, "no mmcache store there (a store is a prefix with a zarr.json)", self._bucket.url
            )
        known = self._notes()
        wanted = [key for key, tag in metadata.items() if not self._is_whole(key, tag, known.get(key))]
        for key in {*filter(_is_metadata, known), *self._below()} - metadata.keys():
            remove_file(self._inside(key))
        notes = {key: known[key] for key in metadata.keys() - set(wanted)}
        # The root comes last: what it names is here then.
        others = [key for key in wanted if key != ROOT]
        for key, coming in [(key, self._submit(self._bucket.read_whole, key, _LIMIT)) for key in others]:
            notes[key] = self._keep(key, metadata[key], coming.result())
        if ROOT in wanted:
            root, tag = self._bucket.read_tagged(ROOT, _LIMIT)
            if tag != metadata[ROOT]:
                return None
            notes[ROOT] = self._keep(ROOT, tag, root)
        with self.naming():
            manifest = read_manifest(self._folder)
        publish(self._folder / _NOTES, json.dumps(notes).encode())
        for array in (*manifest.sites, *RESERVED):
            self._name_shards(array, set(listed.get(array, ())))
        return manifest.store

    def _notes(self) -> dict[str, list[Any]]:
        # Left by another version, or what a power failure made of it.
        with contextlib.suppress(MmcacheError, ValueError, TypeError, RecursionError):
            return dict(json.loads(read_file(self._folder / _NOTES, _LIMIT)))
        return {}

    def _is_whole(self, key: str, tag: str | None, noted: Any) -> bool:
        """Whether the copy of an object that has such a tag now is here, as it came."""
        if tag is None or not isinstance(noted, list) or noted[:1] != [tag]:
            return False
        with contextlib.suppress(MmcacheError, OSError):
            return noted == _note(tag, read_file(self._inside(key), _LIMIT))
        return False

    def _keep(self, key: str, tag: str | None, data: bytes) -> list[Any]:
        file = self._inside(key)
        make_folder(file.parent)
        publish(file, data)
        return _note(tag, data)

    def _below(self) -> Iterator[str]:
        """Name the copies in folders of which not every name is known."""
        for name in _FOLDERS:
            for folder, _, files in os.walk(self._inside(f"{name}/").parent / name):
                for file in files:
                    key = Path(folder, file).relative_to(self._folder).as_posix()
                    if _is_metadata(key):
                        yield key

    def _inside(self, key: str) -> Path:
        """The path of a copy; a link in its way goes, since nothing is written through one."""
        file = self._folder / key
        for folder in file.parents[: key.count("/")]:
            if folder.is_symlink():
                remove_file(folder)
        return file

    @contextlib.contextmanager
    def naming(self) -> Iterator[None]:
        """Name the object, where an error is of the copy of it: people look for it in the bucket."""
        try:
            yield
        except CorruptError as error:
            raise type(error)(str(error).replace(str(self._folder), self._bucket.url)) from error

    def _listed(self) -> dict[str, dict[str, str | None]]:
        """List the bucket: of each array the names of its shards, and under "" the tags of the metadata."""
        found: dict[str, dict[str, str | None]] = {"": {}}
        for key, _, tag in itertools.chain.from_iterable(self._bucket.names()):
            parts = key.split("/")
            if len(parts) == 2 and parts[1].startswith("c.") and all(map(_is_name, parts)):
                found.setdefault(parts[0], {})[parts[1]] = None
            elif _is_metadata(key):
                found[""][key] = tag
        # What is a folder here, too, is an object that stands for a folder, as some tools make.
        above = {"/".join(key.split("/")[:depth]) for key in found[""] for depth in range(1, key.count("/") + 1)}
        found[""] = {key: tag for key, tag in found[""].items() if key not in above}
        return found

    def _name_shards(self, array: str, there: set[str]) -> None:
        """Make an empty file for each shard that the bucket has, and for no other."""
        folder = self._inside(f"{array}/").parent / array
        here = {name for name in list_names(folder) if name.startswith("c.")}
        if there - here:
            make_folder(folder)
        for name in there - here:
            (folder / name).touch()
        for name in here - there:
            remove_file(folder / name)


def _note(tag: str | None, data: bytes) -> list[Any]:
    return [tag, len(data), crc32c.crc32c(data)]


def _is_name(part: str) -> bool:
    """Whether a part of a key can be the name of a file of a store."""
    return part.isprintable() and part[:1] not in ("", ".") and len(part.encode()) < 256


def _is_metadata(key: str) -> bool:
    """Whether an object with such a key is metadata of a store."""
    parts = key.split("/")
    known = (parts[-1] == ROOT and len(parts) <= 2) or (parts[0] in _FOLDERS and 1 < len(parts) <= _DEEPEST)
    return known and all(map(_is_name, parts))
