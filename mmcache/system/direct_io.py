"""Many small reads past the page cache (O_DIRECT), with a queue deep enough to keep the device busy.

Small rows go through a ring that stays in the processor's cache: measured, 1.2 to 1.5 times as fast as direct reads
into the target. Large rows are read into the target: as fast, and the GIL is released only twice. Neighbouring rows are
read in one request where reading the gap between them is cheaper than another request.

Rows of several batches and sites are read in one call, so that the GIL is re-acquired less often (see
system/threads.py).

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

# Tried in turn: all processes of a system share a limit, 65,536 by default (fs.aio-max-nr).
_DEPTHS = (4096, 1024, 256)
# A request's data field: its size in the lower 32 bits, its tag in the upper ones.
_TAG = np.uint64(32)
_SIZE = np.uint64(2**32 - 1)


class Queue:
    """Asynchronous requests, for one thread at a time. Use it as a context: no request is in flight after it.

    A request left in flight by an error or interrupt could write into memory that is reused by then. So the queue is
    closed in that case, which waits for all requests.

    Raises:
        OSError: the kernel has no asynchronous I/O, or none left.
    """

    def __init__(self, depth: int) -> None:
        if not AIO:
            raise OSError(errno.ENOSYS, "this system's asynchronous I/O is not known")
        self.depth, self.in_flight, self._prepared = depth, 0, 0
        self._process = os.getpid()
        self._events = np.zeros(depth, EVENT)
        # The kernel copies a request on submission, and returns its first field with the result.
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
        """Prepare `n` <= `free` requests of one opcode (READ or WRITE), `[n]` int64 each, for the next `submit`."""
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
        """Submit all prepared requests, in one system call if the kernel accepts them at once.

        Blocks while the device's queue is full. Their memory must stay valid until they are reaped.

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
        """Block until at least `least` requests are done. The tags of all that are.

        Raises:
            OSError: one of them failed, or was short (EIO: the file ends before the requested range).
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
        """Whether it can no longer be used: it was closed, or belongs to the process that this one was forked from."""
        return not self._handle or self._process != os.getpid()

    def __enter__(self) -> Self:
        self._prepared = 0
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None or self.in_flight:
            self.close()

    def close(self) -> None:
        """Release the context; blocks until all its requests are done. Does nothing in a forked process."""
        handle, self._handle = self._handle, 0
        if handle and self._process == os.getpid():
            aio_destroy(handle)


def deepest() -> Queue:
    """A new queue, as deep as the system allows: 4096, 1024 or 256 requests.

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


# Reading a gap of this size takes about as long as one more request: 14 us at 2.5 GB/s.
GAP_BYTES = 32 << 10
# Long enough for the device's full rate, short enough that many are in flight.
RUN_BYTES = 1 << 20


class Source(Protocol):
    """Files to read rows from, each with places for equally many rows, numbered across files. Hashable."""

    @property
    def rows_per_file(self) -> int:
        """Row numbers per file, unused ones at its end included."""

    @property
    def data_offset(self) -> int:
        """Offset of a file's first row, in bytes."""

    @property
    def alignment(self) -> int:
        """What offsets, sizes and addresses of direct reads must be multiples of, in bytes."""

    def descriptors(self, files: Collection[int]) -> Mapping[int, Descriptor]:
        """Open files for direct reading."""


def runs_of(rows: np.ndarray, per_file: int, row_bytes: int) -> np.ndarray:
    """Start indices in `rows` of the runs that are each read in one request: int64 `[runs]`, the first one 0.

    Args:
        rows: int64 `[n]`, at least one, ascending.
        per_file: rows per file; a run never spans two files.
        row_bytes: bytes per row.
    """
    far = (np.diff(rows) - 1) * row_bytes > GAP_BYTES
    far |= np.diff(rows // per_file) != 0
    begins = np.concatenate([[True], far])
    # A run that is too long is cut at equal distances from its start.
    first = rows[np.maximum.accumulate(np.where(begins, np.arange(len(rows)), 0))]
    begins[1:] |= np.diff((rows - first) // max(1, RUN_BYTES // row_bytes)) != 0
    return np.flatnonzero(begins)


def alike(keys: np.ndarray) -> Iterator[tuple[int, int]]:
    """(start, stop) of each stretch of equal keys; `keys` is int64 `[n]`, not negative, equal ones adjacent."""
    return pairwise([*np.flatnonzero(np.diff(keys, prepend=-1)).tolist(), len(keys)])


def apart(rows: np.ndarray, row_bytes: int) -> bool:
    """Whether sorting the rows gains nothing, since hardly any two of them could be read in one request."""
    step = -(-len(rows) // HELD)
    # Python's own sort keeps the GIL (see system/threads.py).
    some = np.array(sorted(rows[::step].tolist()))
    return bool(np.mean((np.diff(some) - 1) * row_bytes <= GAP_BYTES * step) < 0.2) if len(some) > 1 else True


class Reads(NamedTuple):
    """Requests, int64 `[n]` each: file, offset and bytes, number of rows; `wanted` `[rows]` is each row's offset."""

    files: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    counts: np.ndarray
    wanted: np.ndarray

    @classmethod
    def of(cls, source: Source, rows: np.ndarray, starts: np.ndarray, stops: np.ndarray, row_bytes: int) -> Reads:
        """Requests for the runs `rows[start:stop]`, widened to the source's alignment."""
        files = rows[starts] // source.rows_per_file
        within = rows[starts[0] : stops[-1]] % source.rows_per_file
        wanted = source.data_offset + within * row_bytes
        begin = wanted[starts - starts[0]]
        end = wanted[stops - starts[0] - 1] + row_bytes
        begin -= begin % source.alignment
        sizes = -(-(end - begin) // source.alignment) * source.alignment
        return cls(files, begin, sizes, stops - starts, wanted)

    def up_to(self, size: int) -> Reads:
        """The first requests that together fit into `size` bytes, at least one."""
        most = max(1, int(np.searchsorted(np.cumsum(self.sizes), size, side="right")))
        rows = int(self.counts[:most].sum())
        files, offsets, sizes, counts = (part[:most] for part in self[:-1])
        return Reads(files, offsets, sizes, counts, self.wanted[:rows])


_SLOT_BYTES = 4 << 20
_SLOTS = 8
# Requests in a slot, so that copying the first rows overlaps with reading the others. With several reads in one call,
# other threads provide the overlap, and slots have more requests so that the GIL is released less often.
_BATCH = 256
# Rows of at least this size are read directly into the target.
_LARGE_BYTES = 16 << 10
# File descriptors that one submission may hold; a process usually may have 1,024.
_MOST_FILES = 128
_MOST_IDLE = 4


class Wanted(NamedTuple):
    """Rows of one source to read, int64 `[n]`, at least one, in any order, into `[n, …]` contiguous memory."""

    source: Source
    rows: np.ndarray
    into: torch.Tensor

    @property
    def row_bytes(self) -> int:
        """Bytes a row."""
        return self.into.numel() // len(self.rows) * self.into.element_size()

    @property
    def straight(self) -> bool:
        """Whether each row may be read directly into the target: rows are aligned, and large enough."""
        whole = not (self.row_bytes | self.into.data_ptr() | self.source.data_offset) % self.source.alignment
        return whole and self.row_bytes >= _LARGE_BYTES


class _Chunk(NamedTuple):
    """The requests that fill one slot of the ring, and where each row is in the slot and in the target.

    `whose` is the index of the `Wanted`; `begins` and `places` are offsets in bytes in the slot and in `target`.
    """

    whose: int
    source: Source
    reads: Reads
    begins: np.ndarray
    target: memoryview
    places: np.ndarray
    row_bytes: int

    def copy(self, slot: memoryview) -> None:
        """Copy the rows from the slot to the target, adjacent rows in one copy.

        Not by torch: its threads spin for a while after each call, which cost a third of the device's rate. Keeps the
        GIL (see system/threads.py).
        """
        size, target = self.row_bytes, self.target
        edges = np.flatnonzero((np.diff(self.begins) != size) | (np.diff(self.places) != size)) + 1
        first = np.append(0, edges)
        lengths = (np.diff(np.append(first, len(self.begins))) * size).tolist()
        begins, places = self.begins[first].tolist(), self.places[first].tolist()
        for begin, place, length in zip(begins, places, lengths, strict=True):
            target[place : place + length] = slot[begin : begin + length]


def _chunks(wanted: Wanted, whose: int, *, together: bool, slot_bytes: int, most: int) -> Iterator[_Chunk]:
    """Chunks of the wanted rows that fit into a slot, of at most `most` requests; `together`: sort and merge rows."""
    source, rows, size = wanted.source, wanted.rows, wanted.row_bytes
    # In the order requested if no rows are read together: their places in the target are then consecutive.
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
    """Reads rows for one thread at a time; keeps its queue and ring between reads.

    Raises:
        OSError: the kernel has no asynchronous I/O, or none left.
    """

    def __init__(self) -> None:
        self.queue = deepest()
        self._ring = np.empty(0, np.uint8)
        # Kept open until submission, when the kernel has its own reference to each file.
        self._opened: dict[tuple[Source, int], Descriptor] = {}

    def read(self, wanted: Sequence[Wanted]) -> list[int]:
        """Read rows into their targets; blocks until all are there. The bytes read for each of `wanted`, gaps included.

        Raises:
            OSError: the device or the file system refused; the content of the targets is then undefined.
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
        """Prepare reads, `[n]` integers each; submits earlier ones if too many files would be open."""
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
        """Read each row directly into its target."""
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
        """Read chunks into the ring; copying the rows out of it overlaps with reading the next chunks.

        Args:
            chunks: of at most `slot_bytes` each.
            slot_bytes: bytes of a slot.
            taken: the bytes read for each of the wanted are added to this.
        """
        waiting: deque[tuple[int, _Chunk]] = deque()
        left: dict[int, int] = {}
        tags = itertools.count()
        while True:
            # Fill all free slots with one submission.
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
    """A reader for the caller's exclusive use in the `with` body; up to four idle ones are kept for reuse.

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


# A fork has a copy of its parent's memory, but not the kernel's queues.
os.register_at_fork(after_in_child=_IDLE.clear)
