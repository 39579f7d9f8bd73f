"""The shards of one array, as files or as objects: names, presence, headers, bytes, and checksums of what is read."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import crc32c
import numpy as np
import torch

from mmcache.errors import CorruptError, IncompleteError
from mmcache.format.names import RESERVED
from mmcache.format.shard import HEADER_BYTES, Layout, parse_header
from mmcache.storage.listing import count_shards, present_shards
from mmcache.storage.shard_bytes import FileBytes, ObjectBytes, ShardBytes
from mmcache.system.files import close_read, count_names, map_file, open_file, read_page, read_through
from mmcache.system.no_symlinks import check_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from mmcache.format.manifest import Manifest
    from mmcache.storage.mirror import Mirror
    from mmcache.system.files import FileStatus

__all__ = ["MANY", "ShardFiles", "ShardFolder"]


T = TypeVar("T")

# Count of numbers or shards from which memory is not allocated on the word of the root alone, which may be forged.
MANY = 1 << 24
# Most expected shards per existing file, above MANY.
_SPARSE = 100


class ShardFiles:
    """The shards of one array: open, check and map them. A mapping lives as long as the tensor returned.

    Args:
        path: the store.
        manifest: what the store says of itself.
        array: a site, or `tokens`, `flags` or `sequences`.
        rows: committed rows (tokens, or sequences).
        wait: called with (slot, block) before a shard is opened; a cache that is being written blocks there
            until the shard is in place.
        remote: the mirror of a store in a bucket, whose folder is `path`; None for a local store.
        fresh: read from the bucket even if the shard is cached.

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
        # Identities of the files whose headers were checked, to check them only once.
        self._met: dict[tuple[int, int], tuple[int, int, int]] = {}

    def key(self, slot: int, block: int) -> str:
        """The file name of a shard."""
        return self._manifest.shard_key(self.array, block, slot)

    def where(self, slot: int, block: int) -> str:
        """Path or URL of a shard, for messages."""
        key = self.key(slot, block)
        return str(self._path / self.array / key) if self.remote is None else self.remote.where(self.array, key)

    def bring(self, slot: int, block: int) -> Path:
        """Path of a shard's file; blocks until it is written or, from a bucket, fetched. Errors as `open_file`."""
        if self.remote is not None:
            return self.remote.fetch(self.array, self.key(slot, block), partial(self.check, slot, block))
        if self._wait is not None:
            self._wait(slot, block)
        return self._path / self.array / self.key(slot, block)

    def check(self, slot: int, block: int, head: bytes, size: int) -> Layout:
        """Check a shard's header and size. Its layout. Raises CorruptError."""
        where = self.where(slot, block)
        expected = self.spec.rows_in_block(block, self.rows)
        likely = self._full if expected == self.spec.shard_rows else Layout(self.spec, expected)
        metadata = self._manifest.shard_metadata(self.array, block, slot)
        layout = parse_header(self.spec, head, size, metadata, where=where, likely=likely)
        # After a crash, a grown store's shard may have more rows than were committed, never fewer.
        exact = self._manifest.kind == "planned" and self.array in self._manifest.sites
        if layout.rows < expected or (exact and layout.rows != expected):
            raise CorruptError(f"{where} has {layout.rows} rows, the store counts {expected}: set it aside")
        return layout

    def open_file(self, slot: int, block: int, *, direct: bool = False) -> tuple[int, FileStatus]:
        """Open and check one shard's file. Its descriptor, which the caller must close, and its status.

        The first open releases the GIL twice; later ones keep the GIL (see system/threads.py). A shard in a bucket is
        fetched first.

        Raises:
            IncompleteError: the shard does not exist.
            CorruptError: it is damaged, or another shard.
            OSError: `direct` was requested, and the file system has no direct reads.
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
        """The result of `use` on a shard's file, once that is in place; for a store in a bucket as `Mirror.use`."""
        if self.remote is None:
            return use(self.bring(slot, block))
        return self.remote.use(self.array, self.key(slot, block), partial(self.check, slot, block), use)

    def count(self) -> int:
        """The number of shards that exist, from one listing."""
        return count_shards(self._path, self._manifest, self.array, self.rows)

    def present(self) -> np.ndarray:
        """Which shards exist: `[slots, blocks]` bool, from one listing; `in_order` iterates over them.

        Raises:
            IncompleteError: the root counts so many shards that hardly any of them can exist.
        """
        shards = self.spec.blocks(self.rows) * len(self._manifest.slots(self.array))
        if shards >= MANY and shards > MANY + _SPARSE * (files := count_names(self._path / self.array)):
            raise IncompleteError(
                f"{self._path / self.array} has {files} files, and {shards} shards are counted: `mmcache verify` "
                f"lists what is missing"
            )
        return present_shards(self._path, self._manifest, self.array, self.rows)

    def believe(self, numbers: int, slot: int, position: int) -> None:
        """Before a large allocation, check the header of the first row's shard.

        Guards against a root with forged widths and layers. Errors as `open_file`.
        """
        if numbers >= MANY:
            slot = slot if self._manifest.layout == "layer" else 0
            self.open_layout(slot, position // self.spec.shard_rows)[0].close()

    def believe_rows(self, start: int, stop: int) -> None:
        """Before an allocation for rows `start` to `stop`, check that the folder has files for as many.

        Raises:
            IncompleteError: there are fewer files.
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
        """Open and check one shard for reading ranges. The open shard, which the caller must close, and its layout.

        Its header is read each time. From a bucket, ranges of a site's shard are read remotely if it is not cached;
        other arrays are small, and fetched. `scattered`: little of it will be read.

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
        """Whether ranges of a shard are read from the bucket."""
        size = Layout(self.spec, self.spec.rows_in_block(block, self.rows)).size
        if self._fresh or size > remote.cache.most_bytes:
            return True
        return self.array not in RESERVED and not self.is_here(slot, block)

    def is_here(self, slot: int, block: int) -> bool:
        """Whether a shard is cached (a damaged copy is removed); True for a local store."""
        if self.remote is None:
            return True
        return self.remote.find(self.array, self.key(slot, block), partial(self.check, slot, block)) is not None

    def _mapped(self, slot: int, block: int, file: Path) -> tuple[np.ndarray, Layout]:
        """Map a shard's file, and check its header and size. Its bytes `[bytes]` uint8, and its layout."""
        pages = map_file(file, what=f"shard {self.key(slot, block)} of {self.array}")
        return pages, self.check(slot, block, pages[:HEADER_BYTES].tobytes(), len(pages))

    def open(self, slot: int, block: int) -> torch.Tensor:
        """The committed rows of one shard, mapped: `[rows, *row_shape]`, read-only.

        Raises:
            IncompleteError: the shard does not exist.
            CorruptError: it is damaged, or another shard.
        """
        return self._rows(self._brought(slot, block, partial(self._mapped, slot, block))[0], block)

    def _rows(self, pages: np.ndarray, block: int) -> torch.Tensor:
        rows = self.spec.rows_in_block(block, self.rows)
        data = pages[HEADER_BYTES : HEADER_BYTES + rows * self.spec.row_bytes]
        return torch.from_numpy(data).view(self.spec.dtype.torch).view(rows, *self.spec.row_shape)


class ShardFolder(ShardFiles):
    """The shards of one array, with checksums of what is read. Constructed as `ShardFiles`.

    A damaged copy of a shard in a bucket is removed and fetched again once.
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
        """Open a shard for reading ranges. A CorruptError of a cached copy removes the copy, and is suppressed.

        With `last`, after it was fetched again, it is raised.
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
        """The result of `read` on one open shard.

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
        """(number, `[bytes]` uint8) of inner chunks of one shard, checksums compared.

        Read, not mapped: a file that is truncated meanwhile raises, instead of killing the process.

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
        """Read rows `start` to `stop` into the page cache; blocks until then.

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
        """Rows `start` to `stop`, checksums compared: `[stop - start, *row_shape]`, in memory that the caller owns.

        For arrays with one shard per block: `tokens`, `flags` and `sequences`.
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
