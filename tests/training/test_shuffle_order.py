"""Each order has every token once, a block shuffle whole blocks in its pools, and the quality that is measured."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mmcache
from mmcache.training.schedule import BlockOrder, Blocks, block_geometry, order_of

LANES = st.integers(1, 6)
BLOCKS = st.builds(Blocks, st.sampled_from([1, 2, 8, 64, 1024]), st.integers(1, 40))


@given(st.integers(1, 700), st.one_of(st.none(), BLOCKS), st.integers(0, 2**64 - 1), st.integers(0, 100), st.data())
def test_every_token_comes_once_in_parts_as_in_one(tokens, blocks, seed, epoch, data):
    for shuffle in ("block",) if blocks else ("global", None):
        order = order_of(shuffle, tokens, blocks, seed, epoch)
        found = order.indices(0, tokens)
        assert found.dtype == np.int64
        assert sorted(found.tolist()) == list(range(tokens))
        start = data.draw(st.integers(0, tokens))
        stop = data.draw(st.integers(start, tokens))
        assert order.indices(start, stop).tolist() == found[start:stop].tolist()


@given(st.integers(1, 700), BLOCKS, st.integers(0, 2**64 - 1), LANES)
def test_a_pool_is_whole_blocks_of_one_lane(tokens, blocks, seed, lanes):
    lanes = min(lanes, tokens)
    order = BlockOrder(tokens, blocks, seed, 0, lanes)
    places = order.indices(0, tokens)
    pools = np.array([order.pool(place) for place in range(tokens)])
    assert (np.diff(pools) >= 0).all()
    listed = {pool: order.blocks(pool) for pool in sorted(set(pools.tolist()))}
    inside = {pool: {order.lanes.lane(place) for place in np.flatnonzero(pools == pool).tolist()} for pool in listed}
    assert all(len(found) == 1 for found in inside.values())
    for pool, ranges in listed.items():
        assert ranges == sorted(ranges)
        assert 1 <= len(ranges) <= blocks.pool
        expected = [index for start, stop in ranges for index in range(start, stop)]
        found = sorted(places[pools == pool].tolist())
        assert set(found) <= set(expected)
        # Of those at the ends of its lane the other lane may have a part.
        assert lanes > 1 or found == expected
        behind = order.next_pool(pool)
        assert behind is None or (behind == pool + 1 and inside[behind] == inside[pool])
    assert sum(order.next_pool(pool) is None for pool in listed) == lanes
    # Each block is read once, but for one between each two lanes: all of them are whole, but for the last of the text.
    together = sorted(one for ranges in listed.values() for one in ranges)
    every = [(start, min(start + blocks.tokens, tokens)) for start in range(0, tokens, blocks.tokens)]
    assert sorted(set(together)) == every
    assert len(together) - len(every) <= lanes - 1


@given(st.integers(1, 700), BLOCKS, LANES)
def test_lanes_have_the_blocks_of_one_in_the_same_turns(tokens, blocks, lanes):
    one, several = BlockOrder(tokens, blocks, 9, 2), BlockOrder(tokens, blocks, 9, 2, min(lanes, tokens))
    assert one.next_pool(one.pool(tokens - 1)) is None
    for lane in range(several.lanes.count):
        begin, end = several.lanes.begin(lane), several.lanes.begin(lane + 1)
        turns = [several._turn(place) for place in range(begin, end)]
        assert turns == [one._turn(place) for place in range(begin, end)]
        blocks_of = {index // blocks.tokens for index in several.indices(begin, end).tolist()}
        assert blocks_of == set(one._order.forward(np.unique(turns)).tolist())


def test_the_order_of_one_lane_is_this_one():
    """Written down: a checkpoint of another version goes on in it."""
    found = BlockOrder(23, Blocks(4, 2), 5, 1).indices(0, 23).tolist()
    assert found == [1, 5, 6, 3, 7, 4, 2, 0, 14, 20, 21, 12, 15, 22, 13, 17, 11, 8, 16, 18, 10, 9, 19]


def test_seed_and_epoch_make_other_orders():
    for shuffle, blocks in (("global", None), ("block", Blocks(16, 4))):
        found = {
            tuple(order_of(shuffle, 1000, blocks, seed, epoch).indices(0, 1000).tolist())
            for seed in (0, 1, 2**64 - 1)
            for epoch in (0, 1)
        }
        assert len(found) == 6
    assert order_of(None, 1000, None, 5, 7).indices(10, 20).tolist() == list(range(10, 20))


def test_within_a_pool_a_token_may_come_anywhere():
    blocks, tokens = Blocks(32, 16), 32 * 16 * 20
    order = BlockOrder(tokens, blocks, 1, 0)
    places = np.argsort(order.indices(0, tokens))
    # Where the first token of each block comes in its pool: a uniform share of the quarters.
    quarters = np.bincount(places[::32] % 512 // 128, minlength=4)
    assert abs(quarters - 80).max() < 5 * np.sqrt(80)


@pytest.mark.parametrize(
    "blocks", [Blocks(64, 100), Blocks(64, 1000), Blocks(1, 500), Blocks(1024, 8), Blocks(1 << 17, 8), Blocks(64, 7)]
)
@pytest.mark.parametrize("lanes", [1, 2, 7])
def test_the_quality_of_a_block_shuffle_is_what_is_measured(blocks, lanes):
    tokens = 100_003
    measured = []
    for epoch in range(3):
        order = BlockOrder(tokens, blocks, 3, epoch, lanes)
        # The epoch takes a token of each lane in turn.
        in_turn = np.empty(tokens, np.int64)
        for lane in range(lanes):
            in_turn[lane::lanes] = order.indices(order.lanes.begin(lane), order.lanes.begin(lane + 1))
        places = np.argsort(in_turn)
        measured.append(np.abs(np.diff(places)).mean() / ((tokens + 1) / 3))
    assert order.quality == pytest.approx(np.mean(measured), rel=0.05)


def test_the_quality_of_the_others_is_what_is_measured():
    uniform = order_of("global", 100_003, None, 0, 0)
    measured = np.abs(np.diff(np.argsort(uniform.indices(0, 100_003)))).mean() / (100_004 / 3)
    assert uniform.quality == 1.0 == pytest.approx(measured, rel=0.02)
    assert order_of(None, 100_003, None, 0, 0).quality == pytest.approx(1 / (100_004 / 3))
    assert order_of(None, 1, None, 0, 0).quality == 1.0


def test_the_geometry_of_usual_stores():
    gpt2 = 12 * 768 * 2
    # Two sites of the token layout: 512 tokens are not quite 9 MiB, so 256 ... 8 MiB at most.
    assert block_geometry(gpt2, 2 * gpt2, 2 << 30) == (256, 227)
    # Of the layer layout: a piece is of one layer, 8 MiB of it would be half of the pool.
    assert block_geometry(768 * 2, 2 * gpt2, 2 << 30) == (4096, 14)
    llama = 32 * 4096 * 2
    assert block_geometry(4096 * 2, 2 * llama, 2 << 30) == (512, 8)
    assert block_geometry(10, 10, 10) == (1, 1)
    with pytest.raises(mmcache.ArgumentError, match="buffer_bytes is 9: expected at least the 10 bytes"):
        block_geometry(10, 10, 9)


@given(st.integers(1, 1 << 24), st.integers(1, 80), st.integers(1, 1 << 40))
def test_a_pool_fits_and_is_of_eight_blocks_at_least(piece, layers, buffer_bytes):
    token = piece * layers
    if token > buffer_bytes:
        return
    block, pool = block_geometry(piece, token, buffer_bytes)
    assert block & (block - 1) == 0
    assert block * pool * token <= buffer_bytes
    assert block * piece <= max(8 << 20, piece)
    assert pool >= min(8, buffer_bytes // token)
