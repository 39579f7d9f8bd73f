"""The batches of one pass over an epoch, fetched by a few threads while the caller works on those before.

Small batches are fetched several together: a job costs three turns of the interpreter's lock, however large it is, and
beside a busy thread each of them takes 5 ms.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from typing import TYPE_CHECKING, Self, TypeAlias

from mmcache.errors import ClosedError
from mmcache.system.threads import Crew

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from mmcache.training.feed_plan import FeedPlan, Position
    from mmcache.training.fetcher import Fetched, Fetcher, Span
    from mmcache.training.training_batch import Batch

__all__ = ["BatchFeed"]

# One waits for the disk, one converts, and one has something to begin with whenever the lock comes its way.
_THREADS = 3

# The batches of a job, and the error that ended it before it had them all.
_Outcome: TypeAlias = "tuple[list[Fetched], BaseException | None]"


class BatchFeed:
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
        plan: FeedPlan,
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
        self._crew = Crew(_THREADS, "fetch")
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
