"""Rows of one site, the simple way: a map a shard, rows copied shard by shard.

It works wherever a file can be mapped, and is what `site_rows`, the fast way, is tested equal to.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
import torch

from mmcache.system.direct_io import alike

if TYPE_CHECKING:
    from mmcache.storage.shard_folder import ShardFolder

__all__ = ["ShardMaps"]


class ShardMaps:
    """The rows of one site. Safe to use from several threads; reading blocks where rows are not in memory.

    Args:
        folder: the site's shards.
        layout: the store's.
        n_layers: how many layers there are; a slot is a layer's place among them.
        most_open: maps that are kept; Python's mmap keeps a descriptor for each.
    """

    def __init__(self, folder: ShardFolder, layout: str, n_layers: int, most_open: int) -> None:
        self._folder, self._layer_layout, self._n_layers = folder, layout == "layer", n_layers
        self._most_open = most_open
        self._files: dict[tuple[int, int], torch.Tensor] = {}
        self._lock = threading.Lock()

    def _view(self, slot: int, block: int) -> torch.Tensor:
        """Give the mapped rows of one layer in one block: `[rows, d_model]`, never to be handed out."""
        place = (slot if self._layer_layout else 0, block)
        file = self._files.get(place)
        if file is None:
            # Without the lock: a shard in a bucket is long in coming, and others may have to be forgotten for it.
            file = self._folder.open(*place)
            with self._lock:
                if len(self._files) >= self._most_open:
                    del self._files[next(iter(self._files))]
                self._files[place] = file
        return file if self._layer_layout else file[:, slot]

    def row(self, slot: int, position: int) -> torch.Tensor:
        """Copy one row: `[d_model]`. Raises IncompleteError or CorruptError, as `ShardFolder.open`."""
        block, row = divmod(position, self._folder.spec.shard_rows)
        return self._view(slot, block)[row].clone()

    def take(self, positions: np.ndarray, slots: list[int], into: torch.Tensor) -> None:
        """Copy rows: positions int64 `[k]`, all there, into contiguous host memory `[k, len(slots), d_model]`.

        Raises:
            IncompleteError, CorruptError: as `row`; what `into` holds then is undefined.
        """
        blocks, within = np.divmod(positions, self._folder.spec.shard_rows)
        order = np.argsort(blocks, kind="stable")
        for start, stop in alike(blocks[order]):
            picked = order[start:stop]
            place, at = torch.from_numpy(picked), torch.from_numpy(within[picked])
            for number, slot in enumerate(slots):
                into[place, number] = self._view(slot, int(blocks[picked[0]]))[at]

    def forget(self) -> None:
        """Let go of every map; they come back as they are needed."""
        with self._lock:
            self._files.clear()
