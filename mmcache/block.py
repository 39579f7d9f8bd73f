"""One block of tokens being filled: a shard a site, or a shard a site and layer."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from mmcache.files import make_folder
from mmcache.shard_statistics import overflow
from mmcache.shard_writer import Seal, ShardWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    import torch

    from mmcache.manifest import Manifest
    from mmcache.page_cache import PageCachePolicy
    from mmcache.pipeline import Pipeline
    from mmcache.shards import ShardFolder
    from mmcache.staging import Stager

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
        self._published = published
        self._token_layout = manifest.layout == "token"
        self._shards: dict[tuple[str, int], ShardWriter] = {}
        first = number * (manifest.shard_tokens or 0)
        try:
            for site in manifest.sites:
                make_folder(path / site)
                spec = manifest.spec(site)
                for slot in manifest.slots(site):
                    if only is not None and (site, slot) not in only:
                        continue
                    self._shards[site, slot] = ShardWriter(
                        path / site / manifest.shard_key(site, number, slot),
                        spec,
                        manifest.shard_metadata(site, number, slot, ids),
                        first,
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
        for (site, slot), shard in self._shards.items():
            for activations, keep in runs:
                layers = activations[site]
                stager.stage(shard, layers if self._token_layout else [layers[slot]], keep)
        if self._shards:
            self.rows += sum(len(next(iter(activations.values()))[0]) for activations, _ in runs)

    def restage(self, stager: Stager, old: Mapping[str, ShardFolder], keep: np.ndarray) -> None:
        """Begin with the rows that a partly filled shard already has, their checksums compared.

        Raises:
            CorruptError: the shard on disk is damaged.
        """
        for (site, slot), shard in self._shards.items():
            rows = old[site].checked(slot, self.number)
            shard.carry(overflow(old[site], slot, self.number))
            stager.stage(shard, rows.unbind(1) if self._token_layout else [rows], keep)
        self.rows = len(keep)

    def seal(self, pipeline: Pipeline, stager: Stager) -> None:
        """Send the block on its way to the disk; returns at once."""
        stager.flush()
        pipeline.submit(Seal(list(self._shards.values()), durable=self._durable, published=self._published))

    def discard(self) -> None:
        """Leave nothing of it behind. Only while no thread of the pipeline can touch it."""
        for shard in self._shards.values():
            shard.discard()
