"""The shards of one array, read, and compared with their checksums."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import crc32c
import numpy as np
import torch

from mmcache.errors import CorruptError
from mmcache.format.shard import HEADER_BYTES
from mmcache.storage.shard_bytes import ObjectBytes
from mmcache.storage.shard_files import ShardFiles
from mmcache.system.files import close_read, read_through

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from mmcache.format.shard import Layout
    from mmcache.storage.shard_bytes import ShardBytes

__all__ = ["ShardFolder"]

T = TypeVar("T")


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
