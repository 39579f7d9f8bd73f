import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mmcache.errors import ArgumentError
from mmcache.format.dtypes import ACTIVATION_DTYPES, BY_NAME
from mmcache.format.shard import CHUNK_BYTES, SHARD_BYTES, Layout, ShardSpec, inner_rows, shard_rows
from mmcache.system.memory import PAGE

# Bytes a row: numbers of 2, 4 or 8 bytes, from one number to a token's 100 layers of 16,384.
ROW_BYTES = st.builds(lambda numbers, size: numbers * size, st.integers(1, 1 << 21), st.sampled_from([2, 4, 8]))
ROWS_OF_SITES = st.lists(ROW_BYTES, min_size=1, max_size=3)


@given(st.integers(1, 1 << 20), ROW_BYTES, st.none() | st.integers(0, 1 << 20))
@example(1 << 20, 2, 1)
@example(999_983, 2, 10)
def test_an_inner_chunk_is_the_largest_divisor_that_fits(shard, row, known):
    limit = max(1, CHUNK_BYTES // row)
    if known is not None and known < shard:
        limit = min(limit, max(known, (64 << 10) // row, 1))
    found = inner_rows(shard, row, known)
    assert shard % found == 0
    assert found <= limit
    # Step by step, where that is quick: no divisor between it and the limit.
    assert not any(shard % other == 0 for other in range(found + 1, min(limit, shard, found + 2000) + 1))


@given(ROWS_OF_SITES)
@example([7 * 2])
@example([64 << 20])
@example([2, 1 << 24])
def test_the_default_shard_is_about_256_mib_of_whole_pages(rows):
    found = shard_rows(rows, None, None)
    assert found & (found - 1) == 0
    assert all(found * row % PAGE == 0 for row in rows)
    # Twice as many would be too much, unless pages ask for them.
    pages = max(PAGE // (row & -row) if row % PAGE else 1 for row in rows)
    assert found == pages or found * max(rows) <= SHARD_BYTES < 2 * found * max(rows)
    # What we choose we also accept: it is `good`, so a user may write it down.
    assert shard_rows(rows, found, None) == found


@given(ROWS_OF_SITES)
def test_2048_is_always_good(rows):
    assert shard_rows(rows, 2048, None) == 2048


@given(ROWS_OF_SITES, st.integers(1, 5000))
def test_a_number_is_good_or_refused_with_the_nearest_good_one(rows, asked):
    def refused(number):
        try:
            assert shard_rows(rows, number, None) == number
        except ArgumentError as error:
            return int(str(error).partition("nearest good number is ")[2].split()[0])
        return None

    near = refused(asked)
    if near is None:
        assert all(asked * row % PAGE == 0 for row in rows)
        return
    assert refused(near) is None
    step = abs(near - asked)
    # A few numbers between, for the price: none of them is good.
    for other in range(max(1, asked - step + 1), asked + step, max(1, step // 8)):
        assert refused(other) is not None


@pytest.mark.parametrize("asked", [0, -1, -2048, 2048.0, "2048", 10**18])
def test_what_is_no_count_of_tokens_is_refused(asked):
    with pytest.raises(ArgumentError, match=rf"shard_tokens is {asked!r}: expected a whole number"):
        shard_rows([16], asked, 10)


def test_a_shard_without_a_useful_divisor_is_refused():
    # A prime number of pages: the rows fill whole pages, but an inner chunk would be one page.
    with pytest.raises(ArgumentError, match=r"useful inner chunk .* nearest good number is"):
        shard_rows([PAGE], 100_003, None)
    with pytest.raises(ArgumentError, match="4096-byte pages"):
        shard_rows([768 * 2], 1001, None)


@given(ROW_BYTES, st.integers(1, 1 << 14), st.none() | st.integers(1, 1 << 24))
@example(2, 10, 999_983)
@example(2, 10, 1 << 24)
def test_the_only_shard_ends_where_its_tokens_end(row, known, asked):
    known = min(known, asked or shard_rows([row], None, None))
    shard = shard_rows([row], asked, known)
    assert shard >= known
    chunk = inner_rows(shard, row, known)
    spec = ShardSpec("activations", BY_NAME["bfloat16"], (row // 2,), shard, chunk, 0)
    # Ten tokens must not cost megabytes: what is not rows is at most an inner chunk, an index and a page or two.
    index = 16 * (shard // chunk) + 4
    assert Layout(spec, known).size <= known * row + max(64 << 10, known * row, row) + index + 4 * PAGE
    assert index <= max(16 * known, asked * row // 128 if asked else 0) + 4


@pytest.mark.parametrize("dtype", ACTIVATION_DTYPES)
def test_ten_tokens_stay_small(dtype):
    row = 128 * BY_NAME[dtype].size
    shard = shard_rows([row], None, 10)
    assert shard == 10
    spec = ShardSpec("activations", BY_NAME[dtype], (128,), shard, inner_rows(shard, row, 10), 1)
    assert 32 * Layout(spec, 10).size < 2 << 20
