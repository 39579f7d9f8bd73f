"""Bytes that come from a bucket, on their way to a file: in memory that is used again, written past the page cache.

To fill the page cache costs the processor several times what the bytes' coming and their writing cost together, and on
a virtual machine, which has to get each fresh page first, ten times: measured, 0.2 to 2.5 s a GB, against 0.04.
"""

from __future__ import annotations

import itertools
import threading
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from mmcache.system.memory import PAGE, Buffers
from mmcache.system.threads import Crew, let_end

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from concurrent.futures import Future

    from mmcache.system.atomic import Draft

__all__ = ["Landing"]

# What is written at a time: long enough for a device's full rate, and short enough for a processor's cache.
_WINDOW = 4 << 20


class Landing:
    """Lands streams in files. Safe to use from several threads.

    Args:
        most: streams at a time whose memory is kept, and whose writes need not wait for each other's.
    """

    def __init__(self, most: int) -> None:
        self._windows, self._crew, self._lock = Buffers(most), Crew(most, "landing"), threading.Lock()

    def land(self, stream: Iterable[memoryview], draft: Draft, offset: int, seen: Callable[[memoryview], None]) -> None:
        """Write what comes into a draft, while more comes; blocks until all of it is written.

        Args:
            stream: the bytes, in order; used up before this returns.
            draft: the file; parts that lie apart may be written by several threads.
            offset: where in it.
            seen: called with the bytes as they come.
        """
        windows = itertools.cycle(self._windows.lend([_WINDOW, _WINDOW]))
        window = next(windows)
        writing: list[Future[None]] = []
        # As far into a page as the place in the file, as direct writes want it.
        start = at = offset % PAGE
        try:
            for data in stream:
                seen(data)
                rest = np.frombuffer(data, np.uint8)
                while len(rest):
                    some = rest[: _WINDOW - at]
                    window[at : at + len(some)] = some
                    at, rest = at + len(some), rest[len(some) :]
                    if at == _WINDOW:
                        self._write(window[start:at], draft, offset, writing)
                        offset += at - start
                        window, start, at = next(windows), 0, 0
            self._write(window[start:at], draft, offset, writing)
            for written in writing:
                written.result()
        finally:
            # Before the memory is somebody else's, and the draft closed.
            let_end(writing)

    def _write(self, some: np.ndarray, draft: Draft, offset: int, writing: list[Future[None]]) -> None:
        """Write a window in the background, once the other one is written."""
        if writing:
            # In the list meanwhile, so that an interrupt here does not leave it alone.
            writing[0].result()
            writing.clear()
        with self._lock:
            writing.append(self._crew.submit(partial(draft.write, some, offset, direct=True)))
