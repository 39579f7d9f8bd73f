"""The batches of one pass over an epoch, fetched by a few threads while the caller works on those before."""

from __future__ import annotations

import itertools
import os
from collections import deque
from typing import TYPE_CHECKING, Self

from mmcache.crew import Crew
from mmcache.errors import ClosedError
from mmcache.feed_plan import FeedPlan, Position

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from mmcache.fetcher import Fetched, Fetcher
    from mmcache.training_batch import Batch

__all__ = ["BatchFeed"]

# One waits for the disk, one converts, and one has something to begin with whenever the lock comes its way.
_THREADS = 3


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
        ahead: batches that are being fetched, or wait, at most.
        moved: called with the new position before each batch is given out, and behind the last one.
    """

    def __init__(
        self,
        fetcher: Fetcher,
        plan: FeedPlan,
        position: Position,
        rank: int,
        worker: tuple[int, int],
        ahead: int,
        moved: Callable[[Position], None],
    ) -> None:
        self._fetcher, self._plan, self._position, self._rank = fetcher, plan, position, rank
        self._shares = plan.shares(position.start)
        first, self._stride = worker
        self._steps = iter(range(position.step + first, len(self._shares), self._stride))
        self._ahead, self._moved, self._process = ahead, moved, os.getpid()
        self._crew = Crew(_THREADS, "fetch")
        self._waiting: deque[Future[Fetched]] = deque()
        self._ended = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._process != os.getpid():
            raise ClosedError("this iterator was made in another process, where its threads are: call iter() again")
        self._top_up()
        if not self._waiting:
            self._finish()
            raise StopIteration
        try:
            batch = self._waiting.popleft().result().hand_over()
        except BaseException:
            self.close()
            raise
        self._top_up()
        self._position = self._position._replace(step=self._position.step + self._stride)
        self._moved(self._position)
        return batch

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Fetch nothing more, and end the threads. Does not block."""
        self._ended = True
        self._waiting.clear()
        self._crew.close()
        self._fetcher.close()

    def _finish(self) -> None:
        if self._ended:
            return
        self.close()
        # Of several workers, one ends before the other: each goes on to the next epoch when it is told to begin again.
        if self._stride == 1:
            self._moved(Position(self._position.epoch + 1, 0, 0))

    def _top_up(self) -> None:
        """Keep as many batches under way as there may be."""
        if not self._ended:
            for step in itertools.islice(self._steps, self._ahead - len(self._waiting)):
                start, stop = (self._position.start + place for place in self._shares.share(step, self._rank))
                state = self._plan.state(self._position._replace(step=step + 1))
                self._waiting.append(self._crew.submit(self._fetcher.fetch, start, stop, state))
