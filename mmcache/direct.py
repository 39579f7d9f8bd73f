"""Many small reads past the page cache, at the depth that keeps a device busy.

Small rows go through a ring whose memory stays in the processor's cache: measured, that is 1.2 to 1.5 times as fast as
letting the device write each to where it is wanted. Large ones are written there: as fast, and the lock of Python is
let go of only twice. Rows are read together where what lies between them costs less to read than another request.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch

from mmcache.aio import DEPTH, Queue
from mmcache.geometry import PAGE
from mmcache.held import HELD, pieces
from mmcache.memory import anonymous
from mmcache.syscalls import READ

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

__all__ = ["GAP_BYTES", "Descriptor", "DirectReader", "Source", "borrowed", "runs_of"]

# To read so much that is not wanted takes about as long as one more request: 14 us at 2.5 GB/s.
GAP_BYTES = 32 << 10
# Long enough for the device's full rate, short enough that many are in flight.
_RUN_BYTES = 1 << 20
_SLOT_BYTES = 8 << 20
_SLOTS = 4
_BATCH = DEPTH // _SLOTS
# From here on a row is read straight to where it is wanted.
_LARGE_BYTES = 16 << 10
# Open files that one submission holds, of the 1,024 that a process usually may have.
_MOST_FILES = 128
_MOST_IDLE = 4


class Descriptor:
    """An open file that is closed with its last reference, so that nobody's read loses it."""

    # Kept here, since modules are emptied before the last objects go.
    _close = staticmethod(os.close)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        self._close(self.fd)


class Source(Protocol):
    """Where rows are read from: files of equally many rows, numbered through."""

    @property
    def rows_per_file(self) -> int:
        """Rows of a file's place, gaps at its end included."""

    @property
    def data_offset(self) -> int:
        """Where a file's first row begins, in bytes."""

    @property
    def alignment(self) -> int:
        """What offsets, sizes and addresses of direct reads must be multiples of, in bytes."""

    def descriptors(self, files: Collection[int]) -> Mapping[int, Descriptor]:
        """Open files for direct reading."""


def runs_of(rows: np.ndarray, per_file: int, row_bytes: int) -> np.ndarray:
    """Say where runs of rows that can be read together begin in `rows`: int64 `[runs]`, the first of them 0.

    Args:
        rows: int64 `[n]`, at least one, ascending.
        per_file: rows a file: no run goes from one into the next.
        row_bytes: bytes a row.
    """
    apart = (np.diff(rows) - 1) * row_bytes > GAP_BYTES
    apart |= np.diff(rows // per_file) != 0
    begins = np.concatenate([[True], apart])
    # One that became too long is cut at even distances from its begin.
    first = rows[np.maximum.accumulate(np.where(begins, np.arange(len(rows)), 0))]
    begins[1:] |= np.diff((rows - first) // max(1, _RUN_BYTES // row_bytes)) != 0
    return np.flatnonzero(begins)


class _Reads(NamedTuple):
    """Requests, int64 `[n]` each: which file, from which byte on, how many, how many rows; and where those begin."""

    files: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    counts: np.ndarray
    wanted: np.ndarray

    @classmethod
    def of(cls, source: Source, rows: np.ndarray, starts: np.ndarray, stops: np.ndarray, row_bytes: int) -> _Reads:
        """Cover the runs of rows from each start to before each stop, widened to whole units of direct reads."""
        files = rows[starts] // source.rows_per_file
        within = rows[starts[0] : stops[-1]] % source.rows_per_file
        wanted = source.data_offset + within * row_bytes
        begin = wanted[starts - starts[0]]
        end = wanted[stops - starts[0] - 1] + row_bytes
        begin -= begin % source.alignment
        sizes = -(-(end - begin) // source.alignment) * source.alignment
        return cls(files, begin, sizes, stops - starts, wanted)

    def up_to(self, size: int) -> _Reads:
        """Give those of the first ones that fit into so many bytes, and at least one."""
        most = max(1, int(np.searchsorted(np.cumsum(self.sizes), size, side="right")))
        rows = int(self.counts[:most].sum())
        files, offsets, sizes, counts = (part[:most] for part in self[:-1])
        return _Reads(files, offsets, sizes, counts, self.wanted[:rows])


def _apart(rows: np.ndarray, row_bytes: int) -> bool:
    """Say whether nothing would be gained from sorting rows, in that hardly any two of them could be read together."""
    step = -(-len(rows) // HELD)
    some = np.array(sorted(rows[::step].tolist()))
    return bool(np.mean((np.diff(some) - 1) * row_bytes <= GAP_BYTES * step) < 0.2) if len(some) > 1 else True


def _copy(source: memoryview, begins: np.ndarray, target: memoryview, places: np.ndarray, size: int) -> None:
    """Copy pieces of `size` bytes from where each begins to its place, int64 `[n]` each; one after the other at once.

    Not by torch, whose threads spin for a while after each call, which took a third of the device's rate away; and
    without letting go of the interpreter's lock.
    """
    edges = np.flatnonzero((np.diff(begins) != size) | (np.diff(places) != size)) + 1
    first = np.append(0, edges)
    lengths = np.diff(np.append(first, len(begins))) * size
    for begin, place, length in zip(begins[first].tolist(), places[first].tolist(), lengths.tolist(), strict=True):
        target[place : place + length] = source[begin : begin + length]


class DirectReader:
    """Reads rows for one thread at a time; keeps its queue and its ring for the next time.

    Raises:
        OSError: this kernel has no asynchronous I/O, or none left.
    """

    def __init__(self) -> None:
        self.queue = Queue()
        self._ring = np.empty(0, np.uint8)

    def read(self, source: Source, rows: np.ndarray, into: torch.Tensor) -> int:
        """Read `rows` int64 `[n]`, at least one, in any order, into `into` `[n, …]`, contiguous host memory.

        Gives the bytes that were read; blocks until all are there.

        Raises:
            OSError: the device, or the file system, refused; `into` holds then whatever came.
        """
        row_bytes = into.numel() // len(rows) * into.element_size()
        with self.queue:
            if not _apart(rows, row_bytes):
                order = np.argsort(rows, kind="stable")
                rows = rows[order]
                return self._read_over(source, rows, runs_of(rows, source.rows_per_file, row_bytes), order, into)
            if row_bytes >= _LARGE_BYTES and not (row_bytes | into.data_ptr() | source.data_offset) % source.alignment:
                return self._read_straight(source, rows, into.data_ptr(), row_bytes)
            # In the order asked, a row is copied only once.
            return self._read_over(source, rows, np.arange(len(rows)), None, into)

    def _submit(
        self, source: Source, files: np.ndarray, offsets: np.ndarray, sizes: np.ndarray, addresses: np.ndarray, tag: int
    ) -> None:
        """Submit reads, `[n]` integers each."""
        names = files.tolist()
        if len(set(names)) > _MOST_FILES:
            half = len(names) // 2
            for part in (slice(half), slice(half, None)):
                self._submit(source, files[part], offsets[part], sizes[part], addresses[part], tag)
            return
        # Held until the kernel has its own reference to each file.
        opened = source.descriptors(set(names))
        fds = np.array([opened[file].fd for file in names])
        self.queue.submit(READ, fds, addresses, sizes, offsets, tag)

    def _read_straight(self, source: Source, rows: np.ndarray, address: int, row_bytes: int) -> int:
        """Let the device write each row to where it is wanted: at `address`, one after the other."""
        count, queue, start = len(rows), self.queue, 0
        files, offsets, addresses, sizes = np.empty((4, count), np.int64)
        for some in pieces(count, count):
            np.divmod(rows[some], source.rows_per_file, files[some], offsets[some])
            offsets[some] *= row_bytes
            offsets[some] += source.data_offset
            addresses[some] = range(address + some.start * row_bytes, address + some.stop * row_bytes, row_bytes)
            sizes[some] = row_bytes
        while start < count or queue.in_flight:
            free = queue.depth - queue.in_flight
            if start < count and free >= min(_BATCH, count - start):
                some = slice(start, min(start + free, count))
                self._submit(source, files[some], offsets[some], sizes[some], addresses[some], 0)
                start = some.stop
            else:
                queue.reap(_BATCH - free if start < count else queue.in_flight)
        return count * row_bytes

    def _read_over(
        self, source: Source, rows: np.ndarray, edges: np.ndarray, order: np.ndarray | None, into: torch.Tensor
    ) -> int:
        """Read runs into the ring, and copy the rows out of it while the next ones come.

        Args:
            source: the files.
            rows: int64 `[n]`, in the order in which they are read.
            edges: where runs begin in them.
            order: where each row is wanted, int64 `[n]`; None for where it stands.
            into: as in `read`.
        """
        row_bytes, align = into.numel() // len(rows) * into.element_size(), source.alignment
        slot_bytes = max(_SLOT_BYTES, -(-(max(row_bytes, _RUN_BYTES) + 2 * align) // PAGE) * PAGE)
        ring, target = self._room(slot_bytes * _SLOTS), into.view(-1).view(torch.uint8).numpy()
        stops = np.append(edges[1:], len(rows))
        waiting: deque[tuple[int, np.ndarray, slice]] = deque()
        left: dict[int, int] = {}
        start = tag = total = 0
        while start < len(edges) or waiting:
            if start < len(edges) and len(waiting) < _SLOTS:
                span = slice(start, start + _BATCH)
                reads = _Reads.of(source, rows, edges[span], stops[span], row_bytes).up_to(slot_bytes)
                at = tag % _SLOTS * slot_bytes + np.cumsum(reads.sizes) - reads.sizes
                self._submit(source, reads.files, reads.offsets, reads.sizes, ring.ctypes.data + at, tag)
                begins = np.repeat(at - reads.offsets, reads.counts) + reads.wanted
                some = slice(edges[start], edges[start] + len(begins))
                waiting.append((tag, begins, some))
                left[tag] = len(at)
                start, tag, total = start + len(at), tag + 1, total + int(reads.sizes.sum())
                continue
            number, begins, some = waiting.popleft()
            while left[number]:
                for done in self.queue.reap(left[number]):
                    left[done] -= 1
            places = np.arange(some.start, some.stop) if order is None else order[some]
            _copy(ring.data, begins, target.data, places * row_bytes, row_bytes)
        return total

    def _room(self, size: int) -> np.ndarray:
        if len(self._ring) < size:
            self._ring = anonymous(size)
        return self._ring


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
