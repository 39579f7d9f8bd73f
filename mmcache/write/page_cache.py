"""What of a writer's bytes stays in the page cache."""

from __future__ import annotations

from mmcache.system.memory import available_memory

__all__ = ["PageCachePolicy"]

# A part of the memory that is free at the start.
_SMALL = 1024


class PageCachePolicy:
    """Decides when writes go past the page cache. Asked by one thread.

    What is small will be read at once, and may stay in it. Anything larger only drives other data out, and filling the
    page cache costs more processor time than the write itself: once as much as a 1,024th of the memory that was free at
    the start has been written, writes are direct.

    Args:
        busy: a model wants the processors meanwhile: writes are direct from the first byte.
    """

    def __init__(self, *, busy: bool = False) -> None:
        self.busy = busy
        self._left = 0 if busy else available_memory() // _SMALL

    def past_it(self, size: int) -> bool:
        """Tell whether the next `size` bytes are written past the page cache."""
        self._left -= size
        return self._left < 0
