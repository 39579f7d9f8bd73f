"""What is read before its rows are wanted: the pools of a block shuffle, or all of a store in a bucket."""

from __future__ import annotations

import contextlib
import threading
import weakref
from concurrent.futures import CancelledError, Future
from functools import partial
from typing import TYPE_CHECKING

from mmcache.errors import AccessError, RemoteError
from mmcache.system.threads import Crew

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmcache.read.site_view import SiteView
    from mmcache.training.kept import Kept
    from mmcache.training.order import BlockOrder

__all__ = ["BringAll", "ReadAhead"]

# Of a bucket, blocks that come at the same time; a disk gives one after the other sooner.
_BRINGERS = 4


class BringAll:
    """Brings all shards of a store in a bucket here, in order and in the background, while batches are made of rows.

    For a store that fits into the cache. What fails is told by the rows.

    Args:
        views: the sites.
        shard_tokens: tokens a shard.
    """

    def __init__(self, views: Sequence[SiteView], shard_tokens: int) -> None:
        self._crew = Crew(_BRINGERS, "bring-all")
        self._first: list[Future[None]] = []
        going = threading.Event()
        going.set()
        self._end = weakref.finalize(self, going.clear)
        for start in range(0, views[0].shape[1], shard_tokens):
            stop = min(start + shard_tokens, views[0].shape[1])
            bring = [partial(view.read_ahead, start, stop, all_come=going) for view in views]
            asked = [self._crew.submit(work) for work in bring]
            self._first = self._first or asked

    def need(self, places: Sequence[tuple[int, int]]) -> None:  # noqa: ARG002 -- as `ReadAhead.need`
        """Wait for the first shards alone, by which it is known how quickly they come.

        Raises AccessError or RemoteError where the bucket gives none; what else fails is told by the rows.

        A row that is not here yet waits for its shard where they come quickly, and else is read from the bucket.
        """
        for piece in self._first:
            with contextlib.suppress(CancelledError):
                if isinstance(error := piece.exception(), AccessError | RemoteError):
                    raise error

    def close(self) -> None:
        """Bring no more, and have no row wait for it. Does not block."""
        self._end()
        self._crew.close()


class ReadAhead:
    """Reads the blocks of the pool that is wanted, and of the one behind it, in the background and in long pieces.

    Processes of one machine that want the same pools each begin at another place of them, and leave out what they find
    in memory: so each block is read by one of them, and copied by nobody else.

    Args:
        order: the epoch's.
        kept: which tokens take part.
        views: the sites.
        gap: so many tokens that do not take part are read rather than left out.
        reader: (which, of how many) processes that want the same pools.
        remote: they are in a bucket.
    """

    def __init__(
        self,
        order: BlockOrder,
        kept: Kept,
        views: Sequence[SiteView],
        gap: int,
        reader: tuple[int, int] = (0, 1),
        *,
        remote: bool = False,
    ) -> None:
        self._order, self._kept, self._views, self._gap, self._reader = order, kept, views, gap, reader
        self._crew = Crew(_BRINGERS if remote else 1, "read-ahead")
        self._lock = threading.Lock()
        self._asked: dict[int, list[Future[None]]] = {}

    def need(self, places: Sequence[tuple[int, int]]) -> None:
        """Block until the pools of some places, as (start, stop), were read, and begin those behind them.

        Raises:
            IncompleteError, CorruptError: a shard is not there, or not what belongs there.
            CancelledError: it was closed meanwhile.
        """
        wanted: list[int] = []
        behind = []
        for start, stop in places:
            pool, last = self._order.pool(start), self._order.pool(stop - 1)
            wanted += range(pool, last + 1)
            behind.append(self._order.next_pool(last))
        for asked in [self._ask(pool) for pool in wanted]:
            for piece in asked:
                piece.result()
        for following in behind:
            if following is not None:
                self._ask(following)

    def close(self) -> None:
        """Read nothing more. Does not block."""
        self._crew.close()

    def _ask(self, pool: int) -> list[Future[None]]:
        with self._lock:
            asked = self._asked.get(pool)
            if asked is None:
                blocks = self._order.blocks(pool)
                which, of = self._reader
                begin = len(blocks) * which // of
                asked = self._asked[pool] = [
                    self._crew.submit(view.read_ahead, first, last)
                    for start, stop in blocks[begin:] + blocks[:begin]
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
