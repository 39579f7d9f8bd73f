"""Lanes: equal, each token once, and ranks of one machine keep to theirs."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from mmcache.training.schedule import MachineOrder, RankShares


@given(st.integers(1, 300), st.integers(1, 9))
def test_lanes_differ_by_one_at_most_and_every_place_is_in_its_own(tokens, count):
    lanes = MachineOrder(tokens, min(count, tokens))
    edges = [lanes.begin(lane) for lane in range(lanes.count + 1)]
    assert (edges[0], edges[-1]) == (0, tokens)
    lengths = [stop - start for start, stop in itertools.pairwise(edges)]
    assert max(lengths) - min(lengths) <= 1
    inside = [lane for lane, length in enumerate(lengths) for _ in range(length)]
    assert [lanes.lane(place) for place in range(tokens)] == inside


def dealt(lanes, shares, start=0):
    """Give the places of the line by step and rank."""
    found = []
    for step in range(len(shares)):
        edges = start + shares.seen(step), start + shares.seen(step + 1)
        ranks = []
        for rank in range(shares.world_size):
            pieces = lanes.pieces(*edges, *(start + turn for turn in shares.share(step, rank)))
            assert all(low < high and lanes.lane(low) == lanes.lane(high - 1) for low, high in pieces)
            ranks.append([place for low, high in pieces for place in range(low, high)])
        found.append(ranks)
    return found


@given(st.integers(1, 300), st.integers(1, 6), st.integers(1, 6), st.integers(1, 15), st.data())
def test_a_step_has_the_next_turns_of_all_lanes_whoever_takes_them(tokens, count, ranks, size, data):
    lanes, start = MachineOrder(tokens, min(count, tokens)), data.draw(st.integers(0, tokens))
    shares = RankShares(tokens - start, ranks, size, drop_last=False)
    # One token of each lane in turn.
    line = [lanes.begin(turn % lanes.count) + turn // lanes.count for turn in range(tokens)]
    seen = start
    for step in dealt(lanes, shares, start):
        together = [place for rank in step for place in rank]
        assert sorted(together) == sorted(line[seen : seen + len(together)])
        seen += len(together)
    assert seen == tokens


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 10), st.integers(1, 6), st.integers(0, 99))
def test_ranks_of_a_machine_keep_to_its_lane(nodes, each, size, steps, more):
    ranks = nodes * each
    tokens = ranks * size * steps + more % (ranks * size)
    lanes, shares = MachineOrder(tokens, nodes), RankShares(tokens, ranks, size, drop_last=True)
    for step in dealt(lanes, shares):
        for rank, places in enumerate(step):
            assert {lanes.lane(place) for place in places} == {rank // each}
            assert len(places) == size


def test_one_lane_is_dealt_side_by_side():
    assert MachineOrder(100, 1).pieces(10, 30, 14, 20) == [(14, 20)]
    assert MachineOrder(100, 1).pieces(10, 30, 14, 14) == []
