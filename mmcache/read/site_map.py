"""One site as one range of addresses: `AddressSpace` maps many files, `SiteMap` knows where each row lies.

With many files in one window of address space, a terabyte is one array and a row is an offset. Each file has a place of
the same size, and is mapped there when first needed; no file descriptor is kept. Memory that is not mapped must not be
touched: check `mapped`. A window costs maps (`vm.max_map_count`) and page tables. When these run out, all of it is
unmapped at once: mapping a file again takes microseconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import math
import os
import threading
import time
import weakref
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from mmcache.format.shard import HEADER_BYTES
from mmcache.system.files import REFUSALS, Descriptor, close_read
from mmcache.system.memory import PAGE, available_memory
from mmcache.system.os_errors import our_error
from mmcache.system.syscalls import Residency, map_over, page_table_bytes, populate, release, reserve, unmap_over
from mmcache.system.threads import pieces

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from mmcache.storage.shard_folder import ShardFolder

__all__ = ["SAMPLES", "AddressSpace", "Files", "SiteMap", "Table"]

# Maps that Linux allows a process by default. A map between two gaps takes two of them, and other code needs some.
_DEFAULT_MAPS = 65530
_SHARE = 4
# Reads between checks of the page tables, which take tens of microseconds.
_CHECK_EVERY = 1 << 17

_WINDOWS: weakref.WeakSet[AddressSpace] = weakref.WeakSet()


def _most_maps() -> int:
    with contextlib.suppress(OSError, ValueError):
        return max(16, int(Path("/proc/sys/vm/max_map_count").read_text()) // _SHARE)
    return _DEFAULT_MAPS // _SHARE


class AddressSpace:
    """`count` places of `place_bytes` each, side by side, for the content of files from `offset` on; both whole pages.

    Reading is safe from several threads, if each reads like this, and checks `mapped` after `enter`:

        window.enter()
        try:
            if all the places needed are mapped: read
        finally:
            window.leave()

    and calls `map` for missing places outside of it. `array` is the whole window, `[count * place_bytes]` uint8:
    it must never be written to and never reach a user. No more than `most_maps` places are mapped at a time.

    Raises:
        OSError: not enough address space.
    """

    def __init__(self, place_bytes: int, count: int, offset: int) -> None:
        self.place_bytes, self.count, self._offset = place_bytes, count, offset
        size = place_bytes * count
        self.address = reserve(size, offset)
        self._release = weakref.finalize(self, release, self.address, size)
        self._release.atexit = False
        self.array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.address))
        # The same flags twice: a bytearray is faster for one, numpy for many.
        self.flags = bytearray(count)
        self.mapped = np.frombuffer(self.flags, bool)
        # For the owner's use, reset with the maps: places whose page tables were filled.
        self.filled = bytearray(count)
        self.populated = np.frombuffer(self.filled, bool)
        self._maps = 0
        self._reset()
        self.most_maps = _most_maps()
        self._most_tables = available_memory() // 16
        self._unchecked = 0
        _WINDOWS.add(self)

    def _reset(self) -> None:
        """Start without readers inside: a fork does not have the threads that were."""
        self._lock = threading.Lock()
        # For the owner's use, as `populated`: held while files are opened.
        self.opening = threading.Lock()
        # Its length is the number of readers inside. Append and pop are atomic, and cheaper than any lock.
        self._inside: deque[None] = deque()
        self.leave = self._inside.pop

    def enter(self) -> None:
        """Begin a read: nothing is unmapped until `leave`."""
        self._inside.append(None)

    def map(self, place: int, fd: int, size: int) -> None:
        """Map `size` bytes of a file, whole pages, to a place; the file descriptor may be closed afterwards."""
        with self._lock:
            if self.flags[place]:
                return
            if self._maps >= self.most_maps:
                self._forget()
            try:
                map_over(self.address + place * self.place_bytes, size, fd, self._offset)
            except OSError:
                # Too many maps in this process: other windows and libraries use some too.
                self._forget()
                try:
                    map_over(self.address + place * self.place_bytes, size, fd, self._offset)
                except OSError as error:
                    raise our_error(error) from error
            self._maps += 1
            self.flags[place] = True

    def tally(self, reads: int) -> None:
        """Count reads that may have touched new pages; unmap everything if the page tables became too large."""
        self._unchecked += reads
        if self._unchecked >= _CHECK_EVERY:
            self._unchecked = 0
            if page_table_bytes() > self._most_tables:
                self.forget()

    def forget(self) -> None:
        """Unmap everything, once no reader is inside; places are mapped again when needed."""
        with self._lock:
            self._forget()

    def _forget(self) -> None:
        # Flags first: a reader that enters from now on finds nothing mapped, and waits for the lock in `map`.
        self.mapped[:] = self.populated[:] = False
        while self._inside:
            time.sleep(0.0001)
        if self._maps:
            unmap_over(self.address, self.place_bytes * self.count)
        self._maps = 0


def _in_fork() -> None:
    for window in list(_WINDOWS):
        window._reset()  # noqa: SLF001 -- this module's own


os.register_at_fork(after_in_child=_in_fork)


# Rows, or places in a shard, that are checked to conclude that all is in memory.
SAMPLES = 8
# The most places of a window, two bytes each; metadata that counts more shards is hardly true.
_MOST_PLACES = 1 << 23
# Shards whose page tables are filled at a time, at 2 to 12 ms each.
_MOST_POPULATED = 64


class Table(NamedTuple):
    """The site's memory as rows of one kind, `[rows, layers of each, d_model]`; rows per shard; bytes per row."""

    tensor: torch.Tensor
    rows_per_file: int
    row_bytes: int


class Files(NamedTuple):
    """The site's files as rows of one kind: a `direct_io.Source`."""

    site: SiteMap
    rows_per_file: int

    @property
    def data_offset(self) -> int:
        """Offset of a file's first row."""
        return HEADER_BYTES

    @property
    def alignment(self) -> int:
        """Bytes that offset and size of a direct read must be multiples of."""
        return self.site.alignment

    def descriptors(self, files: Collection[int]) -> Mapping[int, Descriptor]:
        """Open files for direct reading."""
        return self.site.opened(files)


class SiteMap:
    """The files of one site, mapped when first needed. Safe to use from several threads.

    `rows` and `records` are the same memory: as rows of one layer, and as all that a file has of a token. They may
    only be read, within `mapped_for` or as `AddressSpace` describes, and must never reach a user.

    Args:
        folder: the site's shards.
        layout: the store's layout.
        n_layers: the number of layers; a slot is a layer's index among them.
        most_open: file descriptors to keep for direct reads.

    Raises:
        OSError: not enough address space, or too many shards.
    """

    def __init__(self, folder: ShardFolder, layout: str, n_layers: int, most_open: int) -> None:
        self._folder = folder
        by_layer, spec = layout == "layer", folder.spec
        self._blocks = spec.blocks(folder.rows)
        place_bytes = spec.shard_rows * spec.row_bytes
        if self._blocks == 1:
            # Its rows need not fill whole pages, but its place must hold whole pages and whole rows.
            both = math.lcm(PAGE, spec.row_bytes)
            place_bytes = -(-folder.rows * spec.row_bytes // both) * both
        places = self._blocks * (n_layers if by_layer else 1)
        if places > _MOST_PLACES:
            raise OSError(errno.ENOMEM, f"{places} shards are more than a window has places for")
        self.window = AddressSpace(place_bytes, places, HEADER_BYTES)
        flat = torch.from_numpy(self.window.array).view(spec.dtype.torch)
        row_bytes = spec.row_shape[-1] * spec.dtype.size
        self.rows = Table(flat.view(-1, 1, spec.row_shape[-1]), place_bytes // row_bytes, row_bytes)
        records = flat.view(-1, math.prod(spec.row_shape[:-1]), spec.row_shape[-1])
        self.records = Table(records, place_bytes // spec.row_bytes, spec.row_bytes)
        # Distance in rows between two layers, and between two positions.
        self.layer_step = self._blocks * self.rows.rows_per_file if by_layer else 1
        self.position_step = 1 if by_layer else n_layers
        self.residency = Residency(spec.row_bytes)
        # Whether mincore tells us what is in memory (only a file's owner), and the alignment of direct reads.
        self.owned, self.alignment = False, PAGE
        self.descriptors: dict[int, Descriptor] = {}
        self.most_open = most_open

    def _bytes_of(self, place: int) -> int:
        """Bytes of the whole pages that a shard's rows take."""
        spec = self._folder.spec
        return -(-spec.rows_in_block(place % self._blocks, self._folder.rows) * spec.row_bytes // PAGE) * PAGE

    def map(self, place: int) -> None:
        """Map a shard. Raises IncompleteError or CorruptError, as `ShardFolder.open_file`."""
        fd, status = self._folder.open_file(*divmod(place, self._blocks))
        try:
            self.alignment = status.alignment
            self.owned = os.geteuid() in (0, status.owner)
            self.window.map(place, fd, self._bytes_of(place))
        finally:
            close_read(fd)

    def cached(self, table: Table, rows: np.ndarray) -> float:
        """The fraction of some rows that is in memory."""
        with self.mapped_for(table, rows):
            if self.owned:
                start, size = self.window.address, table.row_bytes
                return sum(self.residency.whole(start + row * size, size) for row in rows.tolist()) / len(rows)
        # Others than the owner can only find out by a read that may not wait.
        return sum(self.is_cached(table, row) for row in rows.tolist()) / len(rows)

    def is_cached(self, table: Table, row: int) -> bool:
        """Whether a row is in memory; it need not be mapped."""
        place, within = divmod(row, table.rows_per_file)
        fd, _ = self._folder.open_file(*divmod(place, self._blocks))
        try:
            room, offset = bytearray(table.row_bytes), HEADER_BYTES + within * table.row_bytes
            return os.preadv(fd, [room], offset, os.RWF_NOWAIT) == len(room)
        except OSError as error:
            if error.errno not in REFUSALS:
                raise our_error(error) from error
            return False
        finally:
            close_read(fd)

    @contextlib.contextmanager
    def mapped_for(self, table: Table, rows: np.ndarray) -> Iterator[None]:
        """Map the shards of some rows, and keep them mapped until the `with` ends."""
        window = self.window
        while True:
            if not self._mapped(table, rows):
                for place in np.unique(rows // table.rows_per_file).tolist():
                    if not window.flags[place]:
                        self.map(place)
            window.enter()
            try:
                if self._mapped(table, rows):
                    yield
                    return
            finally:
                window.leave()

    def _mapped(self, table: Table, rows: np.ndarray) -> bool:
        mapped = self.window.mapped
        return 0 not in self.window.flags or all(
            mapped[rows[some] // table.rows_per_file].all() for some in pieces(len(rows), len(rows))
        )

    def opened(self, places: Collection[int]) -> Mapping[int, Descriptor]:
        """File descriptors of shards for direct reading, opened if necessary."""
        found = {place: there for place in places if (there := self.descriptors.get(place))}
        missing = [place for place in places if place not in found]
        if missing:
            # Otherwise threads that start together would each open all of them.
            with self.window.opening:
                for place in missing:
                    found[place] = self.descriptors.get(place) or self._open(place)
        return found

    def _open(self, place: int) -> Descriptor:
        fd, status = self._folder.open_file(*divmod(place, self._blocks), direct=True)
        made, self.alignment = Descriptor(fd), status.alignment
        self.descriptors[place] = made
        # `forget` does not take the lock: each of these steps is atomic.
        for old in list(self.descriptors)[: -self.most_open]:
            self.descriptors.pop(old, None)
        return made

    def populate(self) -> None:
        """Fill the page tables of mapped shards that are wholly in memory, which saves each row a page fault."""
        window = self.window
        for place in np.flatnonzero(window.mapped & ~window.populated)[:_MOST_POPULATED].tolist():
            address, size = window.address + place * window.place_bytes, self._bytes_of(place)
            window.enter()
            try:
                window.populated[place] = True
                some = range(0, size, max(PAGE, size // SAMPLES))
                if window.flags[place] and all(self.residency.whole(address + at, 1) for at in some):
                    populate(address, size)
            finally:
                window.leave()

    def check(self, table: Table, rows: np.ndarray) -> None:
        """Raise CorruptError or IncompleteError if the shard of one of the rows is gone, truncated or replaced."""
        for place in np.unique(rows // table.rows_per_file).tolist():
            close_read(self._folder.open_file(*divmod(place, self._blocks))[0])

    def forget(self) -> None:
        """Drop every map and file descriptor; they are made again when needed."""
        self.window.forget()
        self.descriptors.clear()
