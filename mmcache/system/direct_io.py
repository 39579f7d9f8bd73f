"""Many small reads past the page cache, at the depth that keeps a device busy.

Small rows go through a ring whose memory stays in the processor's cache: measured, that is 1.2 to 1.5 times as fast as
letting the device write each to where it is wanted. Large ones are written there: as fast, and the lock of Python is
let go of only twice. Rows are read together where what lies between them costs less to read than another request.

What several batches want of several sites is asked for in one go: each time that the lock is had back takes 5 ms beside
a busy thread.

Source: Linux asynchronous I/O, io_submit(2) and io_getevents(2), on descriptors opened with O_DIRECT.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
from collections import deque
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self

import numpy as np
import torch

from mmcache.system.memory import PAGE, anonymous
from mmcache.system.syscalls import AIO, EVENT, IOCB, READ, aio_destroy, aio_reap, aio_setup, aio_submit
from mmcache.system.threads import HELD, pieces

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from mmcache.system.files import Descriptor

__all__ = [
    "GAP_BYTES",
    "RUN_BYTES",
    "DirectReader",
    "Queue",
    "Reads",
    "Source",
    "Wanted",
    "alike",
    "apart",
    "borrowed",
    "deepest",
    "runs_of",
]

# Tried in turn: a system has so many for all its processes together, 65,536 unless told otherwise (fs.aio-max-nr).
_DEPTHS = (4096, 1024, 256)
# A request carries its size, below 4 GiB, and its tag above that.
_TAG = np.uint64(32)
_SIZE = np.uint64(2**32 - 1)


class Queue:
    """Asynchronous requests of one thread at a time. Use it as a context: nothing is in flight when that ends.

    A request that a failure or an interrupt leaves in flight would go on to write into memory that may be someone
    else's by then: where the block is ended by one, the queue is closed, which waits for all of them.

    Raises:
        OSError: the kernel has no asynchronous I/O, or none left.
    """

    def __init__(self, depth: int) -> None:
        if not AIO:
            raise OSError(errno.ENOSYS, "this system's asynchronous I/O is not known")
        self.depth, self.in_flight, self._prepared = depth, 0, 0
        self._process = os.getpid()
        self._events = np.zeros(depth, EVENT)
        # The kernel copies a request when it takes it, and is told of each by its first field.
        self._records = np.zeros(depth, IOCB)
        self._pointers = (self._records.ctypes.data + np.arange(depth) * IOCB.itemsize).astype(np.uint64)
        self._handle = aio_setup(depth)

    @property
    def free(self) -> int:
        """How many more requests may be prepared."""
        return self.depth - self.in_flight - self._prepared

    def prepare(
        self, opcode: int, fds: np.ndarray, addresses: np.ndarray, sizes: np.ndarray, offsets: np.ndarray, tag: int = 0
    ) -> None:
        """Put requests down, all of the same opcode (READ or WRITE), `[n]` int64 each, `n` at most what is free."""
        these = self._records[self._prepared : self._prepared + len(sizes)]
        self._prepared += len(sizes)
        for some in pieces(len(sizes), len(sizes)):
            part = these[some]
            part["data"] = sizes[some] + (tag << 32)
            part["opcode"] = opcode
            part["fd"] = fds[some]
            part["address"] = addresses[some]
            part["size"] = sizes[some]
            part["offset"] = offsets[some]

    def submit(self) -> None:
        """Submit all that was prepared, in one call of the system.

        Blocks while the device's own queue is full. The memory must stay until they are reaped.

        Raises:
            OSError: the kernel refused.
        """
        pointers, self._prepared = self._pointers[: self._prepared], 0
        while len(pointers):
            taken = aio_submit(self._handle, pointers)
            if not taken:
                raise OSError(errno.EAGAIN, "the kernel takes no more asynchronous requests")
            self.in_flight += taken
            pointers = pointers[taken:]

    def reap(self, least: int) -> list[int]:
        """Wait until at least `least` requests are done, and give the tags of those that are.

        Raises:
            OSError: one of them failed, or was cut short (EIO: the file ends before what was asked for).
        """
        count = aio_reap(self._handle, least, self._events)
        self.in_flight -= count
        tags: list[int] = []
        for some in pieces(count, count):
            done = self._events[some]
            wanted, results = (done["data"] & _SIZE).astype(np.int64), done["result"]
            tags += (done["data"] >> _TAG).tolist()
            bad = results != wanted
            if bad.any():
                first = int(np.argmax(bad))
                if results[first] < 0:
                    raise OSError(-int(results[first]), os.strerror(-int(results[first])))
                raise OSError(errno.EIO, f"{results[first]} bytes instead of {wanted[first]}")
        return tags

    @property
    def closed(self) -> bool:
        """Whether it can no longer be used: it was closed, or is another process's, of which this is a fork."""
        return not self._handle or self._process != os.getpid()

    def __enter__(self) -> Self:
        self._prepared = 0
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None or self.in_flight:
            self.close()

    def close(self) -> None:
        """Give the context back once everything in it is done, for which this waits. A fork has none to give."""
        handle, self._handle = self._handle, 0
        if handle and self._process == os.getpid():
            aio_destroy(handle)


def deepest() -> Queue:
    """Make the deepest queue that is to be had.

    Raises:
        OSError: the kernel has no asynchronous I/O, or none left.
    """
    for depth in _DEPTHS[:-1]:
        try:
            return Queue(depth)
        except OSError as error:
            if error.errno != errno.EAGAIN:
                raise
    return Queue(_DEPTHS[-1])


# To read so much that is not wanted takes about as long as one more request: 14 us at 2.5 GB/s.
GAP_BYTES = 32 << 10
# Long enough for the device's full rate, short enough that many are in flight.
RUN_BYTES = 1 << 20


class Source(Protocol):
    """Where rows are read from: files of equally many rows, numbered through. Hashable."""

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
    far = (np.diff(rows) - 1) * row_bytes > GAP_BYTES
    far |= np.diff(rows // per_file) != 0
    begins = np.concatenate([[True], far])
    # One that became too long is cut at even distances from its begin.
    first = rows[np.maximum.accumulate(np.where(begins, np.arange(len(rows)), 0))]
    begins[1:] |= np.diff((rows - first) // max(1, RUN_BYTES // row_bytes)) != 0
    return np.flatnonzero(begins)


def alike(keys: np.ndarray) -> Iterator[tuple[int, int]]:
    """Give where each stretch of equal keys begins and ends: int64 `[n]`, from 0 on, equal ones side by side."""
    return pairwise([*np.flatnonzero(np.diff(keys, prepend=-1)).tolist(), len(keys)])


def apart(rows: np.ndarray, row_bytes: int) -> bool:
    """Say whether nothing would be gained from sorting rows, in that hardly any two of them could be read together."""
    step = -(-len(rows) // HELD)
    # Python's own sort keeps the interpreter's lock.
    some = np.array(sorted(rows[::step].tolist()))
    return bool(np.mean((np.diff(some) - 1) * row_bytes <= GAP_BYTES * step) < 0.2) if len(some) > 1 else True


class Reads(NamedTuple):
    """Requests, int64 `[n]` each: which file, from which byte on, how many, how many rows; and where those begin."""

    files: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    counts: np.ndarray
    wanted: np.ndarray

    @classmethod
    def of(cls, source: Source, rows: np.ndarray, starts: np.ndarray, stops: np.ndarray, row_bytes: int) -> Reads:
        """Cover the runs of rows from each start to before each stop, widened to whole units of direct reads."""
        files = rows[starts] // source.rows_per_file
        within = rows[starts[0] : stops[-1]] % source.rows_per_file
        wanted = source.data_offset + within * row_bytes
        begin = wanted[starts - starts[0]]
        end = wanted[stops - starts[0] - 1] + row_bytes
        begin -= begin % source.alignment
        sizes = -(-(end - begin) // source.alignment) * source.alignment
        return cls(files, begin, sizes, stops - starts, wanted)

    def up_to(self, size: int) -> Reads:
        """Give those of the first ones that fit into so many bytes, and at least one."""
        most = max(1, int(np.searchsorted(np.cumsum(self.sizes), size, side="right")))
        rows = int(self.counts[:most].sum())
        files, offsets, sizes, counts = (part[:most] for part in self[:-1])
        return Reads(files, offsets, sizes, counts, self.wanted[:rows])


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
