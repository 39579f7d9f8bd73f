"""Fetches the tokens of a batch: every site, in the order of the epoch, converted, on the device."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mmcache.devices import is_cpu
from mmcache.dlpack import tensor_over
from mmcache.held import pieces
from mmcache.store import Store, open_store
from mmcache.training_batch import Batch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from mmcache.buffers import Buffers
    from mmcache.conversion import Conversion
    from mmcache.feed_plan import State
    from mmcache.kept import Kept
    from mmcache.order import Order
    from mmcache.read_ahead import ReadAhead
    from mmcache.site_view import SiteView

__all__ = ["Fetched", "Fetcher", "Source"]


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
        return replace(self, store=open_store(self.store.path, partial=True))

    def __reduce__(self) -> tuple[Callable[..., Source], tuple[object, ...]]:
        return _opened, (self.store.path, self.kept, self.conversions, self.layers, self.device)

    def views(self) -> list[SiteView]:
        """Give the sites that are wanted."""
        return [self.store[site] for site in self.conversions]

    def disk_bytes(self) -> tuple[int, int]:
        """Give the bytes that a token has side by side on disk, in the widest site, and in all, all layers together."""
        sizes = [math.prod((view.shape[0], view.d_model, view.dtype.itemsize)) for view in self.views()]
        side_by_side = max(sizes) // (self.store.n_layers if self.store.layout == "layer" else 1)
        return side_by_side, sum(sizes)

    def shapes(self, tokens: int) -> dict[str, tuple[int, int, int]]:
        """Give the shapes of the sites' rows of so many tokens."""
        deep = self.store.n_layers if self.layers is None else len(self.layers)
        return {site: (tokens, deep, self.store[site].d_model) for site in self.conversions}


def _opened(path: Path, *rest: Any) -> Source:
    return Source(open_store(path, partial=True), *rest)


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
        self, source: Source, order: Order, read_ahead: ReadAhead | None, buffers: tuple[Buffers, Buffers]
    ) -> None:
        self._source, self._order, self._read_ahead = source, order, read_ahead
        self._buffers, self._staging = buffers
        self._tokens: np.ndarray | None = None
        self._stream: torch.cuda.Stream | None = None
        if source.device.type == "cuda":
            self._stream = torch.cuda.Stream(source.device)  # type: ignore[no-untyped-call]

    def fetch(self, start: int, stop: int, state: State) -> Fetched:
        """Fetch the tokens at the places from `start` to before `stop` of the epoch; blocks until they are there.

        On CUDA, until the copy is queued. Errors as `SiteView.gather`.
        """
        source = self._source
        positions = source.kept.positions(self._order.indices(start, stop))
        if self._read_ahead is not None:
            self._read_ahead.need(start, stop)
        done = None
        if self._stream is not None:
            rows, done = self._on_cuda(positions, self._stream)
        else:
            rows = self._on_host(positions)
            if not is_cpu(source.device):
                rows = {site: found.to(source.device) for site, found in rows.items()}
        batch = Batch.of(rows, torch.from_numpy(positions), torch.from_numpy(self._tokens_at(positions)), state)
        return Fetched(batch, done)

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

    def _on_host(self, positions: np.ndarray) -> dict[str, torch.Tensor]:
        shapes = self._source.shapes(len(positions))
        conversions = self._source.conversions
        out = self._lend(self._buffers, {site: (shapes[site], made.dtype) for site, made in conversions.items()})
        stored = {site: (shapes[site], made.stored) for site, made in conversions.items() if made.staged}
        staged = self._lend(self._staging, stored)
        for site, conversion in conversions.items():
            rows = staged.get(site, out[site])
            self._source.store[site].gather(positions, layers=self._source.layers, out=rows)
            conversion.apply(rows, out[site])
        return out

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

    def _on_cuda(
        self, positions: np.ndarray, stream: torch.cuda.Stream
    ) -> tuple[dict[str, torch.Tensor], torch.cuda.Event]:
        """Queue the copies, and the conversions behind them, on the side stream, from torch's own pinned memory.

        That is not given to anyone else before the copies from it are done.
        """
        out = {}
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        with torch.cuda.device(self._source.device), torch.cuda.stream(stream):
            for site, shape in self._source.shapes(len(positions)).items():
                conversion = self._source.conversions[site]
                pinned = torch.empty(shape, dtype=conversion.stored, pin_memory=True)
                self._source.store[site].gather(positions, layers=self._source.layers, out=pinned)
                rows = torch.empty(shape, dtype=conversion.stored, device=self._source.device)
                rows.copy_(pinned, non_blocking=True)
                out[site] = conversion.on_device(rows)
            done.record(stream)
        return out, done
