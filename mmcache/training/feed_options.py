"""The arguments of a training feed, checked when it is made rather than when it runs."""

from __future__ import annotations

import os
from operator import index as whole
from typing import TYPE_CHECKING

import torch
import torch.distributed

from mmcache.errors import ArgumentError
from mmcache.system.arguments import count, shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmcache.read.store import Store

__all__ = [
    "checked_layers",
    "checked_sites",
    "nodes_of",
    "share_of",
]

# How launchers tell each process how many there are in all, and on how many machines. All of them are told the same;
# how many are on a machine need not be the same on each.
_LAUNCHERS = (("WORLD_SIZE", "GROUP_WORLD_SIZE"), ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES"))


def checked_sites(store: Store, sites: Sequence[str] | None) -> tuple[str, ...]:
    """Give the sites wanted, all of the store's where None are named.

    Raises:
        ArgumentError: none at all, or one twice.
        UnknownSiteError: the store has no such site.
    """
    if sites is None:
        return store.sites
    names = tuple(sites)
    if not names or len(set(names)) < len(names):
        raise ArgumentError(f"sites is {sites!r}: expected a list of sites, each once, of {', '.join(store.sites)}")
    for name in names:
        store.d_model(name)
    return names


def checked_layers(store: Store, site: str, layers: Sequence[int] | None) -> tuple[int, ...] | None:
    """Give the layers wanted.

    Raises:
        ArgumentError: none at all.
        OutOfRangeError, DtypeError: one is not there, or no number.
    """
    if layers is None:
        return None
    store[site].gather([], layers=layers)
    chosen = tuple(whole(layer) for layer in layers)
    if not chosen:
        raise ArgumentError(f"layers is {layers!r}: expected at least one of {list(store.layers)}, or None for all")
    return chosen


def share_of(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Give rank and world size, as given, or else those of `torch.distributed`, or 0 of 1.

    Raises:
        ArgumentError: only one of them is given, or the rank is not below the world size.
    """
    if rank is None and world_size is None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1
    if rank is None or world_size is None:
        raise ArgumentError(
            f"rank is {shown(rank)} and world_size is {shown(world_size)}: give both of them, or neither"
        )
    ranks = count(1)("world_size", world_size)
    return count(0, ranks - 1)("rank", rank), ranks


def nodes_of(nodes: int | None, world_size: int) -> int:
    """Give how many machines the ranks are on: as given, or as the launcher says if these are the ranks it started.

    Raises:
        ArgumentError: there are more of them than ranks, or none.
    """
    if nodes is not None:
        return count(1, world_size)("nodes", nodes)
    for ranks, machines in _LAUNCHERS:
        found = os.environ.get(machines, "")
        if os.environ.get(ranks) == str(world_size) and found.isdecimal():
            return min(max(1, int(found)), world_size)
    return 1
