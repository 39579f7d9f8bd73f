"""What is wanted of shards is asked for without a gap too long, and lands where it is wanted, however it comes."""

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mmcache.read.remote_rows import begins_of, parts_of, scatter

MOST = 16 << 20


@given(st.lists(st.integers(0, 1 << 16), min_size=1, max_size=200, unique=True), st.sampled_from([64, 1536, 1 << 15]))
def test_requests_leave_nothing_out_and_go_over_no_long_gap(places, size):
    offsets = np.array(sorted(places)) * size
    begins = begins_of(offsets, size, MOST)
    edges = [*begins.tolist(), len(offsets)]
    assert begins[0] == 0
    assert (np.diff(edges) > 0).all()
    for first, last in pairwise(edges):
        assert (np.diff(offsets[first:last]) - size <= 128 << 10).all()
        assert offsets[last - 1] + size - offsets[first] <= MOST + size


@given(st.data(), st.integers(1, 40), st.integers(1, 30), st.integers(0, 50), st.booleans())
def test_pieces_land_where_they_are_wanted_however_they_come(data, size, there, before, in_order):
    stream = np.random.default_rng(size).integers(0, 256, before + there * size + 7, np.uint8)
    units = sorted(data.draw(st.lists(st.integers(0, there - 1), min_size=1, max_size=50)))
    if in_order:
        units = list(range(units[0], units[-1] + 1))
    places = np.arange(len(units)) if in_order else np.array(data.draw(st.permutations(range(len(units)))))
    offsets = 1000 + before + np.array(units) * size
    edges = sorted({0, len(stream), *data.draw(st.lists(st.integers(0, len(stream)), max_size=20))})
    into = np.zeros((len(units), size), np.uint8)
    scatter((stream[a:b].data for a, b in pairwise(edges)), 1000, into, offsets, places)
    for unit, place in zip(units, places, strict=True):
        assert into[place].tobytes() == stream[before + unit * size :][:size].tobytes()


def test_what_comes_behind_the_last_piece_is_not_waited_for():
    def stream():
        yield memoryview(bytes(range(20)))
        raise AssertionError("nobody wants more")

    into = np.zeros((2, 5), np.uint8)
    scatter(stream(), 0, into, np.array([5, 10]), np.array([1, 0]))
    assert into.tolist() == [[10, 11, 12, 13, 14], [5, 6, 7, 8, 9]]


@given(st.lists(st.integers(0, 99), min_size=1, max_size=40), st.integers(1, 4), st.integers(1, 30), st.booleans())
def test_parts_are_all_that_is_wanted_each_once(positions, n_slots, shard_rows, by_layer):
    slots = list(range(5, 5 + n_slots))
    found = []
    for part in parts_of(np.array(positions), slots, shard_rows, by_layer=by_layer):
        assert (np.diff(part.rows) >= 0).all()
        for row, place in zip(part.rows.tolist(), part.places.tolist(), strict=True):
            for slot, column in zip(part.slots, part.columns, strict=True):
                assert part.shard == (slot if by_layer else 0, positions[place] // shard_rows)
                assert slot == slots[column]
                found.append((place, column, part.shard[1] * shard_rows + row))
    assert sorted(found) == [(n, c, p) for n, p in enumerate(positions) for c in range(n_slots)]
