"""Which shards of an array exist, from one listing of its folder."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

import numpy as np

from mmcache.format.names import RESERVED
from mmcache.system.files import name_batches
from mmcache.system.no_symlinks import check_path

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from mmcache.format.manifest import Manifest

__all__ = ["count_shards", "in_order", "is_there", "listed_shards", "present_shards"]

# No leading zeros: `c.00.1.0` is no shard's name. At most 18 digits, which fit int64.
_NUMBER = r"(?:0|[1-9]\d{0,17})"
# For names joined by slashes, which no name contains: one search in thousands of names is far faster than thousands of
# searches.
_SITE, _SEQUENCES, _COLUMN = (
    re.compile(rf"(?<![^/])c\.{key}(?![^/])", re.ASCII)
    for key in (rf"({_NUMBER}\.{_NUMBER})\.0", rf"({_NUMBER})\.0", rf"({_NUMBER})")
)
# Blocks searched at a time.
_PIECE = 1 << 16


def listed_shards(
    path: Path, manifest: Manifest, array: str, rows: int, *, expected: bool = True
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Slots and blocks of the shards in an array's folder, `[n]` int64 each, some thousands at a time.

    Only those that an array of `rows` rows should have or, if not `expected`, only those that it should not; in the
    order of the folder. Memory grows neither with the folder nor with the numbers in a root.

    Raises:
        LinkError: the array's folder is a symbolic link.
    """
    slots, blocks = len(manifest.slots(array)), manifest.spec(array).blocks(rows)
    pattern = _SEQUENCES if array == "sequences" else _COLUMN if array in RESERVED else _SITE
    check_path(path, array)
    for names in name_batches(path / array):
        keys = pattern.findall("/".join(names))
        if not keys:
            continue
        numbers = np.fromstring(" ".join(keys).replace(".", " "), np.int64, sep=" ").reshape(len(keys), -1)
        block = numbers[:, -1]
        slot = np.zeros_like(block) if array in RESERVED else numbers[:, 0]
        its_own = (slot < slots) & (block < blocks)
        chosen = its_own if expected else ~its_own
        yield slot[chosen], block[chosen]


def present_shards(path: Path, manifest: Manifest, array: str, rows: int) -> np.ndarray:
    """Which shards of an array of `rows` rows exist: `[slots, blocks]` bool, from one listing of its folder.

    Takes a byte per expected shard. Use `ShardFolder.present` if that number comes from an untrusted root.
    """
    there = np.zeros((len(manifest.slots(array)), manifest.spec(array).blocks(rows)), bool)
    for shards in listed_shards(path, manifest, array, rows):
        there[shards] = True
    return there


def count_shards(path: Path, manifest: Manifest, array: str, rows: int) -> int:
    """The number of existing shards of an array of `rows` rows; needs constant memory."""
    return sum(len(block) for _, block in listed_shards(path, manifest, array, rows))


def is_there(path: Path, manifest: Manifest, array: str, slot: int, block: int) -> bool:
    """Whether one shard exists now."""
    return os.path.lexists(path / array / manifest.shard_key(array, block, slot))


def in_order(which: np.ndarray) -> Iterator[tuple[int, int]]:
    """(slot, block) of the shards for which `which`, `[slots, blocks]` bool, is true, in this order."""
    for slot, row in enumerate(which):
        for first in range(0, len(row), _PIECE):
            for block in np.flatnonzero(row[first : first + _PIECE]).tolist():
                yield slot, first + block
