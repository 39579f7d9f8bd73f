"""Between host memory and a device: pinned buffers, in pieces, so that a terabyte needs only megabytes of them."""

from __future__ import annotations

import torch

from mmcache.errors import DtypeError

__all__ = ["check_dense", "is_cpu", "own_copy"]

_PIECE_BYTES = 16 << 20


def is_cpu(device: torch.device | str) -> bool:
    """Tell whether a device is the host itself."""
    return device == "cpu" or torch.device(device).type == "cpu"


def check_dense(tensor: object, what: str) -> None:
    """Refuse what has no rows that could be copied.

    Raises:
        DtypeError: no tensor, a sparse one, or one of the meta device, which has no data.
    """
    if not isinstance(tensor, torch.Tensor):
        raise DtypeError(f"{what} is a {type(tensor).__name__}: expected a torch tensor")
    if tensor.layout != torch.strided or tensor.is_meta:
        kind = "on the meta device, without data" if tensor.is_meta else f"{tensor.layout}"
        raise DtypeError(f"{what} is {kind}: expected a dense tensor with data")


def own_copy(rows: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Copy mapped rows into memory of the caller's own, on any device.

    Args:
        rows: `[n, …]` on the host, at least one dimension; it is only read.
        device: where the copy goes. To CUDA it travels through two pinned buffers of 16 MiB, one being filled
            while the other is under way; the call blocks until the copy is there.
    """
    if is_cpu(device):
        return rows.clone(memory_format=torch.contiguous_format)
    if torch.device(device).type != "cuda":
        return rows.to(device, copy=True)
    out = torch.empty(rows.shape, dtype=rows.dtype, device=device)
    if not rows.numel():
        return out
    step = max(1, _PIECE_BYTES // max(1, rows[0].numel() * rows.element_size()))
    buffers: list[torch.Tensor] = []
    events: list[torch.cuda.Event] = []
    with torch.cuda.device(out.device):
        for number, start in enumerate(range(0, len(rows), step)):
            piece = rows[start : start + step]
            turn = number % 2
            if number < 2:
                buffers.append(torch.empty(piece.shape, dtype=rows.dtype, pin_memory=True))
                events.append(torch.cuda.Event())  # type: ignore[no-untyped-call]
            else:
                events[turn].synchronize()
            pinned = buffers[turn][: len(piece)]
            pinned.copy_(piece)
            out[start : start + len(piece)].copy_(pinned, non_blocking=True)
            events[turn].record()
        for event in events:
            event.synchronize()
    return out
