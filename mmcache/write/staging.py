"""`Stager`: copies rows of tensors into staging slots, of which the pipeline makes shards."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from mmcache.stats.moments import WHOLE_ROWS, block_rows
from mmcache.system.memory import PAGE
from mmcache.write.pipeline import Job

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mmcache.format.shard import ShardSpec
    from mmcache.write.pipeline import Pipeline, Slot
    from mmcache.write.shard_writer import ShardWriter

__all__ = ["Stager"]

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class _Piece:
    """Some rows of one shard in a slot: bytes `start` to `stop`.

    `kept` has for each time that rows were added their number, and which of them count in the statistics (None for
    all). `overflow` has the overflow counts of those that overflowed.
    """

    shard: ShardWriter
    start: int
    stop: int
    kept: list[tuple[int, np.ndarray | None]]
    overflow: list[torch.Tensor]

    def keep(self) -> np.ndarray | None:
        """Which rows count in the statistics: `[n]` bool, or None for all."""
        if all(kept is None for _, kept in self.kept):
            return None
        return np.concatenate([np.ones(rows, np.bool_) if kept is None else kept for rows, kept in self.kept])


class _SlotJob(Job):
    """The job that empties one slot."""

    def __init__(self, slot: Slot, pipeline: Pipeline) -> None:
        self.slot, self.used = slot, 0
        self.pieces: list[_Piece] = []
        # Packed tensors on a device, kept until they were copied from there (event `copied`).
        self.sources: list[torch.Tensor] = []
        self.copied: torch.cuda.Event | None = None
        # Nothing more will be staged in it: it may be submitted.
        self.full = False
        self._pipeline = pipeline
        self._writes: list[tuple[Callable[[np.ndarray], None], np.ndarray]] = []

    def begin(self, shard: ShardWriter) -> int:
        """The offset in the slot for the next rows of a shard.

        Directly after its last rows, or as far into a page as in its file, so that whole pages can be written directly.
        """
        if self.pieces and self.pieces[-1].shard is shard:
            return self.used
        into_page = shard.staged * shard.spec.row_bytes % PAGE
        # A slot may have room for just one row, and none for an offset.
        fits = into_page + shard.spec.row_bytes <= len(self.slot.memory)
        return -(-self.used // PAGE) * PAGE + into_page * fits

    def add(
        self, shard: ShardWriter, start: int, stop: int, keep: np.ndarray | None, overflow: torch.Tensor | None
    ) -> None:
        """Record that bytes `start` to `stop` are the next rows of a shard."""
        if not (self.pieces and self.pieces[-1].shard is shard):
            self.pieces.append(_Piece(shard, start, start, [], []))
        piece = self.pieces[-1]
        piece.kept.append(((stop - start) // shard.spec.row_bytes, keep))
        if overflow is not None:
            piece.overflow.append(overflow)
        piece.stop = self.used = stop

    def digest(self) -> None:
        if self.copied is not None:
            self.copied.synchronize()
            self.sources.clear()
        for piece in self.pieces:
            overflow = [lost.cpu().numpy() for lost in piece.overflow]
            data = self.slot.memory[piece.start : piece.stop]
            piece.shard.digest(data, piece.keep(), overflow)
            self._writes.append((piece.shard.begin_write(len(data)), data))

    def write(self) -> None:
        for write, data in self._writes:
            write(data)
        self._pipeline.ring.release(self.slot)


class Stager:
    """Copies rows into slots and submits full slots to the pipeline. Used by one thread at a time."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        # Jobs not submitted yet; only the last may be not full. An interrupt between any two steps loses none of them,
        # and every step can be repeated.
        self._filled: list[_SlotJob] = []
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def stage(self, shard: ShardWriter, parts: Sequence[torch.Tensor], keep: np.ndarray | None = None) -> None:
        """Stage the next rows of a shard; blocks only while every slot is in use.

        Args:
            shard: the shard that they belong to.
            parts: one `[n, d_model]` tensor for each layer of the shard's row, of any device, strides and float
                dtype; cast to the storage dtype. Read before this returns; on CUDA, before any later work of the
                current stream.
            keep: `[n]` bool, the rows that count in the statistics; None for all.
        """
        spec = shard.spec
        rows, done = len(parts[0]), 0
        whole_rows = _whole_rows(spec, self._pipeline.ring.slot_bytes)
        room_for_all = self._pipeline.ring.slot_bytes // spec.row_bytes
        on_cuda = parts[0].device.type == "cuda"
        plain = _plain(parts, spec.dtype.torch)
        while done < rows:
            job = self._open() or self._next(pin=on_cuda)
            start = job.begin(shard)
            room = (len(job.slot.memory) - start) // spec.row_bytes
            if job.used and room < whole_rows <= room_for_all // 4 and shard.staged % whole_rows == 0:
                # The rows that are summed together next would be split, even if these have room: others may follow.
                self._set_aside()
                continue
            fit = min(room, rows - done)
            if fit < rows - done:
                # Whole pages, so that the next piece starts on one and can be written directly; and if possible all
                # rows that are summed together, which then need not be kept until the others arrive.
                whole = fit - (shard.staged + fit) % whole_rows
                fit = whole if whole > 0 or job.used else fit
            elsewhere = bool(job.sources) and job.sources[0].device != parts[0].device
            if fit <= 0 or elsewhere or (on_cuda and not job.slot.pinned):
                self._set_aside()
                continue
            stop = start + fit * spec.row_bytes
            overflow = None
            if plain is None:
                into = job.slot.tensor[start:stop].view(spec.dtype.torch).view(fit, *spec.row_shape)
                wanted = [part[done : done + fit] for part in parts]
                overflow = self._copy_from_cuda(job, into, wanted) if on_cuda else _copy(into, wanted)
            else:
                _copy_plain(job.slot.memory[start:stop], [bits[done : done + fit] for bits in plain], spec.row_shape)
            job.add(shard, start, stop, None if keep is None else keep[done : done + fit], overflow)
            shard.staged += fit
            done += fit
        self._submit()

    def _open(self) -> _SlotJob | None:
        return self._filled[-1] if self._filled and not self._filled[-1].full else None

    def _next(self, *, pin: bool) -> _SlotJob:
        job = _SlotJob(self._pipeline.acquire(pin=pin), self._pipeline)
        self._filled.append(job)
        return job

    def flush(self) -> None:
        """Submit the filled slots, and the one that is being filled."""
        self._set_aside()
        self._submit()

    def _submit(self) -> None:
        while self._filled and self._filled[0].full:
            self._pipeline.submit(self._filled[0])
            del self._filled[0]

    def _set_aside(self) -> None:
        """Mark the open slot as full; submit slots only when none is free.

        While the ring has room, rows are copied without background threads that compete for memory bandwidth and
        processors, so that the caller waits only for the copies.
        """
        job = self._open()
        if job is None:
            return
        if job.sources:
            job.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            job.copied.record(self._streams[job.sources[0].device])
        job.full = True
        if not self._pipeline.ring.has_room:
            self._submit()

    def settle(self) -> None:
        """Flush if packed rows hold device memory, which is freed only after their slot is submitted."""
        job = self._open()
        if job is not None and job.sources:
            self.flush()

    def _copy_from_cuda(self, job: _SlotJob, into: torch.Tensor, parts: list[torch.Tensor]) -> torch.Tensor | None:
        """Queue the copy: pack and cast on the caller's stream, then one copy to pinned memory on a side stream.

        Packing always copies, which takes microseconds on the device. So whatever the caller does to the tensors next,
        even in place, comes after it, and they need not be kept.
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


def _whole_rows(spec: ShardSpec, slot_bytes: int) -> int:
    """The number of rows that fill whole pages, and if a slot has room, all rows that are summed together."""
    block = block_rows(spec.stat_layers, spec.row_shape[-1], spec.chunk_rows) if spec.stat_layers else WHOLE_ROWS
    fits = block * spec.row_bytes <= slot_bytes
    return max(PAGE // math.gcd(spec.row_bytes, PAGE), block if fits else WHOLE_ROWS)


def _narrows(source: torch.dtype, target: torch.dtype) -> bool:
    return torch.finfo(source).max > torch.finfo(target).max


def _plain(parts: Sequence[torch.Tensor], dtype: torch.dtype) -> list[np.ndarray] | None:
    """The bits of the parts as integers, if all are in host memory and need no cast; else None."""
    if any(part.dtype != dtype or part.device.type != "cpu" or part.is_neg() for part in parts):
        return None
    return [part.detach().view(_INTEGERS[dtype.itemsize]).numpy() for part in parts]


def _copy_plain(into: np.ndarray, parts: list[np.ndarray], row_shape: tuple[int, ...]) -> None:
    """Copy bits into slot memory, `[bytes]` uint8. By numpy: torch's threads would wait for each other beside ours."""
    view = into.view(parts[0].dtype).reshape(-1, *row_shape)
    for layer, part in enumerate(parts):
        np.copyto(view if view.ndim == 2 else view[:, layer], part)


def _within(rows: torch.Tensor, most: float) -> bool:
    """Whether no magnitude is larger and none is NaN, in one quick pass; computing the norm takes 16 times as long."""
    low, high = torch.aminmax(rows)
    return bool(low >= -most) and bool(high <= most)


def _copy(into: torch.Tensor, parts: list[torch.Tensor]) -> torch.Tensor | None:
    """Copy rows of host (or any other blocking) memory; returns how many values per layer the cast made infinite."""
    views = [into] if into.ndim == 2 else list(into.unbind(1))
    counted = None
    for layer, (view, part) in enumerate(zip(views, parts, strict=True)):
        view.copy_(part)
        if _narrows(part.dtype, into.dtype) and not _within(part, torch.finfo(into.dtype).max):
            if counted is None:
                counted = torch.zeros(len(views), dtype=torch.int64)
            counted[layer] = (view.isinf().cpu() & part.isfinite().cpu()).sum()
    return counted
