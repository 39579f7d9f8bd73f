"""The shards of one array, as files or as objects: names, presence, headers, bytes, and checksums of what is read."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

import crc32c
import numpy as np
import torch

from mmcache.errors import CorruptError, IncompleteError
from mmcache.format.names import RESERVED
from mmcache.format.shard import HEADER_BYTES, Layout, parse_header
from mmcache.storage.listing import count_shards, present_shards
from mmcache.system.files import advise_random, close_read, count_names, map_file, open_file, read_page, read_through
from mmcache.system.memory import PAGE
from mmcache.system.no_symlinks import check_path
from mmcache.system.os_errors import read_at

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from mmcache.format.manifest import Manifest
    from mmcache.storage.mirror import Mirror, ShardObjects
    from mmcache.system.files import FileStatus

__all__ = ["MANY", "FileBytes", "ObjectBytes", "ShardBytes", "ShardFiles", "ShardFolder"]


class ShardBytes(Protocol):
    """A shard that is open for reading pieces of it, until it is closed."""

    @property
    def size(self) -> int:
        """Bytes of all of it."""

    def head(self) -> bytes:
        """Read its first page, or what there is of it."""

    def read(self, into: memoryview, offset: int) -> bool:
        """Fill `into` from `offset` on; False if it ends before. Blocks until it is there."""

    def scattered(self) -> None:
        """Say that little of it will be read, so that nothing is read ahead."""

    def close(self) -> None:
        """Let go of it."""


class FileBytes:
    """Those of a file, whose descriptor it closes."""

    def __init__(self, fd: int, size: int, *, direct: bool = False) -> None:
        self._fd, self.size, self._direct = fd, size, direct

    def head(self) -> bytes:
        """Read its first page."""
        return read_page(self._fd)

    def read(self, into: memoryview, offset: int) -> bool:
        """As `ShardBytes.read`; where the file was opened for direct reads, all of it has to be in whole pages."""
        done = 0
        while done < len(into):
            count = read_at(self._fd, into[done:], offset + done)
            done += count
            # Direct reads cannot go on from within a page: there the file ends.
            if not count or (self._direct and count % PAGE):
                break
        return done == len(into)

    def scattered(self) -> None:
        """Tell the system so."""
        advise_random(self._fd)

    def close(self) -> None:
        """Close the file."""
        close_read(self._fd)


class ObjectBytes:
    """Those of an object, by ranged reads."""

    def __init__(self, objects: ShardObjects, array: str, key: str) -> None:
        self._objects, self._array, self._key = objects, array, key
        self._head, self.size = objects.head(array, key)

    def head(self) -> bytes:
        """Give its first page, which was read when it was opened."""
        return self._head

    def read(self, into: memoryview, offset: int) -> bool:
        """As `ShardBytes.read`; one request. Errors as `ShardObjects.read`."""
        stop = min(offset + len(into), self.size)
        if stop > offset:
            into[: stop - offset] = self._objects.read(self._array, self._key, offset, stop)
        return stop - offset == len(into)

    def scattered(self) -> None:
        """Do nothing: no more comes than is asked for."""

    def close(self) -> None:
        """Do nothing: it keeps no connection."""


T = TypeVar("T")

# Numbers, or rows, from which on memory is not taken for what a root says alone, which may be a stranger's.
MANY = 1 << 24
# Shards that many of them may be of, for each file that is there.
_SPARSE = 100


class ShardFiles:
    """The shards of one array. It keeps no map: each lives as long as the tensor that is handed out.

    Args:
        path: the store.
        manifest: what the store says of itself.
        array: a site, or `tokens`, `flags` or `sequences`.
        rows: rows (tokens, or sequences) that count.
        wait: called with (slot, block) before a shard is opened; a cache that is being written blocks there
            until the shard is in place.
        remote: what has the store's shards, where they are in a bucket; `path` is its folder then.
        fresh: read from the bucket even what is here.

    Raises:
        LinkError: the array's folder is a symbolic link.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        array: str,
        rows: int,
        wait: Callable[[int, int], None] | None = None,
        *,
        remote: Mirror | None = None,
        fresh: bool = False,
    ) -> None:
        check_path(path, array)
        self.spec, self.rows = manifest.spec(array), rows
        self._path, self._manifest, self.array, self._wait = path, manifest, array, wait
        self.remote, self._fresh = remote, fresh
        self._full = Layout(self.spec, self.spec.shard_rows)
        # What was checked: a file that is the same as then need not be again.
        self._met: dict[tuple[int, int], tuple[int, int, int]] = {}

    def key(self, slot: int, block: int) -> str:
        """Name a shard."""
        return self._manifest.shard_key(self.array, block, slot)

    def where(self, slot: int, block: int) -> str:
        """Say where a shard is, for people."""
        key = self.key(slot, block)
        return str(self._path / self.array / key) if self.remote is None else self.remote.where(self.array, key)

    def bring(self, slot: int, block: int) -> Path:
        """Give a shard's path, once it is in place: of a store in a bucket, once it is here. Errors as `open_file`."""
        if self.remote is not None:
            return self.remote.fetch(self.array, self.key(slot, block), partial(self.check, slot, block))
        if self._wait is not None:
            self._wait(slot, block)
        return self._path / self.array / self.key(slot, block)

    def check(self, slot: int, block: int, head: bytes, size: int) -> Layout:
        """Check a shard's header and size, and give its layout. Raises CorruptError."""
        where = self.where(slot, block)
        expected = self.spec.rows_in_block(block, self.rows)
        likely = self._full if expected == self.spec.shard_rows else Layout(self.spec, expected)
        metadata = self._manifest.shard_metadata(self.array, block, slot)
        layout = parse_header(self.spec, head, size, metadata, where=where, likely=likely)
        # What grows may be ahead of the commit after a crash, never behind it.
        exact = self._manifest.kind == "planned" and self.array in self._manifest.sites
        if layout.rows < expected or (exact and layout.rows != expected):
            raise CorruptError(f"{where} has {layout.rows} rows, the store counts {expected}: set it aside")
        return layout

    def open_file(self, slot: int, block: int, *, direct: bool = False) -> tuple[int, FileStatus]:
        """Open one shard's file, checked, and give its descriptor, which is the caller's to close, and its status.

        Beside a busy thread the first time takes two turns of the interpreter's lock, and each later one none. What is
        in a bucket is brought here first.

        Raises:
            IncompleteError: the shard is not there.
            CorruptError: it is not what belongs there.
            OSError: `direct` was asked for, and the file system has no direct reads.
            AccessError, RemoteError, DiskFullError: of a store in a bucket, as `Mirror.fetch`.
        """
        return self._brought(slot, block, partial(self._open_checked, slot, block, direct))

    def _open_checked(self, slot: int, block: int, direct: bool, file: Path) -> tuple[int, FileStatus]:
        fd, status = self._open(slot, block, direct, file)
        try:
            identity = (status.inode, status.size, status.modified)
            if self._met.get((slot, block)) != identity:
                self.check(slot, block, read_page(fd), status.size)
                self._met[slot, block] = identity
        except BaseException:
            close_read(fd)
            raise
        return fd, status

    def _open(self, slot: int, block: int, direct: bool, file: Path) -> tuple[int, FileStatus]:
        what = f"shard {self.key(slot, block)} of {self.array}"
        return open_file(file, what=what, direct=direct, known=(slot, block) in self._met)

    def _brought(self, slot: int, block: int, use: Callable[[Path], T]) -> T:
        """Use a shard's file, once it is in place; of a store in a bucket as `Mirror.use`."""
        if self.remote is None:
            return use(self.bring(slot, block))
        return self.remote.use(self.array, self.key(slot, block), partial(self.check, slot, block), use)

    def count(self) -> int:
        """Count the shards that are there, from one listing."""
        return count_shards(self._path, self._manifest, self.array, self.rows)

    def present(self) -> np.ndarray:
        """Tell which shards are there: `[slots, blocks]` bool, from one listing; `in_order` names them.

        Raises:
            IncompleteError: the root counts so many that hardly any of them can be there.
        """
        shards = self.spec.blocks(self.rows) * len(self._manifest.slots(self.array))
        if shards >= MANY and shards > MANY + _SPARSE * (files := count_names(self._path / self.array)):
            raise IncompleteError(
                f"{self._path / self.array} has {files} files, and {shards} shards are counted: `mmcache verify` "
                f"lists what is missing"
            )
        return present_shards(self._path, self._manifest, self.array, self.rows)

    def believe(self, numbers: int, slot: int, position: int) -> None:
        """Before memory is taken for many numbers: look whether the shard of the first row is what the root says.

        A root may claim widths and layers that no file has. Errors as `open_file`.
        """
        if numbers >= MANY:
            slot = slot if self._manifest.layout == "layer" else 0
            self.open_layout(slot, position // self.spec.shard_rows)[0].close()

    def believe_rows(self, start: int, stop: int) -> None:
        """Before memory is taken for something of each of some rows: look whether there are files for as many.

        Raises:
            IncompleteError: there are fewer.
        """
        files = count_names(self._path / self.array)
        blocks = self.spec.blocks(stop) - start // self.spec.shard_rows
        if blocks > files:
            raise IncompleteError(
                f"{self._path / self.array} has {files} files, and rows {start} to {stop} are in {blocks} shards: "
                f"`mmcache verify` lists what is missing"
            )

    def open_layout(
        self, slot: int, block: int, *, direct: bool = False, scattered: bool = False
    ) -> tuple[ShardBytes, Layout]:
        """Open one shard for reading pieces, checked, and say where everything is in it; its header is read each time.

        Of a store in a bucket, pieces of a site's shard come from there where it is not here; other arrays are small,
        and brought here. What is opened is the caller's to close. `scattered`: little of it will be read.

        Raises:
            IncompleteError, CorruptError, OSError: as `open_file`.
        """

        def checked(shard: ShardBytes) -> tuple[ShardBytes, Layout]:
            if scattered:
                shard.scattered()
            try:
                return shard, self.check(slot, block, shard.head(), shard.size)
            except BaseException:
                shard.close()
                raise

        def of_file(file: Path) -> tuple[ShardBytes, Layout]:
            fd, status = self._open(slot, block, direct, file)
            return checked(FileBytes(fd, status.size, direct=direct))

        if self.remote is not None and self._stays_there(self.remote, slot, block):
            return checked(ObjectBytes(self.remote, self.array, self.key(slot, block)))
        return self._brought(slot, block, of_file)

    def _stays_there(self, remote: Mirror, slot: int, block: int) -> bool:
        """Tell whether a shard is read from the bucket by the piece."""
        size = Layout(self.spec, self.spec.rows_in_block(block, self.rows)).size
        if self._fresh or size > remote.cache.most_bytes:
            return True
        return self.array not in RESERVED and not self.is_here(slot, block)

    def is_here(self, slot: int, block: int) -> bool:
        """Whether a shard of a store in a bucket is here; one that turns out to be damaged goes."""
        if self.remote is None:
            return True
        return self.remote.find(self.array, self.key(slot, block), partial(self.check, slot, block)) is not None

    def _mapped(self, slot: int, block: int, file: Path) -> tuple[np.ndarray, Layout]:
        """Map a shard's file and check its header and size: `[bytes]` uint8, and where things are in it."""
        pages = map_file(file, what=f"shard {self.key(slot, block)} of {self.array}")
        return pages, self.check(slot, block, pages[:HEADER_BYTES].tobytes(), len(pages))

    def open(self, slot: int, block: int) -> torch.Tensor:
        """Map one shard: `[rows, *row_shape]`, only those rows that count. It must only be read.

        Raises:
            IncompleteError: the shard is not there.
            CorruptError: it is not what belongs there.
        """
        return self._rows(self._brought(slot, block, partial(self._mapped, slot, block))[0], block)

    def _rows(self, pages: np.ndarray, block: int) -> torch.Tensor:
        rows = self.spec.rows_in_block(block, self.rows)
        data = pages[HEADER_BYTES : HEADER_BYTES + rows * self.spec.row_bytes]
        return torch.from_numpy(data).view(self.spec.dtype.torch).view(rows, *self.spec.row_shape)


class ShardFolder(ShardFiles):
    """The shards of one array. Made as `ShardFiles`.

    Where the copy of a bucket's shard turns out to be damaged, it goes, and is fetched again: an error that names the
    object means that what was just fetched is damaged.
    """

    def _bad_chunk(self, slot: int, block: int, number: int) -> CorruptError:
        remedy = "set the file aside, as `mmcache repair` does, and make it again"
        if self.remote is not None:
            remedy = "delete the object, and push or make it again"
        return CorruptError(f"{self.where(slot, block)}: inner chunk {number} does not match its checksum; {remedy}")

    @contextlib.contextmanager
    def _opened(
        self, slot: int, block: int, *, scattered: bool = False, last: bool
    ) -> Iterator[tuple[ShardBytes, Layout]]:
        """Open a shard for reading pieces. A copy of a bucket's in which something is damaged goes, and that is all.

        With `last`, when it was fetched again already, that is an error.
        """
        shard, layout = self.open_layout(slot, block, scattered=scattered)
        try:
            yield shard, layout
        except CorruptError as error:
            if self.remote is None or isinstance(shard, ObjectBytes):
                raise
            if last:
                raise self.remote.spoilt(self.array, self.key(slot, block), error) from error
            self.remote.drop(self.array, self.key(slot, block))
        finally:
            shard.close()

    def reading(self, slot: int, block: int, read: Callable[[ShardBytes, Layout], T], *, scattered: bool = False) -> T:
        """What is read of one shard, which is open as long as that takes.

        Args:
            slot: which shard,
            block: and which block of it.
            read: reads it, and raises CorruptError where a checksum differs.
            scattered: little of it will be read.

        Raises:
            IncompleteError, CorruptError, OSError: as `open_layout`; what `read` raises.
        """
        for last in (False, True):
            with self._opened(slot, block, scattered=scattered, last=last) as (shard, layout):
                return read(shard, layout)
        raise AssertionError("the last time, an error is raised")

    def chunks(self, slot: int, block: int, numbers: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Read inner chunks of one shard, each as its number and `[bytes]` uint8, once its checksum was compared.

        Nothing is mapped: a file that is cut short meanwhile is an error, and does not end the process.

        Raises:
            IncompleteError, CorruptError: as `open_file`; a checksum differs, or the file ends before it should.
        """
        done = 0
        for last in (False, True):
            with self._opened(slot, block, last=last) as (shard, layout):
                for number, chunk in self._compared(slot, block, shard, layout, numbers[done:]):
                    yield number, chunk
                    done += 1
                return

    def _compared(
        self, slot: int, block: int, shard: ShardBytes, layout: Layout, numbers: Sequence[int]
    ) -> Iterator[tuple[int, np.ndarray]]:
        first, last = min(numbers, default=0), max(numbers, default=-1) + 1
        step, wanted = self.spec.chunk_bytes, np.empty(last - first, "<u4")
        there = shard.read(wanted.view(np.uint8).data, layout.tensors["crc32c"][2] + 4 * first)
        for number in numbers:
            chunk = np.empty(step, np.uint8)
            if not there or not shard.read(chunk.data, HEADER_BYTES + number * step):
                where = self.where(slot, block)
                raise CorruptError(f"{where} was cut short while it was read; set it aside and make it again")
            if crc32c.crc32c(chunk.data) != wanted[number - first]:
                raise self._bad_chunk(slot, block, number)
            yield number, chunk

    def checked(self, slot: int, block: int) -> torch.Tensor:
        """Map one shard as `open` does, after comparing the checksum of every inner chunk.

        Raises:
            CorruptError: a checksum differs; the error names the first such chunk.
        """
        return self._brought(slot, block, partial(self._checked, slot, block))

    def _checked(self, slot: int, block: int, file: Path) -> torch.Tensor:
        pages, layout = self._mapped(slot, block, file)
        _, _, start, stop = layout.tensors["crc32c"]
        step = self.spec.chunk_bytes
        for number, wanted in enumerate(pages[start:stop].view("<u4")):
            at = HEADER_BYTES + number * step
            if crc32c.crc32c(pages[at : at + step].data) != wanted:
                raise self._bad_chunk(slot, block, number)
        return self._rows(pages, block)

    def read_through(self, slot: int, start: int, stop: int) -> None:
        """Read rows from `start` to `stop` for nothing but their being in the page cache afterwards.

        Raises:
            IncompleteError, CorruptError: as `open_file`.
        """
        spec = self.spec
        for block in range(start // spec.shard_rows, -(-stop // spec.shard_rows)):
            first, last = (min(max(row - block * spec.shard_rows, 0), spec.shard_rows) for row in (start, stop))
            fd, _ = self.open_file(slot, block)
            try:
                read_through(fd, HEADER_BYTES + first * spec.row_bytes, HEADER_BYTES + last * spec.row_bytes)
            finally:
                close_read(fd)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Read rows into memory of the caller's own, checksums compared: `[stop - start, *row_shape]`.

        For arrays that have one shard a block: `tokens`, `flags` and `sequences`.
        """
        self.believe_rows(start, stop)
        spec = self.spec
        out = np.empty((stop - start, *spec.row_shape), spec.dtype.numpy)
        into = out.reshape(-1).view(np.uint8)
        for block in range(start // spec.shard_rows, -(-stop // spec.shard_rows)):
            first = block * spec.shard_rows
            low, high = max(start, first) - first, min(stop, first + spec.shard_rows) - first
            for number, chunk in self.chunks(0, block, range(low // spec.chunk_rows, -(-high // spec.chunk_rows))):
                begin = number * spec.chunk_rows
                a, b = max(low, begin), min(high, begin + spec.chunk_rows)
                at = (first + a - start) * spec.row_bytes
                rows = chunk[(a - begin) * spec.row_bytes : (b - begin) * spec.row_bytes]
                into[at : at + len(rows)] = rows
        return torch.from_numpy(out)
