"""The processes that train together: those that torchrun started, on one machine or several, or this one alone."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import distributed

import mmcache

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["RankLostError", "Ranks", "together"]

# Bytes sent at a time.
_PIECE = 256 << 20


class RankLostError(mmcache.MmcacheError):
    """Another rank has ended, and printed why."""


@dataclass(frozen=True)
class Ranks:
    """This process's rank, the number of ranks, and the device to compute on."""

    rank: int
    count: int
    device: str

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all ranks in place, and return it: the same bits on each."""
        if self.count > 1:
            with _others():
                distributed.all_reduce(tensor)
        return tensor

    def spread(self, data: bytes) -> bytes:
        """The first rank's `data`, on every rank."""
        with _others():
            distributed.broadcast(size := torch.tensor(len(data)), 0)
            everything = torch.frombuffer(bytearray(data or int(size)), dtype=torch.uint8)
            for start in range(0, len(everything), _PIECE):
                distributed.broadcast(everything[start : start + _PIECE], 0)
        return everything.numpy().tobytes()


@contextlib.contextmanager
def _others() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RankLostError(f"another rank has ended: see what it said ({error})") from error


@contextlib.contextmanager
def together(device: str) -> Iterator[Ranks]:
    """Join the ranks that torchrun started, if any: with nccl on CUDA, where each has its own device, else with gloo.

    After an error the group is not destroyed: others may be waiting in it, until torchrun ends them.
    """
    if not distributed.is_torchelastic_launched():
        yield Ranks(0, 1, device)
        return
    cuda = device.startswith("cuda") and torch.cuda.is_available()
    if cuda:
        device = f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" else device
        torch.cuda.set_device(device)
    with _others():
        # CPU tensors, such as a checkpoint's, use gloo in any case.
        distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    yield Ranks(distributed.get_rank(), distributed.get_world_size(), device)
    distributed.destroy_process_group()
