"""Splits by whole units: disjoint, together everything, of about the size asked for, and stable as a store grows."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mmcache
from mmcache.read.store import Sequences
from mmcache.training.token_filter import Split, as_split, members


def store_of(spans, shard_tokens=64):
    return SimpleNamespace(sequences=Sequences(np.array(spans, np.int64)), shard_tokens=shard_tokens, where="acts")


def sequences(lengths, documents=None):
    stops = np.cumsum(lengths)
    return np.stack([stops - lengths, stops, np.arange(len(lengths)) if documents is None else documents], axis=1)


FRACTIONS = st.floats(0.01, 0.99)


@given(
    st.lists(st.integers(1, 200), min_size=40, max_size=300),
    FRACTIONS,
    st.sampled_from(["sequence", "document", "shard"]),
    st.integers(0, 2**64 - 1),
)
def test_the_parts_are_disjoint_and_together_everything(lengths, fraction, by, seed):
    store = store_of(sequences(lengths, documents=np.arange(len(lengths)) // 3))
    found = {}
    for part in ("train", "validation"):
        try:
            found[part] = members(Split(part, fraction, by, seed), store)
        except mmcache.ArgumentError:
            found[part] = np.zeros(len(lengths), bool)
    assert (found["train"] ^ found["validation"]).all()


@given(st.integers(50, 3000), FRACTIONS, st.integers(0, 2**64 - 1))
def test_one_of_each_window_is_picked(units, fraction, seed):
    store = store_of(sequences(np.ones(units, int)))
    try:
        picked = members(Split("validation", fraction, seed=seed), store)
    except mmcache.ArgumentError:
        picked = np.zeros(units, bool)
    # Between any two windows lie at most two units more or fewer than the fraction says.
    assert abs(np.cumsum(picked) - np.arange(1, units + 1) * fraction).max() <= 2


@given(st.integers(2, 400), st.integers(1, 400), FRACTIONS, st.sampled_from(["sequence", "document", "shard"]))
def test_a_store_that_grows_keeps_every_unit_where_it_was(units, more, fraction, by):
    lengths = np.random.default_rng(units).integers(1, 100, units + more)
    documents = np.random.default_rng(more).integers(0, 50, units + more)
    spans = sequences(lengths, documents)
    split = Split("train", fraction, by)
    try:
        before = members(split, store_of(spans[:units]))
    except mmcache.ArgumentError:
        before = np.zeros(units, bool)
    try:
        after = members(split, store_of(spans))
    except mmcache.ArgumentError:
        after = np.zeros(units + more, bool)
    assert np.array_equal(before, after[:units])


def test_units_are_whole():
    rng = np.random.default_rng(0)
    lengths, documents = rng.integers(1, 50, 2000), rng.integers(0, 400, 2000)
    spans = sequences(lengths, documents)
    store = store_of(spans)
    for document in range(400):
        assert len(set(members(Split("validation", 0.2, "document"), store)[documents == document])) <= 1
    by_shard = members(Split("validation", 0.2, "shard"), store)
    for shard in range(int(spans[-1, 1]) // 64 + 1):
        assert len(set(by_shard[spans[:, 0] // 64 == shard])) <= 1
    assert 0.1 < by_shard.mean() < 0.3


def test_a_sequence_belongs_to_the_shard_that_it_starts_in():
    # The second begins in shard 0 and fills shards 1 and 2, in which none begins: shard 3 is the second unit.
    store = store_of([[0, 10, 0], [10, 195, 1], [195, 200, 2]])
    parts = {seed: members(Split("train", 0.5, "shard", seed), store).tolist() for seed in range(40)}
    assert set(map(tuple, parts.values())) == {(True, True, False), (False, False, True)}


def test_other_seeds_are_other_splits_and_the_same_seed_the_same():
    store = store_of(sequences(np.ones(1000, int)))
    found = [members(Split("validation", seed=seed), store) for seed in (0, 0, 1)]
    assert np.array_equal(found[0], found[1])
    assert (found[0] & found[2]).sum() < 40
    assert found[0].sum() == found[2].sum() == 100
    # Pinned: held-out sequences that changed would leak into training.
    assert np.flatnonzero(found[0])[:5].tolist() == PINNED


PINNED = [1, 17, 28, 37, 48]


def test_the_strings_are_shorthands():
    assert as_split("train") == Split("train", 0.1, "sequence", 0)
    assert as_split("validation") == Split("validation")
    assert as_split(None) is None
    with pytest.raises(mmcache.ArgumentError, match="'test'"):
        as_split("test")


def test_an_empty_part_says_the_numbers():
    store = store_of(sequences([5, 5, 5]))
    empty = []
    for seed in range(50):
        try:
            members(Split("validation", 0.01, seed=seed), store)
        except mmcache.ArgumentError as error:
            empty.append(str(error))
    assert len(empty) > 40
    assert "validation part of acts is empty: of 3 sequences, a fraction of 0.01 with seed" in empty[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"part": "test"}, "'test'"),
        ({"fraction": 0}, "fraction"),
        ({"fraction": 1}, "fraction"),
        ({"fraction": float("nan")}, "fraction"),
        ({"fraction": True}, "fraction"),
        ({"by": "token"}, "'token'"),
        ({"seed": -1}, "seed"),
        ({"seed": 1.5}, "seed"),
    ],
)
def test_what_makes_no_sense_is_refused(options, said):
    with pytest.raises(mmcache.ArgumentError, match=said):
        Split(**{"part": "train"} | options)
