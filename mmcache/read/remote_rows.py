"""Rows of one site of a store in a bucket (`RemoteRows`): from cached shards, or by ranged reads of the others.

Cached shards are mapped and read as those of a local store. Of other shards, rows that lie close together are read in
one request; if nearly all of a shard is wanted, the request is for all of it. Once more bytes of a shard were read in
pieces than it has, it is downloaded, if the cache has room without evicting another.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
import threading
from concurrent.futures import CancelledError, Future
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch

from mmcache.errors import ArgumentError, CorruptError, DiskFullError
from mmcache.format.shard import HEADER_BYTES, Layout
from mmcache.read.prefetched_rows import Extents
from mmcache.storage.mirror import STREAMS
from mmcache.system.direct_io import alike
from mmcache.system.threads import let_end

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from mmcache.storage.shard_folder import ShardFolder

__all__ = ["Part", "RemoteRows", "begins_of", "parts_of", "scatter"]

# Gaps up to this size are read rather than split into two requests.
_GAP_BYTES = 128 << 10


class Part(NamedTuple):
    """The rows wanted of one shard.

    Row numbers, int64 `[n]` ascending, and their places among all requested rows; the slots, and their columns.
    """

    shard: tuple[int, int]
    rows: np.ndarray
    places: np.ndarray
    slots: list[int]
    columns: list[int]


def parts_of(positions: np.ndarray, slots: list[int], shard_rows: int, *, by_layer: bool) -> Iterator[Part]:
    """Split a request by shard; in the layer layout each slot has its own shards.

    Args:
        positions: tokens, int64 `[k]`, in any order.
        slots: the slots of the layers wanted.
        shard_rows: rows per shard.
        by_layer: whether it is the layer layout.
    """
    order = np.argsort(positions, kind="stable")
    blocks, within = np.divmod(positions[order], shard_rows)
    for start, stop in alike(blocks):
        block, rows, places = int(blocks[start]), within[start:stop], order[start:stop]
        if not by_layer:
            yield Part((0, block), rows, places, slots, list(range(len(slots))))
            continue
        for column, slot in enumerate(slots):
            yield Part((slot, block), rows, places, [slot], [column])


def begins_of(offsets: np.ndarray, size: int, most: int) -> np.ndarray:
    """Indices of the pieces (`size` bytes, at ascending offsets `[n]`) that begin a request of about `most` bytes."""
    far = np.diff(offsets) - size > _GAP_BYTES
    begins = np.concatenate([[True], far])
    first = offsets[np.maximum.accumulate(np.where(begins, np.arange(len(offsets)), 0))]
    # A request that is too long is cut at even distances from its start.
    begins[1:] |= np.diff((offsets - first) // max(size, most)) != 0
    return np.flatnonzero(begins)


def scatter(stream: Iterable[memoryview], at: int, into: np.ndarray, offsets: np.ndarray, places: np.ndarray) -> None:
    """Copy pieces of a stream to their places as they arrive.

    Args:
        stream: bytes of a shard; not read further than the last piece.
        at: the offset of the first byte.
        into: `[m, size]` uint8.
        offsets: of the pieces, `[n]` ascending, multiples of `size` apart.
        places: the rows of `into` that they go to.
    """
    size, done, rest = into.shape[1], 0, b""
    units = (offsets - offsets[0]) // size
    skip, unit = int(offsets[0]) - at, 0
    for data in stream:
        skipped = min(skip, len(data))
        skip -= skipped
        body = np.frombuffer(data, np.uint8)[skipped:]
        if rest:
            # A piece split between two parts of the stream.
            missing = size - len(rest)
            rest, body = rest + body[:missing].tobytes(), body[missing:]
            if len(rest) < size:
                continue
            done = _put(np.frombuffer(rest, np.uint8)[None], unit, units, into, places, done)
            unit += 1
        whole = len(body) // size
        done = _put(body[: whole * size].reshape(whole, size), unit, units, into, places, done)
        unit, rest = unit + whole, body[whole * size :].tobytes()
        if done == len(units):
            return


def _put(body: np.ndarray, unit: int, units: np.ndarray, into: np.ndarray, places: np.ndarray, done: int) -> int:
    """Copy the wanted ones of pieces `[n, size]`, numbered from `unit`; returns how many are done in all."""
    stop = int(np.searchsorted(units, unit + len(body)))
    there, to = units[done:stop] - unit, places[done:stop]
    if stop > done:
        if _follow(there) and _follow(to):
            into[to[0] : to[-1] + 1] = body[there[0] : there[-1] + 1]
        else:
            into[to] = body[there]
    return stop


def _follow(numbers: np.ndarray) -> bool:
    """Whether the numbers are consecutive."""
    return bool((np.diff(numbers) == 1).all())


# The least bytes of a request, if that many are wanted; bytes read at a time from a shard that arrived meanwhile.
_REQUEST_BYTES, _PIECE_BYTES = 16 << 20, 2 << 20
# If no more than 1/_UNWANTED of a shard is unwanted, all of it is requested: some servers and proxies answer that far
# sooner than a range.
_UNWANTED = 8
# The most bytes of one file of prefetched rows.
_EXTENT_BYTES = 16 << 20
_CHECKED: Future[None] = Future()
_CHECKED.set_result(None)


class LocalRows(Protocol):
    """A reader of local shards: `MappedRows` or `PortableRows`."""

    def row(self, slot: int, position: int) -> torch.Tensor:
        """Copy one row: `[d_model]`."""

    def take(self, positions: np.ndarray, slots: list[int], into: torch.Tensor) -> None:
        """Copy rows: positions int64 `[k]` into contiguous host memory `[k, len(slots), d_model]`."""

    def forget(self) -> None:
        """Drop every map."""


# Offsets of pieces in a shard, ascending, and their places.
_Pieces: TypeAlias = tuple[np.ndarray, np.ndarray]


class RemoteRows:
    """The reader of a site in a bucket. Safe to use from several threads; reading blocks until the rows are there.

    Args:
        folder: the site's shards, in a bucket.
        layout: the store's layout.
        n_layers: the number of layers; a slot is a layer's index among them.
        local: the reader of shards that are here.
        fits: whether all of the store fits into the cache.
    """

    def __init__(self, folder: ShardFolder, layout: str, n_layers: int, local: LocalRows, *, fits: bool) -> None:
        if folder.remote is None:
            raise AssertionError("the store is not in a bucket")
        self._folder, self._by_layer, self._n_layers, self._local = folder, layout == "layer", n_layers, local
        self.remote, self.fits = folder.remote, fits
        self._row_bytes = folder.spec.row_shape[-1] * folder.spec.dtype.size
        self._extents = Extents(folder)
        # Shards whose headers were checked, and the bytes of each that were read in pieces.
        self._known: dict[tuple[int, int], Future[None]] = {}
        self._moved: dict[tuple[int, int], int] = {}
        # Set while the whole store is being downloaded: then a read may wait for its shard.
        self.all_come: threading.Event | None = None
        self._generation = self.remote.cache.generation
        self._lock = threading.Lock()
        self.remote.cache.hold(self)

    def row(self, slot: int, position: int) -> torch.Tensor:
        """Copy one row: `[d_model]`. Errors as `take`."""
        self._catch_up()
        spec = self._folder.spec
        block, row = divmod(position, spec.shard_rows)
        shard = (slot if self._by_layer else 0, block)
        if self._is_here(shard):
            with self._reading():
                return self._local.row(slot, position)
        if self._extents.covered(shard, np.array([row])).any():
            into = torch.empty((1, 1, spec.row_shape[-1]), dtype=spec.dtype.torch)
            self.take(np.array([position]), [slot], into)
            return into[0, 0]
        # In this thread: handing it to another takes a tenth of the time that the server needs.
        self._know(shard)
        start = HEADER_BYTES + row * spec.row_bytes + (0 if self._by_layer else slot * self._row_bytes)
        data = self.remote.read(self._folder.array, self._folder.key(*shard), start, start + self._row_bytes)
        self._count(shard, self._row_bytes, Layout(spec, spec.rows_in_block(block, self._folder.rows)).size)
        return torch.frombuffer(bytearray(data), dtype=spec.dtype.torch)

    def take(self, positions: np.ndarray, slots: list[int], into: torch.Tensor) -> None:
        """Copy rows: positions int64 `[k]`, all in range, into contiguous host memory `[k, len(slots), d_model]`.

        Raises:
            IncompleteError, CorruptError, AccessError, RemoteError, DiskFullError: as `Mirror.fetch`; the content
                of `into` is then undefined.
        """
        self._catch_up()
        if not slots:
            return
        parts = list(parts_of(positions, slots, self._folder.spec.shard_rows, by_layer=self._by_layer))
        here = [self._is_here(part.shard) for part in parts]
        if not all(here) and self.all_come is not None and self.all_come.is_set() and self.remote.quick:
            here = self._wait_for(parts, here)
        if all(here) and (self.fits or len(parts) == 1):
            with self._reading():
                self._local.take(positions, slots, into)
            return
        # Shard by shard: the cache may not have room for all of them at the same time.
        asked: list[Future[None]] = []
        try:
            left = [self._from_extents(part, into) for part in itertools.compress(parts, map(operator.not_, here))]
            wanted = [part for part in left if part is not None]
            for part in wanted:
                self._ask(part, into, asked, max(1, STREAMS // len(wanted)))
            for part in itertools.compress(parts, here):
                self._from_local(part, into)
            for answer in asked:
                answer.result()
        finally:
            # Nothing may write to the caller's memory after this returns.
            let_end(asked)

    def read_ahead(self, slots: list[int], start: int, stop: int) -> None:
        """Fetch the rows of tokens from `start` to before `stop` into the cache; blocks until done. Errors as `take`.

        Whole shards, if the store fits into the cache or a whole shard is wanted; else only those rows.
        """
        rows = self._folder.spec.shard_rows
        wanted: list[Future[Any]] = []
        for block in range(start // rows, -(-stop // rows)):
            first, last = max(start - block * rows, 0), min(stop - block * rows, rows)
            there = self._folder.spec.rows_in_block(block, self._folder.rows)
            for slot in slots:
                if self._is_here((slot, block)):
                    continue
                if self.fits or last - first >= there:
                    wanted.append(self.remote.fetch_later(self._folder.bring, slot, block))
                    continue
                step = max(1, _EXTENT_BYTES // self._folder.spec.row_bytes)
                for at in range(first, last, step):
                    end = min(at + step, last)
                    wanted.append(self.remote.fetch_later(self._bring_extent, (slot, block), at, end))
        for fetched in wanted:
            fetched.result()

    def _bring_extent(self, shard: tuple[int, int], start: int, stop: int) -> None:
        self._know(shard)
        self._extents.bring(shard, start, stop)

    def forget(self) -> None:
        """Drop every map; maps are made again when needed."""
        self._local.forget()
        self._extents.forget()

    def _catch_up(self) -> None:
        """Drop all maps if shards were evicted from the cache since the last call; this frees their disk space."""
        generation = self.remote.cache.generation
        if generation != self._generation:
            self._generation = generation
            self.forget()

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Afterwards drop all maps if shards were evicted meanwhile: one may have been mapped just before."""
        generation = self.remote.cache.generation
        try:
            yield
        finally:
            if self.remote.cache.generation != generation:
                self.forget()

    def _is_here(self, shard: tuple[int, int]) -> bool:
        return self._folder.is_here(*shard)

    def _wait_for(self, parts: list[Part], here: list[bool]) -> list[bool]:
        """Wait for shards that are not here, if the cache has room; returns which are here then. Errors as `take`."""
        missing = [part.shard for part, there in zip(parts, here, strict=True) if not there]
        spec, cache = self._folder.spec, self.remote.cache
        needed = sum(Layout(spec, spec.rows_in_block(block, self._folder.rows)).size for _, block in missing)
        if cache.used() + needed > cache.most_bytes:
            return here
        for coming in [self.remote.fetch_later(self._folder.bring, *shard) for shard in missing]:
            # Shards that the cache has no room for are read by range.
            with contextlib.suppress(DiskFullError, ArgumentError, CancelledError):
                coming.result()
        return [self._is_here(part.shard) for part in parts]

    def _from_local(self, part: Part, into: torch.Tensor) -> None:
        rows = torch.empty((len(part.rows), len(part.slots), into.shape[2]), dtype=into.dtype)
        with self._reading():
            self._local.take(part.rows + part.shard[1] * self._folder.spec.shard_rows, part.slots, rows)
        into[torch.from_numpy(part.places)[:, None], torch.tensor(part.columns)] = rows

    def _from_extents(self, part: Part, into: torch.Tensor) -> Part | None:
        """Copy prefetched rows; returns the rest of the part, or None if nothing is left."""
        which, found = self._extents.take(part.shard, part.rows)
        if not len(which):
            return part
        rows = found[:, None] if self._by_layer else found[:, part.slots]
        into[torch.from_numpy(part.places[which])[:, None], torch.tensor(part.columns)] = rows
        left = np.ones(len(part.rows), bool)
        left[which] = False
        return part._replace(rows=part.rows[left], places=part.places[left]) if left.any() else None

    def _ask(self, part: Part, into: torch.Tensor, asked: list[Future[None]], streams: int) -> None:
        """Request the wanted rows of a shard that is not here, in about as many requests as it has streams."""
        spec, (_, block) = self._folder.spec, part.shard
        offsets, into_bytes, places = self._units(part, into)
        size = into_bytes.shape[1]
        order = np.argsort(offsets, kind="stable")
        offsets, places = offsets[order], places[order]
        whole = Layout(spec, spec.rows_in_block(block, self._folder.rows)).size
        span = int(offsets[-1]) + size - int(offsets[0])
        edges = [*begins_of(offsets, size, max(_REQUEST_BYTES, -(-whole // streams))).tolist(), len(offsets)]
        moved = sum(int(offsets[last - 1] - offsets[first]) + size for first, last in itertools.pairwise(edges))
        pieces = [(offsets[first:last], places[first:last]) for first, last in itertools.pairwise(edges)]
        # Nearly all of it, without gaps: only the limit on their length makes these several requests.
        if (whole - span) * _UNWANTED <= whole and len(begins_of(offsets, size, whole)) == 1:
            moved = whole
            asked.append(self.remote.submit(self._read_whole, part.shard, into_bytes, pieces, asked))
        else:
            asked += [self.remote.submit(self._read, part.shard, into_bytes, *piece) for piece in pieces]
        self._count(part.shard, moved, whole)

    def _units(self, part: Part, into: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Cut a part into pieces of one size: their offsets in the shard, `into` as such pieces, their places.

        A piece is a row, or all layers of a token if all are wanted in their order.
        """
        spec = self._folder.spec
        base = HEADER_BYTES + part.rows * spec.row_bytes
        flat = into.view(torch.uint8).numpy().reshape(-1)
        if not self._by_layer and part.slots == list(range(self._n_layers)):
            return base, flat.reshape(-1, spec.row_bytes), part.places
        within = np.array([0 if self._by_layer else slot * self._row_bytes for slot in part.slots])
        offsets = (base[:, None] + within).reshape(-1)
        places = (part.places[:, None] * into.shape[1] + np.array(part.columns)).reshape(-1)
        return offsets, flat.reshape(-1, self._row_bytes), places

    def _read(self, shard: tuple[int, int], into: np.ndarray, offsets: np.ndarray, places: np.ndarray) -> None:
        """Read one range, and copy its pieces to their places."""
        start, stop = int(offsets[0]), int(offsets[-1]) + into.shape[1]
        if self._is_here(shard):
            # The shard arrived after its rows were requested.
            scatter(self._from_file(shard, start, stop), start, into, offsets, places)
            return
        self._know(shard)
        stream = self.remote.stream(self._folder.array, self._folder.key(*shard), start, stop)
        scatter(stream, start, into, offsets, places)

    def _from_file(self, shard: tuple[int, int], start: int, stop: int) -> Iterator[memoryview]:
        """Read bytes of a shard that is here, up to 2 MiB at a time."""
        file, _ = self._folder.open_layout(*shard)
        try:
            for at in range(start, stop, _PIECE_BYTES):
                piece = memoryview(bytearray(min(_PIECE_BYTES, stop - at)))
                if not file.read(piece, at):
                    raise CorruptError(f"{self._folder.where(*shard)} was cut short while it was read: read it again")
                yield piece
        finally:
            file.close()

    def _read_whole(
        self, shard: tuple[int, int], into: np.ndarray, pieces: list[_Pieces], asked: list[Future[None]]
    ) -> None:
        """Read a whole shard in one request; if that is slow, also request all pieces but the first by range."""
        head, size, stream = self.remote.whole(self._folder.array, self._folder.key(*shard))
        self._folder.check(*shard, head, size)
        self._known[shard] = _CHECKED
        if self.remote.quick:
            pieces = [(np.concatenate([piece[0] for piece in pieces]), np.concatenate([piece[1] for piece in pieces]))]
        # Before this job ends, so that `take`, which waits for it, sees them.
        asked += [self.remote.submit(self._read, shard, into, *piece) for piece in pieces[1:]]
        scatter(stream, 0, into, *pieces[0])

    def _know(self, shard: tuple[int, int]) -> None:
        """Check a shard's header before its first read; other threads wait meanwhile."""
        mine: Future[None] = Future()
        known = self._known.setdefault(shard, mine)
        if known is not mine:
            known.result()
            return
        try:
            self._folder.check(*shard, *self.remote.head(self._folder.array, self._folder.key(*shard)))
            mine.set_result(None)
            self._known[shard] = _CHECKED
        except BaseException as error:
            # The next caller tries again.
            del self._known[shard]
            mine.set_exception(error)
            raise

    def _count(self, shard: tuple[int, int], moved: int, whole: int) -> None:
        """Download a shard in the background once more bytes of it were read than it has, if there is room."""
        with self._lock:
            total = self._moved.get(shard, 0) + moved
            wanted = total > whole
            self._moved[shard] = 0 if wanted else total
        if wanted and self.remote.cache.used() + whole <= self.remote.cache.most_bytes:
            self.remote.fetch_later(self._folder.bring, *shard)
