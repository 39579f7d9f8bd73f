"""Rows of one site, the careful way: read, never mapped, and each inner chunk's checksum compared.

A file that is cut short, replaced or damaged while it is read is an error, whatever the moment. A row costs the inner
chunk that it lies in, of up to 4 MiB.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from mmcache.shards import ShardFolder

__all__ = ["CheckedRows"]


class CheckedRows:
    """The rows of one site. Safe to use from several threads; reading blocks until the chunks are read.

    Args:
        folder: the site's shards.
        layout: the store's.
    """

    def __init__(self, folder: ShardFolder, layout: str) -> None:
        self._folder, self._layer_layout = folder, layout == "layer"

    def row(self, slot: int, position: int) -> torch.Tensor:
        """Copy one row: `[d_model]`. Raises IncompleteError or CorruptError, as `ShardFolder.chunks`."""
        row = torch.empty((1, 1, self._folder.spec.row_shape[-1]), dtype=self._folder.spec.dtype.torch)
        self.take(np.array([position]), [slot], row)
        return row[0, 0]

    def take(self, positions: np.ndarray, slots: list[int], into: torch.Tensor) -> None:
        """Copy rows: positions int64 `[k]`, all there, into contiguous host memory `[k, len(slots), d_model]`.

        Raises:
            IncompleteError, CorruptError: as `row`; what `into` holds then is undefined.
        """
        spec = self._folder.spec
        order = np.argsort(positions, kind="stable")
        ascending = positions[order]
        blocks = ascending // spec.shard_rows
        edges = [*np.flatnonzero(np.diff(blocks, prepend=-1)), len(order)]
        # In the layer layout each slot is a file of its own, in the token layout all of them are in one.
        groups = [(slot, [number]) for number, slot in enumerate(slots)] if self._layer_layout else [(0, None)]
        for start, stop in pairwise(edges):
            block = int(blocks[start])
            within = ascending[start:stop] - block * spec.shard_rows
            for file, numbers in groups:
                self._take(file, block, within, order[start:stop], slots, numbers, into)

    def _take(
        self,
        file: int,
        block: int,
        within: np.ndarray,
        places: np.ndarray,
        slots: list[int],
        numbers: list[int] | None,
        into: torch.Tensor,
    ) -> None:
        """Copy ascending rows of one file to their places; `numbers` are the slots' places, None for all of them."""
        spec = self._folder.spec
        chunks = within // spec.chunk_rows
        edges = [*np.flatnonzero(np.diff(chunks, prepend=-1)), len(within)]
        wanted = iter(pairwise(edges))
        for number, data in self._folder.chunks(file, block, chunks[edges[:-1]].tolist()):
            start, stop = next(wanted)
            rows = torch.from_numpy(data).view(spec.dtype.torch).view(spec.chunk_rows, *spec.row_shape)
            at = torch.from_numpy(within[start:stop] - number * spec.chunk_rows)
            place = torch.from_numpy(places[start:stop])
            if numbers is None:
                into[place] = rows[at][:, slots]
            else:
                into[place, numbers[0]] = rows[at]

    def forget(self) -> None:
        """Do nothing: it keeps nothing."""
