"""Prefetching: batches ahead of the caller (`BatchIterator`), rows ahead of the batches (`ReadAhead`, `FetchAll`).

Small batches are fetched several together: a job of any size has to get the GIL three times (see system/threads.py).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import weakref
from collections import deque
from concurrent.futures import CancelledError, Future
from functools import partial
from typing import TYPE_CHECKING, Self, TypeAlias

from mmcache.errors import AccessError, ClosedError, RemoteError
from mmcache.system.threads import ThreadPool

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mmcache.read.site_view import SiteView
    from mmcache.training.fetcher import Batch, Fetched, Fetcher, Span
    from mmcache.training.schedule import BlockOrder, EpochSchedule, Position
    from mmcache.training.token_filter import KeptTokens

__all__ = ["BatchIterator", "FetchAll", "ReadAhead"]

# One thread waits for the disk, one converts, and one has work ready whenever it gets the GIL.
_THREADS = 3

# The batches of a job, and the error that ended it before it had all of them.
_Outcome: TypeAlias = "tuple[list[Fetched], BaseException | None]"


class BatchIterator:
    """An iterator over batches, for one thread. Nothing runs before the first batch is requested.

    Its threads end when it is dropped, at the end of the epoch, after an error, and when Python exits. `__next__`
    raises an error of the background unchanged, and ends the iteration.

    Args:
        fetcher: fetches the batches; closed at the end.
        plan: the schedule of the epoch.
        position: where to begin.
        rank: the rank whose share is fetched.
        worker: (index, count): this worker takes steps index, index + count, ….
        group: batches that are fetched together.
        ahead: the most batches that are being fetched or ready; at least `group`.
        moved: called with the new position before each batch is returned, and with one worker at the end of the epoch.
    """

    def __init__(
        self,
        fetcher: Fetcher,
        plan: EpochSchedule,
        position: Position,
        rank: int,
        worker: tuple[int, int],
        group: int,
        ahead: int,
        moved: Callable[[Position], None],
    ) -> None:
        self._fetcher, self._plan, self._position, self._rank = fetcher, plan, position, rank
        self._shares = plan.shares(position.start)
        first, self._stride = worker
        self._steps = iter(range(position.step + first, len(self._shares), self._stride))
        self._group, self._ahead, self._moved, self._process = group, ahead, moved, os.getpid()
        self._crew = ThreadPool(_THREADS, "fetch")
        # Batches that are ready, the error after them, and the jobs that fetch more; the number of all these batches.
        self._ready: deque[Fetched] = deque()
        self._failure: BaseException | None = None
        self._jobs: deque[Future[_Outcome]] = deque()
        self._under_way = 0
        self._ended = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._process != os.getpid():
            raise ClosedError("this iterator was made in another process, where its threads are: call iter() again")
        self._top_up()
        if not self._under_way:
            self._finish()
            raise StopIteration
        try:
            batch = self._next().hand_over()
        except BaseException:
            self.close()
            raise
        self._under_way -= 1
        self._top_up()
        self._position = self._position._replace(step=self._position.step + self._stride)
        self._moved(self._position)
        return batch

    def _next(self) -> Fetched:
        """The next batch; blocks until it is ready."""
        if not self._ready and self._failure is None:
            fetched, self._failure = self._jobs.popleft().result()
            self._ready.extend(fetched)
        if self._ready:
            return self._ready.popleft()
        assert self._failure is not None  # noqa: S101 -- a job has batches, or a failure
        raise self._failure

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Stop fetching, and end the threads. Does not block."""
        self._ended = True
        self._jobs.clear()
        self._ready.clear()
        self._under_way = 0
        self._crew.close()
        self._fetcher.close()

    def _finish(self) -> None:
        if self._ended:
            return
        self.close()
        # Several workers do not end together: each moves to the next epoch when it is iterated again.
        if self._stride == 1:
            self._moved(self._plan.begin(self._position.epoch + 1))

    def _top_up(self) -> None:
        """Submit whole groups of batches until `ahead` of them are pending or ready."""
        while not self._ended and self._under_way + self._group <= self._ahead:
            spans = []
            for step in itertools.islice(self._steps, self._group):
                here, behind = (self._position._replace(step=number) for number in (step, step + 1))
                spans.append((self._plan.places(here, self._shares, self._rank), self._plan.state(behind)))
            if not spans:
                return
            self._under_way += len(spans)
            self._jobs.append(self._crew.submit(_fetched, self._fetcher, spans))


def _fetched(fetcher: Fetcher, spans: list[Span]) -> _Outcome:
    """Fetch batches together; if that fails, one by one up to the one that fails."""
    try:
        return fetcher.fetch(spans), None
    except Exception as error:  # noqa: BLE001 -- kept, and raised again after the good batches
        failure = error
    done: list[Fetched] = []
    if len(spans) > 1:
        for span in spans:
            fetched, found = _fetched(fetcher, [span])
            if found is not None:
                return done, found
            done += fetched
        return done, None
    return done, failure


# Concurrent block downloads from a bucket; a disk is faster with one read at a time.
_BRINGERS = 4


class FetchAll:
    """Downloads all shards of a store in a bucket, in order and in the background, while batches are fetched.

    For a store that fits into the cache. Reading rows raises what failed.

    Args:
        views: the sites.
        shard_tokens: tokens per shard.
    """

    def __init__(self, views: Sequence[SiteView], shard_tokens: int) -> None:
        self._crew = ThreadPool(_BRINGERS, "bring-all")
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
        """Block until the first shards are here, which shows how fast downloads are.

        Raises AccessError or RemoteError if these fail so; reading rows raises other errors. A row that is not here yet
        waits for its shard if downloads are fast; otherwise it is read from the bucket.
        """
        for piece in self._first:
            with contextlib.suppress(CancelledError):
                if isinstance(error := piece.exception(), AccessError | RemoteError):
                    raise error

    def close(self) -> None:
        """Stop downloading, so that no row waits for it. Does not block."""
        self._end()
        self._crew.close()


class ReadAhead:
    """Reads the blocks of the pool that is wanted, and of the next, in the background and in long pieces.

    Processes of one machine that want the same pools each begin at a different block, and skip what is in memory
    already: so only one of them reads a block.

    Args:
        order: the epoch's order.
        kept: the kept tokens.
        views: the sites.
        gap: up to this many dropped tokens between kept ones are read rather than skipped.
        reader: (index, count) of this process among those that want the same pools.
        remote: whether the store is in a bucket.
    """

    def __init__(
        self,
        order: BlockOrder,
        kept: KeptTokens,
        views: Sequence[SiteView],
        gap: int,
        reader: tuple[int, int] = (0, 1),
        *,
        remote: bool = False,
    ) -> None:
        self._order, self._kept, self._views, self._gap, self._reader = order, kept, views, gap, reader
        self._crew = ThreadPool(_BRINGERS if remote else 1, "read-ahead")
        self._lock = threading.Lock()
        self._asked: dict[int, list[Future[None]]] = {}

    def need(self, places: Sequence[tuple[int, int]]) -> None:
        """Block until the pools of some places, as (start, stop), have been read; begin to read the next pools.

        Raises:
            IncompleteError, CorruptError: a shard is missing, damaged, or not the one that belongs there.
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
        """Stop reading. Does not block."""
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
                # Of finished pools, remember only that they were read.
                for number, pieces in self._asked.items():
                    if pieces and all(
                        piece.done() and not (piece.cancelled() or piece.exception()) for piece in pieces
                    ):
                        self._asked[number] = []
        return asked
