"""One batch of a training feed: the rows of its tokens, gathered, converted, and on the device.

A tensor over memory that is there, made without letting go of the interpreter's lock. Every operator of torch lets go
of it, a mere `view` too, and to get it back beside a busy thread takes 5 ms and more: measured, a third of what a batch
of the feed took there. What comes in by DLPack has its shape already. numpy hands its arrays over like that, but has no
bfloat16: so the dtype is said in the record itself.

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
    """A `view.gather(positions, layers=layers, out=out)`, of positions int64 `[k]` from 0 on into host memory."""

    view: SiteView
    positions: np.ndarray
    layers: Sequence[int] | None
    out: torch.Tensor


def gather_together(wanted: Sequence[Gather]) -> None:
    """Gather them all, equal to one after the other; blocks until all rows are there.

    Errors as `SiteView.gather`; what any `out` holds then is undefined.
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
    """Make a tensor of `memory`, uint8 of exactly its size: it, and every view of it, keeps that very array.

    `dtype` is a floating one.
    """
    if not len(memory):
        return torch.empty(shape, dtype=dtype)  # which numpy refuses to make from memory
    # By way of a memoryview, or numpy would keep what the memory is a part of, in place of the array itself.
    capsule = np.frombuffer(memory.data, f"i{dtype.itemsize}").reshape(shape).__dlpack__()
    record = _pointer(capsule, b"dltensor")
    ctypes.c_uint8.from_address(record + _CODE_AT).value = _BFLOAT if dtype == torch.bfloat16 else _FLOAT
    return torch.utils.dlpack.from_dlpack(capsule)


class Batch(dict[str, torch.Tensor]):
    """A dict of the sites: `batch[site]` is `[k, n_layers, d_model]`, and row i of each is of the same token.

    It is the caller's own memory. It pickles, and DataLoader's `pin_memory=True` gives one whose sites are pinned.

    Attributes:
        positions: `[k]` int64 on the CPU: where in the store each token is.
        tokens: `[k]` int32 on the CPU: which token it is; -1 where that is not known.
        state: what `state_dict()` of the dataset was when it had yielded this batch and nothing after it.
    """

    positions: torch.Tensor
    tokens: torch.Tensor
    state: State

    @classmethod
    def of(
        cls, activations: Mapping[str, torch.Tensor], positions: torch.Tensor, tokens: torch.Tensor, state: State
    ) -> Self:
        """Put a batch together; it holds on to what it is given."""
        batch = cls(activations)
        batch.positions, batch.tokens, batch.state = positions, tokens, state
        return batch

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """Give the same batch with its sites on another device; `positions` and `tokens` stay on the CPU.

        `non_blocking` is as in `torch.Tensor.to`: worth it where the batch is pinned.
        """
        moved = {site: rows.to(device, non_blocking=non_blocking) for site, rows in self.items()}
        return type(self).of(moved, self.positions, self.tokens, self.state)

    def __repr__(self) -> str:
        sites = (f"{site!r}: {list(rows.shape)} {rows.dtype} on {rows.device}" for site, rows in self.items())
        return f"Batch({', '.join(sites)})"


# A batch: which places of the order, as (start, stop), none empty, and the state behind it.
Span: TypeAlias = "tuple[list[tuple[int, int]], State]"
# The sites of a batch, and what those on a CUDA device have to be waited for with.
_Rows: TypeAlias = "tuple[dict[str, torch.Tensor], torch.cuda.Event | None]"


@dataclass(frozen=True)
class Source:
    """What batches are made of, whatever the epoch.

    Attributes:
        store: the store.
        kept: the tokens that take part.
        conversions: what is done to the rows of each site wanted.
        layers: the layers wanted; None for all.
        device: where the sites' rows go.
    """

    store: Store
    kept: KeptTokens
    conversions: Mapping[str, Conversion]
    layers: Sequence[int] | None
    device: torch.device

    def reopened(self) -> Source:
        """Give the same with a store of its own, opened again; it may be partial by now."""
        return replace(self, store=reopened(self.store))

    def __reduce__(self) -> tuple[Callable[..., Source], tuple[object, ...]]:
        return _opened, (self.store, self.kept, self.conversions, self.layers, self.device)

    def views(self) -> list[SiteView]:
        """Give the sites that are wanted."""
        return [self.store[site] for site in self.conversions]

    def disk_bytes(self) -> tuple[int, int]:
        """Give the bytes that a token has side by side on disk, in the widest site, and in all, all layers together."""
        sizes = [math.prod((view.shape[0], view.d_model, view.dtype.itemsize)) for view in self.views()]
        side_by_side = max(sizes) // (self.store.n_layers if self.store.layout == "layer" else 1)
        return side_by_side, sum(sizes)

    def has_room(self, tokens: int) -> bool:
        """Tell whether so many tokens of a block shuffle have room where they are read to; says so where they have not.

        Of a store in a bucket that is the cache; else the page cache, of which nobody knows.
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
        """Give the shapes of the sites' rows of so many tokens."""
        deep = self.store.n_layers if self.layers is None else len(self.layers)
        return {site: (tokens, deep, self.store[site].d_model) for site in self.conversions}


def _opened(store: Store, *rest: Any) -> Source:
    return Source(reopened(store), *rest)


@dataclass(frozen=True)
class Fetched:
    """A batch, and what its rows on a CUDA device have to be waited for with."""

    batch: Batch
    done: torch.cuda.Event | None

    def hand_over(self) -> Batch:
        """Give the batch to the current stream: what is queued there from now on finds it complete."""
        if self.done is not None:
            for rows in self.batch.values():
                stream = torch.cuda.current_stream(rows.device)
                stream.wait_event(self.done)
                # It was taken on the side stream, whose allocator must not give it away while this one uses it.
                rows.record_stream(stream)
        return self.batch


class Fetcher:
    """Fetches batches of one epoch. Safe to use from several threads.

    Args:
        source: what of.
        order: the epoch's.
        read_ahead: what brings the rows into memory before; None where nothing does.
        buffers: what host memory is taken from: for the batches, and for stored rows on their way to them.
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
        """Fetch batches; blocks until their tokens are there.

        On CUDA, until the copies are queued. Errors as `SiteView.gather`: then none of them is given.
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
        """Read nothing more ahead. Does not block."""
        if self._read_ahead is not None:
            self._read_ahead.close()

    def _tokens_at(self, positions: np.ndarray) -> np.ndarray:
        """Give the token ids: `[k]` int32."""
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
        """Give a tensor for each site, of any content, out of one buffer."""
        if not wanted:
            return {}
        memory = buffers.lend([dtype.itemsize * math.prod(shape) for shape, dtype in wanted.values()])
        return {
            site: tensor_over(part, dtype, shape)
            for (site, (shape, dtype)), part in zip(wanted.items(), memory, strict=True)
        }

    def _on_cuda(self, positions: Sequence[np.ndarray], stream: torch.cuda.Stream) -> list[_Rows]:
        """Queue the copies, and the conversions behind them, on the side stream, from torch's own pinned memory.

        That is not given to anyone else before the copies from it are done.
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


# Of the wide numbers in which a piece is computed: in the caches, and few enough calls for a batch, since after each
# the interpreter's lock has to be had back.
_PIECE_BYTES = 8 << 20


class Conversion:
    """What is done to the rows of one site: nothing, a cast, or `(x - shift) * scale` and a cast.

    Normalising is computed in float32, from float64 in float64. Immutable; it pickles.

    Args:
        view: the site.
        layers: the layers wanted, in their order; None for all.
        dtype: of the result; None for the storage dtype.
        normalize: as `SiteStatistics.normalizer`; None leaves the values as they are.

    Raises:
        ArgumentError: the statistics of a layer cannot normalise it.
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
        """Whether the stored rows need a place of their own; otherwise they go where the result will be."""
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
        """Give what `apply` gives, of rows on a device and there, in new memory or in the rows' own."""
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
