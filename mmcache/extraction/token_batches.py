"""The batches of a plan, read from the store.

Each is a function of the plan alone: batch number `b` is sequences `b * batch_size` to `(b + 1) * batch_size`, padded
on the right to the longest, whoever runs it and whenever. Where the plan says `equal_lengths`, because padding would
show in what others get, such a group is run in parts: each is what follows each other in it with one length.
"""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING

import numpy as np

from mmcache.format.shard import ids_digest
from mmcache.format.token_flags import counted
from mmcache.storage.shard_folder import ShardFolder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from mmcache.format.manifest import Manifest

__all__ = ["Batches"]


class _Window:
    """A column read piece by piece: the last shard that was asked for is kept."""

    def __init__(self, path: Path, manifest: Manifest, array: str, rows: int) -> None:
        self._folder = ShardFolder(path, manifest, array, rows)
        self._block, self._rows = -1, np.empty(0)

    def read(self, start: int, stop: int) -> np.ndarray:
        size = self._folder.spec.shard_rows
        parts = []
        while start < stop:
            block, row = divmod(start, size)
            if block != self._block:
                self._block, self._rows = block, self._folder.checked(0, block).numpy().copy()
            parts.append(self._rows[row : row + stop - start])
            start += len(parts[-1])
        return np.concatenate(parts)


def parts_of_one_length(group: np.ndarray) -> list[np.ndarray]:
    """A batch `[sequences, 3]` cut wherever the length of a sequence is not that of the one before."""
    lengths = group[:, 1] - group[:, 0]
    return np.split(group, np.flatnonzero(np.diff(lengths)) + 1)


class Batches:
    """The batches of a plan, as token ids, in memory that does not grow with the corpus."""

    def __init__(self, path: Path, manifest: Manifest, batch_size: int) -> None:
        self.size, self._sequences = batch_size, manifest.n_sequences
        total = manifest.n_tokens or 0
        self._equal_lengths = bool(manifest.source.get("equal_lengths"))
        self._spans = _Window(path, manifest, "sequences", manifest.n_sequences)
        self._tokens = _Window(path, manifest, "tokens", total)
        self._flags = _Window(path, manifest, "flags", total)
        self._left_out = manifest.left_out

    def spans(self, start: int = 0) -> Iterator[np.ndarray]:
        """Give start, stop and document of the sequences of each batch, `[sequences, 3]`, from token `start` on.

        That is from the batch on that the token is in.
        """
        batches = range(0, self._sequences, self.size)
        # Most of a store may be there already: what comes before is not read.
        before = bisect.bisect_right(batches, start, key=lambda first: int(self._spans.read(first, first + 1)[0, 0]))
        for first in batches[max(0, before - 1) :]:
            group = self._spans.read(first, min(first + self.size, self._sequences))
            yield from parts_of_one_length(group) if self._equal_lengths else [group]

    def ids(self, spans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Give ids and attention mask of a batch: `[sequences, longest]` int64, padded on the right with 0."""
        lengths = spans[:, 1] - spans[:, 0]
        ids = np.zeros((len(spans), int(lengths.max())), np.int64)
        tokens = self._tokens.read(int(spans[0, 0]), int(spans[-1, 1]))
        for row, (start, stop) in enumerate(spans[:, :2] - spans[0, 0]):
            ids[row, : stop - start] = tokens[start:stop]
        return ids, (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)

    def digest(self, start: int, stop: int) -> str:
        """Hash the ids of some tokens, as a shard's header says them."""
        return ids_digest(self._tokens.read(start, stop))

    def keep(self, spans: np.ndarray) -> np.ndarray:
        """Tell which tokens of a batch count in the statistics: `[tokens]` bool."""
        return counted(self._flags.read(int(spans[0, 0]), int(spans[-1, 1])), self._left_out)
