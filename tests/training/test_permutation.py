"""Bijective for every size, the same everywhere, its own inverse's inverse, and without a trace of the order before."""

import math
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mmcache
from mmcache.training.permutation import MOST, Permutation, hashed, mixed

KEYS = st.integers(0, 2**64 - 1)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 1000, 7919, 2**18 + 1, 1_000_003])
def test_every_number_comes_once(n):
    found = Permutation(n, mixed(n, 1)).forward(np.arange(n))
    assert found.dtype == np.int64
    assert np.array_equal(np.sort(found), np.arange(n))


@given(st.integers(1, 3000), KEYS)
def test_every_number_comes_once_whatever_the_size_and_the_key(n, key):
    permutation = Permutation(n, key)
    found = permutation.forward(np.arange(n))
    assert sorted(found.tolist()) == list(range(n))
    assert permutation.inverse(found).tolist() == list(range(n))


@given(st.integers(1, MOST), KEYS, st.lists(st.integers(0, 2**63), min_size=1, max_size=50))
def test_the_inverse_finds_the_place(n, key, numbers):
    permutation = Permutation(n, key)
    places = np.array([number % n for number in numbers], np.int64)
    found = permutation.forward(places)
    assert found.min() >= 0
    assert found.max() < n
    assert np.array_equal(permutation.inverse(found), places)
    assert np.array_equal(permutation.forward(places.astype(np.uint64)), found)
    assert np.array_equal(permutation.forward(permutation.inverse(places)), places)


@pytest.mark.parametrize("n", [2**40, 2**40 + 15, MOST])
def test_of_a_store_larger_than_any_a_part_is_as_it_should_be(n):
    permutation = Permutation(n, mixed(5))
    places = np.concatenate([np.arange(300_000), np.arange(n - 300_000, n)])
    found = permutation.forward(places)
    assert len(np.unique(found)) == len(places)
    assert 0 <= found.min() <= found.max() < n
    assert np.array_equal(permutation.inverse(found), places)


@pytest.mark.parametrize("length", [0, 1, 499, 501, 1024, 8000, 8001, 40_000])
def test_a_call_may_be_of_any_length(length):
    permutation = Permutation(50_021, mixed(9))
    places = np.arange(length)
    found = permutation.forward(places)
    assert places.tolist() == list(range(length))
    one_by_one = [int(permutation.forward(np.array([place]))[0]) for place in range(0, length, 997)]
    assert found[::997].tolist() == one_by_one


def test_it_is_the_same_on_every_machine():
    places = np.arange(5)
    assert mixed(1, 2, 3) == 7702586659592502839
    assert hashed(np.arange(3), mixed(7)).tolist() == [mixed(mixed(7), number) for number in range(3)]
    assert Permutation(1000, mixed(0, 0)).forward(places).tolist() == GOLDEN[1000]
    assert Permutation(2**18 + 1, mixed(0, 0)).forward(places).tolist() == GOLDEN[2**18 + 1]
    assert Permutation(2**40, mixed(0, 0)).forward(places).tolist() == GOLDEN[2**40]
    assert Permutation(MOST, mixed(0, 0)).forward(places).tolist() == GOLDEN[MOST]


# Pinned: a shuffle that changed would resume into another order.
GOLDEN = {
    1000: [954, 326, 973, 861, 179],
    2**18 + 1: [175116, 192616, 251885, 174998, 229405],
    2**40: [410758019625, 818705119098, 207212612953, 831535587336, 442117288701],
    MOST: [1856277281696905899, 1256455845371343828, 4795136696270664458, 4779858214202159596, 6016190131838811542],
}


def by_hand(n, key, place):
    """The same in plain integers."""
    right = math.isqrt(n - 1) + 1
    sizes = (-(-n // right), right)
    while True:
        halves = list(divmod(place, right))
        for turn in range(6):
            target = turn % 2
            value = (halves[1 - target] * (mixed(key, turn, 0) | 1) + mixed(key, turn, 1)) % 2**64
            value = (value ^ (value >> 32)) * 0x94D049BB133111EB % 2**64
            halves[target] = (halves[target] + ((value >> 32) * sizes[target] >> 32)) % sizes[target]
        place = halves[0] * right + halves[1]
        if place < n:
            return place


@given(st.integers(1, MOST), KEYS, st.integers(0, MOST))
def test_it_is_what_its_documentation_says(n, key, place):
    assert int(Permutation(n, key).forward(np.array([place % n]))[0]) == by_hand(n, key, place % n)


def chi_square(counts, expected):
    """How many standard deviations a chi-square statistic is from what it is by chance."""
    freedom = counts.size - 1
    return (((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("n", [10_007, 2**18 + 1, 10_000_019, 2**40, 2**59 - 55])
def test_neighbours_land_anywhere(n):
    # How far from each other, and in which of 16 x 16 places, for several distances in the text.
    scores = []
    for distance in (1, 2, 3, 64, 768, 1024):
        for key in range(4):
            permutation = Permutation(n, mixed(key, distance))
            count = min(n - distance, 100_000)
            one, other = permutation.forward(np.arange(count)), permutation.forward(np.arange(count) + distance)
            apart = np.bincount(((other - one) % n / n * 100).astype(int), minlength=100)
            scores.append(chi_square(apart, count / 100))
            if n > 10 * count:
                # All of a small one is spread more evenly than chance would.
                pairs = np.bincount(one * 16 // n * 16 + other * 16 // n, minlength=256)
                scores.append(chi_square(pairs, count / 256))
    assert max(scores) < 5
    assert abs(np.mean(scores)) < 5 / math.sqrt(len(scores))


@pytest.mark.parametrize("n", [2, 3, 4])
def test_of_a_few_numbers_every_order_comes_as_often(n):
    keys = 6000
    found = Counter(tuple(Permutation(n, mixed(key)).forward(np.arange(n)).tolist()) for key in range(keys))
    counts = np.array([found[order] for order in permutations(range(n))])
    assert chi_square(counts, keys / math.factorial(n)) < 5


def test_keys_of_neighbouring_epochs_have_nothing_in_common():
    n = 100_003
    orders = [Permutation(n, mixed(seed, epoch)).forward(np.arange(n)) for seed in range(2) for epoch in range(3)]
    for number, one in enumerate(orders):
        for other in orders[:number]:
            # One place in n has the same number by chance.
            assert (one == other).sum() < 12
            assert abs(np.corrcoef(one, other)[0, 1]) < 5 / math.sqrt(n)


@pytest.mark.parametrize("n", [0, -1, 2**63])
def test_there_is_none_of_another_size(n):
    with pytest.raises(mmcache.ArgumentError, match=str(n)):
        Permutation(n, 0)
