"""Copy a store's shards between a folder and a bucket: choose them, verify them, several at a time.

Both ends are listed first, and shards that both have are compared, so that a place that holds another store is refused
before anything is written to it. Then the missing shards are copied.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import threading
from collections import deque
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from mmcache.errors import CorruptError, IncompleteError, StoreExistsError
from mmcache.format.names import RESERVED, STATISTICS_FOLDER
from mmcache.format.shard import HEADER_BYTES, Layout, ids_digest
from mmcache.format.signed_json import ROOT
from mmcache.ops.endpoints import SUMMARY, BucketEndpoint, FolderEndpoint, expected_bytes, metadata
from mmcache.read.store import Store
from mmcache.storage.mirror import STREAMS, StreamWriter
from mmcache.storage.object_store import PART_BYTES
from mmcache.storage.shard_bytes import FileBytes
from mmcache.storage.shard_check import StreamCheckPart, check_ids, check_shard, tail_problems
from mmcache.storage.shard_folder import ShardFolder
from mmcache.storage.tokenizer_file import TOKENIZER
from mmcache.system.atomic import AtomicFile
from mmcache.system.files import open_file
from mmcache.system.threads import ThreadPool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from mmcache.format.manifest import Manifest
    from mmcache.ops.endpoints import Endpoint, Glance
    from mmcache.ops.transfer import Blocks
    from mmcache.storage.object_store import ObjectStore

__all__ = ["Downloader", "Shard", "ShardCopier", "Uploader"]

T = TypeVar("T")

# How many shards are copied at a time, and how many are compared at a time.
_COPIES, _GLANCES = 3, 16


class _StoppedError(Exception):
    """Another shard failed, or the caller was interrupted: this copy stops."""


@dataclass(frozen=True)
class Shard:
    """A shard to copy: its size in bytes, and whether it replaces one already at the target."""

    array: str
    slot: int
    block: int
    size: int
    replace: bool


class ShardCopier:
    """Base of push and pull.

    Args:
        source: where shards are copied from.
        target: where they are copied to.
        manifest: the store that is copied.
        there: the root that the target has already; None if it has none.
        progress: called with the bytes done and the total, from several threads.
    """

    copies = _COPIES

    def __init__(
        self,
        source: Endpoint,
        target: Endpoint,
        manifest: Manifest,
        there: Manifest | None,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._source, self._target = source, target
        self._manifest, self._there, self._progress = manifest, there, progress
        self._todo: dict[str, list[Shard]] = {}
        self._done = self._total = 0
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._failure: BaseException | None = None
        self._corpus: Store | None = None
        # Shards copied, found at the target and missing from the source; bytes copied and bytes to copy.
        self.copied = self.there = self.missing = self.bytes = self.bytes_to_copy = 0

    def key(self, array: str, slot: int, block: int) -> str:
        """The path of a shard's file, relative to the store's folder."""
        return f"{array}/{self._manifest.shard_key(array, block, slot)}"

    def plan(self, arrays: Iterable[str], blocks: Blocks) -> None:
        """Find the shards to copy, and compare those that the target has. Nothing is written.

        Raises:
            StoreExistsError: the target has another shard under the same name.
            IncompleteError: the source has lost tokens, flags or sequences.
            CorruptError: a shard to be copied is damaged.
        """
        for array in arrays:
            self._plan_array(array, blocks)
        self._done = self._total - self.bytes_to_copy
        self._tell(0)

    def _plan_array(self, array: str, blocks: Blocks) -> None:
        manifest, whole = self._manifest, array in RESERVED
        found, present = self._source.listed(manifest, array), self._target.listed(manifest, array)
        slots, count = len(manifest.slots(array)), manifest.spec(array).blocks(manifest.rows(array))
        both = np.isin(*(shards[:, 1] * slots + shards[:, 0] for shards in (found, present)))
        wanted = np.ones(len(found), bool) if whole else blocks.of(found[:, 1])
        missing = (count if whole else blocks.count(count)) * slots - int(wanted.sum())
        if missing and whole:
            raise IncompleteError(
                f"{self._source.where(array)}: {missing} of {count} shards are gone, without which the others are of "
                f"no use: restore them; `mmcache verify` lists what is missing"
            )
        self.missing += missing
        # The target's last counted block must be compared even if it was not asked for: more of its rows will count.
        edge = self._counts_there(array) // manifest.spec(array).shard_rows
        if self._grows(array, edge):
            wanted |= both & (found[:, 1] == edge)
        found, both = found[wanted], both[wanted]
        same = np.zeros(len(found), bool)
        same[both] = self._each(self._same, [(array, *where) for where in found[both, :2].tolist()], _GLANCES)
        self.there += int(same.sum())
        self._total += int(found[:, 2].sum())
        self.bytes_to_copy += int(found[~same, 2].sum())
        rest = zip(found[~same].tolist(), both[~same].tolist(), strict=True)
        self._todo[array] = [Shard(array, slot, block, size, taken) for (slot, block, size), taken in rest]

    def copy(self, arrays: Iterable[str]) -> None:
        """Copy the shards that `plan` found, array by array; blocks until done. Raises as `push` or `pull`."""
        for array in arrays:
            sizes = self._each(self._carry, [(shard,) for shard in self._todo[array]], self.copies)
            self.copied += sum(size > 0 for size in sizes)
            self.there += sum(size == 0 for size in sizes)
            self.bytes += sum(sizes)

    def _each(self, work: Callable[..., T], jobs: Sequence[tuple[Any, ...]], threads: int) -> list[T]:
        """Run jobs on several threads. The first failure stops the others, and is raised when they have ended."""
        crew, asked, results = ThreadPool(threads, "transfer"), deque[Future[T]](), list[T]()

        def guarded(*job: Any) -> T:
            try:
                return work(*job)
            except BaseException as error:
                self._failure = self._failure or error
                self._stop.set()
                raise

        try:
            for job in jobs:
                asked.append(crew.submit(guarded, *job))
                if len(asked) >= 2 * threads:
                    results.append(asked.popleft().result())
            while asked:
                results.append(asked.popleft().result())
        except _StoppedError:
            raise (self._failure or AssertionError("stopped by nobody")) from None
        except BaseException:
            self._stop.set()
            raise
        finally:
            crew.close()
            for future in asked:
                with contextlib.suppress(CancelledError):
                    future.exception()
        return results

    def _tell(self, count: int) -> None:
        """Add to the bytes done; negative where some are copied again. Raises _StoppedError after a failure."""
        if self._stop.is_set():
            raise _StoppedError
        with self._lock:
            self._done += count
            done = min(max(self._done, 0), self._total)
        if self._progress is not None:
            self._progress(done, self._total)

    def _exact(self, array: str) -> bool:
        """Whether a shard has exactly the rows that count, so that a longer one never replaces it."""
        return self._manifest.kind == "planned" and array in self._manifest.sites

    def _counts_there(self, array: str) -> int:
        return 0 if self._there is None else self._there.rows(array)

    def _counted(self, array: str, block: int) -> tuple[int, int]:
        """How many rows of a block will count after the copy, and how many count at the target already."""
        spec = self._manifest.spec(array)
        totals = self._manifest.rows(array), self._counts_there(array)
        return spec.rows_in_block(block, totals[0]), spec.rows_in_block(block, totals[1])

    def _grows(self, array: str, block: int) -> bool:
        need, counted = self._counted(array, block)
        return not self._exact(array) and 0 < counted < need

    def _same(self, array: str, slot: int, block: int) -> bool:
        """Whether the target's shard can stay as it is.

        Raises:
            StoreExistsError: it is another shard, and must be kept.
            CorruptError: the source's shard has fewer rows than the store counts, or is damaged.
        """
        self._tell(0)
        ours = self._source.glance(self._manifest, array, slot, block)
        need, counted = self._counted(array, block)
        if ours.layout.rows < need:
            where = self._source.where(self.key(array, slot, block))
            raise CorruptError(f"{where} has {ours.layout.rows} rows, the store counts {need}: make it again")
        theirs = self._glance_there(array, slot, block)
        if theirs is None:
            return False
        rows, exact = theirs.layout.rows, self._exact(array)
        if rows == ours.layout.rows:
            if theirs == ours:
                return True
        elif not exact and rows >= need and ours.agrees(theirs, min(rows, ours.layout.rows)):
            return True
        # Rows that do not count at the target may be overwritten; those that do must equal ours.
        if exact or counted >= need or not ours.agrees(theirs, min(counted, rows)):
            self._refuse(array, slot, block)
        return False

    def _glance_there(self, array: str, slot: int, block: int) -> Glance | None:
        """The fingerprint of the target's shard; None if it may be replaced. Raises StoreExistsError."""
        raise NotImplementedError

    def _refuse(self, array: str, slot: int, block: int) -> None:
        """Raise StoreExistsError if the target's shard, which differs from ours, must be kept."""
        raise NotImplementedError

    def _carry(self, shard: Shard) -> int:
        """Copy a shard. Returns its bytes; 0 if an equal one has appeared at the target meanwhile."""
        raise NotImplementedError

    def _problem(self, folder: ShardFolder, slot: int, block: int, ids: str | None) -> str | None:
        """Verify every byte of a shard: what is wrong, or None. Raises IncompleteError if it is gone."""
        try:
            wrong, _ = check_shard(folder, slot, block, full=True, ids=ids, tell=lambda _: self._tell(0))
        except CorruptError as error:
            return str(error).removeprefix(folder.where(slot, block)).lstrip(": ")
        return wrong[0] if wrong else None

    def _ids(self, shard: Shard, path: Path) -> str | None:
        """The digest of the token ids of a shard's rows, read from `path`; None if its header has no such digest."""
        if not self._exact(shard.array):
            return None
        if self._corpus is None:
            self._corpus = Store(path, self._manifest)
        rows, total = self._manifest.shard_tokens or 1, self._corpus.n_tokens
        context = self._corpus.sequences[self._corpus.sequences.find(shard.block * rows)].start
        tokens = ShardFolder(path, self._manifest, "tokens", total)
        return ids_digest(tokens.read(context, min((shard.block + 1) * rows, total)).numpy())


class Uploader(ShardCopier):
    """Copies from a folder into a bucket; the other arguments are those of `ShardCopier`."""

    def __init__(
        self,
        folder: Path,
        bucket: ObjectStore,
        manifest: Manifest,
        there: Manifest | None,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        super().__init__(FolderEndpoint(folder), BucketEndpoint(bucket), manifest, there, progress)
        self._folder, self._bucket = folder, bucket

    def _glance_there(self, array: str, slot: int, block: int) -> Glance | None:
        try:
            return self._target.glance(self._manifest, array, slot, block)
        except CorruptError as error:
            raise StoreExistsError(
                errno.EEXIST,
                f"the object that is there is not this store's shard ({error}): delete it, or push to another address",
                self._target.where(self.key(array, slot, block)),
            ) from error

    def _refuse(self, array: str, slot: int, block: int) -> None:
        key = self.key(array, slot, block)
        raise StoreExistsError(
            errno.EEXIST,
            f"the shard that is there has other rows or statistics than {self._source.where(key)}: it is another "
            f"store's or another run's, or one of the two is damaged (`mmcache verify` tells): delete the object, or "
            f"push to another address",
            self._target.where(key),
        )

    def _carry(self, shard: Shard) -> int:
        self._tell(0)
        array, slot, block = shard.array, shard.slot, shard.block
        key = self.key(array, slot, block)
        folder = ShardFolder(self._folder, self._manifest, array, self._manifest.rows(array))
        problem = self._problem(folder, slot, block, self._ids(shard, self._folder))
        if problem:
            raise CorruptError(
                f"{self._folder / key}: {problem}. It was not sent: `mmcache verify` lists all that is wrong, and "
                f"`mmcache repair` sets it aside"
            )
        file, replace = self._folder / key, shard.replace
        size, told = file.stat().st_size, -PART_BYTES

        def alive() -> None:
            # Called before the upload begins, and before each part.
            nonlocal told
            step = min(PART_BYTES, size - max(told, 0)) if told >= 0 else 0
            told = max(told, 0) + step
            self._tell(step)

        while not self._bucket.upload(key, file, alive, replace=replace):
            # Another process uploaded this object first.
            if self._same(array, slot, block):
                size = 0
                break
            replace = True
        self._tell(shard.size - max(told, 0))
        return size


class _Arriving(ShardFolder):
    """The shards of an array that is being downloaded; errors name the object."""

    def __init__(self, path: Path, manifest: Manifest, array: str, object_at: str) -> None:
        super().__init__(path, manifest, array, manifest.rows(array))
        self.object_at = object_at

    def where(self, slot: int, block: int) -> str:  # noqa: ARG002 -- it is this one
        return self.object_at


class Downloader(ShardCopier):
    """Copies from a bucket into a folder; the other arguments are those of `ShardCopier`."""

    # Each copy uses one of the writer's streams.
    copies = STREAMS

    def __init__(
        self,
        bucket: ObjectStore,
        folder: Path,
        manifest: Manifest,
        there: Manifest | None,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._place = BucketEndpoint(bucket)
        super().__init__(self._place, FolderEndpoint(folder), manifest, there, progress)
        self._folder, self._bucket, self._landing = folder, bucket, StreamWriter(STREAMS)

    def stage(self, scratch: Path, sites: Sequence[str], *, sequences: bool) -> None:
        """Fetch all but shards and root into a temporary folder, and check it; with `sequences`, also their table.

        Raises:
            CorruptError: a file does not match its checksums, even after it was fetched again.
            IncompleteError: the sequences are gone.
        """
        for last in (False, True):
            try:
                self._stage(scratch, sites, sequences=sequences)
                with self._place.naming(scratch):
                    for _ in metadata(scratch, self._manifest, sites):
                        pass
            except CorruptError:
                if last:
                    raise
            else:
                return

    def _stage(self, scratch: Path, sites: Sequence[str], *, sequences: bool) -> None:
        manifest = self._manifest
        kept = {key for batch in self._bucket.names(STATISTICS_FOLDER) for key, _, _ in batch}
        keys = [f"{array}/{ROOT}" for array in (*sites, *(RESERVED if manifest.has_tokens else ()))]
        keys += [f"{STATISTICS_FOLDER}/{site}/{name}" for site in sites for name in SUMMARY]
        keys += [f"{STATISTICS_FOLDER}/{ROOT}", *([TOKENIZER] if "tokenizer_bytes" in manifest.source else [])]
        for key in keys:
            if key in kept or not key.startswith(f"{STATISTICS_FOLDER}/"):
                self._place.fetch(key, scratch)
        blocks = manifest.spec("sequences").blocks(manifest.n_sequences) if sequences and manifest.has_tokens else 0
        for block in range(blocks):
            key = self.key("sequences", 0, block)
            if not self._place.fetch(key, scratch):
                raise IncompleteError(f"{self._bucket.where(key)} is gone, without which no sequence can be found")

    def _glance_there(self, array: str, slot: int, block: int) -> Glance | None:
        try:
            return self._target.glance(self._manifest, array, slot, block)
        except IncompleteError:
            return None
        except CorruptError as error:
            self._check_ours(self._folder / self.key(array, slot, block), error)
            return None

    def _check_ours(self, file: Path, error: CorruptError) -> None:
        """Refuse to replace a shard whose header names another store; an unreadable header is no reason."""
        with contextlib.suppress(CorruptError, ValueError, KeyError, TypeError, RecursionError):
            fd, status = open_file(file, what="the shard")
            shard = FileBytes(fd, status.size)
            try:
                said = json.loads(shard.head()[8:])["__metadata__"]["store"]
            finally:
                shard.close()
            if said != self._manifest.store:
                raise StoreExistsError(
                    errno.EEXIST, f"another store's shard is there ({error}): choose another folder", str(file)
                ) from error

    def _refuse(self, array: str, slot: int, block: int) -> None:
        folder = ShardFolder(self._folder, self._manifest, array, self._manifest.rows(array))
        # A damaged shard may be replaced.
        if self._problem(folder, slot, block, None) is None:
            key = self.key(array, slot, block)
            raise StoreExistsError(
                errno.EEXIST,
                f"the shard that is there is whole, and has other rows or statistics than {self._bucket.where(key)}: "
                f"it is another run's, or the object is damaged: move the file away, or choose another folder",
                str(self._folder / key),
            )

    def _carry(self, shard: Shard) -> int:
        key, problem = self.key(shard.array, shard.slot, shard.block), ""
        # Twice: the object may have been replaced since it was listed, or during the download.
        for _ in range(2):
            try:
                size, coming = self._bucket.whole(key)
                with contextlib.closing(coming):
                    problem = self._fetch(shard, key, size, coming)
            except CorruptError as error:
                problem = str(error).removeprefix(self._bucket.where(key)).lstrip(": ")
            if not problem:
                return size
        raise CorruptError(
            f"{self._bucket.where(key)}: {problem}. It was fetched twice: the object is damaged. Delete it, and push "
            f"it again from a good copy"
        )

    def _fetch(self, shard: Shard, key: str, size: int, coming: Iterator[memoryview]) -> str:
        """Download a shard, and publish it if every byte is as expected. Returns what is wrong, or an empty string."""
        array, manifest = shard.array, self._manifest
        least = expected_bytes(manifest, array, shard.block)
        most = least if self._exact(array) else Layout(manifest.spec(array), manifest.spec(array).shard_rows).size
        if not least <= size <= most:
            return f"it has {size} bytes, and {least} belong there"
        folder = _Arriving(self._folder, manifest, array, self._bucket.where(key))
        first = next(coming)
        layout = folder.check(shard.slot, shard.block, bytes(first[:HEADER_BYTES]), size)
        check_ids(bytes(first[:HEADER_BYTES]), self._ids(shard, self._folder))
        part = StreamCheckPart(layout, 0)

        def seen(data: memoryview) -> None:
            part.add(data)
            self._tell(len(data))

        draft = AtomicFile(self._folder, key, reserve=size)
        try:
            self._landing.land(itertools.chain([first], coming), draft, 0, seen)
            wrong = tail_problems(layout, part.crcs, bytes(part.tail))
            if not wrong:
                draft.publish(size)
                return ""
        except CorruptError:
            self._tell(-part.at)
            raise
        finally:
            draft.discard()
        self._tell(-size)
        return "; ".join(wrong)
