"""The two ends of a transfer, behind the same questions: a store's files in a folder, its objects in a bucket."""

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
from mmcache.storage.shard_folder import FileBytes
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
    """What tells a shard from another without its rows: its first page, and all from its checksums on."""

    layout: Layout
    head: bytes
    behind: bytes

    def agrees(self, other: Glance, rows: int) -> bool:
        """Tell whether both have the same checksums of the whole inner chunks within the first `rows` rows."""
        stop = rows // self.layout.spec.chunk_rows * 4
        return self.behind[:stop] == other.behind[:stop]


class Endpoint(Protocol):
    """A folder or a bucket, as far as a store is copied from or to it."""

    def where(self, key: str) -> str:
        """Give the path or address of a file of the store."""

    def listed(self, manifest: Manifest, array: str) -> np.ndarray:
        """List the shards of an array that are there: slot, block and bytes as `[n, 3]` int64."""

    def glance(self, manifest: Manifest, array: str, slot: int, block: int) -> Glance:
        """Look at a shard, with small reads. Raises CorruptError: it is none of this store under this name."""

    def write(self, key: str, data: bytes) -> bool:
        """Put a small file there, whole or not at all; False where exactly it is there already."""


def expected_bytes(manifest: Manifest, array: str, block: int) -> int:
    """Give the bytes of a shard that has exactly the rows that count."""
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
        """As `Endpoint.listed`; bytes are those that there should be."""
        found = [np.zeros((2, 0), np.int64)]
        found += [np.stack(shards) for shards in listed_shards(self._path, manifest, array, manifest.rows(array))]
        slots, blocks = np.concatenate(found, axis=1)
        sizes = np.full(len(blocks), expected_bytes(manifest, array, 0))
        last = manifest.spec(array).blocks(manifest.rows(array)) - 1
        sizes[blocks == last] = expected_bytes(manifest, array, last)
        return _sorted(np.stack([slots, blocks, sizes], axis=1))

    def glance(self, manifest: Manifest, array: str, slot: int, block: int) -> Glance:
        """As `Endpoint.glance`. Raises IncompleteError where it is not there."""
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
    """The prefix of a bucket below which a store's objects are."""

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
                # What has another name is no shard of it, whatever numbers are in it.
                own = slot < slots and block < blocks and key == f"{array}/{manifest.shard_key(array, block, slot)}"
                shards += [(slot, block, size)] if own else []
            found.append(np.array(shards, np.int64).reshape(-1, 3))
        return _sorted(np.concatenate(found))

    def glance(self, manifest: Manifest, array: str, slot: int, block: int) -> Glance:
        """As `Endpoint.glance`; two requests. Errors as `ObjectStore.read`."""
        key = f"{array}/{manifest.shard_key(array, block, slot)}"
        size = self._bucket.size(key)
        # Of an object without bytes no server gives the first ones.
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
        """Read the root, and give its bytes too; None where there is none.

        Raises:
            CorruptError, VersionError: it describes no store.
            StoreNotFoundError: there is no such bucket. AccessError, RemoteError: as `ObjectStore.read`.
        """
        text = read_if_there(self._bucket, ROOT)
        return None if text is None else (manifest_of(self._bucket, text), text)

    def fetch(self, key: str, folder: Path) -> bool:
        """Put a small object into a folder that is thrown away, to be checked as a store's file; False if none."""
        data = read_if_there(self._bucket, key)
        if data is None:
            return False
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / key).write_bytes(data)
        return True

    @contextlib.contextmanager
    def naming(self, folder: Path) -> Iterator[None]:
        """Name the object, where an error is of the copy of it in a folder."""
        try:
            yield
        except CorruptError as error:
            raise type(error)(str(error).replace(str(folder), self._bucket.url)) from error


def _numbers_in(name: str, *, in_sites: bool) -> tuple[int, int]:
    """Read slot and block off a shard's name; any numbers off another."""
    parts = [int(part) if part.isdecimal() and len(part) < 19 else 0 for part in name.split(".")]
    parts += [0, 0, 0]
    return (parts[1], parts[2]) if in_sites else (0, parts[1])


def _sorted(shards: np.ndarray) -> np.ndarray:
    """Put shards in order, by block; a listing that began anew may name some twice."""
    shards = shards[np.lexsort((shards[:, 0], shards[:, 1]))]
    again = (np.diff(shards[:, :2], axis=0) == 0).all(axis=1)
    once: np.ndarray = shards[np.concatenate([np.ones(min(1, len(shards)), bool), ~again])]
    return once


def metadata(folder: Path, manifest: Manifest, sites: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Read all that a part of a store has beside shards and root: each file and its bytes, checked.

    Merged statistics that are not of exactly these tokens are left out: nothing believes them.

    Raises:
        CorruptError: one of them is damaged, not this store's, or not there.
    """
    for array in (*sites, *(RESERVED if manifest.has_tokens else ())):
        if not manifest.rows(array) and not (folder / array / ROOT).exists():
            continue  # as before its first rows
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
    """Read an array's metadata, and compare it with what the root says; it may be ahead of a grown store's commit."""
    if manifest.rows(array):
        return read_array(folder, manifest, array)
    return read_signed(folder / array / ROOT, ARRAY_LIMIT)[1]
