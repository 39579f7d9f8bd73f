"""Readers of one site's rows in a local store: `MappedRows` (fast), `PortableRows` (simple), `CheckedRows` (checksums).

`MappedRows` copies rows that are in memory by one `index_select`, which releases the GIL. It reads others by
asynchronous direct reads; where these are refused, it prefetches many rows at once with madvise.

`PortableRows` maps each shard and copies rows shard by shard. It works wherever a file can be mapped, and is the
reference that `MappedRows` is tested against.

`CheckedRows` reads without mapping, and compares the checksum of each inner chunk. A file that is truncated, replaced
or damaged is an error, even in the middle of a read. A row costs reading its whole inner chunk, of up to 4 MiB.
"""

from __future__ import annotations

import contextlib
import enum
import os
import threading
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch

from mmcache.format.shard import HEADER_BYTES
from mmcache.read.remote_rows import RemoteRows
from mmcache.read.site_map import SAMPLES, Files, SiteMap
from mmcache.system.direct_io import GAP_BYTES, Wanted, alike, apart, borrowed, runs_of
from mmcache.system.files import REFUSALS
from mmcache.system.memory import PAGE, anonymous, available_memory
from mmcache.system.os_errors import our_error
from mmcache.system.syscalls import AIO, LINUX, will_need, will_need_all
from mmcache.system.threads import HELD, pieces

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mmcache.read.site_map import Table
    from mmcache.storage.shard_folder import ShardFolder
    from mmcache.system.syscalls import Ranges

__all__ = [
    "CheckedRows",
    "MappedRows",
    "Piece",
    "PortableRows",
    "Reader",
    "Taker",
    "Way",
    "best_reader",
    "bring_near",
    "take_pieces",
]


class Way(enum.Enum):
    """How rows are read: from the map, from the map after madvise (`MADV_WILLNEED`), or past the page cache."""

    MAPPED = 0
    ADVISED = 1
    DIRECT = 2


class Piece(NamedTuple):
    """Row indices of a table, int64 `[n]`, at least one, and their destination: contiguous host memory for `n` rows."""

    table: Table
    rows: np.ndarray
    into: torch.Tensor


class Taker(Protocol):
    """A reader whose pieces `take_pieces` can read: `MappedRows`."""

    def way(self, piece: Piece) -> Way:
        """The best way to read a piece."""

    def advice(self, piece: Piece) -> list[Ranges]:
        """Memory ranges to prefetch before the first row of a piece is copied."""

    def copy(self, piece: Piece, *, advised: bool = False) -> None:
        """Copy a piece from the map."""

    def wanted(self, piece: Piece) -> Wanted:
        """What to read past the page cache for a piece."""

    def was_read(self, size: int) -> None:
        """Count bytes that were read past the page cache."""

    def was_refused(self) -> None:
        """Note that the system refuses direct reads."""

    def check(self, piece: Piece) -> None:
        """Raise if one of the piece's shards is gone, truncated or replaced."""


def take_pieces(wanted: Sequence[tuple[Taker, Piece]]) -> None:
    """Read each piece in the best way; prefetches start before rows in memory are copied, so that they overlap.

    All direct reads are submitted together. Errors as `MappedRows.take`.
    """
    chosen: dict[Way, list[tuple[Taker, Piece]]] = {way: [] for way in Way}
    for reader, piece in wanted:
        chosen[reader.way(piece)].append((reader, piece))
    will_need_all([part for reader, piece in chosen[Way.ADVISED] for part in reader.advice(piece)])
    for reader, piece in chosen[Way.MAPPED]:
        reader.copy(piece)
    if chosen[Way.DIRECT]:
        _read(chosen[Way.DIRECT])
    for reader, piece in chosen[Way.ADVISED]:
        reader.copy(piece, advised=True)


def _read(wanted: Sequence[tuple[Taker, Piece]]) -> None:
    """Read pieces past the page cache, or through it if the system refuses direct reads."""
    try:
        with borrowed() as direct:
            taken = direct.read([reader.wanted(piece) for reader, piece in wanted])
    except OSError as error:
        if error.errno not in REFUSALS:
            # If a file was truncated meanwhile, that is the error to raise.
            for reader, piece in wanted:
                reader.check(piece)
            raise our_error(error) from error
        for reader, piece in wanted:
            reader.was_refused()
            will_need_all(reader.advice(piece))
            reader.copy(piece, advised=True)
        return
    for (reader, _), size in zip(wanted, taken, strict=True):
        reader.was_read(size)


class PortableRows:
    """The simple reader: a map per shard. Safe to use from several threads; blocks if rows are not in memory.

    Args:
        folder: the site's shards.
        layout: the store's layout.
        n_layers: the number of layers; a slot is a layer's index among them.
        most_open: maps to keep; Python's mmap holds a file descriptor for each.
    """

    def __init__(self, folder: ShardFolder, layout: str, n_layers: int, most_open: int) -> None:
        self._folder, self._layer_layout, self._n_layers = folder, layout == "layer", n_layers
        self._most_open = most_open
        self._files: dict[tuple[int, int], torch.Tensor] = {}
        self._lock = threading.Lock()

    def _view(self, slot: int, block: int) -> torch.Tensor:
        """The mapped rows of one layer in one block: `[rows, d_model]`; must never reach a user."""
        place = (slot if self._layer_layout else 0, block)
        file = self._files.get(place)
        if file is None:
            # Outside the lock: fetching a shard from a bucket is slow, and evicting others for it may call `forget`.
            file = self._folder.open(*place)
            with self._lock:
                if len(self._files) >= self._most_open:
                    del self._files[next(iter(self._files))]
                self._files[place] = file
        return file if self._layer_layout else file[:, slot]

    def row(self, slot: int, position: int) -> torch.Tensor:
        """Copy one row: `[d_model]`. Raises IncompleteError or CorruptError, as `ShardFolder.open`."""
        block, row = divmod(position, self._folder.spec.shard_rows)
        return self._view(slot, block)[row].clone()

    def take(self, positions: np.ndarray, slots: list[int], into: torch.Tensor) -> None:
        """Copy rows: positions int64 `[k]`, all in range, into contiguous host memory `[k, len(slots), d_model]`.

        Raises:
            IncompleteError, CorruptError: as `row`; the content of `into` is then undefined.
        """
        blocks, within = np.divmod(positions, self._folder.spec.shard_rows)
        order = np.argsort(blocks, kind="stable")
        for start, stop in alike(blocks[order]):
            picked = order[start:stop]
            place, at = torch.from_numpy(picked), torch.from_numpy(within[picked])
            for number, slot in enumerate(slots):
                into[place, number] = self._view(slot, int(blocks[picked[0]]))[at]

    def forget(self) -> None:
        """Drop every map; maps are made again when needed."""
        with self._lock:
            self._files.clear()


class CheckedRows:
    """The reader that compares checksums. Safe to use from several threads; reading blocks until the chunks are read.

    Args:
        folder: the site's shards.
        layout: the store's layout.
    """

    def __init__(self, folder: ShardFolder, layout: str) -> None:
        self._folder, self._layer_layout = folder, layout == "layer"

    def row(self, slot: int, position: int) -> torch.Tensor:
        """Copy one row: `[d_model]`. Raises IncompleteError or CorruptError, as `ShardFolder.chunks`."""
        row = torch.empty((1, 1, self._folder.spec.row_shape[-1]), dtype=self._folder.spec.dtype.torch)
        self.take(np.array([position]), [slot], row)
        return row[0, 0]

    def take(self, positions: np.ndarray, slots: list[int], into: torch.Tensor) -> None:
        """Copy rows: positions int64 `[k]`, all in range, into contiguous host memory `[k, len(slots), d_model]`.

        Raises:
            IncompleteError, CorruptError: as `row`; the content of `into` is then undefined.
        """
        spec = self._folder.spec
        order = np.argsort(positions, kind="stable")
        blocks, within = np.divmod(positions[order], spec.shard_rows)
        # For each file: the layers to copy of its rows, and their columns in `into`. The layer layout has a file for
        # each slot, the token layout one for all.
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
        """No-op: nothing is kept."""


# Of fewer than _FEW rows, all are checked for being in memory; of more, about SAMPLES, plus one in _MORE_SAMPLES.
_FEW, _MORE_SAMPLES = 64, 1 << 14
# Gathers of this many rows fill the page tables first.
_MANY = 1024
# After this many equal answers whether a row is in memory, the answer is assumed for as many reads.
_BELIEVED = 16
# Rows and gathers in a generation, of which two are remembered: repeated requests go through the page cache.
_MOST_ASKED = 1 << 13
# The most rows of a piece: their indices take a few times 8 MiB.
_MOST_ROWS = 1 << 20
# The most bytes of one step of prefetching; two steps are in flight.
_ADVISED_BYTES = 32 << 20


class MappedRows:
    """The fast reader: one range of addresses. Safe to use from several threads; blocks if rows are not in memory.

    Args:
        folder: the site's shards.
        layout: the store's layout.
        n_layers: the number of layers; a slot is a layer's index among them.
        most_open: file descriptors to keep for direct reads.

    Raises:
        OSError: not enough address space.
    """

    def __init__(self, folder: ShardFolder, layout: str, n_layers: int, most_open: int) -> None:
        self._map = SiteMap(folder, layout, n_layers, most_open)
        self._every_slot = list(range(n_layers)) if layout == "token" else None
        spec = folder.spec
        self._bytes, self._dtype = self._map.window.array.data, spec.dtype.torch
        self._was_cached, self._alike, self._believed = False, 0, 0
        self._asked: set[int] = set()
        self._asked_earlier: set[int] = set()
        self._direct, self._bytes_past_cache = AIO, 0
        self._bounce, self._bouncing = anonymous(spec.row_bytes + 2 * PAGE).data, threading.Lock()

    def row(self, slot: int, position: int) -> torch.Tensor:
        """Copy one row: `[d_model]`. Raises IncompleteError or CorruptError, as `ShardFolder.open_file`."""
        site = self._map
        index = slot * site.layer_step + position * site.position_step
        window, size = site.window, site.rows.row_bytes
        place, start = index // site.rows.rows_per_file, index * size
        if self._believed and not self._was_cached and not self._asked_before(index):
            self._believed -= 1
            row = self._direct_row(index, place)
            if row is not None:
                return row
        while True:
            window.enter()
            try:
                if window.flags[place]:
                    address = window.address + start
                    if self._probably_cached(index, address):
                        # Keeps the GIL (see system/threads.py).
                        return torch.frombuffer(bytearray(self._bytes[start : start + size]), dtype=self._dtype)
                    # One read for the whole row: a page fault would read one page.
                    will_need(address & -PAGE, size + address % PAGE)
                    row = site.rows.tensor[index, 0].clone()
                    break
            finally:
                window.leave()
            site.map(place)
        window.tally(1)
        return row

    def _direct_row(self, index: int, place: int) -> torch.Tensor | None:
        """A row, read past the page cache; None if that is refused, or not worth opening a file."""
        site = self._map
        found = site.descriptors.get(place)
        if found is None and (not self._direct or site.window.count > site.most_open):
            return None
        size, align = site.rows.row_bytes, site.alignment
        offset = HEADER_BYTES + index % site.rows.rows_per_file * size
        before = offset % align
        if not self._bouncing.acquire(blocking=False):
            return None  # in use by another thread, or was when this process was forked
        try:
            room = self._bounce[: before + size + -(offset + size) % align]
            # Keep a reference until it is read: another thread may drop the descriptor.
            file = found or site.opened((place,))[place]
            done = os.preadv(file.fd, (room,), offset - before)
            if done >= before + size:
                return torch.frombuffer(bytearray(room[before : before + size]), dtype=self._dtype)
        except OSError as error:
            if error.errno not in REFUSALS:
                raise our_error(error) from error
            self._direct = False
        finally:
            self._bouncing.release()
        return None  # refused, or truncated, which the mapped path finds out

    def _asked_before(self, key: int) -> bool:
        """Whether a row, or a gather (by its hash), was requested recently; remembers this request."""
        asked = self._asked
        if key in asked or key in self._asked_earlier:
            return True
        asked.add(key)
        if len(asked) >= _MOST_ASKED:
            self._asked, self._asked_earlier = set(), asked
        return False

    def _probably_cached(self, index: int, address: int) -> bool:
        """Whether a row is in memory.

        Asking the kernel takes longer than copying a row: after many equal answers, the last is assumed for a while.
        """
        if self._believed:
            self._believed -= 1
            return self._was_cached
        site = self._map
        size = site.rows.row_bytes
        cached = site.residency.whole(address, size) if site.owned else site.is_cached(site.rows, index)
        self._alike = self._alike + 1 if cached == self._was_cached else 0
        self._was_cached = cached
        self._believed = _BELIEVED if self._alike >= _BELIEVED else 0
        return cached

    def take(self, positions: np.ndarray, slots: list[int], into: torch.Tensor) -> None:
        """Copy rows: positions int64 `[k]`, all in range, into contiguous host memory `[k, len(slots), d_model]`.

        Raises:
            IncompleteError, CorruptError: as `row`; the content of `into` is then undefined.
            OSError: the device failed.
        """
        for piece in self.pieces(positions, slots, into):
            take_pieces([(self, piece)])

    def pieces(self, positions: np.ndarray, slots: list[int], into: torch.Tensor) -> Iterator[Piece]:
        """Cut the arguments of `take` into pieces of limited length, each in no more shards than can be mapped."""
        yield from self._cut(Piece(*self._rows_of(positions, slots, into)))

    def _rows_of(
        self, positions: np.ndarray, slots: list[int], into: torch.Tensor
    ) -> tuple[Table, np.ndarray, torch.Tensor]:
        """Table, row indices int64 `[n]` (position by position) and destination of some positions in some layers."""
        if slots == self._every_slot:
            return self._map.records, positions, into
        count, site = len(positions), self._map
        rows, steps = np.empty((count, len(slots)), np.int64), np.array(slots, np.int64) * site.layer_step
        for some in pieces(count, count, width=len(slots)):
            rows[some] = positions[some, None] * site.position_step + steps
        # `view` only if needed: each torch call releases the GIL (see system/threads.py).
        return site.rows, rows.reshape(-1), into if len(slots) == 1 else into.view(-1, 1, into.shape[-1])

    def _cut(self, piece: Piece) -> Iterator[Piece]:
        table, rows, into = piece
        count, most = len(rows), self._map.window.most_maps
        if count <= _MOST_ROWS and (
            self._map.window.count <= most or len(np.unique(rows // table.rows_per_file)) <= most
        ):
            if count:
                yield piece
            return
        step = min(_MOST_ROWS, -(-count // 2))
        for start in range(0, count, step):
            yield from self._cut(Piece(table, rows[start : start + step], into[start : start + step]))

    def way(self, piece: Piece) -> Way:
        """The best way to read a piece."""
        table, rows, _ = piece
        sample = rows if len(rows) < _FEW else rows[:: len(rows) // (SAMPLES + len(rows) // _MORE_SAMPLES)]
        cached = self._map.cached(table, sample)
        if cached <= 0.5 and len(rows) >= _FEW and not self._worth_caching(table, rows, sample):
            return Way.DIRECT
        if cached == 1.0 and len(rows) >= _MANY and 0 in self._map.window.filled:
            self._map.populate()
        return Way.ADVISED if cached < 1.0 else Way.MAPPED

    def wanted(self, piece: Piece) -> Wanted:
        """What to read past the page cache for a piece."""
        return Wanted(Files(self._map, piece.table.rows_per_file), piece.rows, piece.into)

    def was_read(self, size: int) -> None:
        """Count bytes that were read past the page cache."""
        self._bytes_past_cache += size

    def was_refused(self) -> None:
        """Note that the system refuses direct reads."""
        self._direct = False

    def check(self, piece: Piece) -> None:
        """Raise CorruptError or IncompleteError if a shard of the piece is gone, truncated or replaced."""
        self._map.check(piece.table, piece.rows)

    def _worth_caching(self, table: Table, rows: np.ndarray, sample: np.ndarray) -> bool:
        """Whether rows that are not in memory should be read through the page cache.

        Direct reads are faster, but leave nothing in it. Rows that were requested before are worth caching. So is a
        site smaller than half of the free memory, if it is being read through, or (ski-rental rule) once as many bytes
        were read directly as it has.
        """
        if self._asked_before(hash(sample.tobytes())) or not self._direct:
            return True
        size = self._map.window.place_bytes * self._map.window.count
        between = (abs(int(rows[-1]) - int(rows[0])) / len(rows) - 1) * table.row_bytes
        return (between <= GAP_BYTES or self._bytes_past_cache >= size) and size < available_memory() // 2

    def advice(self, piece: Piece) -> list[Ranges]:
        """Memory ranges to prefetch before the first row of a piece is copied."""
        with self._map.mapped_for(piece.table, piece.rows):
            return self._ranges(piece.table, piece.rows[: 2 * self._step(piece)])

    def copy(self, piece: Piece, *, advised: bool = False) -> None:
        """Copy rows from the map; with `advised`, `advice` was prefetched, and the rest is prefetched meanwhile."""
        table, rows, into = piece
        indices = torch.from_numpy(rows)
        with self._map.mapped_for(table, rows):
            step = self._step(piece) if advised else len(rows)
            if step >= len(rows):
                torch.index_select(table.tensor, 0, indices, out=into)
            else:
                for start in range(0, len(rows), step):
                    if start:
                        will_need_all(self._ranges(table, rows[start + step : start + 2 * step]))
                    some = slice(start, start + step)
                    torch.index_select(table.tensor, 0, indices[some], out=into[some])
        self._map.window.tally(len(rows))

    @staticmethod
    def _step(piece: Piece) -> int:
        return max(1, _ADVISED_BYTES // piece.table.row_bytes)

    def _ranges(self, table: Table, rows: np.ndarray) -> list[Ranges]:
        """The pages of some rows; rows that lie close together share a range."""
        size, address = table.row_bytes, self._map.window.address
        if len(rows) and not apart(rows, size):
            rows = np.sort(rows)
            edges = runs_of(rows, table.rows_per_file, size)
            last = rows[np.append(edges[1:], len(rows)) - 1]
            begin = address + rows[edges] * size
            begin -= begin % PAGE
            return [(begin, address + (last + 1) * size - begin)]
        begins = (address + rows[start : start + HELD] * size for start in range(0, len(rows), HELD))
        return [(begin - begin % PAGE, begin % PAGE + size) for begin in begins]

    def forget(self) -> None:
        """Drop every map and file descriptor; they are made again when needed."""
        self._map.forget()


Reader: TypeAlias = MappedRows | PortableRows | CheckedRows | RemoteRows


def best_reader(
    folder: ShardFolder, layout: str, n_layers: int, most_open: int, *, check: bool = False, fits: bool = False
) -> Reader:
    """A `MappedRows` of a site, or a `PortableRows` where that is not possible; arguments as theirs.

    With `check`, a `CheckedRows`. Otherwise, for a store in a bucket, a `RemoteRows` over the local reader; `fits`:
    whether all of the store fits into the cache.
    """
    if check:
        return CheckedRows(folder, layout)
    local = _mapping_reader(folder, layout, n_layers, most_open)
    return local if folder.remote is None else RemoteRows(folder, layout, n_layers, local, fits=fits)


def _mapping_reader(folder: ShardFolder, layout: str, n_layers: int, most_open: int) -> MappedRows | PortableRows:
    if LINUX:
        # Fails if address space is limited.
        with contextlib.suppress(OSError):
            return MappedRows(folder, layout, n_layers, most_open)
    return PortableRows(folder, layout, n_layers, most_open)


def bring_near(
    reader: Reader, folder: ShardFolder, slots: list[int], start: int, stop: int, *, all_come: threading.Event | None
) -> None:
    """Read rows into the page cache, or fetch them from a bucket; blocks. Errors as `ShardFolder.open_file`."""
    if isinstance(reader, RemoteRows):
        reader.all_come = all_come or reader.all_come
        reader.read_ahead(slots, start, stop)
        return
    for slot in slots:
        folder.read_through(slot, start, stop)
