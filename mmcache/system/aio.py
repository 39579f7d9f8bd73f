"""A queue of asynchronous reads or writes, deep enough to keep a device busy from one thread.

Source: Linux asynchronous I/O, io_submit(2) and io_getevents(2), on descriptors opened with O_DIRECT.
"""

from __future__ import annotations

import errno
import os
from typing import Self

import numpy as np

from mmcache.system.held import pieces
from mmcache.system.syscalls import AIO, EVENT, IOCB, aio_destroy, aio_reap, aio_setup, aio_submit

__all__ = ["Queue", "deepest"]

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
