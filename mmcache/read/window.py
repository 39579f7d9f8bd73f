"""A window of address space on many files at once, so that a terabyte is one array and a row is an offset.

Each file has a place of the same size, and is mapped there when it is first needed; no descriptor is kept. What is
not mapped may not be touched: `mapped` tells. `vm.max_map_count` and the page tables are what a window costs, and
when they run out all of it is let go of at once: mapping a file again takes microseconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
import weakref
from collections import deque
from pathlib import Path

import numpy as np

from mmcache.system.memory import available_memory
from mmcache.system.os_errors import our_error
from mmcache.system.syscalls import map_over, page_table_bytes, release, reserve, unmap_over

__all__ = ["Window"]

# A process may have 65,530 maps unless told otherwise, and a map between two gaps takes two of them. Others need some.
_DEFAULT_MAPS = 65530
_SHARE = 4
# So many reads may pass before the page tables are looked at, which takes tens of microseconds.
_CHECK_EVERY = 1 << 17

_WINDOWS: weakref.WeakSet[Window] = weakref.WeakSet()


def _most_maps() -> int:
    with contextlib.suppress(OSError, ValueError):
        return max(16, int(Path("/proc/sys/vm/max_map_count").read_text()) // _SHARE)
    return _DEFAULT_MAPS // _SHARE


class Window:
    """`count` places of `place_bytes` each, side by side, for what files hold from `offset` on; both in whole pages.

    Reading is safe from several threads, if each reads like this, and looks at `mapped` behind `enter`:

        window.enter()
        try:
            if all that is needed is mapped: read
        finally:
            window.leave()

    and calls `map` for what is not mapped outside of it. `array` is the whole window, `[count * place_bytes]` uint8:
    it must never be written to and never reach a user. No more than `most_maps` places are mapped at a time.

    Raises:
        OSError: there is not as much address space.
    """

    def __init__(self, place_bytes: int, count: int, offset: int) -> None:
        self.place_bytes, self.count, self._offset = place_bytes, count, offset
        size = place_bytes * count
        self.address = reserve(size, offset)
        self._release = weakref.finalize(self, release, self.address, size)
        self._release.atexit = False
        self.array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.address))
        # The same flags twice: a bytearray is quicker to ask for one, numpy for many.
        self.flags = bytearray(count)
        self.mapped = np.frombuffer(self.flags, bool)
        # For the reader's own use, forgotten with the maps: whose page tables were filled.
        self.filled = bytearray(count)
        self.populated = np.frombuffer(self.filled, bool)
        self._maps = 0
        self._reset()
        self.most_maps = _most_maps()
        self._most_tables = available_memory() // 16
        self._unchecked = 0
        _WINDOWS.add(self)

    def _reset(self) -> None:
        """Begin with nobody inside: in a fork, the threads that were are not there."""
        self._lock = threading.Lock()
        # For the reader's own use, as `populated`: held while its files are opened.
        self.opening = threading.Lock()
        # Its append and pop are atomic, and cheaper than any lock: its length is the number of readers inside.
        self._inside: deque[None] = deque()
        self.leave = self._inside.pop

    def enter(self) -> None:
        """Keep what is mapped until `leave`."""
        self._inside.append(None)

    def map(self, place: int, fd: int, size: int) -> None:
        """Map `size` bytes of a file, whole pages, to a place; the descriptor may be closed then."""
        with self._lock:
            if self.flags[place]:
                return
            if self._maps >= self.most_maps:
                self._forget()
            try:
                map_over(self.address + place * self.place_bytes, size, fd, self._offset)
            except OSError:
                # Too many maps in this process: other windows and libraries have some too.
                self._forget()
                try:
                    map_over(self.address + place * self.place_bytes, size, fd, self._offset)
                except OSError as error:
                    raise our_error(error) from error
            self._maps += 1
            self.flags[place] = True

    def tally(self, reads: int) -> None:
        """Count reads that may have touched new pages, and let go of everything where page tables grew too large."""
        self._unchecked += reads
        if self._unchecked >= _CHECK_EVERY:
            self._unchecked = 0
            if page_table_bytes() > self._most_tables:
                self.forget()

    def forget(self) -> None:
        """Let go of everything that is mapped, once nobody reads it; it comes back as it is needed."""
        with self._lock:
            self._forget()

    def _forget(self) -> None:
        # In this order: who enters from here on finds nothing mapped, and waits for the lock.
        self.mapped[:] = self.populated[:] = False
        while self._inside:
            time.sleep(0.0001)
        if self._maps:
            unmap_over(self.address, self.place_bytes * self.count)
        self._maps = 0


def _in_fork() -> None:
    for window in list(_WINDOWS):
        window._reset()  # noqa: SLF001 -- this module's own


os.register_at_fork(after_in_child=_in_fork)
