"""From tensors to shards: rows are copied into staging slots, and the pipeline makes shards of them."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import crc32c
import numpy as np
import torch

from mmcache.files import Draft, sync_folder
from mmcache.format import HEADER_BYTES, Layout
from mmcache.geometry import PAGE
from mmcache.statistics import Moments

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from mmcache.format import ShardSpec
    from mmcache.pipeline import Pipeline, Slot

__all__ = ["Seal", "ShardWriter", "Stager"]


class ShardWriter:
    """One shard that is being filled, in order. Equal, byte for byte, to `format.encode` of the same rows.

    Made in the caller's thread, which meets a full disk there; digested, written and published in the
    pipeline's threads, each of which touches only its own part of the state.

    Args:
        path: the final name.
        spec: the array's shards.
        metadata: the header's strings.
        first_token: the position of the shard's first row in the store.
        rows: rows it will have, where that is known: their space is reserved at once.
        direct: write past the page cache.
        durable: sync before the rename.
        inspect: called, in the digest thread, with the finished statistics; raising there keeps the shard from
            being published.
    """

    def __init__(
        self,
        path: Path,
        spec: ShardSpec,
        metadata: Mapping[str, str],
        first_token: int,
        *,
        rows: int | None,
        direct: bool,
        durable: bool,
        inspect: Callable[[Mapping[str, np.ndarray]], None] | None = None,
    ) -> None:
        self.spec = spec
        self.folder = path.parent
        self._metadata, self._first_token, self._durable = metadata, first_token, durable
        self._inspect = inspect
        # The caller's side, the digest thread's, and the write thread's.
        self.staged = 0
        self._digested = 0
        self._written = 0
        self._crcs: list[int] = []
        self._crc = 0
        width = spec.row_shape[-1]
        self._moments = Moments(spec.stat_layers, width, spec.chunk_rows) if spec.stat_layers else None
        self._tail = b""
        reserve = Layout(spec, rows).size if rows else 0
        self._draft = Draft(path, reserve=reserve, direct=direct)

    def carry(self, overflow: np.ndarray) -> None:
        """Go on counting from the overflow of the shard that this one replaces. Before anything is staged."""
        if self._moments is not None:
            self._moments.add_overflow(overflow)

    def digest(self, data: np.ndarray, keep: np.ndarray | None, overflow: np.ndarray | None) -> None:
        """Take the next rows, as `[bytes]` uint8, into checksums and statistics."""
        spec = self.spec
        rows = len(data) // spec.row_bytes
        done = 0
        while done < rows:
            room = spec.chunk_rows - self._digested % spec.chunk_rows
            some = min(room, rows - done)
            part = data[done * spec.row_bytes : (done + some) * spec.row_bytes]
            self._crc = crc32c.crc32c(part.data, self._crc)
            if some == room:
                self._crcs.append(self._crc)
                self._crc = 0
            done += some
            self._digested += some
        if self._moments is not None:
            shaped = data.view(spec.dtype.numpy).reshape(rows, spec.stat_layers, spec.row_shape[-1])
            self._moments.add(shaped, keep)
            if overflow is not None:
                self._moments.add_overflow(overflow)

    def write(self, data: np.ndarray) -> None:
        """Write the next rows, as `[bytes]` uint8."""
        self._draft.write(data, HEADER_BYTES + self._written)
        self._written += len(data)

    def finish_digest(self) -> None:
        """Compute what stands behind the rows."""
        layout = Layout(self.spec, self._digested)
        padding = layout.chunk_padding()
        if padding:
            self._crcs.append(crc32c.crc32c(padding, self._crc))
        statistics = None if self._moments is None else self._moments.arrays(self._first_token)
        if self._inspect is not None and statistics is not None:
            self._inspect(statistics)
        self._tail = layout.tail(self._crcs, statistics)
        self._moments = None

    def finish_write(self) -> None:
        """Write what stands behind the rows, and the header."""
        header = Layout(self.spec, self._digested).header(self._metadata)
        self._draft.write(np.frombuffer(self._tail, np.uint8), HEADER_BYTES + self._written)
        self._draft.write(np.frombuffer(header, np.uint8), 0)
        self._tail = b""

    def publish(self) -> None:
        """Make the file durable and give it its name."""
        self._draft.publish(Layout(self.spec, self._digested).size, durable=self._durable)

    def discard(self) -> None:
        """Leave nothing behind. Only while no thread of the pipeline can touch the shard."""
        self._draft.discard()


class Seal:
    """The job that finishes shards, publishes them, and makes their folders durable if asked to.

    `done` is set once they are in place, or abandoned.
    """

    def __init__(self, shards: Sequence[ShardWriter], *, durable: bool) -> None:
        self._shards, self._durable = shards, durable
        self.done = threading.Event()

    def digest(self) -> None:
        """Compute checksums and statistics."""
        for shard in self._shards:
            shard.finish_digest()

    def write(self) -> None:
        """Write headers and tails."""
        for shard in self._shards:
            shard.finish_write()

    def publish(self) -> None:
        """Sync, rename, sync the folders."""
        for shard in self._shards:
            shard.publish()
        if self._durable:
            for folder in {shard.folder for shard in self._shards}:
                sync_folder(folder)
        self.done.set()

    def abandon(self) -> None:
        """Remove the drafts."""
        for shard in self._shards:
            shard.discard()
        self.done.set()


@dataclass
class _Piece:
    """Some rows of one shard in a slot."""

    shard: ShardWriter
    start: int
    stop: int
    keep: np.ndarray | None
    overflow: torch.Tensor | None


class _SlotJob:
    """The job that empties one slot."""

    def __init__(self, slot: Slot, pipeline: Pipeline) -> None:
        self.slot, self.used = slot, 0
        self.pieces: list[_Piece] = []
        # Tensors on a device must live until their copy has happened, which `copied` tells.
        self.sources: list[torch.Tensor] = []
        self.copied: torch.cuda.Event | None = None
        self._pipeline = pipeline

    def digest(self) -> None:
        if self.copied is not None:
            self.copied.synchronize()
            self.sources.clear()
        for piece in self.pieces:
            overflow = None if piece.overflow is None else piece.overflow.cpu().numpy()
            piece.shard.digest(self.slot.memory[piece.start : piece.stop], piece.keep, overflow)

    def write(self) -> None:
        for piece in self.pieces:
            piece.shard.write(self.slot.memory[piece.start : piece.stop])
        self._pipeline.ring.release(self.slot)

    def publish(self) -> None:
        """Nothing to do: a shard is published by its seal."""

    def abandon(self) -> None:
        """Nothing to do: the pipeline has failed, and takes its ring with it."""


class Stager:
    """Copies rows into slots and hands full slots to the pipeline. Used by one thread at a time."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._job: _SlotJob | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def stage(self, shard: ShardWriter, parts: Sequence[torch.Tensor], keep: np.ndarray | None = None) -> None:
        """Stage the next rows of a shard; blocks only while every slot is in use.

        Args:
            shard: where they go.
            parts: one `[n, d_model]` tensor a layer of the shard's row, any device, strides and float dtype:
                cast to the storage dtype. Read before this returns, except on CUDA, where a side stream reads
                them behind the work that is queued now; they are kept alive until then.
            keep: `[n]` bool: rows that count in the statistics.
        """
        spec = shard.spec
        rows, done = len(parts[0]), 0
        page_rows = PAGE // math.gcd(spec.row_bytes, PAGE)
        on_cuda = parts[0].device.type == "cuda"
        while done < rows:
            job = self._job or self._next(pin=on_cuda)
            room = (job.slot.tensor.numel() - job.used) // spec.row_bytes
            fit = min(room, rows - done)
            if fit < rows - done:
                # Whole pages, so that the next piece starts on one and may go to the device directly.
                fit -= (shard.staged + fit) % page_rows if fit >= 2 * page_rows else 0
            elsewhere = bool(job.sources) and job.sources[0].device != parts[0].device
            if fit == 0 or elsewhere or (on_cuda and not job.slot.pinned):
                self.flush()
                continue
            start, stop = job.used, job.used + fit * spec.row_bytes
            into = job.slot.tensor[start:stop].view(spec.dtype.torch).view(fit, *spec.row_shape)
            wanted = [part[done : done + fit] for part in parts]
            overflow = self._copy_from_cuda(job, into, wanted) if on_cuda else _copy(into, wanted)
            kept = None if keep is None else keep[done : done + fit]
            job.pieces.append(_Piece(shard, start, stop, kept, overflow))
            job.used = -(-stop // PAGE) * PAGE
            shard.staged += fit
            done += fit

    def _next(self, *, pin: bool) -> _SlotJob:
        self._job = _SlotJob(self._pipeline.acquire(pin=pin), self._pipeline)
        return self._job

    def flush(self) -> None:
        """Hand over the slot that is being filled."""
        if self._job is not None:
            if self._job.sources:
                device = self._job.sources[0].device
                self._job.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self._job.copied.record(self._streams[device])
            self._pipeline.submit(self._job)
            self._job = None

    def settle(self) -> None:
        """Let go of the caller's tensors on a device soon: they are held until their slot is handed over."""
        if self._job is not None and self._job.sources:
            self.flush()

    def _copy_from_cuda(self, job: _SlotJob, into: torch.Tensor, parts: list[torch.Tensor]) -> torch.Tensor | None:
        """Queue the copy on a side stream: cast and interleaved on the device, then one run into pinned memory."""
        device = parts[0].device
        stream = self._streams.get(device)
        if stream is None:
            stream = self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            parts = [part.to(device) for part in parts]
            packed = parts[0] if into.ndim == 2 else torch.stack(parts, dim=1)
            cast = packed.to(into.dtype).contiguous()
            overflow = None
            if _narrows(packed.dtype, into.dtype):
                lost = (cast.isinf() & packed.isfinite()).sum(dim=(0, -1)).reshape(-1)
                overflow = torch.empty(lost.shape, dtype=lost.dtype, pin_memory=True)
                overflow.copy_(lost, non_blocking=True)
            into.copy_(cast, non_blocking=True)
        for part in parts:
            part.record_stream(stream)
        job.sources.extend(parts)
        return overflow


def _narrows(source: torch.dtype, target: torch.dtype) -> bool:
    return torch.finfo(source).max > torch.finfo(target).max


def _copy(into: torch.Tensor, parts: list[torch.Tensor]) -> torch.Tensor | None:
    """Copy rows of host (or any other blocking) memory; count per layer what became infinite in the cast."""
    views = [into] if into.ndim == 2 else list(into.unbind(1))
    counted = None
    for layer, (view, part) in enumerate(zip(views, parts, strict=True)):
        view.copy_(part)
        # One quick pass tells whether to look closer: the largest magnitude (or a NaN).
        if _narrows(part.dtype, into.dtype) and not (
            torch.linalg.vector_norm(part, torch.inf) <= torch.finfo(into.dtype).max
        ):
            if counted is None:
                counted = torch.zeros(len(views), dtype=torch.int64)
            counted[layer] = (view.isinf().cpu() & part.isfinite().cpu()).sum()
    return counted
