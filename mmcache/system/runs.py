"""Which of the rows that are wanted are read together, and what is asked of the device for them. Arithmetic only."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from mmcache.system.held import HELD

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from mmcache.system.descriptor import Descriptor

__all__ = ["GAP_BYTES", "RUN_BYTES", "Reads", "Source", "alike", "apart", "runs_of"]

# To read so much that is not wanted takes about as long as one more request: 14 us at 2.5 GB/s.
GAP_BYTES = 32 << 10
# Long enough for the device's full rate, short enough that many are in flight.
RUN_BYTES = 1 << 20


class Source(Protocol):
    """Where rows are read from: files of equally many rows, numbered through. Hashable."""

    @property
    def rows_per_file(self) -> int:
        """Rows of a file's place, gaps at its end included."""

    @property
    def data_offset(self) -> int:
        """Where a file's first row begins, in bytes."""

    @property
    def alignment(self) -> int:
        """What offsets, sizes and addresses of direct reads must be multiples of, in bytes."""

    def descriptors(self, files: Collection[int]) -> Mapping[int, Descriptor]:
        """Open files for direct reading."""


def runs_of(rows: np.ndarray, per_file: int, row_bytes: int) -> np.ndarray:
    """Say where runs of rows that can be read together begin in `rows`: int64 `[runs]`, the first of them 0.

    Args:
        rows: int64 `[n]`, at least one, ascending.
        per_file: rows a file: no run goes from one into the next.
        row_bytes: bytes a row.
    """
    far = (np.diff(rows) - 1) * row_bytes > GAP_BYTES
    far |= np.diff(rows // per_file) != 0
    begins = np.concatenate([[True], far])
    # One that became too long is cut at even distances from its begin.
    first = rows[np.maximum.accumulate(np.where(begins, np.arange(len(rows)), 0))]
    begins[1:] |= np.diff((rows - first) // max(1, RUN_BYTES // row_bytes)) != 0
    return np.flatnonzero(begins)


def alike(keys: np.ndarray) -> Iterator[tuple[int, int]]:
    """Give where each stretch of equal keys begins and ends: int64 `[n]`, from 0 on, equal ones side by side."""
    return pairwise([*np.flatnonzero(np.diff(keys, prepend=-1)).tolist(), len(keys)])


def apart(rows: np.ndarray, row_bytes: int) -> bool:
    """Say whether nothing would be gained from sorting rows, in that hardly any two of them could be read together."""
    step = -(-len(rows) // HELD)
    # Python's own sort keeps the interpreter's lock.
    some = np.array(sorted(rows[::step].tolist()))
    return bool(np.mean((np.diff(some) - 1) * row_bytes <= GAP_BYTES * step) < 0.2) if len(some) > 1 else True


class Reads(NamedTuple):
    """Requests, int64 `[n]` each: which file, from which byte on, how many, how many rows; and where those begin."""

    files: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    counts: np.ndarray
    wanted: np.ndarray

    @classmethod
    def of(cls, source: Source, rows: np.ndarray, starts: np.ndarray, stops: np.ndarray, row_bytes: int) -> Reads:
        """Cover the runs of rows from each start to before each stop, widened to whole units of direct reads."""
        files = rows[starts] // source.rows_per_file
        within = rows[starts[0] : stops[-1]] % source.rows_per_file
        wanted = source.data_offset + within * row_bytes
        begin = wanted[starts - starts[0]]
        end = wanted[stops - starts[0] - 1] + row_bytes
        begin -= begin % source.alignment
        sizes = -(-(end - begin) // source.alignment) * source.alignment
        return cls(files, begin, sizes, stops - starts, wanted)

    def up_to(self, size: int) -> Reads:
        """Give those of the first ones that fit into so many bytes, and at least one."""
        most = max(1, int(np.searchsorted(np.cumsum(self.sizes), size, side="right")))
        rows = int(self.counts[:most].sum())
        files, offsets, sizes, counts = (part[:most] for part in self[:-1])
        return Reads(files, offsets, sizes, counts, self.wanted[:rows])
