"""Rows of one site, the careful way: read, never mapped, and each inner chunk's checksum compared.

A file that is cut short, replaced or damaged while it is read is an error, whatever the moment. A row costs the inner
chunk that it lies in, of up to 4 MiB.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from mmcache.system.direct_io import alike

if TYPE_CHECKING:
    from mmcache.storage.shard_folder import ShardFolder

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
        blocks, within = np.divmod(positions[order], spec.shard_rows)
        # Each file with the layers wanted of its rows, and their places among the slots: in the layer layout each slot
        # is a file of its own, in the token layout all of them are in one.
        files = [(0, slots, list(range(len(slots))))]
        if self._layer_layout:
            files = [(slot, [0], [place]) for place, slot in enumerate(slots)]
        for start, stop in alike(blocks):
            chunks = within[start:stop] // spec.chunk_rows
            wanted = [(start + first, start + last) for first, last in alike(chunks)]
            numbers = [int(chunks[first - start]) for first, _ in wanted]
            for file, inside, places in files:
                found = self._folder.chunks(file, int(blocks[start]), numbers)
                for (first, last), (number, data) in zip(wanted, found, strict=True):
                    rows = torch.from_numpy(data).view(spec.dtype.torch).view(spec.chunk_rows, -1, spec.row_shape[-1])
                    at = torch.from_numpy(within[first:last] - number * spec.chunk_rows)
                    into[torch.from_numpy(order[first:last])[:, None], places] = rows[at][:, inside]

    def forget(self) -> None:
        """Do nothing: it keeps nothing."""
