"""Host memory: the page size, page-aligned buffers, a pool of buffers that are used again, and how much is free."""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["PAGE", "BufferPool", "anonymous", "available_memory"]

PAGE = 4096

_HUGE_PAGE = 2 << 20


def available_memory() -> int:
    """Give the bytes of memory that could be had without swapping; half of all where that is not told.

    As it was a second ago, or later: asking lets go of the interpreter's lock four times.
    """
    return _available(int(time.monotonic()))


@functools.lru_cache(maxsize=1)
def _available(_second: int) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError), open("/proc/meminfo") as lines:  # noqa: PTH123 -- no Path for a pseudo-file
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def anonymous(size: int) -> np.ndarray:
    """Give page-aligned memory of our own: `[size]` uint8, zeros, taken from the system as it is touched.

    A fork has its own copy of it. Where the system has huge pages, it is taken in those: fresh memory is then written
    five to eight times as fast.
    """
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= _HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


# What is kept for the next ones to need memory, when those that took it are gone; of less, fresh memory costs nothing.
_SPARE_BYTES, _WORTH_SPARING = 256 << 20, 2 << 20
_spare: deque[np.ndarray] = deque()


class BufferPool:
    """Buffers for what is of one size again and again. Safe to use from several threads.

    Fresh memory is written at a fraction of the rate of memory that was written before: the system has to clear it, and
    a virtual machine to get it first. So what nobody uses any more is kept for the next one, and at the end up to 256
    MiB for whatever else of the process takes such memory.

    Args:
        most: buffers that are kept while nobody uses them.
    """

    def __init__(self, most: int) -> None:
        # Its methods are atomic, so that a finaliser may call them wherever it comes.
        self._idle: deque[np.ndarray] = deque(maxlen=most)
        weakref.finalize(self, _spare_all, self._idle).atexit = False

    def lend(self, sizes: Sequence[int]) -> list[np.ndarray]:
        """Lend memory in parts of these numbers of bytes: `[size]` uint8 each, beginning on a page, of any content.

        It is the borrower's own until all of these very arrays are gone; a view of one does not count, but what holds
        on to one, as the storage of a tensor that was made of it does, and so every view of that tensor.
        """
        places, end = [], 0
        for size in sizes:
            places.append(end)
            end += -(-size // PAGE) * PAGE
        memory = self._take(end)
        # One for each, but for the last to come back, which finds none.
        tickets = [None] * (len(sizes) - 1)
        parts = []
        for place, size in zip(places, sizes, strict=True):
            part = memory[place : place + size]
            weakref.finalize(part, _return, tickets, self._idle, memory).atexit = False
            parts.append(part)
        return parts

    def _take(self, size: int) -> np.ndarray:
        while True:
            try:
                memory = self._idle.pop()
            except IndexError:
                return _from_spare(size)
            if len(memory) >= size:
                return memory


def _from_spare(size: int) -> np.ndarray:
    """Take memory that others left, if some is large enough and not much larger, or fresh memory."""
    with contextlib.suppress(IndexError):
        for _ in range(len(_spare)):
            memory = _spare.pop()
            if size <= len(memory) <= 2 * size:
                return memory
            _spare.appendleft(memory)
    return anonymous(max(size, 1))


def _spare_all(idle: deque[np.ndarray]) -> None:
    _spare.extend(memory for memory in idle if len(memory) >= _WORTH_SPARING)
    with contextlib.suppress(IndexError):  # another thread takes them meanwhile
        while sum(map(len, _spare.copy())) > _SPARE_BYTES:
            _spare.popleft()


def _return(tickets: list[None], idle: deque[np.ndarray], memory: np.ndarray) -> None:
    try:
        tickets.pop()
    except IndexError:
        idle.append(memory)
