"""Sums of a block: the quick way in float32 beside the plain one in float64, and what float32 does not hold."""

import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmcache.stats import block_sums as module
from mmcache.stats.block_sums import SPAN, together
from mmcache.stats.block_sums import sum_block as sum_apart

FIELDS = ("count", "first", "second", "norms", "non_finite", "first_non_finite", "zero_rows")


def normal(seed, *shape, scale=1.0, mean=0.0):
    """Draw bfloat16 rows `[n, layers, width]`."""
    return (np.random.default_rng(seed).standard_normal(shape) * scale + mean).astype(ml_dtypes.bfloat16)


def sum_block(rows, keep):
    found = sum_apart(rows, keep)
    found.first, found.second = together(found.first), together(found.second)
    return found


def plainly(rows, keep=None):
    """Sum the same numbers in float64: wider ones, without the shift that those are given."""
    found = sum_block(rows.astype(np.float64), keep)
    weight = found.count[:, None] * found.shift
    found.second = found.second + found.shift * (2 * found.first + weight)
    found.first = found.first + weight
    return found


def is_narrow(monkeypatch, rows, keep=None):
    """Tell whether a block is summed in float32, and give its sums."""
    calls, wide = [], module._sum_wide
    monkeypatch.setattr(module, "_sum_wide", lambda *args: (calls.append(1), wide(*args)))
    found = sum_block(rows, keep)
    monkeypatch.undo()
    assert (sum_apart(rows, keep).first.ndim == 3) == (rows.dtype == ml_dtypes.bfloat16)
    return not calls, found


def assert_equal(found, expected, rtol=1e-6):
    for name in FIELDS:
        atol = rtol * np.sqrt(expected.second * expected.count[:, None]).max(initial=0) if name == "first" else 0
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=rtol, atol=atol, err_msg=name)


@given(st.integers(0, 2**32), st.integers(1, 200), st.integers(1, 4), st.integers(1, 9), st.booleans())
def test_float32_beside_float64(seed, n, layers, half, masked):
    rng = np.random.default_rng(seed)
    rows = normal(seed, n, layers, 2 * half, scale=3)
    rows[rng.random((n, layers)) < 0.05] = 0
    rows[..., 0][rng.random((n, layers)) < 0.05] = rng.choice([np.nan, np.inf, -np.inf])
    keep = rng.random(n) < 0.8 if masked else None
    assert_equal(sum_block(rows, keep), plainly(rows, keep))


def test_activations_are_summed_in_float32(monkeypatch):
    rows = normal(0, 100, 3, 64, scale=5)
    rows[..., 3] = 0
    narrow, found = is_narrow(monkeypatch, rows)
    assert narrow
    assert_equal(found, plainly(rows))


def test_rows_that_are_odd_are_summed_in_float64_unless_they_do_not_count(monkeypatch):
    rows, keep = normal(0, 100, 3, 64, scale=5), np.ones(100, np.bool_)
    rows[7] = 0
    rows[9, 1, 0] = np.nan
    narrow, found = is_narrow(monkeypatch, rows)
    assert not narrow
    assert_equal(found, plainly(rows))
    keep[[7, 9]] = False
    narrow, found = is_narrow(monkeypatch, rows, keep)
    assert narrow
    assert_equal(found, plainly(rows, keep))
    assert found.first_non_finite.tolist() == [-1, 9, -1]
    assert found.zero_rows.tolist() == [1, 1, 1]


@pytest.mark.parametrize("mean", [257.0, 1e4, -3e4])
def test_a_span_of_equal_magnitudes_is_exact(monkeypatch, mean):
    # So that what remains of squares that cancel is the variance and not what was rounded.
    rows = normal(1, SPAN * 4, 1, 8, scale=abs(mean) / 50, mean=mean)
    narrow, found = is_narrow(monkeypatch, rows)
    wide = rows.astype(np.float64)
    assert narrow
    assert np.array_equal(found.first[0], wide.sum(axis=0)[0])
    assert np.array_equal(found.second[0], (wide * wide).sum(axis=0)[0])


@pytest.mark.parametrize(
    ("where", "value"),
    [((5, 1, 2), 1e20), ((5, 1, 2), 3e38), ((slice(None), 1, 2), 1e-20), ((slice(None), 1, 2), 1e-40)],
)
def test_what_float32_does_not_hold_is_summed_in_float64(monkeypatch, where, value):
    rows = normal(2, 70, 2, 6)
    rows[where] = value
    narrow, found = is_narrow(monkeypatch, rows)
    assert not narrow
    assert_equal(found, plainly(rows), rtol=1e-12)


def test_tiny_rows_are_no_zero_rows(monkeypatch):
    rows = normal(3, 70, 1, 6)
    rows[4], rows[5] = 1e-30, 0
    narrow, found = is_narrow(monkeypatch, rows)
    assert not narrow
    assert found.zero_rows.tolist() == [1]
    np.testing.assert_allclose(found.norms[4], np.sqrt(6) * 1e-30, rtol=1e-2)


def test_huge_rows_that_do_not_count_do_not_matter(monkeypatch):
    rows, keep = normal(4, 70, 2, 6), np.ones(70, np.bool_)
    keep[::9] = False
    rows[::9] = 1e30
    narrow, found = is_narrow(monkeypatch, rows, keep)
    assert narrow
    assert found.count.tolist() == [keep.sum()] * 2
    assert np.isnan(found.norms[::9]).all()


def test_wide_rows_and_many_layers_are_summed_in_pieces():
    # Wider than a dot product that BLAS does in one thread, and more layers than are widened at once.
    rows = normal(5, 33, 5, 20_000)
    assert_equal(sum_block(rows, None), plainly(rows))


def at_once(rows, keep):
    """Sum float32 rows as one tile of float64, as the first shards that there are were summed."""
    wide = rows.astype(np.float64)
    left_out = ~np.isfinite(wide).all(axis=-1)
    if keep is not None:
        left_out |= ~keep[:, None]
    which = np.argmin(left_out, axis=0)
    shift = np.where(left_out.all(axis=0)[:, None], 0, wide[which, np.arange(rows.shape[1])])
    moved = wide - shift
    moved[left_out] = 0
    norms = np.sqrt(np.vecdot(wide, wide))
    norms[left_out] = np.nan
    return shift, np.add.reduce(moved, axis=0), np.add.reduce(moved * moved, axis=0), norms


@pytest.mark.parametrize("rows", [1, 31, 32, 33, 100, 256])
def test_bfloat16_in_tiles_of_some_spans_and_layers(monkeypatch, rows):
    rng = np.random.default_rng(8)
    values, keep = normal(8, rows, 5, 20, scale=3, mean=1), rng.random(rows) < 0.7
    values[rng.random((rows, 5)) < 0.1] = 0
    values[..., 4][rng.random((rows, 5)) < 0.1] = np.nan
    expected = sum_block(values, keep)
    for tile in (1, SPAN * 20 * 4, 2 * SPAN * 5 * 20 * 4):
        monkeypatch.setattr(module, "_TILE_BYTES", tile)
        found = sum_block(values, keep)
        assert all(np.array_equal(getattr(found, name), getattr(expected, name), equal_nan=True) for name in FIELDS)


@pytest.mark.parametrize("tile", [1, 3000, 1 << 20])
@pytest.mark.parametrize("bad", [False, True])
def test_no_number_of_rows_that_are_widened_together_shows_in_the_last_bit(monkeypatch, tile, bad):
    monkeypatch.setattr(module, "_TILE_BYTES", tile)
    rng = np.random.default_rng(7)
    rows = rng.standard_normal((100, 3, 20)).astype(np.float32) + np.float32(3)
    keep = None
    if bad:
        keep = rng.random(100) < 0.7
        keep[0] = False
        rows[rng.random((100, 3)) < 0.3, 4] = np.nan
        rows[:, 1, 0] = np.inf  # a layer without any row that counts
    found = sum_block(rows, keep)
    with np.errstate(invalid="ignore"):
        expected = at_once(rows, keep)
    for name, right in zip(("shift", "first", "second", "norms"), expected, strict=True):
        assert np.array_equal(getattr(found, name), right, equal_nan=True), name


def test_memory_in_any_order():
    rows = normal(6, 40, 2, 8)
    turned = np.asfortranarray(rows)
    one, two = sum_block(rows, None), sum_block(turned, None)
    assert all(np.array_equal(getattr(one, name), getattr(two, name)) for name in FIELDS)


_BITS = """
import hashlib, ml_dtypes, numpy as np
from mmcache.stats.block_sums import sum_block
rows = np.random.default_rng(0).standard_normal((128, 2, 10_240)).astype(ml_dtypes.bfloat16)
for some in (rows, rows.astype(np.float32)):
    found = sum_block(some, None)
    print(hashlib.sha256(found.first.tobytes() + found.second.tobytes() + found.norms.tobytes()).hexdigest())
"""


def test_no_number_of_threads_shows_in_the_last_bit():
    said = set()
    for threads in ("1", "2", "7"):
        given = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), threads)
        done = subprocess.run(
            [sys.executable, "-c", _BITS], env={**os.environ, **given}, capture_output=True, text=True, check=True
        )
        said.add(done.stdout)
    assert len(said) == 1
