"""Shards on their way from one place to another: which of them, several at a time, and stopped in the middle.

First it is found out what there is in both places, and whether what is there already is the same, so that a place of
another store's is refused before anything is written to it. Then the others are copied.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from mmcache.errors import CorruptError, IncompleteError
from mmcache.format.names import RESERVED
from mmcache.format.shard import ids_digest
from mmcache.read.store import Store
from mmcache.storage.shard_check import check_shard
from mmcache.storage.shard_folder import ShardFolder
from mmcache.system.threads import Crew

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from mmcache.format.manifest import Manifest
    from mmcache.ops.endpoints import Glance, Place
    from mmcache.ops.part import Blocks

__all__ = ["Carrier", "Shard"]

T = TypeVar("T")

# Shards that are copied at a time, and that are looked at.
_COPIES, _GLANCES = 3, 16


class _StoppedError(Exception):
    """Another shard failed, or the caller was interrupted: nobody waits for this one."""


@dataclass(frozen=True)
class Shard:
    """A shard that is to be copied: its bytes, and whether another one is in its place, which goes."""

    array: str
    slot: int
    block: int
    size: int
    replace: bool


class Carrier:
    """What push and pull share.

    Args:
        source: where shards are copied from,
        target: and where to.
        manifest: the store that is copied.
        there: what counts at the target already; None for nothing.
        progress: called with bytes that are done, and of how many, from several threads.
    """

    copies = _COPIES

    def __init__(
        self,
        source: Place,
        target: Place,
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
        # Shards and bytes: that were copied, were there, that the source lacks, that are to be copied.
        self.copied = self.there = self.missing = self.bytes = self.bytes_to_copy = 0

    def key(self, array: str, slot: int, block: int) -> str:
        """Name a shard's file from the store's folder."""
        return f"{array}/{self._manifest.shard_key(array, block, slot)}"

    def plan(self, arrays: Iterable[str], blocks: Blocks) -> None:
        """Find out which shards are to be copied, and compare those that are there. Nothing is written.

        Raises:
            StoreExistsError: another shard is there.
            IncompleteError: the source has lost tokens, flags or sequences.
            CorruptError: a shard that is to be copied is damaged.
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
        # A block of which more is going to count than there is must not stay as it is.
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
        """Copy what `plan` found, an array after the other; blocks until then. Errors are those of `push` or `pull`."""
        for array in arrays:
            sizes = self._each(self._carry, [(shard,) for shard in self._todo[array]], self.copies)
            self.copied += sum(size > 0 for size in sizes)
            self.there += sum(size == 0 for size in sizes)
            self.bytes += sum(sizes)

    def _each(self, work: Callable[..., T], jobs: Sequence[tuple[Any, ...]], threads: int) -> list[T]:
        """Do jobs, several at a time; the first failure stops the others, and is raised when they have ended."""
        crew, asked, results = Crew(threads, "transfer"), deque[Future[T]](), list[T]()

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
        """Count bytes that are done, fewer than none to do some again; raises where nobody waits for it any more."""
        if self._stop.is_set():
            raise _StoppedError
        with self._lock:
            self._done += count
            done = min(max(self._done, 0), self._total)
        if self._progress is not None:
            self._progress(done, self._total)

    def _exact(self, array: str) -> bool:
        """Tell whether a shard has exactly the rows that count, and is never replaced by a longer one."""
        return self._manifest.kind == "planned" and array in self._manifest.sites

    def _counts_there(self, array: str) -> int:
        return 0 if self._there is None else self._there.rows(array)

    def _counted(self, array: str, block: int) -> tuple[int, int]:
        """Count the rows of a block that will count, and that count there already."""
        spec = self._manifest.spec(array)
        totals = self._manifest.rows(array), self._counts_there(array)
        return spec.rows_in_block(block, totals[0]), spec.rows_in_block(block, totals[1])

    def _grows(self, array: str, block: int) -> bool:
        need, counted = self._counted(array, block)
        return not self._exact(array) and 0 < counted < need

    def _same(self, array: str, slot: int, block: int) -> bool:
        """Tell whether a shard that is there need not be copied.

        Raises:
            StoreExistsError: it is another one, which must be kept.
            CorruptError: the one to be copied is damaged.
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
        # Rows that do not count there may be overwritten; those that do must be the same as ours.
        if exact or counted >= need or not ours.agrees(theirs, min(counted, rows)):
            self._refuse(array, slot, block)
        return False

    def _glance_there(self, array: str, slot: int, block: int) -> Glance | None:
        """Look at the shard that is there; None where it is nothing that must be kept. Raises StoreExistsError."""
        raise NotImplementedError

    def _refuse(self, array: str, slot: int, block: int) -> None:
        """Raise StoreExistsError if the shard that is there, another one than ours, must be kept."""
        raise NotImplementedError

    def _carry(self, shard: Shard) -> int:
        """Copy a shard, and give its bytes; 0 where the same one came to be there meanwhile."""
        raise NotImplementedError

    def _problem(self, folder: ShardFolder, slot: int, block: int, ids: str | None) -> str | None:
        """Verify a shard, every byte of it: what is wrong with it, or None. Raises IncompleteError: it is gone."""
        try:
            wrong, _ = check_shard(folder, slot, block, full=True, ids=ids, tell=lambda _: self._tell(0))
        except CorruptError as error:
            return str(error).removeprefix(folder.where(slot, block)).lstrip(": ")
        return wrong[0] if wrong else None

    def _ids(self, shard: Shard, path: Path) -> str | None:
        """Hash the tokens that a shard's rows are of, from those in a folder; None where headers do not say them."""
        if not self._exact(shard.array):
            return None
        if self._corpus is None:
            self._corpus = Store(path, self._manifest)
        rows, total = self._manifest.shard_tokens or 1, self._corpus.n_tokens
        context = self._corpus.sequences[self._corpus.sequences.find(shard.block * rows)].start
        tokens = ShardFolder(path, self._manifest, "tokens", total)
        return ids_digest(tokens.read(context, min((shard.block + 1) * rows, total)).numpy())
