"""One site of a store: rows, layers, slices and gathers. Whatever is returned is the caller's own memory."""

from __future__ import annotations

import threading
from itertools import pairwise
from operator import index as whole
from typing import TYPE_CHECKING, SupportsIndex, TypeAlias

import numpy as np
import torch

from mmcache.devices import own_copy
from mmcache.errors import ArgumentError, DtypeError, OutOfRangeError, ShapeError
from mmcache.site_statistics import merge_site

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mmcache.shards import ShardFolder
    from mmcache.site_statistics import SiteStatistics

__all__ = ["MAX_MAPS", "Positions", "SiteView"]

# Python's mmap keeps a descriptor a map, and 1,024 of them are what a process usually may have.
MAX_MAPS = 256

Positions: TypeAlias = "torch.Tensor | np.ndarray | Sequence[int] | range"


class SiteView:
    """The logical array `[n_layers, n_tokens, d_model]` of one site, read through memory mapping.

    Made by `store[site]`, not by hand. Layers are the model's own layer numbers; positions are tokens from the
    start of the store, and negative ones count from its end. Safe to use from several threads. Reading blocks
    on the disk where the rows are not in the page cache.
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
        summary: Callable[[], SiteStatistics | None] = lambda: None,
    ) -> None:
        self.name = name
        self._folder, self._layout, self._span, self._keep = folder, layout, span, keep
        self._length, self._max_maps, self._summary = length, max_maps, summary
        self._statistics: SiteStatistics | None = None
        self._slots = {layer: slot for slot, layer in enumerate(layers)}
        self._n_tokens, self._shard_rows = folder.rows, folder.spec.shard_rows
        self._files: dict[tuple[int, int], torch.Tensor] = {}
        self._views: dict[tuple[int, int], torch.Tensor] = {}
        self._lock = threading.Lock()

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that are there, ascending."""
        return tuple(self._slots)

    @property
    def d_model(self) -> int:
        """Numbers a row."""
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
        """Mean, spread, norms and counts of each layer: of the stored values, BOS and special tokens left out.

        Merged from what the shards carry, those that are there in a partial store, or read from `statistics/` where
        `extract` has merged them already; then kept.

        Raises:
            CorruptError: a shard's statistics are damaged.
            IncompleteError: no shard is there yet.
        """
        if self._statistics is None:
            self._statistics = self._summary() or merge_site(self._folder, self._layout, len(self._slots), self._keep)
        return self._statistics

    def __repr__(self) -> str:
        return f"SiteView({self.name!r}, shape={self.shape}, dtype={self.dtype}, layout={self._layout!r})"

    def __len__(self) -> int:
        return len(self._slots)

    def _view(self, slot: int, block: int) -> torch.Tensor:
        """Give the mapped rows of one layer in one block: `[rows, d_model]`, never to be handed out."""
        view = self._views.get((slot, block))
        if view is not None:
            return view
        file_slot = slot if self._layout == "layer" else 0
        with self._lock:
            file = self._files.get((file_slot, block))
            if file is None:
                file = self._folder.open(file_slot, block)
                if len(self._files) >= self._max_maps:
                    self._drop(next(iter(self._files)))
                self._files[file_slot, block] = file
            view = file if self._layout == "layer" else file[:, slot]
            self._views[slot, block] = view
        return view

    def _drop(self, key: tuple[int, int]) -> None:
        del self._files[key]
        for slot in [key[0]] if self._layout == "layer" else range(len(self._slots)):
            self._views.pop((slot, key[1]), None)

    def _forget(self) -> None:
        """Let go of every map; they come back as they are needed."""
        with self._lock:
            self._files.clear()
            self._views.clear()

    def _find(self, layer: SupportsIndex) -> int | None:
        """Give the slot of a layer that may be any kind of whole number, such as a tensor; None: not there."""
        try:
            return self._slots.get(whole(layer))
        except TypeError as error:
            raise DtypeError(f"layer is {layer!r}: expected a whole number") from error

    def _slot(self, layer: SupportsIndex) -> int:
        slot = self._find(layer)
        if slot is None:
            raise OutOfRangeError(f"layer {layer} not in cache ({self._what_layers()})")
        return slot

    def _what_layers(self) -> str:
        layers = tuple(self._slots)
        if layers == tuple(range(len(layers))):
            return f"n_layers={len(layers)}"
        return f"layers={list(layers)}"

    def _bad_position(self, position: int) -> OutOfRangeError:
        return OutOfRangeError(
            f"position {position} out of range ({self._length}={self._n_tokens}: 0 to {self._n_tokens - 1}, "
            f"or negative from the end)"
        )

    def get_position(self, layer: int, position: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Read one row: `[d_model]`, in the storage dtype.

        Raises:
            OutOfRangeError: the layer or position is not there.
            IncompleteError: the row has not been written yet.
            CorruptError: its shard is not what belongs there.
        """
        slot = self._slots.get(layer)
        if slot is None:
            slot = self._slot(layer)
        try:
            # A tensor, such as `tokens.argmax()`, would go on through the arithmetic below.
            position = whole(position)
        except TypeError as error:
            raise DtypeError(f"position is {position!r}: expected a whole number") from error
        if position < 0:
            position += self._n_tokens
        if not 0 <= position < self._n_tokens:
            raise self._bad_position(position if position >= 0 else position - self._n_tokens)
        block, row = divmod(position, self._shard_rows)
        view = self._views.get((slot, block))
        if view is None:
            view = self._view(slot, block)
        if device == "cpu":
            return view[row].clone()
        return own_copy(view[row], device)

    def get_layer(self, layer: int, device: torch.device | str = "cpu") -> torch.Tensor | None:
        """Read a whole layer: `[n_tokens, d_model]`, or None where the layer is not there.

        Raises:
            IncompleteError: some of it has not been written yet.
            CorruptError: a shard is not what belongs there.
        """
        slot = self._find(layer)
        return None if slot is None else self._read(slot, 0, self._n_tokens, device)

    def _read(self, slot: int, start: int, stop: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Copy the rows from `start` to `stop` of one layer."""
        parts = []
        for block in range(start // self._shard_rows, -(-stop // self._shard_rows)):
            first = block * self._shard_rows
            parts.append(self._view(slot, block)[max(start - first, 0) : stop - first])
        if len(parts) == 1:
            return own_copy(parts[0], device)
        out = torch.empty((stop - start, self.d_model), dtype=self.dtype, device=device)
        done = 0
        for part in parts:
            out[done : done + len(part)] = part if out.device.type == "cpu" else own_copy(part, device)
            done += len(part)
        return out

    def __getitem__(self, key: tuple[int, slice | int]) -> torch.Tensor:
        """Read `[layer, a:b]` (`[b - a, d_model]`; steps and negative bounds as in Python) or `[layer, position]`.

        Raises:
            OutOfRangeError: the layer is not there, or the position.
            ArgumentError: another kind of key.
        """
        if not (isinstance(key, tuple) and len(key) == 2):
            raise ArgumentError(f"{self.name}[{key!r}]: expected [layer, start:stop] or [layer, position]")
        layer, rows = key
        if not isinstance(rows, slice):
            return self.get_position(layer, rows)
        start, stop, step = rows.indices(self._n_tokens)
        wanted = range(start, stop, step)
        slot = self._slot(layer)
        if not wanted:
            return torch.empty((0, self.d_model), dtype=self.dtype)
        if step == 1:
            return self._read(slot, start, stop)
        return self.gather(wanted, layers=[layer])[:, 0]

    def sequence(self, index: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Read one whole sequence, every layer: `[n_layers, length, d_model]`.

        Raises:
            OutOfRangeError: there is no such sequence.
        """
        start, stop = self._span(index)
        out = torch.empty((len(self._slots), stop - start, self.d_model), dtype=self.dtype)
        for slot in self._slots.values():
            out[slot] = self._read(slot, start, stop)
        return out if device == "cpu" else own_copy(out, device)

    def get_positions(self, layer: int, positions: Positions, device: torch.device | str = "cpu") -> torch.Tensor:
        """Read some rows of one layer, in the order asked: `[k, d_model]`. Errors as `gather`."""
        return self.gather(positions, layers=[layer], device=device)[:, 0]

    def gather(
        self,
        positions: Positions,
        *,
        layers: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Read the rows of some tokens, in the order asked: `[k, n_layers, d_model]`.

        Args:
            positions: integers in any order, repeated or negative (from the end): a list, range, array or
                1-D tensor.
            layers: the layers wanted, in the order wanted; None for all, ascending.
            device: where the rows go.
            out: where to put them instead of fresh memory: that shape, the storage dtype, any device;
                it is what is returned.

        Raises:
            OutOfRangeError: a layer or position is not there; the first such position is named.
            ShapeError, DtypeError: `out` or `positions` do not fit.
            IncompleteError, CorruptError: as `get_position`.
        """
        slots = list(self._slots.values()) if layers is None else [self._slot(layer) for layer in layers]
        wanted = self._positions(positions)
        shape = (len(wanted), len(slots), self.d_model)
        if out is not None and (tuple(out.shape) != shape or out.dtype != self.dtype):
            kind = ShapeError if tuple(out.shape) != shape else DtypeError
            raise kind(f"out is {tuple(out.shape)} {out.dtype}: expected {shape} {self.dtype}")
        onto_host = out is not None and out.device.type == "cpu"
        rows = out if out is not None and onto_host else torch.empty(shape, dtype=self.dtype)
        self._gather_into(rows, wanted, slots)
        if out is not None:
            return out if onto_host else out.copy_(rows)
        return rows if device == "cpu" else own_copy(rows, device)

    def _gather_into(self, rows: torch.Tensor, wanted: np.ndarray, slots: list[int]) -> None:
        blocks, within = np.divmod(wanted, self._shard_rows)
        order = np.argsort(blocks, kind="stable")
        edges = [*np.flatnonzero(np.diff(blocks[order], prepend=-1)), len(order)]
        for start, stop in pairwise(edges):
            picked = order[start:stop]
            into, at = torch.from_numpy(picked), torch.from_numpy(within[picked])
            for place, slot in enumerate(slots):
                rows[into, place] = self._view(slot, int(blocks[picked[0]]))[at]

    def _positions(self, positions: Positions) -> np.ndarray:
        """Give positions as int64 `[k]`, every one of them from 0 to n_tokens - 1."""
        if isinstance(positions, torch.Tensor):
            positions = positions.detach().cpu().numpy()
        wanted = np.asarray(positions)
        if wanted.ndim != 1:
            raise ShapeError(f"positions have shape {wanted.shape}: expected one dimension")
        if not wanted.size:
            return np.empty(0, np.int64)
        if wanted.dtype.kind not in "iu":
            raise DtypeError(f"positions are {wanted.dtype}: expected integers")
        # Before the cast, in which a large unsigned number would become a negative one.
        bad = (wanted < -self._n_tokens) | (wanted >= self._n_tokens)
        if bad.any():
            raise self._bad_position(int(wanted[np.argmax(bad)]))
        wanted = wanted.astype(np.int64)
        return np.where(wanted < 0, wanted + self._n_tokens, wanted)
