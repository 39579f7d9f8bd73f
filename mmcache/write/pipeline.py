"""Writes in the background: a ring of staging slots and the threads that empty it.

A job passes three stages in order: `digest` (checksum and statistics while the bytes are in cache), `write` (to the
device) and `publish` (sync and rename). So the digest of one slot runs while those before it are written, two at a
time, lest the device wait for us, and shards before that are synced. The ring bounds the memory: when the disk is
slower than the model, the caller waits for a slot.
"""

from __future__ import annotations

import queue
import threading
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any

import torch

from mmcache.errors import ClosedError, MmcacheError, WriteError
from mmcache.system.memory import anonymous
from mmcache.system.threads import ThreadPool

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

__all__ = ["SLOT_BYTES", "Job", "Pipeline", "Ring", "Slot"]

SLOT_BYTES = 16 << 20
_SLOTS = 4
# Writes in flight: the device is done with one while the next is under way.
_WRITERS = 2
# Shards that wait for their sync, with up to two descriptors each, of the 1,024 that a process usually may have.
_MAX_FILES = 128


class Job:
    """What passes through the pipeline; each stage does nothing unless a kind of job says otherwise.

    Once something failed, jobs pass without their stages being run, and `abandon` comes at the very end: no
    thread can be in the middle of an earlier job by then.
    """

    # How many open files go with the job, and are closed at its end.
    files = 0

    def digest(self) -> None:
        """Checksum and statistics; of one job at a time, in order."""

    def write(self) -> None:
        """To the device; of several jobs at the same time, in any order."""

    def publish(self) -> None:
        """Sync and rename; of one job at a time, in order, once it and all before it are written."""

    def abandon(self) -> None:
        """Leave nothing behind."""


def _nothing() -> None:
    pass


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


class Slot:
    """One page-aligned staging buffer, as numpy and as torch see it."""

    def __init__(self, size: int, *, pin: bool) -> None:
        self.memory = anonymous(size)
        self.tensor = torch.from_numpy(self.memory)
        self.pinned = pin
        if pin:
            # Registered rather than allocated pinned, so that the pages are aligned for direct writes too.
            status = _cudart().cudaHostRegister(self.memory.ctypes.data, size, 0)
            if int(status):
                raise WriteError(f"pinning {size} bytes of staging memory failed with CUDA error {status}")

    def free(self) -> None:
        """Unpin; the memory goes with its last view."""
        if self.pinned:
            _cudart().cudaHostUnregister(self.memory.ctypes.data)
            self.pinned = False


class Ring:
    """A few slots that are used again and again; memory is taken as they are first touched."""

    def __init__(self, slot_bytes: int) -> None:
        self.slot_bytes = slot_bytes
        self._free: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        self._slots: list[Slot] = []

    @property
    def has_room(self) -> bool:
        """Whether the next slot is there at once."""
        return len(self._slots) < _SLOTS or not self._free.empty()

    def acquire(self, *, pin: bool, alive: Callable[[], None]) -> Slot:
        """Give a free slot; blocks until there is one. `alive` is asked now and then, and raises on failure."""
        while True:
            try:
                slot = self._free.get_nowait()
            except queue.Empty:
                if len(self._slots) < _SLOTS:
                    slot = Slot(self.slot_bytes, pin=pin)
                    self._slots.append(slot)
                else:
                    try:
                        slot = self._free.get(timeout=0.2)
                    except queue.Empty:
                        alive()
                        continue
            if pin and not slot.pinned:
                self._slots.remove(slot)
                slot = Slot(self.slot_bytes, pin=True)
                self._slots.append(slot)
            return slot

    def release(self, slot: Slot) -> None:
        """Give a slot back."""
        self._free.put(slot)

    def close(self) -> None:
        """Unpin every slot."""
        for slot in self._slots:
            slot.free()
        self._slots.clear()


class _Barrier(Job):
    """A job that does nothing, and says when everything before it is done."""

    def __init__(self) -> None:
        self.done = threading.Event()

    def publish(self) -> None:
        """Everything before has been published."""
        self.done.set()

    def abandon(self) -> None:
        """Everything before has been abandoned or published."""
        self.done.set()


class Pipeline:
    """The threads, and the ring they empty.

    The first failure stops everything: what is under way is abandoned, and every later call raises a
    `WriteError` that names it. Threads start with the first job. `submit`, `drain` and `close` belong to one
    thread at a time.
    """

    def __init__(self, slot_bytes: int) -> None:
        self.ring = Ring(slot_bytes)
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._writers = ThreadPool(_WRITERS, "write")
        self._written: queue.SimpleQueue[tuple[Job, Future[None]] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=work, name=f"mmcache-{stage}", daemon=True)
            for stage, work in (("digest", self._digest), ("publish", self._publish))
        ]
        self._running = False
        self._failure: BaseException | None = None
        self._closed = False
        self._open_files = 0
        self._fewer_files = threading.Condition()

    def check(self) -> None:
        """Raise what failed in the background, if anything did."""
        failure = self._failure
        if failure is None:
            return
        # An OSError's text would tell number and file a second time; an interrupt has none.
        why = (isinstance(failure, OSError) and failure.strerror) or str(failure) or repr(failure)
        message = (
            f"an earlier write failed in the background, and nothing after it was kept ({why}). What was committed or "
            f"published before is intact: go on from there, with a new writer or the same command"
        )
        if isinstance(failure, MmcacheError):
            # The same class again, so that a full disk is still a full disk to the one who catches it.
            if isinstance(failure, OSError) and failure.errno is not None:
                raise type(failure)(failure.errno, message, failure.filename) from failure
            raise type(failure)(message) from failure
        raise WriteError(message) from failure

    def acquire(self, *, pin: bool = False) -> Slot:
        """Give a free slot; blocks while the disk is behind. Raises what failed in the background."""
        self.check()
        return self.ring.acquire(pin=pin, alive=self.check)

    def submit(self, job: Job) -> None:
        """Hand over a job; blocks only while a great many files wait to be published.

        One that may have been handed over already, as its caller was interrupted, may be handed over again if no other
        came in between: it is done once.
        """
        if self._closed:
            raise ClosedError("the writer is closed: open the store again to write to it")
        if not self._running:
            self._start()
        if job.files:
            with self._fewer_files:
                self._fewer_files.wait_for(lambda: self._open_files < _MAX_FILES)
        self._jobs.put(job)
        self._count_files(job.files)

    def _start(self) -> None:
        # The writers too, by a job of no work: what keeps a thread from being started is raised here, to the caller.
        self._writers.submit(_nothing)
        # An interrupt may come between any two of them: those that run are not started again, the others still are.
        for thread in self._threads:
            if thread.ident is None:
                thread.start()
        self._running = True

    def _count_files(self, more: int) -> None:
        if more:
            with self._fewer_files:
                self._open_files += more
                self._fewer_files.notify()

    def _do(self, stage: Callable[[], None]) -> None:
        if self._failure is None:
            try:
                stage()
            except BaseException as error:  # noqa: BLE001 -- kept, and raised again in the caller's thread
                self._failure = error

    def _digest(self) -> None:
        last: Job | None = None
        while (job := self._jobs.get()) is not None:
            if job is last:
                self._count_files(-job.files)
                continue
            last = job
            self._do(job.digest)
            self._written.put((job, self._writers.submit(self._do, job.write)))
        self._written.put(None)

    def _publish(self) -> None:
        while (item := self._written.get()) is not None:
            job, written = item
            # Whatever failed: a job that is being written is not abandoned yet.
            try:
                written.result()
            except CancelledError:
                self._failure = self._failure or ClosedError("Python ended before all was written")
            self._do(job.publish)
            self._end(job)

    def _end(self, job: Job) -> None:
        """Do what comes after the last stage."""
        if self._failure is not None:
            job.abandon()
        self._count_files(-job.files)

    def drain(self) -> None:
        """Block until every job so far is published.

        Raises:
            WriteError: something failed; the class is the failure's own where it is one of ours.
        """
        if self._running:
            barrier = _Barrier()
            self.submit(barrier)
            barrier.done.wait()
        self.check()

    def close(self) -> None:
        """End the threads, after all jobs so far. Never raises for what failed before: `drain` does.

        Safe to call twice; a call that was interrupted is gone on with by the next.
        """
        if not self._closed:
            self._jobs.put(None)
            self._closed = True
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        self._writers.close()
        self._writers.join()
        self.ring.close()
