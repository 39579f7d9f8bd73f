"""Background threads that end with the interpreter, and why some calls keep the GIL.

A call that releases the GIL may have to wait to get it back: beside a thread that is busy in Python, up to the switch
interval of 5 ms. numpy releases it in calls on more than 500 numbers; torch operations, system calls of `os` and calls
through ctypes.CDLL release it too. Measured: the sixty numpy calls that put 1,024 tokens in order take 76 ms instead of
0.14 ms.

So on hot paths, short operations are done by calls that keep the GIL (numpy on at most `HELD` numbers, plain Python,
ctypes.PyDLL), or many are gathered into one call. Long operations, and calls that wait for the disk, release it.
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
# With more numbers than this, the work takes so long that releasing the GIL does not matter.
_FEW = 16 * HELD


def pieces(count: int, long: int, width: int = 1) -> list[slice]:
    """Slices of `count` rows of `width` numbers: short enough that numpy keeps the GIL, or `long` rows each if many."""
    step = max(1, HELD // max(1, width)) if count * width <= _FEW else long
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_Jobs: TypeAlias = "queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None]"

_CREWS: weakref.WeakSet[ThreadPool] = weakref.WeakSet()
_THREADS: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


class ThreadPool:
    """A pool of threads that run jobs in the order of submission. The threads start with the first job.

    Unlike the standard library's executor, which runs every submitted job before the interpreter may end, it cancels
    jobs that have not started. A pool is closed when its last reference goes. After a fork, make a new one.
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
        """Queue a job. A future of its result or error; cancelled at once after `close`.

        Does not block. To be called by one thread at a time.
        """
        for thread in self._threads:
            if thread.ident is None:
                thread.start()
                _THREADS.add(thread)
        future: Future[T] = Future()
        self._jobs.put((future, work, args))
        # After the put, so that a job submitted during `close` is cancelled either here or there.
        if not self._end.alive:
            future.cancel()
        return future

    def close(self) -> None:
        """Cancel the jobs that have not started; threads end after their current job. Does not block."""
        self._end()

    def join(self) -> None:
        """Block until the threads have ended, after `close`."""
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()


def let_end(futures: Sequence[Future[Any]]) -> None:
    """Cancel jobs that have not started, and block until the others have ended, so that none runs in the background.

    `concurrent.futures.wait` would wait forever for jobs that a closed pool has cancelled.
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
        # A waiting thread must not keep a result alive.
        del job, future, work, args


def _end(jobs: _Jobs, threads: int) -> None:
    # May run during garbage collection, at any point: it takes no lock and does not wait.
    with contextlib.suppress(queue.Empty):
        while True:
            job = jobs.get_nowait()
            if job is not None:
                job[0].cancel()
    for _ in range(threads):
        jobs.put(None)


@atexit.register
def _end_all() -> None:
    """End all threads before the interpreter: native code in a thread that outlives it may crash."""
    for crew in list(_CREWS):
        crew.close()
    for thread in list(_THREADS):
        thread.join()
