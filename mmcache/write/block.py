"""One block of tokens being filled: a shard a site, or a shard a site and layer."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from mmcache.stats.site_statistics import overflow
from mmcache.system.files import make_folder
from mmcache.write.shard_writer import Seal, ShardWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    import torch

    from mmcache.format.manifest import Manifest
    from mmcache.storage.shard_folder import ShardFolder
    from mmcache.write.page_cache import PageCachePolicy
    from mmcache.write.pipeline import Pipeline
    from mmcache.write.staging import Stager

__all__ = ["Block", "Run"]

# Tokens in a row: of each site a `[n, d_model]` tensor a layer, and `keep` as in `Stager.stage`.
Run: TypeAlias = "tuple[Mapping[str, Sequence[torch.Tensor]], np.ndarray | None]"


class Block:
    """The shards of one block of tokens, of all sites (and, in the layer layout, all layers), filled in order.

    Args:
        path: the store.
        manifest: its geometry.
        number: which block.
        policy: what goes past the page cache.
        rows: tokens the block will have, where that is known.
        inspect: called with site, slot and statistics of each shard before it is published, in a thread of the
            pipeline; raising there keeps it from being published.
        ids: the digest of the tokens that the block's rows are of, where its headers say it.
        only: (site, slot) of the shards to make, where the others are there already; None for all.
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
        # The position of its first token.
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
        """Stage the next tokens of every site, one run of them after the other.

        All runs of a shard are staged in a row, so that they are written in pieces as large as can be.
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
        """Begin with the rows of the partly filled shards on disk: staged with the first that are appended.

        Their checksums are compared now.

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
        """Send the block on its way to the disk; returns at once. Where that was interrupted, it is called again."""
        if self._seal is None:
            self._seal = Seal(list(self._shards.values()), durable=self._durable, published=self._published)
        stager.flush()
        pipeline.submit(self._seal)

    def discard(self) -> None:
        """Leave nothing of it behind. Only while no thread of the pipeline can touch it."""
        for shard in self._shards.values():
            shard.discard()
