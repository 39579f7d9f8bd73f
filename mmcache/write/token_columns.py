"""Writing `tokens`, `flags` and `sequences`: small arrays of ordinary shards, whose last shard is rewritten."""

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
    """One of the three arrays while it grows; the shards that may still change are in memory.

    Args:
        path: the store's folder.
        manifest: the store's metadata.
        array: `tokens`, `flags` or `sequences`.
        total: the number of committed rows.
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
        # The number of the first row in memory, and the rows: one value, so that no interrupt can separate them.
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
        """The last row, to be read or changed in place; the column must have one."""
        self._dirty = True
        last: np.ndarray = self._held[1][-1][-1]
        return last

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows `[stop - start, …]`, from memory or disk.

        Raises:
            CorruptError, IncompleteError: the rows on disk are damaged, or missing.
        """
        since, rows = self._together()
        found = rows[max(0, start - since) : max(0, stop - since)]
        if start < since:
            # Whole shards, already durable, whether or not the root counts them yet.
            folder = ShardFolder(self._path, self._manifest, self._array, since)
            found = np.concatenate([folder.read(start, min(stop, since)).numpy(), found])
        return found

    def _together(self) -> tuple[int, np.ndarray]:
        """Merge the rows in memory: returns the number of the first, and the rows."""
        since, parts = self._held
        if len(parts) > 1:
            parts = [np.concatenate(parts)]
            self._held = since, parts
        return since, parts[0]

    def _changed(self) -> dict[str, bytes]:
        """The content of the shards that changed, by their names in the store."""
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
        """Keep only the last row's shard in memory: it may be extended, or its last sequence continued."""
        if self._dirty:
            since, rows = self._together()
            full = max(0, len(rows) - 1) // self._spec.shard_rows * self._spec.shard_rows
            self._held = since + full, [rows[full:].copy()]
            self._dirty = False


def publish_columns(path: Path, columns: Collection[Column]) -> None:
    """Publish the changed shards of some columns; blocks until they and their names are durable."""
    files = [column._changed() for column in columns]  # noqa: SLF001 -- of the module's own class
    publish_all(path, {file: data for changed in files for file, data in changed.items()})
    for column in columns:
        column._settle()  # noqa: SLF001
