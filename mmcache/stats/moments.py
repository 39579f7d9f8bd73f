"""Mergeable moments of activations, in float64.

Rows with a value that is not finite are counted, and left out of everything else. Rows that the caller masks (BOS,
special and first tokens, whose norms would dominate the rest) are left out too.

Rows are summed in groups of up to a million and a half numbers, and of at least 64 rows: few numpy calls per megabyte,
on memory that is still in the processor's cache. Groups start at fixed rows of the shard and are added in order, so the
result does not depend, to the last bit, on how calls split the rows.

Sources: shifted data and the pairwise merge of Chan, Golub & LeVeque, "Updating Formulae and a Pairwise Algorithm for
Computing Sample Variances" (1979).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from mmcache.format.shard import NORM_COLUMNS
from mmcache.stats.block_sums import SPAN, Sums, sum_block, together

if TYPE_CHECKING:
    from mmcache.format.shard import ShardSpec

__all__ = ["WHOLE_ROWS", "Moments", "block_rows", "merge_moments", "shard_moments"]

# A group has a multiple of this many rows: at least two spans, whose sums are added in float64.
WHOLE_ROWS = 2 * SPAN
# Numbers in a group, and so the most that an open shard holds of an incomplete one.
_BLOCK_NUMBERS = 3 << 19
# Bytes of an array from which loading the kernel, a quarter of a second, pays off.
_QUICK_FROM = 16 << 20
# Norms are collected for this many rows, and then added together.
_PENDING_ROWS = 4096


def shard_moments(spec: ShardSpec, first: int, *, busy: bool = False) -> Moments:
    """Empty statistics of a shard whose first row is row `first` of its array.

    The kernel sums norms in another order than numpy, which changes their last bits. So it takes over at a fixed row of
    the array. Rows from a model (`busy`), which takes longer than the sums, are always summed by numpy, so that all
    workers on one store make the same bytes, whether or not they have numba.
    """
    quick_from = None if busy else max(0, -(-_QUICK_FROM // spec.row_bytes) - first)
    return Moments(spec.stat_layers, spec.row_shape[-1], spec.chunk_rows, quick_from)


def block_rows(layers: int, width: int, chunk_rows: int) -> int:
    """The number of rows summed together: a power of two, at least 64, otherwise no more than an inner chunk has."""
    fit = min(_BLOCK_NUMBERS // (layers * width), chunk_rows)
    return max(WHOLE_ROWS, 1 << max(0, fit.bit_length() - 1))


class Moments:
    """The statistics of one shard, fed with its rows in order.

    Args:
        layers: layers a row has.
        width: numbers a layer has (`d_model`).
        chunk_rows: rows an inner chunk, the unit in which norms are kept.
        quick_from: the row from which groups are summed by the compiled kernel, if there is one; None for never.
    """

    def __init__(self, layers: int, width: int, chunk_rows: int, quick_from: int | None = None) -> None:
        self._quick_from = math.inf if quick_from is None else quick_from
        self._layers, self._width, self._chunk_rows = layers, width, chunk_rows
        self._block = block_rows(layers, width, chunk_rows)
        self._rows = 0
        self._count = np.zeros(layers)
        self._shift = np.zeros((layers, width))
        # In the shape of the groups' sums, which may have even and odd columns apart.
        self._first = self._second = np.zeros(())
        self._norms: list[np.ndarray] = []
        self._pending: list[np.ndarray] = []
        self._n_pending = 0
        self._non_finite = np.zeros(layers, np.int64)
        self._first_non_finite = np.full(layers, -1, np.int64)
        self._zero_rows = np.zeros(layers, np.int64)
        self._overflow = np.zeros(layers, np.int64)
        self._held: np.ndarray | None = None
        self._held_keep = np.empty(0, np.bool_)
        self._n_held = 0

    def add(self, rows: np.ndarray, keep: np.ndarray | None = None) -> None:
        """Add the next rows. Calls may split the rows anywhere: the result is the same, to the last bit.

        Args:
            rows: `[n, layers, width]`, any float dtype that numpy knows, bfloat16 included; read only.
            keep: `[n]` bool, False for rows to leave out; None keeps all.
        """
        done = 0
        while done < len(rows):
            some = min(self._block - self._n_held, len(rows) - done)
            here = slice(done, done + some)
            kept = None if keep is None else keep[here]
            if some == self._block:
                self._sum(rows[here], kept)
            else:
                self._hold(rows[here], kept)
            done += some

    def add_overflow(self, values: np.ndarray) -> None:
        """Count `[layers]` values that became infinite in the cast to the storage dtype."""
        self._overflow += values

    def _hold(self, rows: np.ndarray, keep: np.ndarray | None) -> None:
        """Keep part of a group until it is complete; `rows` do not reach beyond its end."""
        if self._held is None:
            self._held = np.empty((self._block, self._layers, self._width), rows.dtype)
            self._held_keep = np.empty(self._block, np.bool_)
        place = slice(self._n_held, self._n_held + len(rows))
        self._held[place] = rows
        self._held_keep[place] = True if keep is None else keep
        self._n_held = place.stop
        if self._n_held == self._block:
            self._release()

    def _release(self) -> None:
        if self._held is not None and self._n_held:
            self._sum(self._held[: self._n_held], self._held_keep[: self._n_held])
            self._n_held = 0

    def _sum(self, rows: np.ndarray, keep: np.ndarray | None) -> None:
        self._fold(sum_block(rows, keep, quickly=self._rows >= self._quick_from))

    # float64 values near 1e308, and their squares, are data here and no reason to warn.
    @np.errstate(all="ignore")
    def _fold(self, sums: Sums) -> None:
        """Add the next group's sums."""
        first, second = sums.first, sums.second
        if sums.shift is not None:
            # Relative to the shift of the first group that has one, which is one of its rows: what cancels is then at
            # most the number of rows times what remains.
            fresh = (self._count == 0) & (sums.count > 0)
            self._shift[fresh] = sums.shift[fresh]
            moved = sums.shift - self._shift
            weight = sums.count[:, None] * moved
            second = second + moved * (2 * first + weight)
            first = first + weight
        self._first = self._first + first
        self._second = self._second + second
        self._count += sums.count
        self._non_finite += sums.non_finite
        located = np.where(sums.first_non_finite < 0, -1, self._rows + sums.first_non_finite)
        self._first_non_finite = np.where(self._first_non_finite < 0, located, self._first_non_finite)
        self._zero_rows += sums.zero_rows
        self._rows += len(sums.norms)
        self._pending.append(sums.norms)
        self._n_pending += len(sums.norms)
        if self._n_pending >= _PENDING_ROWS:
            self._add_norms()

    @np.errstate(all="ignore")
    def _add_norms(self) -> None:
        """Add the collected norms to their inner chunks, in pieces that end where a group or an inner chunk ends."""
        if not self._n_pending:
            return
        norms = np.concatenate(self._pending)
        first, stop = self._rows - self._n_pending, self._rows
        self._pending, self._n_pending = [], 0
        edges = {first}
        for step in (self._block, self._chunk_rows):
            edges.update(range(first + -first % step, stop, step))
        starts = np.array(sorted(edges))
        kept = ~np.isnan(norms)
        zeroed = np.where(kept, norms, 0)
        parts = [np.add.reduceat(values, starts - first, axis=0) for values in (kept, zeroed, zeroed * zeroed)]
        ends = [least.reduceat(norms, starts - first, axis=0) for least in (np.fmin, np.fmax)]
        added = np.stack(parts, axis=-1).astype(np.float64)
        for number, chunk in enumerate((starts // self._chunk_rows).tolist()):
            if chunk == len(self._norms):
                fresh = np.zeros((self._layers, len(NORM_COLUMNS)))
                fresh[:, 3:] = np.nan
                self._norms.append(fresh)
            into = self._norms[chunk]
            into[:, :3] += added[number]
            into[:, 3] = np.fmin(into[:, 3], ends[0][number])
            into[:, 4] = np.fmax(into[:, 4], ends[1][number])

    @np.errstate(all="ignore")
    def arrays(self, first_token: int) -> dict[str, np.ndarray]:
        """The arrays that a shard stores; `first_token` is the position of its first row in the store.

        Returns:
            `count`, `mean`, `m2` `[layers, width]`; `norms` `[chunks, layers, 5]` (`NORM_COLUMNS`);
            `non_finite`, `first_non_finite` (a position in the store, or -1), `zero_rows` and `overflow`
            `[layers]`. Without any row counted, `mean` is NaN and `m2` zero. The arrays are the caller's.
        """
        self._release()
        self._add_norms()
        count = np.repeat(self._count[:, None], self._width, axis=1)
        first, second = together(self._first), together(self._second)
        offset = first / count
        mean = self._shift + offset
        # Rounding may make m2 of a constant dimension slightly negative.
        m2 = np.where(count > 0, np.maximum(second - first * offset, 0), 0)
        located = np.where(self._first_non_finite < 0, -1, self._first_non_finite + first_token)
        return {
            "count": count,
            "mean": mean,
            "m2": m2,
            "norms": np.stack(self._norms),
            "non_finite": self._non_finite.copy(),
            "first_non_finite": located,
            "zero_rows": self._zero_rows.copy(),
            "overflow": self._overflow.copy(),
        }


def merge_moments(
    one: tuple[np.ndarray, np.ndarray, np.ndarray], two: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Merge `(count, mean, m2)` of two disjoint sets of rows (Chan et al. 1979, equation 1.5).

    The arrays may have any one shape; a mean where the count is zero is ignored, and NaN where both are. New
    arrays are returned.
    """
    (count_a, mean_a, m2_a), (count_b, mean_b, m2_b) = one, two
    count = count_a + count_b
    share = np.divide(count_b, count, out=np.zeros_like(count), where=count > 0)
    base = np.where(count_a > 0, mean_a, mean_b)
    delta = np.where((count_a > 0) & (count_b > 0), mean_b - base, 0.0)
    return count, base + delta * share, m2_a + m2_b + delta * delta * count_a * share
