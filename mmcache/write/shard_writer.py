"""One shard being made: digested, written and published in the threads of the pipeline."""

from __future__ import annotations

import threading
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING

import crc32c
import numpy as np

from mmcache.format.shard import HEADER_BYTES, Layout
from mmcache.stats.moments import block_rows, shard_moments
from mmcache.system.atomic import Draft
from mmcache.system.files import sync_folder
from mmcache.write.pipeline import Job

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from mmcache.format.shard import ShardSpec
    from mmcache.stats.moments import Moments
    from mmcache.write.page_cache import PageCachePolicy

__all__ = ["Seal", "ShardWriter"]


@lru_cache(maxsize=8)
def _layout(spec: ShardSpec, rows: int) -> Layout:
    """Give a layout; that of full shards, of which there are many, is computed once."""
    return Layout(spec, rows)


def _digest_rows(spec: ShardSpec) -> int:
    """Give the rows that are digested together: an inner chunk, or a block of sums where that is larger."""
    if not spec.stat_layers:
        return spec.chunk_rows
    return max(spec.chunk_rows, block_rows(spec.stat_layers, spec.row_shape[-1], spec.chunk_rows))


class ShardWriter:
    """One shard that is being filled, in order. Equal, byte for byte, to `format.encode` of the same rows.

    Made in the caller's thread, which meets a full disk there unless it is told to leave that to the digest thread;
    digested, written and published in the pipeline's threads, each of which touches only its own part of the state.

    Args:
        root: the folder from which on no link is followed.
        name: the final name from there.
        spec: the array's shards.
        metadata: the header's strings.
        first_token: the position of the shard's first row in the store.
        rows: rows it will have, where that is known: their space is reserved at once.
        policy: what goes past the page cache.
        durable: sync before the rename.
        later: make the file when the first rows are digested: a caller who has computed all rows loses nothing by it.
        inspect: called, in the digest thread, with the finished statistics; raising there keeps the shard from
            being published.
    """

    def __init__(
        self,
        root: Path,
        name: str,
        spec: ShardSpec,
        metadata: Mapping[str, str],
        first_token: int,
        *,
        rows: int | None,
        policy: PageCachePolicy,
        durable: bool,
        later: bool = False,
        inspect: Callable[[Mapping[str, np.ndarray]], None] | None = None,
    ) -> None:
        self.spec = spec
        self.folder = (root / name).parent
        self._metadata, self._first_token, self._durable = metadata, first_token, durable
        self._inspect = inspect
        # The caller's side, and the digest thread's: rows, and bytes of them whose place is given out.
        self.staged = 0
        self._digested = 0
        self._begun = 0
        self._crcs: list[int] = []
        self._crc = 0
        self._tail = b""
        self._policy, self._direct = policy, False
        self._root, self._name, self._rows = root, name, rows
        if not later:
            _ = self._draft

    @property
    def path(self) -> Path:
        """The final name."""
        return self._root / self._name

    @cached_property
    def _draft(self) -> Draft:
        reserve = _layout(self.spec, self._rows).size if self._rows else 0
        return Draft(self._root, self._name, reserve=reserve)

    @cached_property
    def _moments(self) -> Moments | None:
        if not self.spec.stat_layers:
            return None
        return shard_moments(self.spec, self._first_token, busy=self._policy.busy)

    def carry(self, overflow: np.ndarray) -> None:
        """Go on counting from the overflow of the shard that this one replaces. Before anything is staged."""
        if self._moments is not None:
            self._moments.add_overflow(overflow)

    def digest(self, data: np.ndarray, keep: np.ndarray | None, overflow: Sequence[np.ndarray]) -> None:
        """Take the next rows, as `[bytes]` uint8, into checksums and statistics."""
        spec, step = self.spec, _digest_rows(self.spec)
        rows = len(data) // spec.row_bytes
        done = 0
        while done < rows:
            some = min(step - self._digested % step, rows - done)
            part = data[done * spec.row_bytes : (done + some) * spec.row_bytes]
            self._check(part)
            # While the rows are still in the processor's cache.
            if self._moments is not None:
                shaped = part.view(spec.dtype.numpy).reshape(some, spec.stat_layers, spec.row_shape[-1])
                self._moments.add(shaped, None if keep is None else keep[done : done + some])
            done += some
        if self._moments is not None:
            for lost in overflow:
                self._moments.add_overflow(lost)

    def _check(self, data: np.ndarray) -> None:
        """Take the next rows into the checksums of their inner chunks."""
        size = self.spec.row_bytes
        while len(data):
            room = self.spec.chunk_rows - self._digested % self.spec.chunk_rows
            part, data = data[: room * size], data[room * size :]
            self._crc = crc32c.crc32c(part.data, self._crc)
            if len(part) == room * size:
                self._crcs.append(self._crc)
                self._crc = 0
            self._digested += len(part) // size

    def begin_write(self, size: int) -> Callable[[np.ndarray], None]:
        """Give what writes the next rows, `size` bytes of them, as `[size]` uint8: in any thread, beside others."""
        self._direct = self._policy.past_it(size)
        offset = HEADER_BYTES + self._begun
        self._begun += size
        return partial(self._draft.write, offset=offset, direct=self._direct)

    def finish_digest(self) -> None:
        """Compute what stands behind the rows."""
        layout = _layout(self.spec, self._digested)
        padding = layout.chunk_padding()
        if padding:
            self._crcs.append(crc32c.crc32c(padding, self._crc))
        statistics = None if self._moments is None else self._moments.arrays(self._first_token)
        if self._inspect is not None and statistics is not None:
            self._inspect(statistics)
        self._tail = layout.tail(self._crcs, statistics)
        # Not needed any more, and the writer is kept until it is published.
        self._moments = None

    def publish(self) -> None:
        """Write what stands behind the rows, and the header; make the file durable and give it its name."""
        layout = _layout(self.spec, self._digested)
        header = layout.header(self._metadata)
        for part, offset in ((self._tail, HEADER_BYTES + self._begun), (header, 0)):
            self._draft.write(np.frombuffer(part, np.uint8), offset, direct=self._direct)
        self._tail = b""
        self._draft.publish(layout.size, durable=self._durable)

    def discard(self) -> None:
        """Leave nothing behind. Only while no thread of the pipeline can touch the shard."""
        if "_draft" in self.__dict__:
            self._draft.discard()


class Seal(Job):
    """The job that finishes shards, publishes them, and makes their folders durable if asked to.

    `done` is set once they are in place, or abandoned. `published` is told where they are once they all are in place,
    in the publish thread.
    """

    def __init__(
        self,
        shards: Sequence[ShardWriter],
        *,
        durable: bool,
        published: Callable[[Sequence[Path]], None] | None = None,
    ) -> None:
        self._shards: Sequence[ShardWriter] = shards
        self._durable, self._published = durable, published
        self.files = len(shards)
        self.done = threading.Event()

    def digest(self) -> None:
        """Compute checksums and statistics."""
        for shard in self._shards:
            shard.finish_digest()

    def publish(self) -> None:
        """Write headers and tails, sync, rename, sync the folders."""
        for shard in self._shards:
            shard.publish()
        if self._durable:
            for folder in {shard.folder for shard in self._shards}:
                sync_folder(folder)
        if self._published is not None:
            self._published([shard.path for shard in self._shards])
        # Whoever waits for it keeps nothing but that.
        self._shards = ()
        self.done.set()

    def abandon(self) -> None:
        """Remove the drafts."""
        for shard in self._shards:
            shard.discard()
        self._shards = ()
        self.done.set()
