"""Row ranges prefetched from a bucket: mapped files of the disk cache, without a file descriptor each (`Extents`)."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import weakref
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from mmcache.errors import IncompleteError
from mmcache.format.shard import HEADER_BYTES
from mmcache.storage.disk_cache import identity
from mmcache.storage.mirror import CHECKSUM_BYTES
from mmcache.system.files import close_read, map_file, open_file
from mmcache.system.memory import PAGE
from mmcache.system.syscalls import LINUX, map_over, release, reserve

if TYPE_CHECKING:
    from pathlib import Path

    from mmcache.storage.disk_cache import Identity
    from mmcache.storage.shard_folder import ShardFolder

__all__ = ["Extents"]


class _Extent(NamedTuple):
    """Rows of a shard from `start` to before `stop`, `[stop - start, *row_shape]`, and the file that they are in.

    `copy` identifies the file as it was when mapped: nothing is read from a file that has changed since.
    """

    start: int
    stop: int
    path: Path
    copy: Identity | None
    rows: torch.Tensor


class Extents:
    """The prefetched row ranges of one site. Safe to use from several threads.

    Args:
        folder: the site's shards, in a bucket.
    """

    def __init__(self, folder: ShardFolder) -> None:
        self._folder = folder
        self._found: dict[tuple[int, int], list[_Extent]] = {}
        self._lock = threading.Lock()

    def bring(self, shard: tuple[int, int], start: int, stop: int) -> None:
        """Fetch rows from `start` to before `stop` of a shard; blocks until done. Errors as `Mirror.extent`."""
        if self.covered(shard, np.arange(start, stop)).all():
            return
        spec = self._folder.spec
        remote, array = self._folder.remote, self._folder.array
        if remote is None:
            raise AssertionError("the store is not in a bucket")
        begin, end = (HEADER_BYTES + row * spec.row_bytes for row in (start, stop))
        pages = None
        while pages is None:
            path = remote.extent(array, self._folder.key(*shard), begin, end)
            copy = identity(path)
            # The file may have been evicted since.
            with contextlib.suppress(IncompleteError):
                pages = _mapped(path)
        rows = torch.from_numpy(pages[:-CHECKSUM_BYTES]).view(spec.dtype.torch).view(stop - start, *spec.row_shape)
        with self._lock:
            there = [*self._found.get(shard, ()), _Extent(start, stop, path, copy, rows)]
            # Replaced, never changed: other threads may be reading the list.
            self._found[shard] = sorted(there, key=lambda extent: extent.start)
        if identity(path) != copy:
            # Evicted or changed before it was recorded here.
            self.forget()

    def _there(self, shard: tuple[int, int]) -> list[_Extent]:
        # If the file is gone, its mapped memory is still valid.
        return [extent for extent in self._found.get(shard, ()) if identity(extent.path) in (None, extent.copy)]

    def covered(self, shard: tuple[int, int], rows: np.ndarray) -> np.ndarray:
        """Which rows `[n]` of a shard are here: `[n]` bool."""
        there = np.zeros(len(rows), bool)
        for extent in self._there(shard):
            there |= (rows >= extent.start) & (rows < extent.stop)
        return there

    def take(self, shard: tuple[int, int], rows: np.ndarray) -> tuple[np.ndarray, torch.Tensor]:
        """Those of the rows `[n]` of a shard that are here: their indices into `rows`, and a copy `[m, *row_shape]`."""
        which, found = [], []
        left = np.ones(len(rows), bool)
        for extent in self._there(shard):
            inside = np.flatnonzero(left & (rows >= extent.start) & (rows < extent.stop))
            if len(inside):
                left[inside] = False
                which.append(inside)
                found.append(extent.rows[torch.from_numpy(rows[inside] - extent.start)])
        if not which:
            return np.empty(0, np.int64), torch.empty((0, *self._folder.spec.row_shape))
        return np.concatenate(which), torch.cat(found)

    def forget(self) -> None:
        """Drop ranges whose files were deleted, which frees their disk space, or changed."""
        with self._lock:
            for shard, extents in list(self._found.items()):
                self._found[shard] = [extent for extent in extents if identity(extent.path) == extent.copy]


def _mapped(path: Path) -> np.ndarray:
    """Map a file for reading, as `map_file`, but on Linux without keeping a file descriptor."""
    if not LINUX:
        return map_file(path, what=str(path))
    fd, status = open_file(path, what=str(path))
    try:
        # In whole pages: only these can be unmapped.
        size = -(-status.size // PAGE) * PAGE
        address = reserve(size, 0)
        try:
            map_over(address, size, fd, 0)
            memory = (ctypes.c_uint8 * status.size).from_address(address)
            weakref.finalize(memory, release, address, size).atexit = False
        except BaseException:
            release(address, size)
            raise
    finally:
        close_read(fd)
    return np.ctypeslib.as_array(memory)
