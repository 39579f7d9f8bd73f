"""Memory of our own: page-aligned buffers, and how much there is."""

from __future__ import annotations

import contextlib
import mmap
import os

import numpy as np

__all__ = ["anonymous", "available_memory"]


def available_memory() -> int:
    """Give the bytes of memory that could be had without swapping; half of all where that is not told."""
    with contextlib.suppress(OSError, ValueError, IndexError), open("/proc/meminfo") as lines:  # noqa: PTH123 -- no Path for a pseudo-file
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def anonymous(size: int) -> np.ndarray:
    """Give page-aligned memory of our own: `[size]` uint8, zeros, taken from the system as it is touched."""
    return np.frombuffer(mmap.mmap(-1, size), np.uint8)
