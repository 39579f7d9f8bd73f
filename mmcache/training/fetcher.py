"""Fetching training batches: the rows of their tokens, gathered, converted and moved to the device (`Fetcher`).

`tensor_over` makes a tensor over existing memory and keeps the GIL (see system/threads.py). Every operator of torch
releases it, even `view`: getting it back beside a busy thread took a third of a batch's time. A tensor imported by
DLPack already has its shape. numpy exports arrays by DLPack, but has no bfloat16: the dtype is written into the record.

Source: the DLPack specification, https://dmlc.github.io/dlpack/latest/c_api.html: `DLManagedTensor` begins with a
`DLTensor` of a pointer, a device (two int32), the number of dimensions (int32), and the dtype, whose first byte is its
code: 2 for float, 4 for bfloat.
"""

from __future__ import annotations

import ctypes
import math
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, TypeAlias

import numpy as np
import torch

from mmcache.errors import ArgumentError
from mmcache.read.local_rows import MappedRows, take_pieces
from mmcache.read.store import reopened
from mmcache.system.arguments import outside
from mmcache.system.devices import is_cpu
from mmcache.system.threads import pieces

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from mmcache.read.local_rows import Piece, Taker
    from mmcache.read.site_view import SiteView
    from mmcache.read.store import Store
    from mmcache.system.memory import BufferPool
    from mmcache.training.prefetch import FetchAll, ReadAhead
    from mmcache.training.schedule import Order, State
    from mmcache.training.token_filter import KeptTokens

__all__ = ["Batch", "Conversion", "Fetched", "Fetcher", "Gather", "Source", "Span", "gather_together", "tensor_over"]


class Gather(NamedTuple):
    """A `view.gather(positions, layers=layers, out=out)` of non-negative positions int64 `[k]` into host memory."""

    view: SiteView
    positions: np.ndarray
    layers: Sequence[int] | None
    out: torch.Tensor


def gather_together(wanted: Sequence[Gather]) -> None:
    """Do several gathers in one call, so that the GIL is re-acquired once; blocks until all rows are there.

    Errors as `SiteView.gather`; the content of every `out` is then undefined.
    """
    fast: list[tuple[Taker, Piece]] = []
    for view, positions, layers, out in wanted:
        reader, slots = view.rows_of(layers)
        if isinstance(reader, MappedRows):
            fast += [(reader, piece) for piece in reader.pieces(positions, slots, out)]
        else:
            reader.take(positions, slots, out)
    take_pieces(fast)


_CODE_AT = ctypes.sizeof(ctypes.c_void_p) + 12
_FLOAT, _BFLOAT = 2, 4

_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype = ctypes.c_void_p
_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)


def tensor_over(memory: np.ndarray, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor over `memory`, uint8 of exactly its size: it and all its views keep a reference to that array.

    `dtype` is a floating-point dtype.
    """
    if not len(memory):
        return torch.empty(shape, dtype=dtype)  # which numpy refuses to make from memory
    # By way of a memoryview: otherwise numpy would keep the base of the array instead of the array itself.
    capsule = np.frombuffer(memory.data, f"i{dtype.itemsize}").reshape(shape).__dlpack__()
    record = _pointer(capsule, b"dltensor")
    ctypes.c_uint8.from_address(record + _CODE_AT).value = _BFLOAT if dtype == torch.bfloat16 else _FLOAT
    return torch.utils.dlpack.from_dlpack(capsule)


class Batch(dict[str, torch.Tensor]):
    """A dict of the sites: `batch[site]` is `[k, n_layers, d_model]`, and row i of every site is of the same token.

    It is the caller's own memory. It can be pickled, and DataLoader's `pin_memory=True` pins its sites.

    Attributes:
        positions: `[k]` int64 on the CPU, each token's position in the store.
        tokens: `[k]` int32 on the CPU, the token ids; -1 if unknown.
        state: the dataset's `state_dict()` as of this batch, whatever was yielded since.
    """

    positions: torch.Tensor
    tokens: torch.Tensor
    state: State

    @classmethod
    def of(
        cls, activations: Mapping[str, torch.Tensor], positions: torch.Tensor, tokens: torch.Tensor, state: State
    ) -> Self:
        """A batch of these parts, which are not copied."""
        batch = cls(activations)
        batch.positions, batch.tokens, batch.state = positions, tokens, state
        return batch

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """The same batch with its sites on another device; `positions` and `tokens` stay on the CPU.

        `non_blocking` is as in `torch.Tensor.to`: useful if the batch is pinned.
        """
        moved = {site: rows.to(device, non_blocking=non_blocking) for site, rows in self.items()}
        return type(self).of(moved, self.positions, self.tokens, self.state)

    def __repr__(self) -> str:
        sites = (f"{site!r}: {list(rows.shape)} {rows.dtype} on {rows.device}" for site, rows in self.items())
        return f"Batch({', '.join(sites)})"


# A batch to fetch: its places in the order, as (start, stop), none empty, and the state after it.
Span: TypeAlias = "tuple[list[tuple[int, int]], State]"
# The sites of a batch, and the CUDA event after which they are complete.
_Rows: TypeAlias = "tuple[dict[str, torch.Tensor], torch.cuda.Event | None]"


@dataclass(frozen=True)
class Source:
    """The part of a feed that does not depend on the epoch.

    Attributes:
        store: the store.
        kept: the kept tokens.
        conversions: for each site wanted, the conversion of its rows.
        layers: the layers wanted; None for all.
        device: where the sites' rows go.
    """

    store: Store
    kept: KeptTokens
    conversions: Mapping[str, Conversion]
    layers: Sequence[int] | None
    device: torch.device

    def reopened(self) -> Source:
        """The same with its own store, opened again; shards may be missing by now."""
        return replace(self, store=reopened(self.store))

    def __reduce__(self) -> tuple[Callable[..., Source], tuple[object, ...]]:
        return _opened, (self.store, self.kept, self.conversions, self.layers, self.device)

    def views(self) -> list[SiteView]:
        """The sites that are wanted."""
        return [self.store[site] for site in self.conversions]

    def disk_bytes(self) -> tuple[int, int]:
        """Bytes of a token: contiguous on disk in the widest site, and in all sites and layers together."""
        sizes = [math.prod((view.shape[0], view.d_model, view.dtype.itemsize)) for view in self.views()]
        side_by_side = max(sizes) // (self.store.n_layers if self.store.layout == "layer" else 1)
        return side_by_side, sum(sizes)

    def has_room(self, tokens: int) -> bool:
        """Whether the cache of a store in a bucket has room for so many tokens of a block shuffle; warns if not.

        True for a local store, whose page cache is not checked.
        """
        remote = self.store.remote
        if remote is None or self.store.fits:
            return True
        needed = min(tokens, self.store.n_tokens) * self.disk_bytes()[1]
        if needed > remote.cache.most_bytes:
            warnings.warn(
                f"{self.store.where}: two pools of the block shuffle, and what is fetched ahead, take {needed} bytes, "
                f"and the cache may take {remote.cache.most_bytes}: rows are fetched one by one, far slower. Give a "
                f"larger cache_bytes, or a smaller buffer_bytes",
                stacklevel=outside(),
            )
        return needed <= remote.cache.most_bytes

    def shapes(self, tokens: int) -> dict[str, tuple[int, int, int]]:
        """The shapes of the sites' rows for so many tokens."""
        deep = self.store.n_layers if self.layers is None else len(self.layers)
        return {site: (tokens, deep, self.store[site].d_model) for site in self.conversions}


def _opened(store: Store, *rest: Any) -> Source:
    return Source(reopened(store), *rest)


@dataclass(frozen=True)
class Fetched:
    """A batch, and the CUDA event after which its rows are complete (None on the CPU)."""

    batch: Batch
    done: torch.cuda.Event | None

    def hand_over(self) -> Batch:
        """The batch, complete for everything that is queued on the current stream from now on."""
        if self.done is not None:
            for rows in self.batch.values():
                stream = torch.cuda.current_stream(rows.device)
                stream.wait_event(self.done)
                # Allocated on the side stream: the allocator must not reuse it while this stream uses it.
                rows.record_stream(stream)
        return self.batch


class Fetcher:
    """Fetches batches of one epoch. Safe to use from several threads.

    Args:
        source: what the batches are made of.
        order: the epoch's order.
        read_ahead: prefetches the rows; None for no prefetching.
        buffers: pools of host memory: for the batches, and for stored rows before their conversion.
    """

    def __init__(
        self,
        source: Source,
        order: Order,
        read_ahead: ReadAhead | FetchAll | None,
        buffers: tuple[BufferPool, BufferPool],
    ) -> None:
        self._source, self._order, self._read_ahead = source, order, read_ahead
        self._buffers, self._staging = buffers
        self._tokens: np.ndarray | None = None
        self._stream: torch.cuda.Stream | None = None
        if source.device.type == "cuda":
            self._stream = torch.cuda.Stream(source.device)  # type: ignore[no-untyped-call]

    def fetch(self, spans: Sequence[Span]) -> list[Fetched]:
        """Fetch batches; blocks until their rows are there, or on CUDA, until the copies are queued.

        Errors as `SiteView.gather`: then none of them is returned.
        """
        positions = []
        for places, _ in spans:
            indices = [np.empty(0, np.int64), *(self._order.indices(start, stop) for start, stop in places)]
            positions.append(self._source.kept.positions(np.concatenate(indices)))
            for view in self._source.views():
                view.believe(positions[-1], view.rows_of(self._source.layers)[1])
            if self._read_ahead is not None:
                self._read_ahead.need(places)
        fetched = self._on_host(positions) if self._stream is None else self._on_cuda(positions, self._stream)
        batches = []
        for (_, state), where, (rows, done) in zip(spans, positions, fetched, strict=True):
            tokens = torch.from_numpy(self._tokens_at(where))
            batches.append(Fetched(Batch.of(rows, torch.from_numpy(where), tokens, state), done))
        return batches

    def close(self) -> None:
        """Stop prefetching. Does not block."""
        if self._read_ahead is not None:
            self._read_ahead.close()

    def _tokens_at(self, positions: np.ndarray) -> np.ndarray:
        """The token ids: `[k]` int32."""
        if self._tokens is None:
            self._tokens = self._source.store.tokens.numpy()
        found = np.empty(len(positions), np.int32)
        for piece in pieces(len(positions), len(positions)):
            found[piece] = self._tokens[positions[piece]]
        return found

    def _on_host(self, positions: Sequence[np.ndarray]) -> list[_Rows]:
        source, conversions, device = self._source, self._source.conversions, self._source.device
        wanted, found = [], []
        for where in positions:
            shapes = source.shapes(len(where))
            out = self._lend(self._buffers, {site: (shapes[site], made.dtype) for site, made in conversions.items()})
            kept = {site: (shapes[site], made.stored) for site, made in conversions.items() if made.staged}
            staged = self._lend(self._staging, kept)
            found.append((out, {site: staged.get(site, rows) for site, rows in out.items()}))
            wanted += [Gather(source.store[site], where, source.layers, rows) for site, rows in found[-1][1].items()]
        gather_together(wanted)
        for out, stored in found:
            for site, conversion in conversions.items():
                conversion.apply(stored[site], out[site])
        if is_cpu(device):
            return [(out, None) for out, _ in found]
        return [({site: rows.to(device) for site, rows in out.items()}, None) for out, _ in found]

    @staticmethod
    def _lend(
        buffers: BufferPool, wanted: Mapping[str, tuple[tuple[int, int, int], torch.dtype]]
    ) -> dict[str, torch.Tensor]:
        """An uninitialised tensor for each site, all in one buffer."""
        if not wanted:
            return {}
        memory = buffers.lend([dtype.itemsize * math.prod(shape) for shape, dtype in wanted.values()])
        return {
            site: tensor_over(part, dtype, shape)
            for (site, (shape, dtype)), part in zip(wanted.items(), memory, strict=True)
        }

    def _on_cuda(self, positions: Sequence[np.ndarray], stream: torch.cuda.Stream) -> list[_Rows]:
        """Queue copies and conversions on the side stream, from pinned memory of torch's allocator.

        The allocator does not reuse that memory before the copies from it are done.
        """
        source = self._source
        found: list[_Rows] = []
        pinned = [
            {
                site: torch.empty(shape, dtype=source.conversions[site].stored, pin_memory=True)
                for site, shape in source.shapes(len(where)).items()
            }
            for where in positions
        ]
        gather_together(
            [
                Gather(source.store[site], where, source.layers, rows)
                for where, sites in zip(positions, pinned, strict=True)
                for site, rows in sites.items()
            ]
        )
        with torch.cuda.device(source.device), torch.cuda.stream(stream):
            for sites in pinned:
                out, done = {}, torch.cuda.Event()  # type: ignore[no-untyped-call]
                for site, stored in sites.items():
                    rows = torch.empty_like(stored, device=source.device)
                    rows.copy_(stored, non_blocking=True)
                    out[site] = source.conversions[site].on_device(rows)
                done.record(stream)
                found.append((out, done))
        return found


# Bytes of the wide dtype per piece: fits the caches, and takes few calls per batch, since each has to get the GIL back
# (see system/threads.py).
_PIECE_BYTES = 8 << 20


class Conversion:
    """The conversion of one site's rows: none, a cast, or `(x - shift) * scale` and a cast.

    Normalises in float32, or float64 rows in float64. Immutable; can be pickled.

    Args:
        view: the site.
        layers: the layers wanted, in their order; None for all.
        dtype: of the result; None for the storage dtype.
        normalize: as `SiteStatistics.normalizer`; None for no normalisation.

    Raises:
        ArgumentError: a layer's statistics give no finite shift and scale.
    """

    def __init__(
        self,
        view: SiteView,
        layers: Sequence[int] | None,
        dtype: torch.dtype | None,
        normalize: Literal["scalar", "per_dim"] | None,
    ) -> None:
        self.stored = view.dtype
        self.dtype = view.dtype if dtype is None else dtype
        self.wide = torch.float64 if view.dtype == torch.float64 else torch.float32
        self._shift: torch.Tensor | None = None
        self._scale: torch.Tensor | None = None
        if normalize is not None:
            chosen = list(view.layers if layers is None else layers)
            slots = [view.layers.index(layer) for layer in chosen]
            shift, scale = (part[slots].to(self.wide) for part in view.statistics.normalizer(normalize))
            good = (shift.isfinite() & scale.isfinite()).all(dim=1)
            if not good.all():
                layer = chosen[int(good.logical_not().nonzero()[0])]
                raise ArgumentError(
                    f"normalize={normalize!r}: the statistics of {view.name}, layer {layer}, give no finite factor "
                    f"(no rows were counted, or all are zeros); leave the layer out with layers="
                )
            self._shift, self._scale = shift if normalize == "per_dim" else None, scale

    @property
    def staged(self) -> bool:
        """Whether the stored rows need their own buffer; otherwise they are read into that of the result."""
        return self.stored != self.dtype

    def apply(self, rows: torch.Tensor, out: torch.Tensor) -> None:
        """Fill `out` `[k, n_layers, d_model]` from the stored `rows`, which are `out` itself unless `staged`."""
        if self._scale is None:
            if self.staged:
                out.copy_(rows)
            return
        step = max(1, _PIECE_BYTES // max(1, self.wide.itemsize * self._scale.numel()))
        room = None if self.dtype == self.wide else torch.empty((min(step, len(out)), *out.shape[1:]), dtype=self.wide)
        for start in range(0, len(out), step):
            piece, into = rows[start : start + step], out[start : start + step]
            wide = into if room is None else room[: len(into)]
            if self.staged or room is not None:
                wide.copy_(piece)
            self._normalise(wide, self._shift, self._scale)
            if room is not None:
                into.copy_(wide)

    def on_device(self, rows: torch.Tensor) -> torch.Tensor:
        """The result of `apply` for rows on a device, computed there, in new memory or in place."""
        if self._scale is None:
            return rows.to(self.dtype)
        wide = rows.to(self.wide)
        shift = None if self._shift is None else self._shift.to(rows.device, non_blocking=True)
        self._normalise(wide, shift, self._scale.to(rows.device, non_blocking=True))
        return wide.to(self.dtype)

    @staticmethod
    def _normalise(wide: torch.Tensor, shift: torch.Tensor | None, scale: torch.Tensor) -> None:
        if shift is not None:
            wide.sub_(shift)
        wide.mul_(scale)
