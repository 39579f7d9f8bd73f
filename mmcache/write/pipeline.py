"""Writes in the background: a ring of staging slots and the threads that empty it.

A job passes three stages in order: `digest` (checksum and statistics, while the bytes are in the processor's cache),
`write` (to the device) and `publish` (sync and rename). The stages overlap: while one slot is digested, earlier ones
are written, two at a time to keep the device busy, and still earlier shards are synced. The ring bounds the memory: if
the disk is slower than the model, the caller waits for a slot.
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
# Writes in flight: the device has the next one when it finishes one.
_WRITERS = 2
# Shards that wait for their sync, with up to two file descriptors each, of the usual limit of 1,024 per process.
_MAX_FILES = 128


class Job:
    """A job of the pipeline; each stage is a no-op unless a subclass overrides it.

    After a failure, the stages of later jobs are skipped, and `abandon` is called at the very end: by then, no thread
    is still working on an earlier job.
    """

    # Open files that belong to the job, and are closed at its end.
    files = 0

    def digest(self) -> None:
        """Compute checksums and statistics; one job at a time, in order."""

    def write(self) -> None:
        """Write to the device; several jobs at the same time, in any order."""

    def publish(self) -> None:
        """Sync and rename; one job at a time, in order, once it and all before it are written."""

    def abandon(self) -> None:
        """Remove what the job has made."""


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
        """Unpin; the memory is freed with its last view."""
        if self.pinned:
            _cudart().cudaHostUnregister(self.memory.ctypes.data)
            self.pinned = False


class Ring:
    """A few slots that are reused; their memory is taken when first touched."""

    def __init__(self, slot_bytes: int) -> None:
        self.slot_bytes = slot_bytes
        self._free: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        self._slots: list[Slot] = []

    @property
    def has_room(self) -> bool:
        """Whether `acquire` would return at once."""
        return len(self._slots) < _SLOTS or not self._free.empty()

    def acquire(self, *, pin: bool, alive: Callable[[], None]) -> Slot:
        """A free slot; blocks until there is one. Meanwhile `alive` is called now and then, and may raise."""
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
        """Return a slot to the ring."""
        self._free.put(slot)

    def close(self) -> None:
        """Unpin every slot."""
        for slot in self._slots:
            slot.free()
        self._slots.clear()


class _Barrier(Job):
    """A job that does nothing, and shows when all jobs before it are done."""

    def __init__(self) -> None:
        self.done = threading.Event()

    def publish(self) -> None:
        """All jobs before have been published."""
        self.done.set()

    def abandon(self) -> None:
        """All jobs before have been abandoned or published."""
        self.done.set()


class Pipeline:
    """The background threads, and the ring that they empty.

    The first failure stops everything: unfinished jobs are abandoned, and every later call raises an error that names
    it. Threads start with the first job. `submit`, `drain` and `close` are for one thread at a time.
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
        # An OSError's text would repeat number and file; an interrupt has no text.
        why = (isinstance(failure, OSError) and failure.strerror) or str(failure) or repr(failure)
        message = (
            f"an earlier write failed in the background, and nothing after it was kept ({why}). What was committed or "
            f"published before is intact: go on from there, with a new writer or the same command"
        )
        if isinstance(failure, MmcacheError):
            # The same class again, so that callers can still catch a full disk as such.
            if isinstance(failure, OSError) and failure.errno is not None:
                raise type(failure)(failure.errno, message, failure.filename) from failure
            raise type(failure)(message) from failure
        raise WriteError(message) from failure

    def acquire(self, *, pin: bool = False) -> Slot:
        """A free slot; blocks while all of them wait for the disk. Raises what failed in the background."""
        self.check()
        return self.ring.acquire(pin=pin, alive=self.check)

    def submit(self, job: Job) -> None:
        """Queue a job; blocks only while 128 files or more wait to be published.

        A caller that was interrupted may submit the same job again, if no other came in between: it is done once.
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
        # The writers too, with an empty job: a failure to start a thread is raised here, to the caller.
        self._writers.submit(_nothing)
        # An interrupt may come between any two starts: the next call starts only those that do not run.
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
            # Even after a failure: a job must not be abandoned while it is being written.
            try:
                written.result()
            except CancelledError:
                self._failure = self._failure or ClosedError("Python ended before all was written")
            self._do(job.publish)
            self._end(job)

    def _end(self, job: Job) -> None:
        """Finish a job after its last stage: abandon it if anything failed."""
        if self._failure is not None:
            job.abandon()
        self._count_files(-job.files)

    def drain(self) -> None:
        """Block until every job so far is published.

        Raises:
            WriteError: something failed; if that was an MmcacheError, an error of its class.
        """
        if self._running:
            barrier = _Barrier()
            self.submit(barrier)
            barrier.done.wait()
        self.check()

    def close(self) -> None:
        """End the threads after all jobs so far; blocks until then. Never raises for earlier failures: `drain` does.

        Safe to call twice; after an interrupt, call it again to finish.
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
