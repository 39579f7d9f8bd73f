"""Batches fetched ahead of the caller, and pools of rows read ahead of the batches.

Small batches are fetched several together: a job costs three turns of the interpreter's lock, however large it is, and
beside a busy thread each of them takes 5 ms.
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

# One waits for the disk, one converts, and one has something to begin with whenever the lock comes its way.
_THREADS = 3

# The batches of a job, and the error that ended it before it had them all.
_Outcome: TypeAlias = "tuple[list[Fetched], BaseException | None]"


class BatchIterator:
    """An iterator over batches, for one thread. Nothing runs before the first one is asked for.

    Whoever drops it ends its threads, and so does the end of the epoch, an error, or that of the interpreter. An error
    in the background is raised by `__next__` as it is, and ends the pass.

    Args:
        fetcher: what fetches; closed at the end.
        plan: what comes when.
        position: where to begin.
        rank: whose share.
        worker: (which, of how many): it takes every so-manieth step only, beginning with its own.
        group: batches that are fetched together.
        ahead: batches that are being fetched, or wait, at most; as many as a group at least.
        moved: called with the new position before each batch is given out, and behind the last one.
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
        # Batches that are there, what went wrong behind them, and the jobs that make more; how many those are in all.
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
        """Give the next batch; blocks until it is there."""
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
        """Fetch nothing more, and end the threads. Does not block."""
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
        # Of several workers, one ends before the other: each goes on to the next epoch when it is told to begin again.
        if self._stride == 1:
            self._moved(self._plan.begin(self._position.epoch + 1))

    def _top_up(self) -> None:
        """Keep as many batches under way as there may be, whole groups of them."""
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
    """Fetch batches together, or where that fails, one after the other up to the one that fails."""
    try:
        return fetcher.fetch(spans), None
    except Exception as error:  # noqa: BLE001 -- kept, and raised again behind the batches that are good
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


# Of a bucket, blocks that come at the same time; a disk gives one after the other sooner.
_BRINGERS = 4


class FetchAll:
    """Brings all shards of a store in a bucket here, in order and in the background, while batches are made of rows.

    For a store that fits into the cache. What fails is told by the rows.

    Args:
        views: the sites.
        shard_tokens: tokens a shard.
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
