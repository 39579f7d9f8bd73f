"""`SiteView`, one site of a store: rows, layers, slices and gathers. Returned tensors are the caller's own memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
import torch

from mmcache.errors import ArgumentError, OutOfRangeError
from mmcache.read.describe import site_html
from mmcache.read.local_rows import best_reader, bring_near
from mmcache.read.positions import Positions, listed, slice_range, span_of, whole_number, whole_positions
from mmcache.stats.site_statistics import merge_site
from mmcache.system.arguments import a_device, shown
from mmcache.system.devices import check_target, fill_device, is_cpu, own_copy

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from threading import Event

    from mmcache.read.local_rows import Reader
    from mmcache.stats.site_statistics import SiteStatistics
    from mmcache.storage.shard_folder import ShardFolder

__all__ = ["MAX_MAPS", "Positions", "SiteView"]

# File descriptors that all sites of a store together may keep, of the usual limit of 1,024 per process.
MAX_MAPS = 256
# The most bytes that `np.asarray` reads, and rows of a slice that are read at a time.
_ARRAY_BYTES, _SLICE_ROWS = 1 << 30, 1 << 20


class SiteView:
    """The logical array `[n_layers, n_tokens, d_model]` of one site, read through memory mapping.

    Made by `store[site]`. Layers are the model's own layer numbers; positions are tokens from the start of the store,
    and negative ones count from its end. Safe to use from several threads. Reading blocks on the disk, or the network,
    where the rows are not in the page cache.
    """

    def __init__(
        self,
        name: str,
        folder: ShardFolder,
        layout: str,
        layers: Sequence[int],
        span: Callable[[int], tuple[int, int]],
        keep: Callable[[int, int], np.ndarray],
        *,
        length: str = "n_tokens",
        max_maps: int = MAX_MAPS,
        check: bool = False,
        fits: bool = False,
        summary: Callable[[], SiteStatistics | None] = lambda: None,
    ) -> None:
        self.name = name
        self._folder, self._layout, self._span, self._keep = folder, layout, span, keep
        self._length, self._max_maps, self._check, self._summary = length, max_maps, check, summary
        self._fits = fits
        self._statistics: SiteStatistics | None = None
        self._slots = {layer: slot for slot, layer in enumerate(layers)}
        self._n_tokens, self._shard_rows = folder.rows, folder.spec.shard_rows
        self._reader: Reader | None = None

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers of the site, ascending."""
        return tuple(self._slots)

    @property
    def d_model(self) -> int:
        """Values per row."""
        return self._folder.spec.row_shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        """The storage dtype."""
        return self._folder.spec.dtype.torch

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(n_layers, n_tokens, d_model)`."""
        return len(self._slots), self._n_tokens, self.d_model

    @property
    def statistics(self) -> SiteStatistics:
        """Mean, spread, norms and counts of each layer, of the stored values, without BOS, special and first tokens.

        Merged from the shards' statistics (in a partial store, of the shards that exist), or read from `statistics/`
        where `extract` has merged them; kept after the first call.

        Raises:
            CorruptError: a shard's statistics are damaged.
            IncompleteError: no shard exists yet.
        """
        if self._statistics is None:
            self._statistics = self._summary() or merge_site(self._folder, self._layout, len(self._slots), self._keep)
        return self._statistics

    def __repr__(self) -> str:
        return f"SiteView({self.name!r}, shape={self.shape}, dtype={self.dtype}, layout={self._layout!r})"

    _repr_html_ = site_html

    def __len__(self) -> int:
        return len(self._slots)

    def rows_of(self, layers: Sequence[int] | None) -> tuple[Reader, list[int]]:
        """The reader of the rows, and the slots of some layers (None: all). Raises OutOfRangeError."""
        every = list(self._slots.values())
        slots = every if layers is None else [self._slot(layer) for layer in listed("layers", layers)]
        return self._reader or self._read_by(), slots

    def believe(self, positions: np.ndarray | range, slots: Sequence[int]) -> None:
        """Check that many rows can exist before memory is allocated for them, as `ShardFolder.believe`."""
        if len(positions) and slots:
            self._folder.believe(len(positions) * len(slots) * self.d_model, slots[0], int(positions[0]))

    def _read_by(self) -> Reader:
        """The reader of the rows, made when first needed, since it takes address space."""
        # No lock, which a fork might inherit locked: two threads may make one each.
        made = best_reader(
            self._folder, self._layout, len(self._slots), self._max_maps, check=self._check, fits=self._fits
        )
        self._reader = self._reader or made
        return self._reader

    def _forget(self) -> None:
        """Drop every map; maps are made again when needed."""
        if self._reader is not None:
            self._reader.forget()

    def _find(self, layer: SupportsIndex) -> int | None:
        """The slot of a layer, given as any kind of integer, such as a tensor; None if the site has no such layer."""
        return self._slots.get(whole_number("layer", layer))

    def _slot(self, layer: SupportsIndex) -> int:
        slot = self._find(layer)
        if slot is None:
            plain = self.layers == tuple(range(len(self)))
            what = f"n_layers={len(self)}" if plain else f"layers={list(self.layers)}"
            raise OutOfRangeError(f"layer {shown(whole_number('layer', layer))} not in cache ({what})")
        return slot

    def _bad_position(self, position: int) -> OutOfRangeError:
        return OutOfRangeError(
            f"position {shown(position)} out of range ({self._length}={self._n_tokens}: 0 to {self._n_tokens - 1}, "
            f"or negative from the end)"
        )

    def get_position(
        self, layer: int, position: int, device: torch.device | str = "cpu", *, non_blocking: bool = False
    ) -> torch.Tensor:
        """Read one row: `[d_model]`, in the storage dtype; `non_blocking` as in `gather`.

        Raises:
            OutOfRangeError: there is no such layer or position.
            IncompleteError: the row has not been written yet.
            CorruptError: its shard is damaged, or not the one that belongs there.
        """
        slot = self._slots.get(layer) if type(layer) is int else None
        if slot is None:
            slot = self._slot(layer)
        if type(position) is not int:
            # A tensor, such as `tokens.argmax()`, would stay one through the arithmetic below.
            position = whole_number("position", position)
        if position < 0:
            position += self._n_tokens
        if not 0 <= position < self._n_tokens:
            raise self._bad_position(position if position >= 0 else position - self._n_tokens)
        row = (self._reader or self._read_by()).row(slot, position)
        return row if is_cpu(device) else own_copy(row, device, non_blocking=non_blocking)

    def get_layer(self, layer: int, device: torch.device | str = "cpu") -> torch.Tensor | None:
        """Read a whole layer: `[n_tokens, d_model]`, or None if there is no such layer.

        Raises:
            IncompleteError: some of it has not been written yet.
            CorruptError: a shard is damaged, or not the one that belongs there.
        """
        slot = self._find(layer)
        return None if slot is None else self._read(slot, 0, self._n_tokens, device)

    def _read(self, slot: int, start: int, stop: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Copy the rows from `start` to before `stop` of one layer."""
        return self._take([slot], range(start, stop), device)[:, 0]

    def _take(
        self,
        slots: list[int],
        positions: np.ndarray | range,
        device: torch.device | str = "cpu",
        *,
        out: torch.Tensor | None = None,
        non_blocking: bool = False,
    ) -> torch.Tensor:
        """Copy rows of tokens that are all in range: `[k, len(slots), d_model]`."""
        if out is None:
            self.believe(positions, slots)
            shape = len(positions), len(slots), self.d_model
            out = torch.empty(shape, dtype=self.dtype, device=a_device("device", device))

        def fill(into: torch.Tensor, first: int, last: int) -> None:
            for start in range(first, last, _SLICE_ROWS):
                some = positions[start : min(start + _SLICE_ROWS, last)]
                # A view releases the GIL (see system/threads.py).
                part = into if len(some) == len(into) else into[start - first :][: len(some)]
                reader.take(np.asarray(some, np.int64), slots, part)

        reader = self._reader or self._read_by()
        if out.device.type == "cuda" and out.is_contiguous():
            fill_device(out, fill, non_blocking=non_blocking)
        elif out.device.type == "cpu" and out.is_contiguous():
            fill(out, 0, len(positions))
        else:
            rows = torch.empty(out.shape, dtype=out.dtype)
            fill(rows, 0, len(positions))
            out.copy_(rows)
        return out

    def __getitem__(self, key: tuple[int, slice | int]) -> torch.Tensor:
        """Read `[layer, a:b]` (`[b - a, d_model]`; steps and negative bounds as in Python) or `[layer, position]`.

        Raises OutOfRangeError if there is no such layer or position, ArgumentError for another kind of key.
        """
        if not (isinstance(key, tuple) and len(key) == 2):
            raise ArgumentError(f"{self.name}[{shown(key)}]: expected [layer, start:stop] or [layer, position]")
        layer, rows = key
        if not isinstance(rows, slice):
            return self.get_position(layer, rows)
        wanted = slice_range(rows, self._n_tokens)
        if wanted.step == 1 and wanted:
            return self._read(self._slot(layer), wanted.start, wanted.stop)
        return self.gather(wanted, layers=[layer])[:, 0]

    def sequence(self, index: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Read one whole sequence, every layer: `[n_layers, length, d_model]`. Raises OutOfRangeError as `locate`."""
        start, stop = self._span(index)
        slots, positions = list(self._slots.values()), range(start, stop)
        if self._layout == "token":
            return self._take(slots, positions, device).transpose(0, 1).contiguous()
        place = a_device("device", device)
        out = torch.empty((len(slots), stop - start, self.d_model), dtype=self.dtype, device=place)
        for slot in slots:
            self._take([slot], positions, out=out[slot][:, None])
        return out

    def get_positions(
        self, layer: int, positions: Positions, device: torch.device | str = "cpu", *, non_blocking: bool = False
    ) -> torch.Tensor:
        """Read some rows of one layer, in the order asked: `[k, d_model]`. Arguments and errors as `gather`."""
        return self.gather(positions, layers=[layer], device=device, non_blocking=non_blocking)[:, 0]

    def gather(
        self,
        positions: Positions,
        *,
        layers: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
        out: torch.Tensor | None = None,
        non_blocking: bool = False,
    ) -> torch.Tensor:
        """Read the rows of some tokens, in the order asked: `[k, n_layers, d_model]`.

        Rows in the page cache are copied from there. Others are usually read past it, many at a time; those that lie
        close together in one read.

        Args:
            positions: integers in any order, repeated or negative (from the end): a list, range, array or
                1-D tensor.
            layers: the layers wanted, in the order wanted; None for all, ascending.
            device: where the rows go.
            out: where to put them, instead of new memory, which is slower to write to: of that shape, in the storage
                dtype, on any device, pinned or not. It is returned.
            non_blocking: to CUDA, return when the last copy is queued on the current stream.

        Raises:
            OutOfRangeError: there is no such layer or position; the first such position is named.
            ShapeError, DtypeError: `out` or `positions` do not fit.
            IncompleteError, CorruptError: as `get_position`.
            ArgumentError: there is no such `device`, or `out` cannot be written to.
            ReadError: the disk failed.
        """
        _, slots = self.rows_of(layers)
        wanted = whole_positions(positions, self._n_tokens, self._bad_position)
        shape = (len(wanted), len(slots), self.d_model)
        if out is not None:
            check_target(out, shape, self.dtype)
        return self._take(slots, wanted, device, out=out, non_blocking=non_blocking)

    def read_ahead(self, start: int, stop: int, *, all_come: Event | None = None) -> None:
        """Read the rows of some tokens, all layers, into the page cache, or fetch them from a bucket; blocks.

        `all_come`: while it is set, the rest of the store is being fetched too, so reads may wait for their shards.
        Raises OutOfRangeError, and as `get_position`.
        """
        start, stop = span_of(start, stop, self._n_tokens, self._length)
        reader, every = self.rows_of(None)
        bring_near(reader, self._folder, every if self._layout == "layer" else [0], start, stop, all_come=all_come)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Read all of a small site: `[n_layers, n_tokens, d_model]`, bfloat16 as that of ml_dtypes.

        Raises:
            ArgumentError: it is larger than 1 GiB, or `copy` is False: reading from disk always copies.
        """
        numpy_dtype = self._folder.spec.dtype.numpy
        size = len(self._slots) * self._n_tokens * self.d_model * numpy_dtype.itemsize
        if size > _ARRAY_BYTES or copy is False:
            raise ArgumentError(
                f"{self.name} takes {size} bytes as an array, and always a copy: np.asarray reads {_ARRAY_BYTES} at "
                f"most. Read a slice, {self.name}[layer, a:b], or gather some positions"
            )
        found = self._take(list(self._slots.values()), range(self._n_tokens)).transpose(0, 1).contiguous()
        array = found.view(torch.uint8).numpy().view(numpy_dtype)
        return array if dtype is None else array.astype(dtype)
