"""Memory of our own: page-aligned buffers, and how much there is."""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import time

import numpy as np

__all__ = ["PAGE", "anonymous", "available_memory"]

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
