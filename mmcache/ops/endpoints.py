"""The two ends of a transfer, a folder and a bucket, behind one interface."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from mmcache.errors import CorruptError, StoreNotFoundError
from mmcache.format.manifest import ARRAY_LIMIT, METADATA_LIMIT, Manifest, read_array
from mmcache.format.names import RESERVED, STATISTICS_FOLDER
from mmcache.format.shard import HEADER_BYTES, Layout, parse_header
from mmcache.format.signed_json import ROOT, read_signed
from mmcache.stats.site_statistics import load_summary
from mmcache.storage.bucket_metadata import manifest_of, read_if_there
from mmcache.storage.listing import listed_shards
from mmcache.storage.shard_bytes import FileBytes
from mmcache.storage.tokenizer_file import TOKENIZER, read_tokenizer
from mmcache.system.atomic import publish
from mmcache.system.files import make_folder, open_file, read_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from mmcache.storage.object_store import ObjectStore

__all__ = ["SUMMARY", "BucketEndpoint", "Endpoint", "FolderEndpoint", "Glance", "expected_bytes", "metadata"]

# The files of a site's merged statistics, in the order in which they are written.
SUMMARY = ("dimensions/c/0/0/0", "dimensions/zarr.json", "layers/c/0/0", "layers/zarr.json", ROOT)


@dataclass(frozen=True)
class Glance:
    """Fingerprint of a shard without its rows: header page, chunk checksums, statistics and index."""

    layout: Layout
    head: bytes
    behind: bytes

    def agrees(self, other: Glance, rows: int) -> bool:
        """Whether both have the same checksums for all whole inner chunks within the first `rows` rows."""
        stop = rows // self.layout.spec.chunk_rows * 4
        return self.behind[:stop] == other.behind[:stop]


class Endpoint(Protocol):
    """A folder or a bucket that a store is copied from or to."""

    def where(self, key: str) -> str:
        """The path or address of a file of the store, for messages."""

    def listed(self, manifest: Manifest, array: str) -> np.ndarray:
        """The shards of an array that exist: `[n, 3]` int64, slot, block and bytes."""

    def glance(self, manifest: Manifest, array: str, slot: int, block: int) -> Glance:
        """The fingerprint of a shard, by small reads. Raises CorruptError if it is not this store's shard."""

    def write(self, key: str, data: bytes) -> bool:
        """Write a small file atomically. Returns False if the same bytes are there already."""


def expected_bytes(manifest: Manifest, array: str, block: int) -> int:
    """The size in bytes of a shard that has exactly the rows that count."""
    spec = manifest.spec(array)
    return Layout(spec, spec.rows_in_block(block, manifest.rows(array))).size


class FolderEndpoint:
    """A store's folder."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def where(self, key: str) -> str:
        """As `Endpoint.where`."""
        return str(self._path / key)

    def listed(self, manifest: Manifest, array: str) -> np.ndarray:
        """As `Endpoint.listed`, with the bytes that each shard should have."""
        found = [np.zeros((2, 0), np.int64)]
        found += [np.stack(shards) for shards in listed_shards(self._path, manifest, array, manifest.rows(array))]
        slots, blocks = np.concatenate(found, axis=1)
        sizes = np.full(len(blocks), expected_bytes(manifest, array, 0))
        last = manifest.spec(array).blocks(manifest.rows(array)) - 1
        sizes[blocks == last] = expected_bytes(manifest, array, last)
        return _sorted(np.stack([slots, blocks, sizes], axis=1))

    def glance(self, manifest: Manifest, array: str, slot: int, block: int) -> Glance:
        """As `Endpoint.glance`. Raises IncompleteError if there is no such shard."""
        file = self._path / array / manifest.shard_key(array, block, slot)
        fd, status = open_file(file, what=f"shard {file.name} of {array}")
        shard = FileBytes(fd, status.size)
        try:
            head = shard.head()
            metadata = manifest.shard_metadata(array, block, slot)
            layout = parse_header(manifest.spec(array), head, status.size, metadata, where=str(file))
            start = layout.tensors["crc32c"][2]
            behind = bytearray(layout.size - start)
            if not shard.read(memoryview(behind), start):
                raise CorruptError(f"{file} was cut short while it was read; set it aside and make it again")
        finally:
            shard.close()
        return Glance(layout, head, bytes(behind))

    def write(self, key: str, data: bytes) -> bool:
        """As `Endpoint.write`, durably."""
        with contextlib.suppress(StoreNotFoundError, CorruptError):
            if read_file(self._path / key, len(data)) == data:
                return False
        make_folder(self._path, key.rpartition("/")[0])
        publish(self._path, key, data)
        return True


class BucketEndpoint:
    """A prefix of a bucket that holds a store's objects."""

    def __init__(self, bucket: ObjectStore) -> None:
        self._bucket = bucket

    def where(self, key: str) -> str:
        """As `Endpoint.where`."""
        return self._bucket.where(key)

    def listed(self, manifest: Manifest, array: str) -> np.ndarray:
        """As `Endpoint.listed`."""
        slots, blocks = len(manifest.slots(array)), manifest.spec(array).blocks(manifest.rows(array))
        found = [np.zeros((0, 3), np.int64)]
        for batch in self._bucket.names(array):
            shards = []
            for key, size, _ in batch:
                slot, block = _numbers_in(key.rpartition("/")[2], in_sites=array not in RESERVED)
                # Any other name is not a shard of this array, whatever numbers are in it.
                own = slot < slots and block < blocks and key == f"{array}/{manifest.shard_key(array, block, slot)}"
                shards += [(slot, block, size)] if own else []
            found.append(np.array(shards, np.int64).reshape(-1, 3))
        return _sorted(np.concatenate(found))

    def glance(self, manifest: Manifest, array: str, slot: int, block: int) -> Glance:
        """As `Endpoint.glance`; two requests. Errors as `ObjectStore.read`."""
        key = f"{array}/{manifest.shard_key(array, block, slot)}"
        size = self._bucket.size(key)
        # Servers refuse a range request for an empty object.
        head = bytes(self._bucket.read(key, 0, min(size, HEADER_BYTES))) if size else b""
        metadata = manifest.shard_metadata(array, block, slot)
        layout = parse_header(manifest.spec(array), head, size, metadata, where=self.where(key))
        return Glance(layout, head, bytes(self._bucket.read(key, layout.tensors["crc32c"][2], layout.size)))

    def write(self, key: str, data: bytes) -> bool:
        """As `Endpoint.write`. Errors as `ObjectStore.put`."""
        with contextlib.suppress(StoreNotFoundError, CorruptError):
            if self._bucket.read_whole(key, len(data)) == data:
                return False
        return self._bucket.put(key, data)

    def root(self) -> tuple[Manifest, bytes] | None:
        """The root and its bytes; None if there is none.

        Raises:
            CorruptError, VersionError: it is not a valid root.
            StoreNotFoundError: there is no such bucket.
            AccessError, RemoteError: as `ObjectStore.read`.
        """
        text = read_if_there(self._bucket, ROOT)
        return None if text is None else (manifest_of(self._bucket, text), text)

    def fetch(self, key: str, folder: Path) -> bool:
        """Copy a small object into a temporary folder, to be checked like a store's file; False if there is none."""
        data = read_if_there(self._bucket, key)
        if data is None:
            return False
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / key).write_bytes(data)
        return True

    @contextlib.contextmanager
    def naming(self, folder: Path) -> Iterator[None]:
        """Errors about the copy in `folder` name the object instead."""
        try:
            yield
        except CorruptError as error:
            raise type(error)(str(error).replace(str(folder), self._bucket.url)) from error


def _numbers_in(name: str, *, in_sites: bool) -> tuple[int, int]:
    """Slot and block from a shard's file name; arbitrary numbers for any other name."""
    parts = [int(part) if part.isdecimal() and len(part) < 19 else 0 for part in name.split(".")]
    parts += [0, 0, 0]
    return (parts[1], parts[2]) if in_sites else (0, parts[1])


def _sorted(shards: np.ndarray) -> np.ndarray:
    """Sorted by block, then slot, without duplicates: a listing that was restarted may name a shard twice."""
    shards = shards[np.lexsort((shards[:, 0], shards[:, 1]))]
    again = (np.diff(shards[:, :2], axis=0) == 0).all(axis=1)
    once: np.ndarray = shards[np.concatenate([np.ones(min(1, len(shards)), bool), ~again])]
    return once


def metadata(folder: Path, manifest: Manifest, sites: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Each file of a part of a store except shards and root, with its bytes, checked.

    Merged statistics that do not cover exactly these tokens are left out, since readers ignore them.

    Raises:
        CorruptError: a file is damaged, missing or another store's.
    """
    for array in (*sites, *(RESERVED if manifest.has_tokens else ())):
        if not manifest.rows(array) and not (folder / array / ROOT).exists():
            continue  # before the first rows, an array has no metadata
        with _required(folder / array / ROOT):
            yield f"{array}/{ROOT}", _array_metadata(folder, manifest, array)
    kept = [site for site in sites if manifest.shard_tokens and load_summary(folder, manifest, site) is not None]
    if kept:
        with _required(folder / STATISTICS_FOLDER / ROOT):
            yield f"{STATISTICS_FOLDER}/{ROOT}", read_signed(folder / STATISTICS_FOLDER / ROOT, METADATA_LIMIT)[1]
    for site, name in itertools.product(kept, SUMMARY):
        yield (key := f"{STATISTICS_FOLDER}/{site}/{name}"), read_file(folder / key, METADATA_LIMIT)
    with _required(folder / TOKENIZER):
        if read_tokenizer(folder, manifest) is not None:
            yield TOKENIZER, read_file(folder / TOKENIZER, METADATA_LIMIT)


@contextlib.contextmanager
def _required(file: Path) -> Iterator[None]:
    try:
        yield
    except StoreNotFoundError as error:
        raise CorruptError(
            f"{file} is not there, and belongs to the store: `mmcache verify` says what else is missing, and `mmcache "
            f"repair` or the same `mmcache extract` writes it anew"
        ) from error


def _array_metadata(folder: Path, manifest: Manifest, array: str) -> bytes:
    """The bytes of an array's metadata, compared with the root; a grown store's may be ahead of its commit."""
    if manifest.rows(array):
        return read_array(folder, manifest, array)
    return read_signed(folder / array / ROOT, ARRAY_LIMIT)[1]
