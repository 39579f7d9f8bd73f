"""Writing shards: `ShardWriter` (one), `BlockWriter` (all shards of a block of tokens), `Seal` (the last step)."""

from __future__ import annotations

import threading
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING, TypeAlias

import crc32c
import numpy as np

from mmcache.format.shard import HEADER_BYTES, Layout
from mmcache.stats.moments import block_rows, shard_moments
from mmcache.stats.site_statistics import overflow
from mmcache.system.atomic import AtomicFile
from mmcache.system.files import make_folder, sync_folder
from mmcache.write.pipeline import Job

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from pathlib import Path

    import torch

    from mmcache.format.manifest import Manifest
    from mmcache.format.shard import ShardSpec
    from mmcache.stats.moments import Moments
    from mmcache.storage.shard_folder import ShardFolder
    from mmcache.write.page_cache import PageCachePolicy
    from mmcache.write.pipeline import Pipeline
    from mmcache.write.staging import Stager

__all__ = ["BlockWriter", "Run", "Seal", "ShardWriter"]


@lru_cache(maxsize=8)
def _layout(spec: ShardSpec, rows: int) -> Layout:
    """The layout of a shard; cached, since most shards are full ones."""
    return Layout(spec, rows)


def _digest_rows(spec: ShardSpec) -> int:
    """Rows that are digested together: an inner chunk, or the rows that are summed together if these are more."""
    if not spec.stat_layers:
        return spec.chunk_rows
    return max(spec.chunk_rows, block_rows(spec.stat_layers, spec.row_shape[-1], spec.chunk_rows))


class ShardWriter:
    """One shard that is filled in order. Byte-identical to `shard.encode` of the same rows.

    Made in the caller's thread, where a full disk is an error at once, unless `later` leaves it to the digest thread.
    Digested, written and published in the pipeline's threads, each of which touches only its own part of the state.

    Args:
        root: the folder below which no link is followed.
        name: the final name, relative to `root`.
        spec: the geometry of the array's shards.
        metadata: the header's strings.
        first_token: the position of the shard's first row in the store.
        rows: the number of rows it will have, if known: their space is reserved at once.
        policy: decides which writes go past the page cache.
        durable: sync before the rename.
        later: make the file only when the first rows are digested, for callers that have all rows already.
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
        # Rows staged (caller's thread), rows digested, and bytes whose offset in the file is taken (digest thread).
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
        """The final path."""
        return self._root / self._name

    @cached_property
    def _draft(self) -> AtomicFile:
        reserve = _layout(self.spec, self._rows).size if self._rows else 0
        return AtomicFile(self._root, self._name, reserve=reserve)

    @cached_property
    def _moments(self) -> Moments | None:
        if not self.spec.stat_layers:
            return None
        return shard_moments(self.spec, self._first_token, busy=self._policy.busy)

    def carry(self, overflow: np.ndarray) -> None:
        """Add the overflow counts of the shard that this one replaces. Call it before anything is staged."""
        if self._moments is not None:
            self._moments.add_overflow(overflow)

    def digest(self, data: np.ndarray, keep: np.ndarray | None, overflow: Sequence[np.ndarray]) -> None:
        """Add the next rows, `[bytes]` uint8, to checksums and statistics."""
        spec, step = self.spec, _digest_rows(self.spec)
        rows = len(data) // spec.row_bytes
        done = 0
        while done < rows:
            some = min(step - self._digested % step, rows - done)
            part = data[done * spec.row_bytes : (done + some) * spec.row_bytes]
            self._check(part)
            # Now, while the rows are in the processor's cache.
            if self._moments is not None:
                shaped = part.view(spec.dtype.numpy).reshape(some, spec.stat_layers, spec.row_shape[-1])
                self._moments.add(shaped, None if keep is None else keep[done : done + some])
            done += some
        if self._moments is not None:
            for lost in overflow:
                self._moments.add_overflow(lost)

    def _check(self, data: np.ndarray) -> None:
        """Add the next rows to the checksums of their inner chunks."""
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
        """A function that writes the next rows, `[size]` uint8; it may run in any thread, together with others."""
        self._direct = self._policy.past_it(size)
        offset = HEADER_BYTES + self._begun
        self._begun += size
        return partial(self._draft.write, offset=offset, direct=self._direct)

    def finish_digest(self) -> None:
        """Compute the tail, which follows the rows."""
        layout = _layout(self.spec, self._digested)
        padding = layout.chunk_padding()
        if padding:
            self._crcs.append(crc32c.crc32c(padding, self._crc))
        statistics = None if self._moments is None else self._moments.arrays(self._first_token)
        if self._inspect is not None and statistics is not None:
            self._inspect(statistics)
        self._tail = layout.tail(self._crcs, statistics)
        # Freed now, since the writer is kept until it is published.
        self._moments = None

    def publish(self) -> None:
        """Write tail and header, make the file durable, and rename it to its final name."""
        layout = _layout(self.spec, self._digested)
        header = layout.header(self._metadata)
        for part, offset in ((self._tail, HEADER_BYTES + self._begun), (header, 0)):
            self._draft.write(np.frombuffer(part, np.uint8), offset, direct=self._direct)
        self._tail = b""
        self._draft.publish(layout.size, durable=self._durable)

    def discard(self) -> None:
        """Remove the temporary file. Only while no thread of the pipeline can touch the shard."""
        if "_draft" in self.__dict__:
            self._draft.discard()


class Seal(Job):
    """The job that finishes and publishes shards, and with `durable` makes their folders durable.

    `done` is set once they are all in place, or abandoned. Once they are all in place, `published` is called with
    their paths, in the publish thread.
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
        """Finish checksums and statistics."""
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
        # Freed now: whoever waits for `done` may keep this job.
        self._shards = ()
        self.done.set()

    def abandon(self) -> None:
        """Remove the temporary files."""
        for shard in self._shards:
            shard.discard()
        self._shards = ()
        self.done.set()


# Consecutive tokens: for each site a `[n, d_model]` tensor per layer, and `keep` as in `Stager.stage`.
Run: TypeAlias = "tuple[Mapping[str, Sequence[torch.Tensor]], np.ndarray | None]"


class BlockWriter:
    """The shards of one block of tokens, of all sites (and, in the layer layout, all layers), filled in order.

    Args:
        path: the store's folder.
        manifest: its geometry.
        number: the number of the block.
        policy: decides which writes go past the page cache.
        rows: the number of tokens the block will have, if known.
        durable: sync shards and folders.
        inspect: called with site, slot and statistics of each shard before it is published, in a thread of the
            pipeline; raising there keeps it from being published.
        ids: the digest of the block's tokens, if its headers record it.
        only: (site, slot) of the shards to make, if the others exist already; None for all.
        published: called with the shards' paths once all are in place, in a thread of the pipeline.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        number: int,
        policy: PageCachePolicy,
        *,
        rows: int | None = None,
        durable: bool = True,
        ids: str | None = None,
        only: Collection[tuple[str, int]] | None = None,
        inspect: Callable[[str, int, Mapping[str, np.ndarray]], None] | None = None,
        published: Callable[[Sequence[Path]], None] | None = None,
    ) -> None:
        self.number, self.rows, self._durable = number, 0, durable
        # The position of the block's first token.
        self.first = number * (manifest.shard_tokens or 0)
        self._published = published
        self._seal: Seal | None = None
        self._old: tuple[Mapping[str, ShardFolder], np.ndarray] | None = None
        self._token_layout = manifest.layout == "token"
        self._shards: dict[tuple[str, int], ShardWriter] = {}
        try:
            for site in manifest.sites:
                make_folder(path, site)
                spec = manifest.spec(site)
                for slot in manifest.slots(site):
                    if only is not None and (site, slot) not in only:
                        continue
                    self._shards[site, slot] = ShardWriter(
                        path,
                        f"{site}/{manifest.shard_key(site, number, slot)}",
                        spec,
                        manifest.shard_metadata(site, number, slot, ids),
                        self.first,
                        rows=rows,
                        policy=policy,
                        durable=durable,
                        inspect=None if inspect is None else partial(inspect, site, slot),
                    )
        except BaseException:
            self.discard()
            raise

    def append(self, stager: Stager, runs: Sequence[Run]) -> None:
        """Stage the next tokens of every site, run by run.

        All runs of a shard are staged one after the other, so that writes are as large as possible.
        """
        if self._old is not None:
            self._stage_old(stager, *self._old)
        for (site, slot), shard in self._shards.items():
            for activations, keep in runs:
                layers = activations[site]
                stager.stage(shard, layers if self._token_layout else [layers[slot]], keep)
        if self._shards:
            self.rows += sum(len(next(iter(activations.values()))[0]) for activations, _ in runs)

    def resume(self, old: Mapping[str, ShardFolder], keep: np.ndarray) -> None:
        """Begin with the rows of the partly filled shards on disk: checked now, staged by the first `append`.

        Raises:
            CorruptError: a shard on disk is damaged.
        """
        for (site, slot), shard in self._shards.items():
            old[site].checked(slot, self.number)
            shard.carry(overflow(old[site], slot, self.number))
        self._old = old, keep

    def _stage_old(self, stager: Stager, old: Mapping[str, ShardFolder], keep: np.ndarray) -> None:
        for (site, slot), shard in self._shards.items():
            rows = old[site].open(slot, self.number)
            stager.stage(shard, rows.unbind(1) if self._token_layout else [rows], keep)
        self.rows, self._old = len(keep), None

    @property
    def sealed(self) -> bool:
        """Whether `seal` was called, which may have been interrupted."""
        return self._seal is not None

    def seal(self, pipeline: Pipeline, stager: Stager) -> None:
        """Submit the block for writing; returns at once. After an interrupt, call it again."""
        if self._seal is None:
            self._seal = Seal(list(self._shards.values()), durable=self._durable, published=self._published)
        stager.flush()
        pipeline.submit(self._seal)

    def discard(self) -> None:
        """Remove the temporary files. Only while no thread of the pipeline can touch them."""
        for shard in self._shards.values():
            shard.discard()
