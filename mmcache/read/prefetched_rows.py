"""Stretches of rows that were read ahead from a bucket: files of the cache, mapped without a descriptor each."""

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

    And what the file was when it was mapped: nothing is read of one that somebody wrote to.
    """

    start: int
    stop: int
    path: Path
    copy: Identity | None
    rows: torch.Tensor


class Extents:
    """The stretches of one site that are here. Safe to use from several threads.

    Args:
        folder: the site's shards, in a bucket.
    """

    def __init__(self, folder: ShardFolder) -> None:
        self._folder = folder
        self._found: dict[tuple[int, int], list[_Extent]] = {}
        self._lock = threading.Lock()

    def bring(self, shard: tuple[int, int], start: int, stop: int) -> None:
        """Bring rows from `start` to before `stop` of a shard here; blocks until then. Errors as `Mirror.extent`."""
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
            # Others may have made room in the cache since.
            with contextlib.suppress(IncompleteError):
                pages = _mapped(path)
        rows = torch.from_numpy(pages[:-CHECKSUM_BYTES]).view(spec.dtype.torch).view(stop - start, *spec.row_shape)
        with self._lock:
            there = [*self._found.get(shard, ()), _Extent(start, stop, path, copy, rows)]
            # Replaced, never changed: others may be reading the list.
            self._found[shard] = sorted(there, key=lambda extent: extent.start)
        if identity(path) != copy:
            # It went before it was noted here.
            self.forget()

    def _there(self, shard: tuple[int, int]) -> list[_Extent]:
        # Of one whose file is gone, the memory is still what it was.
        return [extent for extent in self._found.get(shard, ()) if identity(extent.path) in (None, extent.copy)]

    def covered(self, shard: tuple[int, int], rows: np.ndarray) -> np.ndarray:
        """Tell which rows of a shard, `[n]`, are here: `[n]` bool."""
        there = np.zeros(len(rows), bool)
        for extent in self._there(shard):
            there |= (rows >= extent.start) & (rows < extent.stop)
        return there

    def take(self, shard: tuple[int, int], rows: np.ndarray) -> tuple[np.ndarray, torch.Tensor]:
        """Copy those rows of a shard that are here: which of `[n]` these are, and `[m, *row_shape]`."""
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
        """Let go of those whose files are gone, so that the disk has its room back, or were written to."""
        with self._lock:
            for shard, extents in list(self._found.items()):
                self._found[shard] = [extent for extent in extents if identity(extent.path) == extent.copy]


def _mapped(path: Path) -> np.ndarray:
    """Map a file for reading, as `map_file`, and keep no descriptor where the system can do without."""
    if not LINUX:
        return map_file(path, what=str(path))
    fd, status = open_file(path, what=str(path))
    try:
        # In whole pages, which alone can be given back.
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
