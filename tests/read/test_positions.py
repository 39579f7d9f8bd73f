"""Which tokens are asked for: every kind of list of whole numbers, and nothing else."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmcache.errors import DtypeError, OutOfRangeError, ShapeError
from mmcache.read.positions import whole_positions

KINDS = (
    list,
    tuple,
    np.array,
    torch.tensor,
    lambda given: np.array(given, np.int16),
    lambda given: np.array(given)[::1],
)


def bad(position):
    return OutOfRangeError(f"position {position}")


@given(st.lists(st.integers(-100, 99), min_size=1), st.sampled_from(KINDS))
def test_any_kind_of_list_counts_from_the_start(asked, kind):
    found = whole_positions(kind(asked), 100, bad)
    assert found.dtype == np.int64
    assert found.tolist() == [position % 100 for position in asked]


@given(st.lists(st.integers(-300, 300)))
def test_the_first_one_out_of_range_is_named(asked):
    outside = [position for position in asked if not -100 <= position < 100]
    if outside:
        with pytest.raises(OutOfRangeError, match=f"position {outside[0]}$"):
            whole_positions(asked, 100, bad)
    else:
        assert len(whole_positions(asked, 100, bad)) == len(asked)


def test_what_is_no_list_of_whole_numbers():
    with pytest.raises(ShapeError, match="one dimension"):
        whole_positions([[1, 2]], 100, bad)
    with pytest.raises(ShapeError, match="one dimension"):
        whole_positions(np.array(3), 100, bad)
    for wrong in ([0.5], ["a"], [True, False]):
        with pytest.raises(DtypeError, match="expected integers"):
            whole_positions(wrong, 100, bad)
    # It would wrap round in the cast.
    with pytest.raises(OutOfRangeError, match="18446744073709551615"):
        whole_positions(np.array([2**64 - 1], np.uint64), 100, bad)
