"""Fetches the tokens of some batches: every site, in the order of the epoch, converted, on the device."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from mmcache.read.store import reopened
from mmcache.system.arguments import outside
from mmcache.system.devices import is_cpu
from mmcache.system.threads import pieces
from mmcache.training.dlpack import tensor_over
from mmcache.training.together import Gather, gather_together
from mmcache.training.training_batch import Batch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from mmcache.read.site_view import SiteView
    from mmcache.read.store import Store
    from mmcache.system.memory import Buffers
    from mmcache.training.conversion import Conversion
    from mmcache.training.feed_plan import State
    from mmcache.training.kept import Kept
    from mmcache.training.order import Order
    from mmcache.training.read_ahead import BringAll, ReadAhead

__all__ = ["Fetched", "Fetcher", "Source", "Span"]

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
    kept: Kept
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
        self, source: Source, order: Order, read_ahead: ReadAhead | BringAll | None, buffers: tuple[Buffers, Buffers]
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
        buffers: Buffers, wanted: Mapping[str, tuple[tuple[int, int, int], torch.dtype]]
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
