"""The local view of a store in a bucket: its metadata, the names of its shards, and a cache of some shards.

The metadata is in a folder that looks like the store's own. Shards are in a bounded disk cache; once compared with
their checksums, they are mapped like those of a local store.

Downloaded bytes are written past the page cache, from reused memory. Filling the page cache takes several times the CPU
time of downloading and writing together, and ten times on a virtual machine, which must get each fresh page first:
measured, 0.2 to 2.5 s per GB, instead of 0.04.
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

# Rate in bytes/s from which one stream is as good as several, and the bytes needed to measure it.
_QUICK, _LEAST_MEASURED = 256e6, 1 << 20


class ShardObjects:
    """The objects that are shards. Safe to use from several threads.

    Args:
        bucket: the store's.
    """

    def __init__(self, bucket: ObjectStore) -> None:
        self.bucket = bucket
        # Whether one stream is fast enough alone, by the latest measurement.
        self.quick = False

    def where(self, array: str, key: str) -> str:
        """The URL of a shard."""
        return f"{self.bucket.url}/{array}/{key}"

    def read(self, array: str, key: str, start: int, stop: int) -> memoryview:
        """Read bytes `start` to `stop` of a shard from the bucket; blocks until all are there.

        Raises:
            IncompleteError: the bucket has no such shard.
            CorruptError: it ends before `stop`.
            AccessError, RemoteError: as `ObjectStore.read`.
        """
        with _shard_errors(self.where(array, key)):
            return self.bucket.read(f"{array}/{key}", start, stop)

    def stream(self, array: str, key: str, start: int, stop: int) -> Iterator[memoryview]:
        """Stream bytes `start` to `stop` of a shard from the bucket, some megabytes at a time. Errors as `read`."""
        with _shard_errors(self.where(array, key)):
            yield from self.bucket.stream(f"{array}/{key}", start, stop)

    def whole(self, array: str, key: str) -> tuple[bytes, int, Generator[memoryview]]:
        """Stream a whole shard from the bucket. Its header, its size, and all its bytes. Errors as `read`."""
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
        """The header of a shard, read from the bucket, and its size. Errors as `read`."""
        with _shard_errors(self.where(array, key)):
            return self.bucket.read_head(f"{array}/{key}", HEADER_BYTES)


@contextlib.contextmanager
def _shard_errors(where: str) -> Iterator[None]:
    """Raise StoreNotFoundError of an object as IncompleteError of a shard."""
    try:
        yield
    except StoreNotFoundError as error:
        raise IncompleteError(f"the bucket has no shard {where}: it was not uploaded yet, or removed") from error


# Bytes per write: large enough for the device's full rate, small enough for the processor's cache.
_WINDOW = 4 << 20


class StreamWriter:
    """Writes streams into files. Safe to use from several threads.

    Args:
        most: number of concurrent streams whose memory is kept, and which write in parallel.
    """

    def __init__(self, most: int) -> None:
        self._windows, self._crew, self._lock = BufferPool(most), ThreadPool(most, "landing"), threading.Lock()

    def land(
        self, stream: Iterable[memoryview], draft: AtomicFile, offset: int, seen: Callable[[memoryview], None]
    ) -> None:
        """Write a stream into a file; writing overlaps with receiving. Blocks until all is written.

        Args:
            stream: the bytes, in order; consumed before this returns.
            draft: the file; several threads may write ranges that do not overlap.
            offset: where the bytes start in the file.
            seen: called with the bytes as they arrive.
        """
        windows = itertools.cycle(self._windows.lend([_WINDOW, _WINDOW]))
        window = next(windows)
        writing: list[Future[None]] = []
        # The same offset within a page as in the file, as O_DIRECT needs.
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
            # Before the memory is reused and the file closed.
            let_end(writing)

    def _write(self, some: np.ndarray, draft: AtomicFile, offset: int, writing: list[Future[None]]) -> None:
        """Write a window in the background; blocks until the other one is written."""
        if writing:
            # Still in the list while waiting, so that after an interrupt `land` waits for it.
            writing[0].result()
            writing.clear()
        with self._lock:
            writing.append(self._crew.submit(partial(draft.write, some, offset, direct=True)))


T = TypeVar("T")
Ts = TypeVarTuple("Ts")

# Default size of the cache: 1/_SHARE of the free room, at most _MOST_CACHE bytes.
_SHARE, _MOST_CACHE = 4, 64 << 30
# Concurrent requests for rows; and streams that download shards, of which more than the CPUs can process only slow each
# other down.
_THREADS, STREAMS = 16, min(16, 2 * (os.cpu_count() or 2))
# Least bytes per stream.
_PART_BYTES = 16 << 20
_LOCK = ".mirror.lock"
# Size of the checksum at the end of a file that holds part of a shard.
CHECKSUM_BYTES = 4


class Mirror(ShardObjects):
    """The local view of one store in a bucket. Safe to use from several threads; each process makes its own.

    The constructor lists the bucket and fetches the metadata that changed; blocks until then.

    Args:
        url: the store.
        cache_dir: the folder of the cache, shared by all stores and processes that name it; None for `cache_folder()`.
        cache_bytes: most bytes of the shards in it; None for a quarter of the free room, up to 64 GiB.

    Raises:
        StoreNotFoundError: there is no store, or no bucket.
        AccessError, RemoteError: the server refuses, or does not answer.
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
        # Separate pools: a job that fetches a shard waits for its other parts, and must not occupy their threads.
        self._crew, self._streams = ThreadPool(_THREADS, "request"), ThreadPool(STREAMS, "stream")
        self._bringers, self._lock = ThreadPool(STREAMS, "bring"), threading.Lock()
        self._landing, self._coming = StreamWriter(STREAMS), 0
        self._metadata = MetadataCopies(self.bucket, self.folder, self.submit)
        with locked(self.folder, _LOCK):
            self._store = self._metadata.refresh()

    def __reduce__(self) -> tuple[type[Mirror], tuple[object, ...]]:
        return Mirror, (self.url, *self._asked)

    def submit(self, work: Callable[[*Ts], T], *arguments: *Ts) -> Future[T]:
        """Run a function in the thread pool for requests. Raises RemoteError in a forked process."""
        self.bucket.check_process()
        with self._lock:
            return self._crew.submit(work, *arguments)

    def fetch_later(self, bring: Callable[[*Ts], T], *arguments: *Ts) -> Future[T]:
        """Fetch a shard, or part of it, in the background, `STREAMS` at a time; `bring` must call `fetch`.

        Raises RemoteError in a forked process.
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
        """Keys in the bucket that no store has; nothing reads them."""
        return self._metadata.strange

    def reread(self, read: Callable[[], T]) -> T:
        """The result of `read`, which reads the local metadata; if that is damaged, it is fetched again first."""
        with contextlib.suppress(CorruptError):
            return read()
        with locked(self.folder, _LOCK):
            self._metadata.refresh(again=True)
        with self._metadata.naming():
            return read()

    def find(self, array: str, key: str, check: Callable[[bytes, int], Layout]) -> Path | None:
        """The file of a cached shard, or None; `check` as in `fetch`. A damaged one is removed."""
        return self.cache.find(self._file(array, key), partial(check_copy, check=check))

    def drop(self, array: str, key: str) -> bool:
        """Remove a shard from the cache; False if it is not there."""
        return self.cache.drop(self._file(array, key))

    def _file(self, array: str, key: str, part: str = "") -> str:
        return _digest(f"{self.url}/{array}/{key}{part}")[:40]

    def use(self, array: str, key: str, check: Callable[[bytes, int], Layout], use: Callable[[Path], T]) -> T:
        """The result of `use` on the file of a shard, fetched if it is not cached; retried if it was evicted meanwhile.

        Fetched again once if `use` finds it corrupt: the bucket may have another one by now, such as a longer one of a
        grown store. Errors as `fetch`, and those of `use`.

        Raises:
            CorruptError: the shard was intact when it was downloaded, but the local copy is damaged.
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
        """The error for a copy that is damaged right after the download, though its object is intact."""
        return CorruptError(
            f"{self.cache.folder / self._file(array, key)}, the copy of {self.where(array, key)}, is damaged though it "
            f"came whole, and was fetched twice ({error}): this machine's disk or memory fails. Choose another cache "
            f"with cache_dir= or $MMCACHE_CACHE"
        )

    def fetch(self, array: str, key: str, check: Callable[[bytes, int], Layout]) -> Path:
        """The file of a shard, fetched if it is not cached; blocks until then.

        Its header is checked by `check`, and every inner chunk's checksum is compared, before the file appears.

        Raises:
            IncompleteError, CorruptError, AccessError, RemoteError: as `read`, or a checksum differs.
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
                # The object may have been replaced during the download, or the bytes damaged on the way.
                if seen is None or (again and seen == self.head(array, key)):
                    raise
                again = True

    def _download(
        self, array: str, key: str, layout: Layout, head: bytes, coming: Generator[memoryview], draft: AtomicFile
    ) -> None:
        """Write a shard whose first bytes have arrived, in as many parallel parts as there are free streams.

        One request per shard if many shards are fetched, or if one stream is fast: some servers answer it far sooner
        than a request for a range.
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
            # They must end before the file is closed.
            let_end(asked)
        if problem := arriving.problem():
            raise CorruptError(f"{self.where(array, key)}: {problem}; remove the object and make it again")

    def _receive(self, array: str, key: str, part: StreamCheckPart, stop: int, draft: AtomicFile) -> None:
        """Write one part of a shard as it arrives; parts do not overlap, so several threads may write them."""
        self._landing.land(self.stream(array, key, part.at, stop), draft, part.at, part.add)

    def extent(self, array: str, key: str, start: int, stop: int) -> Path:
        """A file of bytes `start` to `stop` of a shard and their checksum, fetched if not cached. Errors as `fetch`."""
        # With the store's id: the bytes do not contain it, and another store may be put at the same URL.
        name, size = self._file(array, key, f":{self._store}:{start}-{stop}"), stop - start + CHECKSUM_BYTES
        # The checksum begins with the name: a part under the name of another one has a wrong checksum.
        seed = crc32c.crc32c(name.encode())

        def fill(draft: AtomicFile) -> None:
            at, digest = 0, seed
            # Through the page cache: all of them are read right afterwards.
            for data in self.stream(array, key, start, stop):
                draft.write(np.frombuffer(data, np.uint8), at)
                at, digest = at + len(data), crc32c.crc32c(data, digest)
            draft.write(np.array([digest], "<u4").view(np.uint8), at)

        return self.cache.add(name, lambda: (size, fill), partial(_check_extent, size=size, seed=seed))


def _check_extent(file: Path, size: int, seed: int) -> None:
    """Compare part of a shard with the checksum that follows it; errors as `check_copy`."""
    data = memoryview(read_file(file, size))
    digest = crc32c.crc32c(data[:-CHECKSUM_BYTES], seed).to_bytes(CHECKSUM_BYTES, "little")
    if len(data) != size or digest != data[-CHECKSUM_BYTES:]:
        raise CorruptError(f"{file} does not match its checksum")


def _up_to(stop: int, coming: Iterator[memoryview]) -> Iterator[memoryview]:
    """The first `stop` bytes of a stream."""
    at = 0
    for data in coming:
        yield data[: stop - at]
        at += len(data)
        if at >= stop:
            return


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
