"""`tokens`, `flags` and `sequences`: small arrays, in the same kind of shard, whose last shard is rewritten."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mmcache.draft import Draft, remove_drafts
from mmcache.files import make_folder, sync_folder
from mmcache.format import encode
from mmcache.shards import ShardFolder

if TYPE_CHECKING:
    from pathlib import Path

    from mmcache.manifest import Manifest

__all__ = ["Column"]


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
        self._since = max(0, total - 1) // self._spec.shard_rows * self._spec.shard_rows
        self._dirty = False
        rows = np.empty((0, *self._spec.row_shape), self._spec.dtype.numpy)
        if total:
            folder = ShardFolder(path, manifest, array, total)
            rows = folder.checked(0, self._since // self._spec.shard_rows).numpy().copy()
        self._parts = [rows]
        remove_drafts(path / array)

    def __len__(self) -> int:
        return self._since + sum(map(len, self._parts))

    def extend(self, rows: np.ndarray) -> None:
        """Append rows."""
        self._parts.append(rows.astype(self._spec.dtype.numpy))
        self._dirty = True

    def last(self) -> np.ndarray:
        """Give the last row, to be read or changed in place: the column must have one."""
        self._dirty = True
        last: np.ndarray = self._parts[-1][-1]
        return last

    def publish(self) -> None:
        """Put the shards that changed in place; blocks until they and their names are durable."""
        if not self._dirty:
            return
        spec = self._spec
        make_folder(self._path / self._array)
        rows = np.concatenate(self._parts)
        for start in range(0, len(rows), spec.shard_rows):
            block = (self._since + start) // spec.shard_rows
            metadata = self._manifest.shard_metadata(self._array, block)
            data = encode(spec, rows[start : start + spec.shard_rows], metadata)
            draft = Draft(self._path / self._array / self._manifest.shard_key(self._array, block))
            try:
                draft.write(np.frombuffer(data, np.uint8), 0)
                draft.publish(len(data))
            except BaseException:
                draft.discard()
                raise
        sync_folder(self._path / self._array)
        # The last row's shard stays: it may be extended, or its last sequence continued.
        full = max(0, len(rows) - 1) // spec.shard_rows * spec.shard_rows
        self._parts, self._since = [rows[full:].copy()], self._since + full
        self._dirty = False
