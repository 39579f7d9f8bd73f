"""A store in a bucket, as far as it is on this machine: its metadata, the names of its shards, and some of the shards.

The metadata lies in a folder that looks like the store's own, where an empty file stands for each shard that the bucket
has: so what lists a store's folder lists this one. The shards themselves are in a bounded cache, from which they are
mapped as those of any store.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, TypeVarTuple

import numpy as np

from mmcache.arriving import Arriving
from mmcache.bucket import Bucket
from mmcache.crew import Crew, let_end
from mmcache.draft import publish
from mmcache.errors import ArgumentError, CorruptError, IncompleteError, StoreNotFoundError
from mmcache.files import free_bytes, list_names, make_folder, remove_file
from mmcache.landing import Landing
from mmcache.lock import locked
from mmcache.manifest import read_manifest
from mmcache.names import RESERVED, STATISTICS_FOLDER, TOKENIZER_FOLDER
from mmcache.shard_cache import ShardCache
from mmcache.shard_objects import ShardObjects
from mmcache.signed import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from concurrent.futures import Future

    from mmcache.arriving import ArrivingPart
    from mmcache.draft import Draft
    from mmcache.format import Layout

__all__ = ["STREAMS", "Mirror", "cache_folder"]

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

# What the cache may take, where nobody says: of the room that is free, and at the most.
_SHARE, _MOST_CACHE = 4, 64 << 30
# Requests for rows that are under way together, and those that bring shards here, of which more than the processors can
# take in only get into each other's way.
_THREADS, STREAMS = 16, min(16, 2 * (os.cpu_count() or 2))
# What a stream brings at least.
_PART_BYTES = 16 << 20
# Metadata is small; what is larger below such names is no store's.
_METADATA_LIMIT = 256 << 20
_TAGS = ".tags.json"
_FOLDERS, _DEEPEST = (STATISTICS_FOLDER, TOKENIZER_FOLDER), 8


def cache_folder() -> Path:
    """Give the folder for what can be fetched again: `$MMCACHE_CACHE`, or `mmcache` where caches go on this system."""
    chosen = os.environ.get("MMCACHE_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmcache"


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
        CorruptError: the root is damaged.
    """

    def __init__(
        self, url: str, cache_dir: str | os.PathLike[str] | None = None, cache_bytes: int | None = None
    ) -> None:
        self._asked = cache_dir, cache_bytes
        super().__init__(Bucket(url))
        self.url = self.bucket.url
        above = cache_folder() if cache_dir is None else Path(cache_dir)
        if cache_bytes is None:
            cache_bytes = min(_MOST_CACHE, free_bytes(above) // _SHARE)
        if cache_bytes < 1:
            raise ArgumentError(f"cache_bytes is {cache_bytes}: expected what the shards in {above} may take")
        self.cache = ShardCache(above / "shards", cache_bytes)
        self.folder = above / "stores" / _digest(self.url)[:16]
        # Who brings a shard waits for its other parts, and must not take the place of one.
        self._crew, self._streams = Crew(_THREADS, "request"), Crew(STREAMS, "stream")
        self._bringers, self._lock = Crew(STREAMS, "bring"), threading.Lock()
        self._landing, self._coming = Landing(STREAMS), 0
        make_folder(self.folder)
        with locked(self.folder / ".mirror.lock"):
            self._refresh()

    def __reduce__(self) -> tuple[type[Mirror], tuple[object, ...]]:
        return Mirror, (self.url, *self._asked)

    def _refresh(self) -> None:
        """Make the folder what the bucket has now."""
        while not self._refreshed():
            pass

    def _refreshed(self) -> bool:
        """As `_refresh`; False where another root came meanwhile, which may name shards that were not listed."""
        listed = self._listed()
        metadata = listed.pop("")
        if ROOT not in metadata:
            raise StoreNotFoundError(2, "no mmcache store there (a store is a prefix with a zarr.json)", self.url)
        tags_file, known = self.folder / _TAGS, {}
        # Left by another version, or what a power failure made of it.
        with contextlib.suppress(FileNotFoundError, ValueError, TypeError):
            known = dict(json.loads(tags_file.read_text()))
        wanted = [key for key, tag in metadata.items() if tag is None or known.get(key) != tag or not self._has(key)]
        for key in known.keys() - metadata.keys():
            remove_file(self.folder / key)
        # The root comes last: what it names is here then.
        others = [key for key in wanted if key != ROOT]
        for key, fetched in [(key, self.submit(self.bucket.read_whole, key, _METADATA_LIMIT)) for key in others]:
            self._keep(key, fetched.result())
        if ROOT in wanted:
            root, tag = self.bucket.read_tagged(ROOT, _METADATA_LIMIT)
            if tag != metadata[ROOT]:
                return False
            self._keep(ROOT, root)
        publish(tags_file, json.dumps(metadata).encode())
        try:
            manifest = read_manifest(self.folder)
        except CorruptError as error:
            # People look for it in the bucket.
            raise type(error)(str(error).replace(str(self.folder), self.url)) from error
        self._store = manifest.store
        for array in (*manifest.sites, *RESERVED):
            self._name_shards(array, set(listed.get(array, ())))
        return True

    def _has(self, key: str) -> bool:
        return (self.folder / key).exists()

    def _keep(self, key: str, data: bytes) -> None:
        make_folder((self.folder / key).parent)
        publish(self.folder / key, data)

    def _listed(self) -> dict[str, dict[str, str | None]]:
        """List the bucket: of each array the names of its shards, and under "" the tags of the metadata."""
        found: dict[str, dict[str, str | None]] = {"": {}}
        for key, _, tag in itertools.chain.from_iterable(self.bucket.names()):
            parts = key.split("/")
            if not all(part.isprintable() and part[:1] not in ("", ".") and len(part.encode()) < 256 for part in parts):
                continue
            if len(parts) == 2 and parts[1].startswith("c."):
                found.setdefault(parts[0], {})[parts[1]] = None
            elif (parts[-1] == ROOT and len(parts) <= 2) or (parts[0] in _FOLDERS and 1 < len(parts) <= _DEEPEST):
                found[""][key] = tag
        # What is a folder here, too, is an object that stands for a folder, as some tools make.
        above = {"/".join(key.split("/")[:depth]) for key in found[""] for depth in range(1, key.count("/") + 1)}
        found[""] = {key: tag for key, tag in found[""].items() if key not in above}
        return found

    def _name_shards(self, array: str, there: set[str]) -> None:
        """Make an empty file for each shard that the bucket has, and for no other."""
        here = {name for name in list_names(self.folder / array) if name.startswith("c.")}
        if there - here:
            make_folder(self.folder / array)
        for name in there - here:
            (self.folder / array / name).touch()
        for name in here - there:
            remove_file(self.folder / array / name)

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

    def find(self, array: str, key: str) -> Path | None:
        """Give the file of a shard that is here, or None."""
        return self.cache.find(self._file(array, key))

    def _file(self, array: str, key: str, part: str = "") -> str:
        return _digest(f"{self.url}/{array}/{key}{part}")[:40]

    def use(self, array: str, key: str, check: Callable[[bytes, int], Layout], use: Callable[[Path], T]) -> T:
        """Use the file of a shard, brought here where it is not; again if others had it removed by then.

        Once more where what is here is not what belongs there: the bucket may have another one by now, such as a longer
        one of a grown store. Errors as `fetch`, and those of `use`.
        """
        replaced = False
        while True:
            file = self.fetch(array, key, check)
            try:
                return use(file)
            except IncompleteError:
                continue
            except CorruptError:
                if replaced or not self.cache.drop(self._file(array, key)):
                    raise
                replaced = True

    def fetch(self, array: str, key: str, check: Callable[[bytes, int], Layout]) -> Path:
        """Give the file of a shard, brought here where it is not; blocks until then.

        Its header is looked at by `check`, and the checksum of each inner chunk is compared, before it has its name.

        Raises:
            IncompleteError, CorruptError, AccessError, RemoteError: as `read`; a checksum differs.
            ArgumentError: it is larger than the whole cache.
            DiskFullError: the cache's disk is full.
        """
        name = self._file(array, key)
        found = self.cache.find(name)
        if found is not None:
            return found
        seen: tuple[bytes, int] | None = None

        def begin() -> tuple[int, Callable[[Draft], None]]:
            nonlocal seen
            head, size, coming = self.whole(array, key)
            seen = head, size
            return size, partial(self._download, array, key, check(head, size), head, coming)

        while True:
            try:
                return self.cache.add(name, begin)
            except CorruptError:
                # It may have been replaced while it came.
                if seen is None or seen == self.head(array, key):
                    raise

    def _download(
        self, array: str, key: str, layout: Layout, head: bytes, coming: Generator[memoryview], draft: Draft
    ) -> None:
        """Write a shard whose first bytes have come: in as many parts as there are streams for it.

        Of several shards each is one request, and where they come quickly too: some servers answer it far sooner than
        one for a part.
        """
        parts = 1 if self.quick else max(1, STREAMS // max(1, self._coming))
        arriving = Arriving(layout, head, max(_PART_BYTES, -(-layout.size // parts)))
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

    def _receive(self, array: str, key: str, part: ArrivingPart, stop: int, draft: Draft) -> None:
        """Write one part of a shard as it comes; parts lie apart, so that several threads may write them."""
        self._landing.land(self.stream(array, key, part.at, stop), draft, part.at, part.add)

    def extent(self, array: str, key: str, start: int, stop: int) -> Path:
        """Give a file of some bytes of a shard, brought here where it is not. Errors as `fetch`."""

        def fill(draft: Draft) -> None:
            at = 0
            # Into the page cache: they are wanted at once, and all of them.
            for data in self.stream(array, key, start, stop):
                draft.write(np.frombuffer(data, np.uint8), at)
                at += len(data)

        # Its bytes do not say which store they are of, and another one may come to the same address.
        name = self._file(array, key, f":{self._store}:{start}-{stop}")
        return self.cache.add(name, lambda: (stop - start, fill))


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
