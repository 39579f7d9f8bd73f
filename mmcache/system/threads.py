"""Threads in the background that end with the interpreter, and how large a numpy call keeps the GIL.

It lets go in every call of more than 500 numbers, and to get the lock back beside a thread that keeps it busy takes 5
ms: measured, 76 ms instead of 0.14 for the sixty calls that put 1,024 tokens in order.
"""

from __future__ import annotations

import atexit
import contextlib
import queue
import threading
import weakref
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, TypeVarTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["HELD", "ThreadPool", "let_end", "pieces"]

HELD = 500
# More numbers than these are worth more than the lock.
_FEW = 16 * HELD


def pieces(count: int, long: int, width: int = 1) -> list[slice]:
    """Cut `count` rows of `width` numbers into pieces that keep the lock, or where they are many, of `long` rows."""
    step = max(1, HELD // max(1, width)) if count * width <= _FEW else long
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_Jobs: TypeAlias = "queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None]"

_CREWS: weakref.WeakSet[ThreadPool] = weakref.WeakSet()
_THREADS: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


class ThreadPool:
    """Some threads that take jobs in the order in which they are submitted. They start with the first one.

    The standard library's executor does all that was ever submitted before the interpreter may end; here what has not
    begun is cancelled. A crew that is dropped is closed. In a fork its threads are missing: make another one there.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._jobs: _Jobs = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=_work, args=(self._jobs,), name=f"mmcache-{name}", daemon=True)
            for _ in range(threads)
        ]
        self._end = weakref.finalize(self, _end, self._jobs, threads)
        _CREWS.add(self)

    def submit(self, work: Callable[[*Ts], T], *args: *Ts) -> Future[T]:
        """Queue a job, and give what will hold its result or its error; after `close` it is cancelled at once.

        Does not block. By one thread at a time.
        """
        for thread in self._threads:
            if thread.ident is None:
                thread.start()
                _THREADS.add(thread)
        future: Future[T] = Future()
        self._jobs.put((future, work, args))
        # In this order, so that a job that comes while the crew is being closed is cancelled here or there.
        if not self._end.alive:
            future.cancel()
        return future

    def close(self) -> None:
        """Cancel the jobs that have not begun; the threads end when they are done with theirs. Does not block."""
        self._end()

    def join(self) -> None:
        """Block until the threads have ended, after `close`."""
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()


def let_end(futures: Sequence[Future[Any]]) -> None:
    """Cancel what has not begun, and block until the rest has ended, well or not: nothing goes on behind one's back.

    `concurrent.futures.wait` would wait for ever for what a closed crew has cancelled.
    """
    for future in futures:
        if not future.cancel():
            future.exception()


def _work(jobs: _Jobs) -> None:
    while (job := jobs.get()) is not None:
        future, work, args = job
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(work(*args))
            except BaseException as error:  # noqa: BLE001 -- kept, and raised again where the result is asked for
                future.set_exception(error)
        # While this thread waits, it must not hold on to anybody's result.
        del job, future, work, args


def _end(jobs: _Jobs, threads: int) -> None:
    # May run anywhere, in a collection of garbage: it takes no lock and waits for nothing.
    with contextlib.suppress(queue.Empty):
        while True:
            job = jobs.get_nowait()
            if job is not None:
                job[0].cancel()
    for _ in range(threads):
        jobs.put(None)


@atexit.register
def _end_all() -> None:
    """End all of them while there still is an interpreter: native code in a thread that outlives it may crash."""
    for crew in list(_CREWS):
        crew.close()
    for thread in list(_THREADS):
        thread.join()
