"""The statistics that a shard carries, read from its tail."""

from __future__ import annotations

from typing import TYPE_CHECKING

import crc32c
import numpy as np

from mmcache.errors import CorruptError
from mmcache.format.shard import STATISTICS

if TYPE_CHECKING:
    from mmcache.format.shard import Layout
    from mmcache.storage.shard_folder import ShardBytes, ShardFolder

__all__ = ["brief_statistics", "overflow", "shard_statistics"]

# What of them is not by dimension.
_BRIEF = STATISTICS[3:]


def shard_statistics(folder: ShardFolder, slot: int, block: int) -> tuple[dict[str, np.ndarray], int]:
    """Read the statistics of one shard, their checksum compared: the arrays of `Moments.arrays`.

    They are of all rows in the file, whose number comes with them: after a crash these may be more than count.

    Raises:
        IncompleteError, CorruptError: as `ShardFolder.open_file`; the checksum differs.
    """

    def compared(shard: ShardBytes, layout: Layout) -> tuple[dict[str, np.ndarray], int]:
        data, digest = _read(shard, layout, STATISTICS, folder.where(slot, block))
        if crc32c.crc32c(data) != digest:
            raise CorruptError(
                f"{folder.where(slot, block)}: its statistics do not match their checksum; "
                f"set the file aside and make it again"
            )
        return _arrays(data, layout, STATISTICS), layout.rows

    return folder.reading(slot, block, compared, scattered=True)


def brief_statistics(folder: ShardFolder, slot: int, block: int) -> tuple[dict[str, np.ndarray], int]:
    """Read what of one shard's statistics is not by dimension: norms and counts, a few KiB, as `shard_statistics`.

    The checksum is of all statistics, and not compared: `mmcache verify` does that. Counts that no such shard can have
    are refused.

    Raises:
        IncompleteError, CorruptError: as `ShardFolder.open_file`; such counts.
    """

    def plausible(shard: ShardBytes, layout: Layout) -> tuple[dict[str, np.ndarray], int]:
        found = _arrays(_read(shard, layout, _BRIEF, folder.where(slot, block))[0], layout, _BRIEF)
        if not _plausible(found, block, folder.spec.shard_rows, folder.spec.chunk_rows):
            raise CorruptError(f"{folder.where(slot, block)}: its statistics are damaged; `mmcache verify` says more")
        return found, layout.rows

    return folder.reading(slot, block, plausible, scattered=True)


def overflow(folder: ShardFolder, slot: int, block: int) -> np.ndarray:
    """Count, per layer, the values that became infinite in the cast, among the rows that count.

    Where a crash left more rows in the file, there are no more of them than infinities in those that count.
    """
    found, rows = shard_statistics(folder, slot, block)
    spec = folder.spec
    counted = spec.rows_in_block(block, folder.rows)
    lost = found["overflow"]
    if rows > counted:
        values = folder.open(slot, block).view(counted, spec.stat_layers, -1)
        lost = np.minimum(lost, values.isinf().sum(dim=(0, 2)).numpy())
    return lost


def _read(shard: ShardBytes, layout: Layout, names: tuple[str, ...], where: str) -> tuple[bytearray, int]:
    """Read tensors that follow each other, and the checksum of all of them."""
    start, stop = layout.tensors[names[0]][2], layout.tensors[names[-1]][3]
    _, _, first, last = layout.tensors["statistics_crc32c"]
    # Their checksum stands behind them: of an object, one request instead of two.
    found = bytearray(last - start)
    if not shard.read(memoryview(found), start):
        raise CorruptError(f"{where} was cut short while it was read")
    return found[: stop - start], int.from_bytes(found[first - start : last - start], "little")


def _arrays(data: bytearray, layout: Layout, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Give tensors that follow each other as arrays of the data's own memory."""
    begin, found = layout.tensors[names[0]][2], {}
    for name in names:
        code, shape, start, stop = layout.tensors[name]
        found[name] = np.frombuffer(data, f"<{code[0].lower()}8", (stop - start) // 8, start - begin).reshape(shape)
    return found


def _plausible(found: dict[str, np.ndarray], block: int, size: int, chunk_rows: int) -> bool:
    """Tell whether counts of rows, and the position of the first that is not finite, can be those of a block."""
    rows, first = found["norms"][..., 0], found["first_non_finite"]
    there = (first >= block * size) & (first < (block + 1) * size)
    fine = [((rows >= 0) & (rows <= chunk_rows)).all(), np.where(found["non_finite"], there, first == -1).all()]
    fine += [((found[name] >= 0) & (found[name] <= size)).all() for name in ("non_finite", "zero_rows")]
    return all(fine)
