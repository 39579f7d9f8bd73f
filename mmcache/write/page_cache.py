"""`PageCachePolicy`: which writes go past the page cache."""

from __future__ import annotations

from mmcache.system.memory import available_memory

__all__ = ["PageCachePolicy"]

# 1/_SMALL of the memory that is free at the start may go through the page cache.
_SMALL = 1024


class PageCachePolicy:
    """Decides when writes go past the page cache. Used by one thread.

    A small store is likely to be read soon, and may stay in the page cache. More data would only evict other data, and
    filling the page cache costs more processor time than the write itself. So once 1/1,024 of the memory that was free
    at the start has been written, writes are direct.

    Args:
        busy: a model needs the processors meanwhile, so writes are direct from the first byte.
    """

    def __init__(self, *, busy: bool = False) -> None:
        self.busy = busy
        self._left = 0 if busy else available_memory() // _SMALL

    def past_it(self, size: int) -> bool:
        """Whether the next `size` bytes are written past the page cache; counts them."""
        self._left -= size
        return self._left < 0
