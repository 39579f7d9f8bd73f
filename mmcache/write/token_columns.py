"""`tokens`, `flags` and `sequences`: small arrays, in the same kind of shard, whose last shard is rewritten."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mmcache.format.shard import encode
from mmcache.storage.shard_folder import ShardFolder
from mmcache.system.atomic import publish_all, remove_drafts

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from mmcache.format.manifest import Manifest

__all__ = ["Column", "publish_columns"]


class Column:
    """One of the three arrays while it grows: in memory from the shard on that may still change.

    Args:
        path: the store.
        manifest: what the store says of itself.
        array: `tokens`, `flags` or `sequences`.
        total: rows that are committed.
    """

    def __init__(self, path: Path, manifest: Manifest, array: str, total: int) -> None:
        self._path, self._manifest, self._array = path, manifest, array
        self._spec = manifest.spec(array)
        since = max(0, total - 1) // self._spec.shard_rows * self._spec.shard_rows
        self._dirty = False
        rows = np.empty((0, *self._spec.row_shape), self._spec.dtype.numpy)
        if total:
            folder = ShardFolder(path, manifest, array, total)
            rows = folder.checked(0, since // self._spec.shard_rows).numpy().copy()
        # The first row in memory, and the rows: together, so that an interrupt cannot come in between.
        self._held = (since, [rows])
        remove_drafts(path, array)

    def __len__(self) -> int:
        since, parts = self._held
        return since + sum(map(len, parts))

    def extend(self, rows: np.ndarray) -> None:
        """Append rows."""
        self._dirty = True
        self._held[1].append(rows.astype(self._spec.dtype.numpy))

    def last(self) -> np.ndarray:
        """Give the last row, to be read or changed in place: the column must have one."""
        self._dirty = True
        last: np.ndarray = self._held[1][-1][-1]
        return last

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows `[stop - start, …]`, whether they are on disk yet or not.

        Raises:
            CorruptError, IncompleteError: what is on disk is damaged, or gone.
        """
        since, rows = self._together()
        found = rows[max(0, start - since) : max(0, stop - since)]
        if start < since:
            # Whole shards, and durable, since they were let go of; whether the root counts them yet or not.
            folder = ShardFolder(self._path, self._manifest, self._array, since)
            found = np.concatenate([folder.read(start, min(stop, since)).numpy(), found])
        return found

    def _together(self) -> tuple[int, np.ndarray]:
        """Put what is in memory together: the number of its first row, and the rows."""
        since, parts = self._held
        if len(parts) > 1:
            parts = [np.concatenate(parts)]
            self._held = since, parts
        return since, parts[0]

    def _changed(self) -> dict[str, bytes]:
        """The shards that changed, by their names in the store."""
        if not self._dirty:
            return {}
        spec, files = self._spec, {}
        since, rows = self._together()
        for start in range(0, len(rows), spec.shard_rows):
            block = (since + start) // spec.shard_rows
            metadata = self._manifest.shard_metadata(self._array, block)
            files[f"{self._array}/{self._manifest.shard_key(self._array, block)}"] = encode(
                spec, rows[start : start + spec.shard_rows], metadata
            )
        return files

    def _settle(self) -> None:
        """Let go of all but the last row's shard: it may be extended, or its last sequence continued."""
        if self._dirty:
            since, rows = self._together()
            full = max(0, len(rows) - 1) // self._spec.shard_rows * self._spec.shard_rows
            self._held = since + full, [rows[full:].copy()]
            self._dirty = False


def publish_columns(path: Path, columns: Collection[Column]) -> None:
    """Put those shards of some columns in place that changed; blocks until they and their names are durable."""
    files = [column._changed() for column in columns]  # noqa: SLF001 -- of the module's own class
    publish_all(path, {file: data for changed in files for file, data in changed.items()})
    for column in columns:
        column._settle()  # noqa: SLF001
