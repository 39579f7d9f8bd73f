"""One site as one range of addresses: where each row lies, which rows are in memory, and files for direct reads.

A window of address space on many files at once, so that a terabyte is one array and a row is an offset. Each file has a
place of the same size, and is mapped there when it is first needed; no descriptor is kept. What is not mapped may not
be touched: `mapped` tells. `vm.max_map_count` and the page tables are what a window costs, and when they run out all of
it is let go of at once: mapping a file again takes microseconds.
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

# A process may have 65,530 maps unless told otherwise, and a map between two gaps takes two of them. Others need some.
_DEFAULT_MAPS = 65530
_SHARE = 4
# So many reads may pass before the page tables are looked at, which takes tens of microseconds.
_CHECK_EVERY = 1 << 17

_WINDOWS: weakref.WeakSet[AddressSpace] = weakref.WeakSet()


def _most_maps() -> int:
    with contextlib.suppress(OSError, ValueError):
        return max(16, int(Path("/proc/sys/vm/max_map_count").read_text()) // _SHARE)
    return _DEFAULT_MAPS // _SHARE


class AddressSpace:
    """`count` places of `place_bytes` each, side by side, for what files hold from `offset` on; both in whole pages.

    Reading is safe from several threads, if each reads like this, and looks at `mapped` behind `enter`:

        window.enter()
        try:
            if all that is needed is mapped: read
        finally:
            window.leave()

    and calls `map` for what is not mapped outside of it. `array` is the whole window, `[count * place_bytes]` uint8:
    it must never be written to and never reach a user. No more than `most_maps` places are mapped at a time.

    Raises:
        OSError: there is not as much address space.
    """

    def __init__(self, place_bytes: int, count: int, offset: int) -> None:
        self.place_bytes, self.count, self._offset = place_bytes, count, offset
        size = place_bytes * count
        self.address = reserve(size, offset)
        self._release = weakref.finalize(self, release, self.address, size)
        self._release.atexit = False
        self.array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.address))
        # The same flags twice: a bytearray is quicker to ask for one, numpy for many.
        self.flags = bytearray(count)
        self.mapped = np.frombuffer(self.flags, bool)
        # For the reader's own use, forgotten with the maps: whose page tables were filled.
        self.filled = bytearray(count)
        self.populated = np.frombuffer(self.filled, bool)
        self._maps = 0
        self._reset()
        self.most_maps = _most_maps()
        self._most_tables = available_memory() // 16
        self._unchecked = 0
        _WINDOWS.add(self)

    def _reset(self) -> None:
        """Begin with nobody inside: in a fork, the threads that were are not there."""
        self._lock = threading.Lock()
        # For the reader's own use, as `populated`: held while its files are opened.
        self.opening = threading.Lock()
        # Its append and pop are atomic, and cheaper than any lock: its length is the number of readers inside.
        self._inside: deque[None] = deque()
        self.leave = self._inside.pop

    def enter(self) -> None:
        """Keep what is mapped until `leave`."""
        self._inside.append(None)

    def map(self, place: int, fd: int, size: int) -> None:
        """Map `size` bytes of a file, whole pages, to a place; the descriptor may be closed then."""
        with self._lock:
            if self.flags[place]:
                return
            if self._maps >= self.most_maps:
                self._forget()
            try:
                map_over(self.address + place * self.place_bytes, size, fd, self._offset)
            except OSError:
                # Too many maps in this process: other windows and libraries have some too.
                self._forget()
                try:
                    map_over(self.address + place * self.place_bytes, size, fd, self._offset)
                except OSError as error:
                    raise our_error(error) from error
            self._maps += 1
            self.flags[place] = True

    def tally(self, reads: int) -> None:
        """Count reads that may have touched new pages, and let go of everything where page tables grew too large."""
        self._unchecked += reads
        if self._unchecked >= _CHECK_EVERY:
            self._unchecked = 0
            if page_table_bytes() > self._most_tables:
                self.forget()

    def forget(self) -> None:
        """Let go of everything that is mapped, once nobody reads it; it comes back as it is needed."""
        with self._lock:
            self._forget()

    def _forget(self) -> None:
        # In this order: who enters from here on finds nothing mapped, and waits for the lock.
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


# How many places are looked at to tell whether all is in memory.
SAMPLES = 8
# Shards that a window has places for, two bytes each; a root that counts more is hardly true.
_MOST_PLACES = 1 << 23
# Page tables are filled for so many shards at a time, which takes 2 to 12 ms each.
_MOST_POPULATED = 64


class Table(NamedTuple):
    """The site's memory as rows of one kind, `[rows, layers of each, d_model]`.

    And how many of them a shard's place has, and the bytes of each.
    """

    tensor: torch.Tensor
    rows_per_file: int
    row_bytes: int


class Files(NamedTuple):
    """The site's files as rows of one kind: a `direct_io.Source`."""

    site: SiteMap
    rows_per_file: int

    @property
    def data_offset(self) -> int:
        """Where a file's first row begins."""
        return HEADER_BYTES

    @property
    def alignment(self) -> int:
        """What direct reads must be multiples of."""
        return self.site.alignment

    def descriptors(self, files: Collection[int]) -> Mapping[int, Descriptor]:
        """Open files for direct reading."""
        return self.site.opened(files)


class SiteMap:
    """The files of one site, mapped as they are needed. Safe to use from several threads.

    `rows` and `records` are the same memory, as rows of one layer and as what a file keeps of a token. They may only
    be read, behind `mapped_for` or as `AddressSpace` says, and never reach a user.

    Args:
        folder: the site's shards.
        layout: the store's.
        n_layers: how many layers there are; a slot is a layer's place among them.
        most_open: descriptors for direct reads that are kept.

    Raises:
        OSError: there is no address space for it, or there are too many shards.
    """

    def __init__(self, folder: ShardFolder, layout: str, n_layers: int, most_open: int) -> None:
        self._folder = folder
        by_layer, spec = layout == "layer", folder.spec
        self._blocks = spec.blocks(folder.rows)
        place_bytes = spec.shard_rows * spec.row_bytes
        if self._blocks == 1:
            # Its rows need not fill whole pages, its place does, and whole rows too.
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
        # How far apart the rows of two layers, and of two positions, are.
        self.layer_step = self._blocks * self.rows.rows_per_file if by_layer else 1
        self.position_step = 1 if by_layer else n_layers
        self.residency = Residency(spec.row_bytes)
        # Whether the kernel tells us what is in memory, and what direct reads must be multiples of.
        self.owned, self.alignment = False, PAGE
        self.descriptors: dict[int, Descriptor] = {}
        self.most_open = most_open

    def _bytes_of(self, place: int) -> int:
        """Give the whole pages that a shard's rows take."""
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
        """Say which part of some rows is in memory."""
        with self.mapped_for(table, rows):
            if self.owned:
                start, size = self.window.address, table.row_bytes
                return sum(self.residency.whole(start + row * size, size) for row in rows.tolist()) / len(rows)
        # The kernel tells others than the owner only by reading what it would not have to wait for.
        return sum(self.is_cached(table, row) for row in rows.tolist()) / len(rows)

    def is_cached(self, table: Table, row: int) -> bool:
        """Tell whether a row is in memory, without its being mapped."""
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
        """Map the shards of some rows, and keep them mapped until the block ends."""
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
        """Open shards for direct reading, or give those that are open."""
        found = {place: there for place in places if (there := self.descriptors.get(place))}
        missing = [place for place in places if place not in found]
        if missing:
            # Threads that begin together would else open all of them each.
            with self.window.opening:
                for place in missing:
                    found[place] = self.descriptors.get(place) or self._open(place)
        return found

    def _open(self, place: int) -> Descriptor:
        fd, status = self._folder.open_file(*divmod(place, self._blocks), direct=True)
        made, self.alignment = Descriptor(fd), status.alignment
        self.descriptors[place] = made
        # Whoever forgets them does not take the lock: each of these steps is whole by itself.
        for old in list(self.descriptors)[: -self.most_open]:
            self.descriptors.pop(old, None)
        return made

    def populate(self) -> None:
        """Fill the page tables of mapped shards that are in memory all over: that spares each of their rows a fault."""
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
        """Raise CorruptError or IncompleteError if the shard of one of the rows is no longer what it was."""
        for place in np.unique(rows // table.rows_per_file).tolist():
            close_read(self._folder.open_file(*divmod(place, self._blocks))[0])

    def forget(self) -> None:
        """Let go of every map and descriptor; they come back as they are needed."""
        self.window.forget()
        self.descriptors.clear()
