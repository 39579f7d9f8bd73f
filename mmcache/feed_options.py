"""The arguments of a training feed, checked when it is made rather than when it runs."""

from __future__ import annotations

import os
from operator import index as whole
from typing import TYPE_CHECKING

import torch
import torch.distributed

from mmcache.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmcache.store import Store

__all__ = [
    "checked_choice",
    "checked_count",
    "checked_device",
    "checked_layers",
    "checked_sites",
    "nodes_of",
    "share_of",
]

# How launchers tell each process how many there are in all, and on how many machines. All of them are told the same;
# how many are on a machine need not be the same on each.
_LAUNCHERS = (("WORLD_SIZE", "GROUP_WORLD_SIZE"), ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES"))


def checked_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Refuse what is none of the choices.

    Raises:
        ArgumentError: with all of them.
    """
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
        raise ArgumentError(f"{name} is {value!r}: expected {' or '.join(map(repr, choices))}")


def checked_count(name: str, value: object, least: int, most: int = 2**63 - 1) -> int:
    """Give a whole number of any kind as an int.

    Raises:
        ArgumentError: it is none, or out of bounds.
    """
    try:
        found = -1 if isinstance(value, bool) else whole(value)  # type: ignore[arg-type]
    except TypeError:
        found = -1
    if not least <= found <= most:
        raise ArgumentError(f"{name} is {value!r}: expected a whole number from {least} to {most}")
    return found


def checked_sites(store: Store, sites: Sequence[str] | None) -> tuple[str, ...]:
    """Give the sites wanted, all of the store's where None are named.

    Raises:
        ArgumentError: a name alone, none at all, or one twice.
        UnknownSiteError: the store has no such site.
    """
    if sites is None:
        return store.sites
    names = () if isinstance(sites, str) else tuple(sites)
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


def checked_device(device: torch.device | str) -> torch.device:
    """Give the device that is meant.

    Raises:
        ArgumentError: there is no such device.
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ArgumentError(f"device is {device!r}, which torch does not know ({error})") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ArgumentError(f"device is {device!r}: torch sees {torch.cuda.device_count()} CUDA devices")
    return found


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
        raise ArgumentError(f"rank is {rank} and world_size is {world_size}: give both of them, or neither")
    ranks = checked_count("world_size", world_size, 1)
    return checked_count("rank", rank, 0, ranks - 1), ranks


def nodes_of(nodes: int | None, world_size: int) -> int:
    """Give how many machines the ranks are on: as given, or as the launcher says if these are the ranks it started.

    Raises:
        ArgumentError: there are more of them than ranks, or none.
    """
    if nodes is not None:
        return checked_count("nodes", nodes, 1, world_size)
    for ranks, machines in _LAUNCHERS:
        found = os.environ.get(machines, "")
        if os.environ.get(ranks) == str(world_size) and found.isdecimal():
            return min(max(1, int(found)), world_size)
    return 1
