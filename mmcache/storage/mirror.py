"""A store in a bucket, as far as it is on this machine: its metadata, the names of its shards, and some of the shards.

The metadata lies in a folder that looks like the store's own. The shards are in a bounded cache, from which they are
mapped as those of any store, once they were compared with their checksums.

Bytes that come from a bucket, on their way to a file: in memory that is used again, written past the page cache. To
fill the page cache costs the processor several times what the bytes' coming and their writing cost together, and on a
virtual machine, which has to get each fresh page first, ten times: measured, 0.2 to 2.5 s a GB, against 0.04.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import threading
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, TypeVarTuple

import crc32c
import numpy as np

from mmcache.errors import ArgumentError, CorruptError, IncompleteError, StoreNotFoundError
from mmcache.format.shard import HEADER_BYTES
from mmcache.storage.bucket_metadata import MetadataCopies
from mmcache.storage.cache_folder import cache_folder, private_folder
from mmcache.storage.disk_cache import DiskCache
from mmcache.storage.object_store import ObjectStore
from mmcache.storage.shard_check import StreamCheck, check_copy
from mmcache.system.files import free_bytes, read_file
from mmcache.system.locks import locked
from mmcache.system.memory import PAGE, BufferPool
from mmcache.system.threads import ThreadPool, let_end

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator
    from concurrent.futures import Future

    from mmcache.format.shard import Layout
    from mmcache.storage.shard_check import StreamCheckPart
    from mmcache.system.atomic import AtomicFile

__all__ = ["CHECKSUM_BYTES", "STREAMS", "Mirror", "ShardObjects", "StreamWriter"]

# Bytes a second from which on one stream is as good as several, and what has to come for it to be told.
_QUICK, _LEAST_MEASURED = 256e6, 1 << 20


class ShardObjects:
    """The objects that are shards. Safe to use from several threads.

    Args:
        bucket: the store's.
    """

    def __init__(self, bucket: ObjectStore) -> None:
        self.bucket = bucket
        # Whether a stream, by the latest that was measured, needs no others beside it.
        self.quick = False

    def where(self, array: str, key: str) -> str:
        """Give the address of a shard."""
        return f"{self.bucket.url}/{array}/{key}"

    def read(self, array: str, key: str, start: int, stop: int) -> memoryview:
        """Read bytes of a shard from the bucket, exactly so many; blocks until they are there.

        Raises:
            IncompleteError: the bucket has no such shard.
            CorruptError: it ends before `stop`.
            AccessError, RemoteError: as `ObjectStore.read`.
        """
        with _shard_errors(self.where(array, key)):
            return self.bucket.read(f"{array}/{key}", start, stop)

    def stream(self, array: str, key: str, start: int, stop: int) -> Iterator[memoryview]:
        """Read bytes of a shard from the bucket as they come, some megabytes at a time. Errors as `read`."""
        with _shard_errors(self.where(array, key)):
            yield from self.bucket.stream(f"{array}/{key}", start, stop)

    def whole(self, array: str, key: str) -> tuple[bytes, int, Generator[memoryview]]:
        """Read a whole shard from the bucket: its header, its size, and all of it, as it comes. Errors as `read`."""
        with _shard_errors(self.where(array, key)):
            size, coming = self.bucket.whole(f"{array}/{key}")
            began = time.perf_counter()
            first = next(coming, memoryview(b""))
            while len(first) < min(HEADER_BYTES, size):
                first = memoryview(bytes(first) + bytes(next(coming)))
            if len(first) >= _LEAST_MEASURED:
                self.quick = len(first) > _QUICK * (time.perf_counter() - began)
        return bytes(first[:HEADER_BYTES]), size, self._rest(array, key, first, coming)

    def _rest(self, array: str, key: str, first: memoryview, coming: Generator[memoryview]) -> Generator[memoryview]:
        with contextlib.closing(coming), _shard_errors(self.where(array, key)):
            yield first
            yield from coming

    def head(self, array: str, key: str) -> tuple[bytes, int]:
        """Read the header of a shard from the bucket, and its size. Errors as `read`."""
        with _shard_errors(self.where(array, key)):
            return self.bucket.read_head(f"{array}/{key}", HEADER_BYTES)


@contextlib.contextmanager
def _shard_errors(where: str) -> Iterator[None]:
    """Tell an object that is not there as a shard that is not there."""
    try:
        yield
    except StoreNotFoundError as error:
        raise IncompleteError(f"the bucket has no shard {where}: it was not uploaded yet, or removed") from error


# What is written at a time: long enough for a device's full rate, and short enough for a processor's cache.
_WINDOW = 4 << 20


class StreamWriter:
    """Lands streams in files. Safe to use from several threads.

    Args:
        most: streams at a time whose memory is kept, and whose writes need not wait for each other's.
    """

    def __init__(self, most: int) -> None:
        self._windows, self._crew, self._lock = BufferPool(most), ThreadPool(most, "landing"), threading.Lock()

    def land(
        self, stream: Iterable[memoryview], draft: AtomicFile, offset: int, seen: Callable[[memoryview], None]
    ) -> None:
        """Write what comes into a draft, while more comes; blocks until all of it is written.

        Args:
            stream: the bytes, in order; used up before this returns.
            draft: the file; parts that lie apart may be written by several threads.
            offset: where in it.
            seen: called with the bytes as they come.
        """
        windows = itertools.cycle(self._windows.lend([_WINDOW, _WINDOW]))
        window = next(windows)
        writing: list[Future[None]] = []
        # As far into a page as the place in the file, as direct writes want it.
        start = at = offset % PAGE
        try:
            for data in stream:
                seen(data)
                rest = np.frombuffer(data, np.uint8)
                while len(rest):
                    some = rest[: _WINDOW - at]
                    window[at : at + len(some)] = some
                    at, rest = at + len(some), rest[len(some) :]
                    if at == _WINDOW:
                        self._write(window[start:at], draft, offset, writing)
                        offset += at - start
                        window, start, at = next(windows), 0, 0
            self._write(window[start:at], draft, offset, writing)
            for written in writing:
                written.result()
        finally:
            # Before the memory is somebody else's, and the draft closed.
            let_end(writing)

    def _write(self, some: np.ndarray, draft: AtomicFile, offset: int, writing: list[Future[None]]) -> None:
        """Write a window in the background, once the other one is written."""
        if writing:
            # In the list meanwhile, so that an interrupt here does not leave it alone.
            writing[0].result()
            writing.clear()
        with self._lock:
            writing.append(self._crew.submit(partial(draft.write, some, offset, direct=True)))


T = TypeVar("T")
Ts = TypeVarTuple("Ts")

# What the cache may take, where nobody says: of the room that is free, and at the most.
_SHARE, _MOST_CACHE = 4, 64 << 30
# Requests for rows that are under way together, and those that bring shards here, of which more than the processors can
# take in only get into each other's way.
_THREADS, STREAMS = 16, min(16, 2 * (os.cpu_count() or 2))
# What a stream brings at least.
_PART_BYTES = 16 << 20
_LOCK = ".mirror.lock"
# What stands behind the bytes in a file that is a part of a shard.
CHECKSUM_BYTES = 4


class Mirror(ShardObjects):
    """What is here of one store in a bucket. Safe to use from several threads and, one made in each, processes.

    Made, it lists the bucket and fetches the metadata that changed; blocks until then.

    Args:
        url: the store.
        cache_dir: the folder of the cache, shared by all stores and processes that name it; None for `cache_folder()`.
        cache_bytes: what the shards in it may take; None for a quarter of the free room, up to 64 GiB.

    Raises:
        StoreNotFoundError: there is no store, or no bucket.
        AccessError, RemoteError: the server refuses, or gives no answer.
        CorruptError: the root is damaged. LinkError: a folder of the cache is a symbolic link.
        ArgumentError: the cache is not this user's own.
    """

    def __init__(
        self, url: str, cache_dir: str | os.PathLike[str] | None = None, cache_bytes: int | None = None
    ) -> None:
        self._asked = cache_dir, cache_bytes
        super().__init__(ObjectStore(url))
        self.url = self.bucket.url
        above = cache_folder() if cache_dir is None else Path(cache_dir)
        if cache_bytes is None:
            cache_bytes = min(_MOST_CACHE, free_bytes(above) // _SHARE)
        if cache_bytes < 1:
            raise ArgumentError(f"cache_bytes is {cache_bytes}: expected what the shards in {above} may take")
        self.cache = DiskCache(private_folder(above, "shards"), cache_bytes)
        self.folder = private_folder(above, "stores", _digest(self.url)[:16])
        # Who brings a shard waits for its other parts, and must not take the place of one.
        self._crew, self._streams = ThreadPool(_THREADS, "request"), ThreadPool(STREAMS, "stream")
        self._bringers, self._lock = ThreadPool(STREAMS, "bring"), threading.Lock()
        self._landing, self._coming = StreamWriter(STREAMS), 0
        self._metadata = MetadataCopies(self.bucket, self.folder, self.submit)
        with locked(self.folder, _LOCK):
            self._store = self._metadata.refresh()

    def __reduce__(self) -> tuple[type[Mirror], tuple[object, ...]]:
        return Mirror, (self.url, *self._asked)

    def submit(self, work: Callable[[*Ts], T], *arguments: *Ts) -> Future[T]:
        """Do something in one of the threads for requests. Raises RemoteError in a process that was forked."""
        self.bucket.check_process()
        with self._lock:
            return self._crew.submit(work, *arguments)

    def fetch_later(self, bring: Callable[[*Ts], T], *arguments: *Ts) -> Future[T]:
        """Bring a shard, or a part of it, here in the background, some at a time; `bring` ends in `fetch`.

        Raises RemoteError in a process that was forked.
        """
        self.bucket.check_process()
        with self._lock:
            future = self._bringers.submit(bring, *arguments)
            self._coming += 1
        future.add_done_callback(self._came)
        return future

    def _came(self, _: Future[Any]) -> None:
        with self._lock:
            self._coming -= 1

    @property
    def strange(self) -> tuple[str, ...]:
        """Keys in the bucket that no store has, in order; nothing reads them."""
        return self._metadata.strange

    def reread(self, read: Callable[[], T]) -> T:
        """What is read of the metadata here; where it is damaged, read once more from copies that were just fetched."""
        with contextlib.suppress(CorruptError):
            return read()
        with locked(self.folder, _LOCK):
            self._metadata.refresh(again=True)
        with self._metadata.naming():
            return read()

    def find(self, array: str, key: str, check: Callable[[bytes, int], Layout]) -> Path | None:
        """The file of a shard that is here, or None; `check` as in `fetch`. One that is damaged goes."""
        return self.cache.find(self._file(array, key), partial(check_copy, check=check))

    def drop(self, array: str, key: str) -> bool:
        """Let the file of a shard go; False where it is not here."""
        return self.cache.drop(self._file(array, key))

    def _file(self, array: str, key: str, part: str = "") -> str:
        return _digest(f"{self.url}/{array}/{key}{part}")[:40]

    def use(self, array: str, key: str, check: Callable[[bytes, int], Layout], use: Callable[[Path], T]) -> T:
        """Use the file of a shard, brought here where it is not; again if others had it removed by then.

        Once more where what is here is not what belongs there: the bucket may have another one by now, such as a longer
        one of a grown store. Errors as `fetch`, and those of `use`.

        Raises:
            CorruptError: what came whole from the bucket is damaged here.
        """
        replaced = False
        while True:
            file = self.fetch(array, key, check)
            try:
                return use(file)
            except IncompleteError:
                continue
            except CorruptError as error:
                if replaced:
                    raise self.spoilt(array, key, error) from error
                self.drop(array, key)
                replaced = True

    def spoilt(self, array: str, key: str, error: CorruptError) -> CorruptError:
        """The error for a copy that is damaged as soon as it is here, while its object is whole."""
        return CorruptError(
            f"{self.cache.folder / self._file(array, key)}, the copy of {self.where(array, key)}, is damaged though it "
            f"came whole, and was fetched twice ({error}): this machine's disk or memory fails. Choose another cache "
            f"with cache_dir= or $MMCACHE_CACHE"
        )

    def fetch(self, array: str, key: str, check: Callable[[bytes, int], Layout]) -> Path:
        """Give the file of a shard, brought here where it is not; blocks until then.

        Its header is looked at by `check`, and the checksum of each inner chunk is compared, before it has its name.

        Raises:
            IncompleteError, CorruptError, AccessError, RemoteError: as `read`; a checksum differs.
            ArgumentError: it is larger than the whole cache.
            DiskFullError: the cache's disk is full.
        """
        name, whole = self._file(array, key), partial(check_copy, check=check)
        found = self.cache.find(name, whole)
        if found is not None:
            return found
        seen: tuple[bytes, int] | None = None
        again = False

        def begin() -> tuple[int, Callable[[AtomicFile], None]]:
            nonlocal seen
            head, size, coming = self.whole(array, key)
            seen = head, size
            return size, partial(self._download, array, key, check(head, size), head, coming)

        while True:
            try:
                return self.cache.add(name, begin, whole)
            except CorruptError:
                # It may have been replaced, or damaged by whatever lies between, while it came.
                if seen is None or (again and seen == self.head(array, key)):
                    raise
                again = True

    def _download(
        self, array: str, key: str, layout: Layout, head: bytes, coming: Generator[memoryview], draft: AtomicFile
    ) -> None:
        """Write a shard whose first bytes have come: in as many parts as there are streams for it.

        Of several shards each is one request, and where they come quickly too: some servers answer it far sooner than
        one for a part.
        """
        parts = 1 if self.quick else max(1, STREAMS // max(1, self._coming))
        arriving = StreamCheck(layout, head, max(_PART_BYTES, -(-layout.size // parts)))
        (first, end), *others = arriving.parts
        with self._lock:
            asked = [self._streams.submit(self._receive, array, key, part, stop, draft) for part, stop in others]
        try:
            with contextlib.closing(coming):
                self._landing.land(_up_to(end, coming), draft, 0, first.add)
            for part in asked:
                part.result()
        finally:
            # All of them end before the draft does.
            let_end(asked)
        if problem := arriving.problem():
            raise CorruptError(f"{self.where(array, key)}: {problem}; remove the object and make it again")

    def _receive(self, array: str, key: str, part: StreamCheckPart, stop: int, draft: AtomicFile) -> None:
        """Write one part of a shard as it comes; parts lie apart, so that several threads may write them."""
        self._landing.land(self.stream(array, key, part.at, stop), draft, part.at, part.add)

    def extent(self, array: str, key: str, start: int, stop: int) -> Path:
        """A file of some bytes of a shard and their checksum, brought here where it is not. Errors as `fetch`."""

        def fill(draft: AtomicFile) -> None:
            at = digest = 0
            # Into the page cache: they are wanted at once, and all of them.
            for data in self.stream(array, key, start, stop):
                draft.write(np.frombuffer(data, np.uint8), at)
                at, digest = at + len(data), crc32c.crc32c(data, digest)
            draft.write(np.array([digest], "<u4").view(np.uint8), at)

        # Its bytes do not say which store they are of, and another one may come to the same address.
        name, size = self._file(array, key, f":{self._store}:{start}-{stop}"), stop - start + CHECKSUM_BYTES
        return self.cache.add(name, lambda: (size, fill), partial(_check_extent, size=size))


def _check_extent(file: Path, size: int) -> None:
    """Compare some bytes of a shard with their checksum, which stands behind them; errors as `check_copy`."""
    data = memoryview(read_file(file, size))
    digest = crc32c.crc32c(data[:-CHECKSUM_BYTES]).to_bytes(CHECKSUM_BYTES, "little")
    if len(data) != size or digest != data[-CHECKSUM_BYTES:]:
        raise CorruptError(f"{file} does not match its checksum")


def _up_to(stop: int, coming: Iterator[memoryview]) -> Iterator[memoryview]:
    """Give the first `stop` bytes of what comes."""
    at = 0
    for data in coming:
        yield data[: stop - at]
        at += len(data)
        if at >= stop:
            return


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
