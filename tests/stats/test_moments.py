import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mmcache.format.dtypes import ACTIVATION_DTYPES, BY_NAME
from mmcache.format.shard import NORM_COLUMNS, STATISTICS
from mmcache.stats.moments import Moments, merge_moments

SEEDS = st.integers(0, 2**32)


def gathered(rows, chunk_rows=16, keep=None, cuts=(), first_token=0):
    """The statistics of `[n, layers, width]` rows, handed over in pieces that end at `cuts`."""
    moments = Moments(rows.shape[1], rows.shape[2], chunk_rows)
    for start, stop in itertools.pairwise([0, *sorted(cuts), len(rows)]):
        moments.add(rows[start:stop], None if keep is None else keep[start:stop])
    return moments.arrays(first_token)


def plainly(rows, chunk_rows=16, keep=None, first_token=0):
    """The same in the simplest numpy, in float64 (longdouble for M2), one layer at a time."""
    n, layers, width = rows.shape
    found = {name: [] for name in STATISTICS}
    norms = np.full((-(-n // chunk_rows), layers, 5), np.nan)
    for layer in range(layers):
        wide = rows[:, layer].astype(np.float64)
        finite = np.isfinite(wide).all(axis=1)
        kept = finite if keep is None else finite & keep
        used = wide[kept].astype(np.longdouble)
        found["count"].append(np.full(width, kept.sum()))
        found["mean"].append(used.mean(axis=0) if len(used) else np.full(width, np.nan))
        found["m2"].append(((used - used.mean(axis=0)) ** 2).sum(axis=0) if len(used) else np.zeros(width))
        found["non_finite"].append((~finite).sum())
        found["first_non_finite"].append(-1 if finite.all() else first_token + int(np.argmin(finite)))
        found["zero_rows"].append((wide == 0).all(axis=1).sum())
        found["overflow"].append(0)
        for chunk in range(len(norms)):
            part = slice(chunk * chunk_rows, (chunk + 1) * chunk_rows)
            length = np.linalg.norm(wide[part][kept[part]], axis=1)
            ends = (length.min(), length.max()) if len(length) else (np.nan, np.nan)
            norms[chunk, layer] = (len(length), length.sum(), (length**2).sum(), *ends)
    return {name: np.array(values, np.float64) for name, values in found.items() if name != "norms"} | {"norms": norms}


def assert_close(found, expected, dtype="float64"):
    # bfloat16 is summed in float32 by spans of rows.
    rtol = 1e-6 if dtype == "bfloat16" else 1e-9
    with np.errstate(invalid="ignore"):
        rms = np.sqrt(expected["m2"] / expected["count"] + expected["mean"] ** 2)
    assert set(found) == set(expected) == set(STATISTICS)
    for name, array in found.items():
        assert array.dtype == (np.float64 if name in STATISTICS[:4] else np.int64)
        # What rounding may leave of a variance that is zero is measured against the squares that it came of.
        floor = 1e-25 * float(np.nanmax(expected["norms"][..., 2], initial=0)) if name == "m2" else 0
        if name == "mean":
            # What is added up to a mean near zero is as large as the root mean square.
            assert np.array_equal(np.isnan(array), np.isnan(expected[name]))
            assert not (np.abs(array - expected[name]) > rtol / 10 * rms).any()
        else:
            np.testing.assert_allclose(array, expected[name], rtol=rtol, atol=floor, err_msg=name)


def normal(seed, shape, dtype="float64"):
    return np.random.default_rng(seed).standard_normal(shape).astype(BY_NAME[dtype].numpy)


WIDTHS = st.sampled_from([1, 2, 9, 10])


@given(SEEDS, st.sampled_from(ACTIVATION_DTYPES), st.integers(1, 300), st.integers(1, 3), st.integers(1, 70), WIDTHS)
@example(0, "float32", 64, 1, 64, 9)
@example(0, "bfloat16", 65, 2, 7, 10)
def test_equal_to_float64_numpy(seed, dtype, n, layers, chunk_rows, width):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((n, layers, width)) * rng.uniform(0.1, 20, width) + rng.uniform(-9, 9, width)
    rows = rows.astype(BY_NAME[dtype].numpy)
    assert_close(gathered(rows, chunk_rows), plainly(rows, chunk_rows), dtype)


@given(
    SEEDS,
    st.integers(1, 300),
    st.lists(st.integers(0, 300), max_size=6),
    st.booleans(),
    st.sampled_from(["float32", "bfloat16"]),
    st.sampled_from([6, 1 << 14]),  # all in one block, or in blocks of 64 rows
)
@example(seed=0, n=300, cuts=[63, 64, 65, 128], masked=True, dtype="bfloat16", shape=1 << 14)
@settings(max_examples=30)
def test_any_split_of_the_rows_gives_the_same_to_the_last_bit(seed, n, cuts, masked, dtype, shape):
    rng = np.random.default_rng(seed)
    rows = normal(seed, (n, 2, shape), dtype)
    rows[rng.random((n, 2)) < 0.1] = np.inf
    keep = rng.random(n) < 0.7 if masked else None
    whole = gathered(rows, keep=keep)
    split = gathered(rows, keep=keep, cuts=[cut for cut in cuts if cut < n])
    assert {name: array.tobytes() for name, array in split.items()} == {
        name: array.tobytes() for name, array in whole.items()
    }


@pytest.mark.parametrize("dtype", ACTIVATION_DTYPES)
def test_a_dimension_of_ten_thousand_spoils_neither_itself_nor_the_others(dtype):
    rows = normal(1, (1000, 2, 32)) * 3
    rows[..., 7] = 1e4 + rows[..., 7] * 20
    rows = rows.astype(BY_NAME[dtype].numpy)
    found, expected = gathered(rows), plainly(rows)
    assert_close(found, expected, dtype)
    assert found["m2"][0, 7] > 0
    assert (np.sqrt(found["m2"] / found["count"])[:, :7] < 4).all()


def test_a_constant_dimension_has_no_variance():
    rows = np.full((200, 1, 3), 0.1)
    rows[..., 1] = -1e4
    found = gathered(rows)
    assert (found["m2"] >= 0).all()
    assert (found["m2"] <= 1e-25 * 1e8 * 200).all()
    np.testing.assert_allclose(found["mean"][0], [0.1, -1e4, 0.1], rtol=1e-14)


@given(SEEDS, st.integers(1, 200), st.sampled_from([np.nan, np.inf, -np.inf]))
def test_rows_that_are_not_finite_are_counted_and_left_out(seed, n, value):
    rng = np.random.default_rng(seed)
    rows = normal(seed, (n, 3, 4), "float16")
    bad = rng.random((n, 3)) < 0.2
    rows[..., 2][bad] = value
    keep = rng.random(n) < 0.8
    found = gathered(rows, keep=keep, first_token=1000)
    assert_close(found, plainly(rows, keep=keep, first_token=1000))
    assert found["non_finite"].tolist() == bad.sum(axis=0).tolist()
    firsts = [1000 + int(np.argmax(column)) if column.any() else -1 for column in bad.T]
    assert found["first_non_finite"].tolist() == firsts


def test_masked_rows_change_nothing_but_the_counts_of_bad_rows():
    rows = normal(0, (100, 2, 4))
    keep = np.ones(100, np.bool_)
    keep[::7] = False
    masked = rows.copy()
    masked[~keep] = 1e30  # an attention sink
    masked[7, 0] = np.nan
    masked[14, 1] = 0
    found, expected = gathered(masked, keep=keep), gathered(rows, keep=keep)
    for name in STATISTICS[:4]:
        assert np.array_equal(found[name], expected[name], equal_nan=True)
    assert found["non_finite"].tolist() == [1, 0]
    assert found["zero_rows"].tolist() == [0, 1]


def test_zero_rows_are_rows_of_zeros_and_not_of_subnormals():
    rows = np.zeros((10, 1, 4))
    rows[3, 0, 1] = 5e-324  # whose square is zero
    rows[4, 0, 1] = -0.0
    found = gathered(rows)
    assert found["zero_rows"].tolist() == [9]
    assert found["norms"][0, 0, :2].tolist() == [10, 0]


def test_without_any_row_that_counts():
    rows = np.full((20, 1, 3), np.nan, np.float32)
    for found in (gathered(rows), gathered(np.ones_like(rows), keep=np.zeros(20, np.bool_))):
        assert not found["count"].any()
        assert not found["m2"].any()
        assert np.isnan(found["mean"]).all()
        assert found["norms"][:, 0, :3].tolist() == [[0, 0, 0], [0, 0, 0]]
        assert np.isnan(found["norms"][:, 0, 3:]).all()


def test_norms_are_kept_for_each_inner_chunk():
    rows = normal(3, (150, 2, 6))
    found = gathered(rows, chunk_rows=40)["norms"]
    assert found.shape == (4, 2, len(NORM_COLUMNS))
    lengths = np.linalg.norm(rows, axis=2)
    expected = [
        [len(p), p.sum(), (p**2).sum(), p.min(), p.max()] for p in (lengths[s : s + 40, 1] for s in range(0, 150, 40))
    ]
    np.testing.assert_allclose(found[:, 1], expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", ACTIVATION_DTYPES)
def test_any_bits_are_data_and_warn_of_nothing(dtype):
    # Warnings are errors here. Random bits are signalling NaNs and the largest numbers there are.
    entry = BY_NAME[dtype]
    rows = np.random.default_rng(0).integers(0, 256, (130, 2, 8 * entry.size), np.uint8).view(entry.numpy)
    found = gathered(rows)
    with np.errstate(invalid="ignore"):
        wide = rows.astype(np.float64)
    assert found["non_finite"].tolist() == (~np.isfinite(wide).all(axis=2)).sum(axis=0).tolist()
    assert gathered(np.full((70, 1, 2), np.finfo(entry.numpy).max if dtype != "bfloat16" else 3e38, entry.numpy))


def test_overflow_is_added_up():
    moments = Moments(2, 3, 4)
    moments.add(np.ones((5, 2, 3)))
    moments.add_overflow(np.array([1, 0]))
    moments.add_overflow(np.array([2, 7]))
    assert moments.arrays(0)["overflow"].tolist() == [3, 7]


def test_what_is_given_out_is_the_callers_own():
    moments = Moments(1, 3, 4)
    moments.add(normal(0, (100, 1, 3)))
    first = moments.arrays(0)
    expected = {name: array.copy() for name, array in first.items()}
    for array in first.values():
        array[...] = -5
    again = moments.arrays(0)
    assert all(np.array_equal(again[name], expected[name]) for name in again)


SCALES = np.array([1, 1, 1, 100])


def side(seed, n):
    """Count, mean and M2 of `n` rows, each dimension about its own place."""
    rows = normal(seed, (n, 4)) * SCALES + np.array([0, 1, -50, 1e4])
    if not n:
        return rows, (np.zeros(4), np.full(4, np.nan), np.zeros(4))
    return rows, (np.full(4, float(n)), rows.mean(axis=0), ((rows - rows.mean(axis=0)) ** 2).sum(axis=0))


COUNTS = st.integers(0, 50)


def assert_merged(found, expected):
    assert np.array_equal(found[0], expected[0])
    # 1e-12 of the spread of the rows, and of all their squares: a mean may be near zero, two rows near each other.
    for power in (1, 2):
        differs = np.abs(found[power] - expected[power])
        assert np.array_equal(np.isnan(found[power]), np.isnan(expected[power]))
        assert not (differs > 1e-12 * SCALES**power * np.maximum(1, found[0]) ** (power - 1)).any()


@given(SEEDS, COUNTS, COUNTS, COUNTS)
@example(0, 0, 0, 0)
@example(0, 0, 0, 3)
@example(0, 3, 0, 0)
def test_merging_is_associative_commutative_and_equal_to_the_whole(seed, n_a, n_b, n_c):
    (rows_a, a), (rows_b, b), (rows_c, c) = side(seed, n_a), side(seed + 1, n_b), side(seed + 2, n_c)
    left = merge_moments(merge_moments(a, b), c)
    assert_merged(merge_moments(a, merge_moments(b, c)), left)
    assert_merged(merge_moments(c, merge_moments(b, a)), left)
    rows = np.concatenate([rows_a, rows_b, rows_c])
    whole = gathered(rows[:, None]) if len(rows) else None
    if whole is None:
        assert_merged(left, (np.zeros(4), np.full(4, np.nan), np.zeros(4)))
    else:
        assert_merged(left, (whole["count"][0], whole["mean"][0], whole["m2"][0]))


def test_an_empty_side_changes_nothing_even_in_some_dimensions():
    count = np.array([0.0, 0.0, 5.0, 5.0])
    one = (count, np.where(count > 0, 2.0, np.nan), np.where(count > 0, 3.0, 0.0))
    two = (count[::-1], one[1][::-1], one[2][::-1])
    assert_merged(merge_moments(one, two), ([5, 5, 5, 5], [2, 2, 2, 2], [3, 3, 3, 3]))
    assert_merged(merge_moments(one, one), (2 * count, one[1], 2 * one[2]))


def test_merging_changes_neither_side():
    _, a = side(0, 5)
    _, b = side(1, 7)
    before = [array.copy() for array in (*a, *b)]
    for array in merge_moments(a, b):
        array[...] = 0
    assert all(map(np.array_equal, (*a, *b), before))
