"""The pools of a block shuffle, brought into the page cache before their rows are wanted."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from mmcache.crew import Crew

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Future

    from mmcache.kept import Kept
    from mmcache.order import BlockOrder
    from mmcache.site_view import SiteView

__all__ = ["ReadAhead"]


class ReadAhead:
    """Reads the blocks of the pool that is wanted, and of the one behind it, in the background and in long pieces.

    Args:
        order: the epoch's.
        kept: which tokens take part.
        views: the sites.
        gap: so many tokens that do not take part are read rather than left out.
    """

    def __init__(self, order: BlockOrder, kept: Kept, views: Sequence[SiteView], gap: int) -> None:
        self._order, self._kept, self._views, self._gap = order, kept, views, gap
        self._crew = Crew(1, "read-ahead")
        self._lock = threading.Lock()
        self._asked: dict[int, list[Future[None]]] = {}

    def need(self, start: int, stop: int) -> None:
        """Block until the pools of the places from `start` to before `stop` were read, and begin the next one.

        Raises:
            IncompleteError, CorruptError: a shard is not there, or not what belongs there.
            CancelledError: it was closed meanwhile.
        """
        if start >= stop:
            return
        last = self._order.pool(stop - 1)
        for pool in range(self._order.pool(start), last + 1):
            for piece in self._ask(pool):
                piece.result()
        if last + 1 < self._order.pools:
            self._ask(last + 1)

    def close(self) -> None:
        """Read nothing more. Does not block."""
        self._crew.close()

    def _ask(self, pool: int) -> list[Future[None]]:
        with self._lock:
            asked = self._asked.get(pool)
            if asked is None:
                asked = self._asked[pool] = [
                    self._crew.submit(view.read_ahead, first, last)
                    for start, stop in self._order.blocks(pool)
                    for view in self._views
                    for first, last in self._kept.stretches(start, stop, self._gap)
                ]
                # Of those before, only that they were read is remembered.
                for number, pieces in self._asked.items():
                    if pieces and all(
                        piece.done() and not (piece.cancelled() or piece.exception()) for piece in pieces
                    ):
                        self._asked[number] = []
        return asked
