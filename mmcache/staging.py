"""From tensors to shards: rows are copied into staging slots, and the pipeline makes shards of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mmcache.geometry import PAGE

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from mmcache.pipeline import Pipeline, Slot
    from mmcache.shard_writer import ShardWriter

__all__ = ["Stager"]


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

    files = 0

    def __init__(self, slot: Slot, pipeline: Pipeline) -> None:
        self.slot, self.used = slot, 0
        self.pieces: list[_Piece] = []
        # Packed on a device, and kept until they have been copied from there, which `copied` tells.
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
                cast to the storage dtype. Read before this returns; on CUDA, before any later work of the
                current stream.
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
                whole = fit - (shard.staged + fit) % page_rows
                fit = whole if whole > 0 or job.used else fit
            elsewhere = bool(job.sources) and job.sources[0].device != parts[0].device
            if fit <= 0 or elsewhere or (on_cuda and not job.slot.pinned):
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
        """Give the packed rows' device memory back soon: it is held until their slot is handed over."""
        if self._job is not None and self._job.sources:
            self.flush()

    def _copy_from_cuda(self, job: _SlotJob, into: torch.Tensor, parts: list[torch.Tensor]) -> torch.Tensor | None:
        """Queue the copy: packed and cast on the caller's stream, then one run into pinned memory on a side stream.

        Packing always copies, which takes microseconds on the device. So whatever the caller does to the tensors
        next, in place or not, comes after it, and they need not be kept.
        """
        device = parts[0].device
        stream = self._streams.get(device)
        if stream is None:
            stream = self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        rows = parts[0] if into.ndim == 2 else torch.stack([part.to(device) for part in parts], dim=1)
        packed = rows.to(into.dtype, copy=into.ndim == 2, memory_format=torch.contiguous_format)
        queued = [packed]
        overflow = None
        if _narrows(rows.dtype, into.dtype):
            lost = (packed.isinf() & rows.isfinite()).sum(dim=(0, -1)).reshape(-1)
            overflow = torch.empty(lost.shape, dtype=lost.dtype, pin_memory=True)
            queued.append(lost)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            into.copy_(packed, non_blocking=True)
            if overflow is not None:
                overflow.copy_(queued[-1], non_blocking=True)
        for tensor in queued:
            tensor.record_stream(stream)
        job.sources.extend(queued)
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
