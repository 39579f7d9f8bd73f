"""States: read back exactly, laid out anew for other ranks, and refused with what differs."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mmcache
from mmcache.training.schedule import Blocks, EpochSchedule, Position

PLAN = EpochSchedule(7, 1000, 99, "block", Blocks(16, 8), 2, 10, drop_last=False)


def test_a_state_is_a_few_numbers_and_words():
    state = PLAN.state(Position(3, 40, 5, 1))
    assert state == {
        "version": 1,
        "epoch": 3,
        "start": 40,
        "step": 5,
        "lanes": 1,
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
    assert PLAN.position(json.loads(json.dumps(state))) == (3, 40, 5, 1)
    assert replace(PLAN, shuffle=None, blocks=None).state(PLAN.begin(0))["block_tokens"] == 0


@given(
    st.integers(1, 500),
    st.tuples(st.integers(1, 4), st.integers(1, 20), st.booleans(), st.integers(1, 4)),
    st.lists(
        st.tuples(st.integers(1, 4), st.integers(1, 20), st.booleans(), st.integers(1, 4), st.integers(0, 30)),
        max_size=4,
    ),
    st.sampled_from([None, Blocks(4, 3)]),
)
def test_whatever_the_ranks_are_between_resumes_each_token_comes_once(tokens, first, others, blocks):
    shuffle = "block" if blocks else None
    plan, seen = EpochSchedule(0, tokens, 0, shuffle, blocks, *first), []
    position = plan.begin(5)
    assert position == (5, 0, 0, min(first[3], tokens) if blocks else 1)
    for ranks, size, drop_last, nodes, steps in [*others, (1, 7, False, 1, 1000)]:
        state = plan.state(position)
        plan = EpochSchedule(0, tokens, 0, shuffle, blocks, ranks, size, drop_last, nodes)
        # The epoch goes on in the lanes that it began with, the next has those of the machines that there are now.
        lanes, position = position.lanes, plan.position(state)
        assert (position.epoch, position.lanes) == (5, lanes)
        assert plan.begin(6).lanes == (min(nodes, tokens) if blocks else 1)
        shares = plan.shares(position.start)
        for step in range(position.step, min(position.step + steps, len(shares))):
            here = position._replace(step=step)
            seen += [
                place for rank in range(ranks) for span in plan.places(here, shares, rank) for place in range(*span)
            ]
            position = position._replace(step=step + 1)
    assert sorted(seen) == list(range(tokens))
    assert blocks or seen == list(range(tokens))


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
        replace(PLAN, **change).position(PLAN.state(PLAN.begin(0)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "version 2"),
        ({"epoch": -1}, "epoch is -1"),
        ({"step": "x"}, "step is 'x'"),
        ({"start": 1001}, "start is 1001"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"workers": 0}, "workers is 0"),
        ({"lanes": 0}, "lanes is 0"),
        ({"lanes": 1001}, "lanes is 1001: expected at most 1000"),
    ],
)
def test_what_is_no_state_is_refused(change, said):
    with pytest.raises(mmcache.ArgumentError, match=said):
        PLAN.position(PLAN.state(PLAN.begin(0)) | change)


def test_what_lacks_something_is_refused():
    state = PLAN.state(PLAN.begin(0))
    del state["seed"], state["step"]
    with pytest.raises(mmcache.ArgumentError, match="lacks step, seed"):
        PLAN.position(state)
    for nothing in (None, 5, "state", []):
        with pytest.raises(mmcache.ArgumentError, match="lacks version"):
            PLAN.position(nothing)


def test_a_state_from_before_there_were_lanes_is_of_one():
    plan = replace(PLAN, nodes=3)
    state = plan.state(Position(3, 40, 5, 1))
    del state["lanes"]
    assert plan.position(state) == (3, 40, 5, 1)
    assert plan.begin(4).lanes == 3
    whole = replace(PLAN, shuffle="global", blocks=None)
    with pytest.raises(mmcache.ArgumentError, match="lanes is 2: expected at most 1"):
        whole.position(whole.state(Position(0, 0, 0, 2)))


def test_a_workers_state_is_only_for_that_worker():
    state = PLAN.state(Position(0, 0, 4, 1), workers=2)
    assert PLAN.position(state, workers=2) == (0, 0, 4, 1)
    for plan, workers in ((PLAN, 1), (PLAN, 3), (replace(PLAN, world_size=3), 2), (replace(PLAN, batch_size=5), 2)):
        with pytest.raises(mmcache.ArgumentError, match=r"one of 2 DataLoader workers.* load the `state` of the last"):
            plan.position(state, workers)
    # That of the main process, or of a batch, is for all of them.
    assert PLAN.position(PLAN.state(Position(0, 0, 4, 1)), workers=3) == (0, 0, 4, 1)
    assert replace(PLAN, world_size=4).position(PLAN.state(Position(0, 0, 4, 1)), workers=3) == (0, 80, 0, 1)


def test_lanes_are_never_so_many_that_a_step_takes_long():
    plan = EpochSchedule(0, 10**12, 0, "block", Blocks(16, 8), 10**6, 10, drop_last=False, nodes=10**6)
    assert plan.begin(0).lanes == 1 << 16
    with pytest.raises(mmcache.ArgumentError, match="lanes is 65537: expected at most 65536"):
        plan.position(plan.state(plan.begin(0)) | {"lanes": 65537})
