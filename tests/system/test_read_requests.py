"""Runs of rows that are read together, and the requests for them."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mmcache.system.direct_io import GAP_BYTES, apart, runs_of
from mmcache.system.threads import HELD


@given(
    rows=st.lists(st.integers(0, 5000), min_size=1, max_size=200).map(sorted),
    per_file=st.integers(1, 700),
    row_bytes=st.integers(1, 1 << 20),
)
def test_runs_cover_every_row_within_a_file_and_the_allowed_gaps(rows, per_file, row_bytes):
    rows = np.array(rows, np.int64)
    edges = runs_of(rows, per_file, row_bytes)
    assert edges[0] == 0
    assert (np.diff(edges) > 0).all()
    for start, stop in zip(edges, [*edges[1:], len(rows)], strict=True):
        run = rows[start:stop]
        assert len(set((run // per_file).tolist())) == 1
        assert ((np.diff(run) - 1) * row_bytes <= GAP_BYTES).all()
        assert (run[-1] - run[0] + 1) * row_bytes <= max(row_bytes, 1 << 20)
    # And no two that could have been one: each begins where a rule says so.
    for edge in edges[1:]:
        before, here = rows[edge - 1], rows[edge]
        first = rows[edges[edges < edge][-1]]
        assert (
            before // per_file != here // per_file
            or (here - before - 1) * row_bytes > GAP_BYTES
            or (here - first + 1) * row_bytes > (1 << 20) - 2 * row_bytes
            or (here - first) // max(1, (1 << 20) // row_bytes) > 0
        )


def test_rows_are_apart_where_hardly_any_two_could_be_read_together():
    generator = np.random.default_rng(0)
    for count in (2, 100, HELD, 10 * HELD):
        assert apart(generator.permutation(count) * 50, 8192), count
        assert not apart(generator.permutation(count) * 2, 8192), count
    assert apart(np.array([7]), 8192)
    assert not apart(np.array([7, 7]), 8192)
