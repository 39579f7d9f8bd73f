"""States: read back exactly, laid out anew for other ranks, and refused with what differs."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mmcache
from mmcache.feed_plan import FeedPlan, Position
from mmcache.order import Blocks

PLAN = FeedPlan(7, 1000, 99, "block", Blocks(16, 8), 2, 10, drop_last=False)


def test_a_state_is_a_few_numbers_and_words():
    state = PLAN.state(Position(3, 40, 5))
    assert state == {
        "version": 1,
        "epoch": 3,
        "start": 40,
        "step": 5,
        "workers": 1,
        "seed": 7,
        "tokens": 1000,
        "kept": 99,
        "shuffle": "block",
        "block_tokens": 16,
        "pool_blocks": 8,
        "world_size": 2,
        "batch_size": 10,
        "drop_last": False,
    }
    assert PLAN.position(json.loads(json.dumps(state))) == (3, 40, 5)
    assert replace(PLAN, shuffle=None, blocks=None).state(Position(0, 0, 0))["block_tokens"] == 0


@given(
    st.integers(1, 500),
    st.tuples(st.integers(1, 4), st.integers(1, 20), st.booleans()),
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 20), st.booleans(), st.integers(0, 30)), max_size=4),
)
def test_whatever_the_ranks_are_between_resumes_each_token_comes_once(tokens, first, others):
    plan, position, seen = FeedPlan(0, tokens, 0, None, None, *first), Position(5, 0, 0), []
    for ranks, size, drop_last, steps in [*others, (1, 7, False, 1000)]:
        state = plan.state(position)
        plan = FeedPlan(0, tokens, 0, None, None, ranks, size, drop_last)
        position = plan.position(state)
        assert position.epoch == 5
        shares = plan.shares(position.start)
        for step in range(position.step, min(position.step + steps, len(shares))):
            for rank in range(ranks):
                start, stop = shares.share(step, rank)
                seen += range(position.start + start, position.start + stop)
            position = position._replace(step=step + 1)
    assert seen == list(range(tokens))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 8}, "seed is 7, here 8"),
        ({"tokens": 999}, "tokens is 1000, here 999"),
        ({"kept": 1}, "kept is 99, here 1"),
        ({"shuffle": "global", "blocks": None}, "shuffle is 'block', here 'global'; block_tokens is 16, here 0"),
        ({"blocks": Blocks(16, 4)}, "pool_blocks is 8, here 4"),
    ],
)
def test_another_order_is_refused_with_what_differs(change, said):
    with pytest.raises(mmcache.ArgumentError, match=said):
        replace(PLAN, **change).position(PLAN.state(Position(0, 0, 0)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "version 2"),
        ({"epoch": -1}, "epoch is -1"),
        ({"step": "x"}, "step is 'x'"),
        ({"start": 1001}, "start is 1001"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"workers": 0}, "workers is 0"),
    ],
)
def test_what_is_no_state_is_refused(change, said):
    with pytest.raises(mmcache.ArgumentError, match=said):
        PLAN.position(PLAN.state(Position(0, 0, 0)) | change)


def test_what_lacks_something_is_refused():
    state = PLAN.state(Position(0, 0, 0))
    del state["seed"], state["step"]
    with pytest.raises(mmcache.ArgumentError, match="lacks step, seed"):
        PLAN.position(state)
    for nothing in (None, 5, "state", []):
        with pytest.raises(mmcache.ArgumentError, match="lacks version"):
            PLAN.position(nothing)


def test_a_workers_state_is_only_for_that_worker():
    state = PLAN.state(Position(0, 0, 4), workers=2)
    assert PLAN.position(state, workers=2) == (0, 0, 4)
    for plan, workers in ((PLAN, 1), (PLAN, 3), (replace(PLAN, world_size=3), 2), (replace(PLAN, batch_size=5), 2)):
        with pytest.raises(mmcache.ArgumentError, match=r"one of 2 DataLoader workers.* load the `state` of the last"):
            plan.position(state, workers)
    # That of the main process, or of a batch, is for all of them.
    assert PLAN.position(PLAN.state(Position(0, 0, 4)), workers=3) == (0, 0, 4)
    assert replace(PLAN, world_size=4).position(PLAN.state(Position(0, 0, 4)), workers=3) == (0, 80, 0)
