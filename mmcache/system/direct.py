"""Many small reads past the page cache, at the depth that keeps a device busy.

Small rows go through a ring whose memory stays in the processor's cache: measured, that is 1.2 to 1.5 times as fast as
letting the device write each to where it is wanted. Large ones are written there: as fast, and the lock of Python is
let go of only twice. Rows are read together where what lies between them costs less to read than another request.

What several batches want of several sites is asked for in one go: each time that the lock is had back takes 5 ms
beside a busy thread.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from mmcache.system.aio import deepest
from mmcache.system.held import HELD
from mmcache.system.memory import PAGE, anonymous
from mmcache.system.runs import RUN_BYTES, Reads, Source, apart, runs_of
from mmcache.system.syscalls import READ

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mmcache.system.descriptor import Descriptor

__all__ = ["DirectReader", "Wanted", "borrowed"]

_SLOT_BYTES = 4 << 20
_SLOTS = 8
# Requests in a slot, so that the first rows are copied while the others come. Where several reads are asked for in
# one go, other threads see to that, and all that matters is how often the lock is let go of.
_BATCH = 256
# From here on a row is read straight to where it is wanted.
_LARGE_BYTES = 16 << 10
# Open files that one submission holds, of the 1,024 that a process usually may have.
_MOST_FILES = 128
_MOST_IDLE = 4


class Wanted(NamedTuple):
    """Rows of one source, int64 `[n]`, at least one, in any order, and where they go: `[n, …]` contiguous memory."""

    source: Source
    rows: np.ndarray
    into: torch.Tensor

    @property
    def row_bytes(self) -> int:
        """Bytes a row."""
        return self.into.numel() // len(self.rows) * self.into.element_size()

    @property
    def straight(self) -> bool:
        """Whether the device may write each row to where it is wanted, were none to be read together."""
        whole = not (self.row_bytes | self.into.data_ptr() | self.source.data_offset) % self.source.alignment
        return whole and self.row_bytes >= _LARGE_BYTES


class _Chunk(NamedTuple):
    """What a slot of the ring takes: whose, the requests, and which of the slot's bytes go where behind them."""

    whose: int
    source: Source
    reads: Reads
    begins: np.ndarray
    target: memoryview
    places: np.ndarray
    row_bytes: int

    def copy(self, slot: memoryview) -> None:
        """Copy the rows from the slot to their places; those that lie one after the other at once.

        Not by torch, whose threads spin for a while after each call, which took a third of the device's rate away;
        and without letting go of the interpreter's lock.
        """
        size, target = self.row_bytes, self.target
        edges = np.flatnonzero((np.diff(self.begins) != size) | (np.diff(self.places) != size)) + 1
        first = np.append(0, edges)
        lengths = (np.diff(np.append(first, len(self.begins))) * size).tolist()
        begins, places = self.begins[first].tolist(), self.places[first].tolist()
        for begin, place, length in zip(begins, places, lengths, strict=True):
            target[place : place + length] = slot[begin : begin + length]


def _chunks(wanted: Wanted, whose: int, *, together: bool, slot_bytes: int, most: int) -> Iterator[_Chunk]:
    """Cut what is wanted into what slots take, at most so many requests each."""
    source, rows, size = wanted.source, wanted.rows, wanted.row_bytes
    # In the order asked where nothing is read together: a row is copied only once then.
    order, edges = None, np.arange(len(rows))
    if together:
        order = np.argsort(rows, kind="stable")
        rows = rows[order]
        edges = runs_of(rows, source.rows_per_file, size)
    stops = np.append(edges[1:], len(rows))
    target, start = wanted.into.view(-1).view(torch.uint8).numpy().data, 0
    while start < len(edges):
        span = slice(start, start + most)
        reads = Reads.of(source, rows, edges[span], stops[span], size).up_to(slot_bytes)
        begins = np.repeat(np.cumsum(reads.sizes) - reads.sizes - reads.offsets, reads.counts) + reads.wanted
        some = slice(edges[start], edges[start] + len(begins))
        places = np.arange(some.start, some.stop) if order is None else order[some]
        start += len(reads.files)
        yield _Chunk(whose, source, reads, begins, target, places * size, size)


class DirectReader:
    """Reads rows for one thread at a time; keeps its queue and its ring for the next time.

    Raises:
        OSError: this kernel has no asynchronous I/O, or none left.
    """

    def __init__(self) -> None:
        self.queue = deepest()
        self._ring = np.empty(0, np.uint8)
        # Held until the kernel has its own reference to each file.
        self._opened: dict[tuple[Source, int], Descriptor] = {}

    def read(self, wanted: Sequence[Wanted]) -> list[int]:
        """Read rows to where they are wanted, and give the bytes that each took; blocks until all are there.

        Raises:
            OSError: the device, or the file system, refused; the memory holds then whatever came.
        """
        taken, straight, chunks = [0] * len(wanted), [], []
        slot_bytes = max(_SLOT_BYTES, *(max(one.row_bytes, RUN_BYTES) + 2 * one.source.alignment for one in wanted))
        slot_bytes = -(-slot_bytes // PAGE) * PAGE
        most = min(_BATCH if len(wanted) == 1 else HELD, self.queue.depth // _SLOTS)
        for whose, one in enumerate(wanted):
            together = not apart(one.rows, one.row_bytes)
            if one.straight and not together:
                straight.append(one)
                taken[whose] = len(one.rows) * one.row_bytes
            else:
                chunks.append(_chunks(one, whose, together=together, slot_bytes=slot_bytes, most=most))
        try:
            with self.queue:
                self._read_straight(straight)
                self._read_over(itertools.chain.from_iterable(chunks), slot_bytes, taken)
        finally:
            self._opened.clear()
        return taken

    def _prepare(
        self, source: Source, files: np.ndarray, offsets: np.ndarray, sizes: np.ndarray, addresses: np.ndarray, tag: int
    ) -> None:
        """Prepare reads of some files, `[n]` integers each, and submit what can no longer wait."""
        names = files.tolist()
        several = set(names)
        if len(several) > _MOST_FILES:
            half = len(names) // 2
            for part in (slice(half), slice(half, None)):
                self._prepare(source, files[part], offsets[part], sizes[part], addresses[part], tag)
            return
        if len(self._opened) + len(several) > _MOST_FILES:
            self._submit()
        missing = [file for file in several if (source, file) not in self._opened]
        self._opened |= {(source, file): made for file, made in source.descriptors(missing).items()}
        fds = np.array([self._opened[source, name].fd for name in names])
        self.queue.prepare(READ, fds, addresses, sizes, offsets, tag)

    def _submit(self) -> None:
        self.queue.submit()
        self._opened.clear()

    def _read_straight(self, wanted: Sequence[Wanted]) -> None:
        """Let the device write each row to where it is wanted."""
        queue = self.queue
        step = min(HELD, queue.depth // 2)
        for one in wanted:
            source, size, address = one.source, one.row_bytes, one.into.data_ptr()
            for start in range(0, len(one.rows), step):
                rows = one.rows[start : start + step]
                if queue.free < len(rows):
                    self._submit()
                    queue.reap(min(queue.in_flight, max(_BATCH, len(rows) - queue.free)))
                files, within = np.divmod(rows, source.rows_per_file)
                addresses = address + np.arange(start, start + len(rows)) * size
                sizes = np.full(len(rows), size)
                self._prepare(source, files, source.data_offset + within * size, sizes, addresses, 0)
        self._submit()
        while queue.in_flight:
            queue.reap(queue.in_flight)

    def _read_over(self, chunks: Iterator[_Chunk], slot_bytes: int, taken: list[int]) -> None:
        """Read chunks into the ring, and copy the rows out of it while the next ones come.

        Args:
            chunks: of at most `slot_bytes` each.
            slot_bytes: what a slot has.
            taken: where the bytes that each of the wanted takes are added up.
        """
        waiting: deque[tuple[int, _Chunk]] = deque()
        left: dict[int, int] = {}
        tags = itertools.count()
        while True:
            # Every slot that is free, in one submission.
            for chunk, tag in zip(itertools.islice(chunks, _SLOTS - len(waiting)), tags, strict=False):
                files, offsets, sizes = chunk.reads[:3]
                at = self._slot(tag, slot_bytes).ctypes.data + np.cumsum(sizes) - sizes
                self._prepare(chunk.source, files, offsets, sizes, at, tag)
                waiting.append((tag, chunk))
                left[tag] = len(files)
                taken[chunk.whose] += int(sizes.sum())
            self._submit()
            if not waiting:
                return
            while left[waiting[0][0]]:
                for done in self.queue.reap(left[waiting[0][0]]):
                    left[done] -= 1
            while waiting and not left[waiting[0][0]]:
                tag, chunk = waiting.popleft()
                chunk.copy(self._slot(tag, slot_bytes).data)

    def _slot(self, tag: int, size: int) -> np.ndarray:
        if len(self._ring) < size * _SLOTS:
            self._ring = anonymous(size * _SLOTS)
        start = tag % _SLOTS * size
        return self._ring[start : start + size]


_IDLE: deque[DirectReader] = deque()


@contextlib.contextmanager
def borrowed() -> Iterator[DirectReader]:
    """Give a reader that nobody else uses meanwhile; a few are kept for the next time.

    Raises:
        OSError: as `DirectReader`.
    """
    try:
        reader = _IDLE.pop()
    except IndexError:
        reader = DirectReader()
    try:
        yield reader
    finally:
        if len(_IDLE) >= _MOST_IDLE:
            reader.queue.close()
        if not reader.queue.closed:
            _IDLE.append(reader)


# A fork has the memory of its parent's queues, and not the queues.
os.register_at_fork(after_in_child=_IDLE.clear)
