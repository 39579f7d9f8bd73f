"""What a store knows of its tokens beside their activations: ids, flags and the sequences that they are in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from mmcache.errors import CorruptError
from mmcache.read.sequences import Sequences
from mmcache.storage.shard_folder import MANY

if TYPE_CHECKING:
    from collections.abc import Callable

    from mmcache.format.manifest import Manifest
    from mmcache.storage.shard_folder import ShardFolder

__all__ = ["TokenArrays"]

# What stands for the ids and flags of a store that has none, as a cache.
_UNKNOWN = {"tokens": -1, "flags": 0}


class TokenArrays:
    """The arrays `tokens`, `flags` and `sequences` of one store; what is read as a whole is kept.

    Args:
        manifest: what the store says of itself.
        folder: gives the shards of an array.
        where: the store, for people.
    """

    def __init__(self, manifest: Manifest, folder: Callable[[str], ShardFolder], where: str) -> None:
        self._manifest, self._folder, self._where = manifest, folder, where
        self._whole: dict[str, torch.Tensor] = {}
        self._sequences: Sequences | None = None

    def whole(self, array: str) -> torch.Tensor:
        """Read all of `tokens` or `flags`: `[n_tokens]`; shared by all who ask."""
        found = self._whole.get(array)
        if found is None:
            found = self._whole[array] = self._read(array)
        return found

    def _read(self, array: str) -> torch.Tensor:
        total = self._manifest.n_tokens or 0
        if self._manifest.has_tokens:
            return self._folder(array).read(0, total)
        # Of a small cache, some shards may be lost.
        if total >= MANY:
            self._folder(next(iter(self._manifest.sites))).believe_rows(0, total)
        return self._unknown(array, total)

    def piece(self, array: str, start: int, stop: int) -> torch.Tensor:
        """Read `tokens` or `flags` from `start` to before `stop`, which are there, and no others."""
        if array in self._whole:
            return self._whole[array][start:stop]
        if not self._manifest.has_tokens:
            return self._unknown(array, stop - start)
        return self._folder(array).read(start, stop)

    def _unknown(self, array: str, count: int) -> torch.Tensor:
        return torch.full((count,), _UNKNOWN[array], dtype=self._manifest.spec(array).dtype.torch)

    @property
    def sequences(self) -> Sequences:
        """The contexts that the model saw, in order; together they are all the tokens.

        Raises:
            CorruptError: they do not follow each other.
        """
        if self._sequences is None:
            self._sequences = self._read_sequences()
        return self._sequences

    def _read_sequences(self) -> Sequences:
        total, count = self._manifest.n_tokens or 0, self._manifest.n_sequences
        if self._manifest.has_tokens:
            spans = self._folder("sequences").read(0, count).numpy()
            if len(spans) and self._manifest.kind == "grown":
                # A crash may leave the last one continued further than what counts.
                spans[-1, 1] = min(spans[-1, 1], total)
        else:
            spans = np.array([[0, total, 0]][:count], np.int64).reshape(-1, 3)
        edges = np.append(spans[:, 0], total)
        if (edges[0] if len(spans) else total) or (spans[:, 1] != edges[1:]).any():
            raise CorruptError(f"{self._where}: its sequences do not follow each other up to {total} tokens")
        return Sequences(spans)
