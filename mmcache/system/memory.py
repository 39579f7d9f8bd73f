"""Host memory: the page size, page-aligned buffers, a pool of reused buffers, and how much is free."""

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
    """Bytes of memory available without swapping; half of all memory where the system does not say.

    Cached for up to a second: reading it releases the GIL four times (see system/threads.py).
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
    """Page-aligned private memory: `[size]` uint8, zeros, allocated by the system when it is touched.

    A fork has its own copy. Huge pages are used where the system has them: fresh memory is then written five to eight
    times as fast.
    """
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= _HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


# Memory of pools that are gone, kept for later pools. Smaller buffers are not kept: fresh memory is cheap there.
_SPARE_BYTES, _WORTH_SPARING = 256 << 20, 2 << 20
_spare: deque[np.ndarray] = deque()


class BufferPool:
    """A pool of buffers for repeated requests of similar size. Safe to use from several threads.

    Writing to fresh memory is several times slower than to reused memory: the system must clear it, and a virtual
    machine must get it first. So unused buffers are kept for the next request. When a pool goes, up to 256 MiB are kept
    for the other pools of the process.

    Args:
        most: how many unused buffers to keep.
    """

    def __init__(self, most: int) -> None:
        # A deque's methods are atomic, so that a finalizer may call them at any point.
        self._idle: deque[np.ndarray] = deque(maxlen=most)
        weakref.finalize(self, _spare_all, self._idle).atexit = False

    def lend(self, sizes: Sequence[int]) -> list[np.ndarray]:
        """Borrow one array for each size: `[size]` uint8, page-aligned, uninitialized.

        The memory returns to the pool when all of these array objects are gone. A numpy view does not keep it; a
        tensor made from an array does, and so does every view of that tensor.
        """
        places, end = [], 0
        for size in sizes:
            places.append(end)
            end += -(-size // PAGE) * PAGE
        memory = self._take(end)
        # One ticket less than parts: the last part to go finds none, and returns the memory.
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
    """Spare memory of `size` to 2 * `size` bytes if there is some, otherwise fresh memory."""
    with contextlib.suppress(IndexError):
        for _ in range(len(_spare)):
            memory = _spare.pop()
            if size <= len(memory) <= 2 * size:
                return memory
            _spare.appendleft(memory)
    return anonymous(max(size, 1))


def _spare_all(idle: deque[np.ndarray]) -> None:
    _spare.extend(memory for memory in idle if len(memory) >= _WORTH_SPARING)
    with contextlib.suppress(IndexError):  # another thread may take them meanwhile
        while sum(map(len, _spare.copy())) > _SPARE_BYTES:
            _spare.popleft()


def _return(tickets: list[None], idle: deque[np.ndarray], memory: np.ndarray) -> None:
    try:
        tickets.pop()
    except IndexError:
        idle.append(memory)
