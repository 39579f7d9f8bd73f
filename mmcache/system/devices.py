"""Copies between host memory and a device, in pieces through small pinned buffers, and checks of tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mmcache.errors import ArgumentError, DtypeError, ShapeError
from mmcache.system.arguments import a_device
from mmcache.system.syscalls import LINUX, writable

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["check_dense", "check_target", "fill_device", "is_cpu", "own_copy"]

_PIECE_BYTES = 16 << 20


def is_cpu(device: torch.device | str) -> bool:
    """Whether a device is the CPU. Raises ArgumentError for one that does not exist."""
    return (device.__class__ is str and device == "cpu") or a_device("device", device).type == "cpu"


def check_dense(tensor: object, what: str) -> None:
    """Check that `tensor` is a dense tensor with data; `what` names it in the error.

    Raises:
        DtypeError: it is no tensor, is sparse, or is on the meta device, which has no data.
    """
    if not isinstance(tensor, torch.Tensor):
        raise DtypeError(f"{what} is a {type(tensor).__name__}: expected a torch tensor")
    if tensor.layout != torch.strided or tensor.is_meta:
        kind = "on the meta device, without data" if tensor.is_meta else f"{tensor.layout}"
        raise DtypeError(f"{what} is {kind}: expected a dense tensor with data")


def check_target(out: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Check that rows can be written into `out`.

    Raises:
        ShapeError, DtypeError: it is no tensor of that shape and dtype.
        ArgumentError: it requires grad, its elements overlap, or its memory is read-only.
    """
    check_dense(out, "out")
    if tuple(out.shape) != shape or out.dtype != dtype:
        kind = ShapeError if tuple(out.shape) != shape else DtypeError
        raise kind(f"out is {tuple(out.shape)} {out.dtype}: expected {shape} {dtype}")
    if out.requires_grad:
        raise ArgumentError("out requires grad: expected plain memory, such as out.detach()")
    if not out.is_contiguous() and _overlaps(out):
        raise ArgumentError(
            f"out has strides {out.stride()}, by which elements share memory: expected out.contiguous()"
        )
    if LINUX and out.device.type == "cpu" and out.numel() and out.is_contiguous():
        last = out.data_ptr() + out.numel() * out.element_size() - 1
        if not (writable(out.data_ptr()) and writable(last)):
            raise ArgumentError(
                "out is memory that cannot be written to, such as of a file opened for reading: copy it"
            )


def _overlaps(tensor: torch.Tensor) -> bool:
    """Whether elements may share memory: some dimension's stride is no larger than the extent of the faster ones."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def own_copy(rows: torch.Tensor, device: torch.device | str, *, non_blocking: bool = False) -> torch.Tensor:
    """A copy of host rows on any device, in memory that the caller owns.

    Args:
        rows: `[n, …]` on the host, at least one dimension; read before this returns, and never written.
        device: where the copy goes; to CUDA as in `fill_device`.
        non_blocking: as in `fill_device`.
    """
    if is_cpu(device):
        return rows.clone(memory_format=torch.contiguous_format)
    if torch.device(device).type != "cuda":
        return rows.to(device, copy=True)
    out = torch.empty(rows.shape, dtype=rows.dtype, device=device)
    fill_device(out, lambda piece, start, stop: piece.copy_(rows[start:stop]), non_blocking=non_blocking)
    return out


def fill_device(
    out: torch.Tensor, fill: Callable[[torch.Tensor, int, int], object], *, non_blocking: bool = False
) -> None:
    """Fill CUDA memory piece by piece, through two pinned buffers of 16 MiB (or one row, if that is larger).

    Args:
        out: `[n, …]`, contiguous.
        fill: called as `fill(piece, start, stop)` to write rows `start` to `stop` into the pinned `piece` `[m, …]`;
            the copy of one piece overlaps with filling the next.
        non_blocking: return when the last copy is queued on the current stream, not when it is done.
    """
    if not out.numel():
        return
    step = max(1, _PIECE_BYTES // (out[0].numel() * out.element_size()))
    buffers: list[torch.Tensor] = []
    events: list[torch.cuda.Event] = []
    with torch.cuda.device(out.device):
        for number, start in enumerate(range(0, len(out), step)):
            stop, turn = min(start + step, len(out)), number % 2
            if number < 2:
                # torch's pinned allocator does not reuse this memory before the copies from it are done.
                shape = (stop - start, *out.shape[1:])
                buffers.append(torch.empty(shape, dtype=out.dtype, pin_memory=True))
                events.append(torch.cuda.Event())  # type: ignore[no-untyped-call]
            else:
                events[turn].synchronize()
            pinned = buffers[turn][: stop - start]
            fill(pinned, start, stop)
            out[start:stop].copy_(pinned, non_blocking=True)
            events[turn].record()
        if not non_blocking:
            for event in events:
                event.synchronize()
