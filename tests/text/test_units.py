"""Numbers for people: no unit is left with a number too large for it, and lists are told as ranges."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmcache.text import duration, ranges, size

SCALE = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


@pytest.mark.parametrize(
    ("count", "said"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (1 << 20, "1.0 MiB"), (3 << 40, "3.0 TiB"),
     (1 << 50, "1024.0 TiB")],
)  # fmt: skip
def test_bytes_are_said_in_the_largest_unit_that_fits(count, said):
    assert size(count) == said


@given(st.integers(0, 1 << 52))
def test_what_is_said_of_bytes_is_right_to_the_last_digit(count):
    number, unit = size(count).split()
    assert abs(float(number) - count / SCALE[unit]) <= 0.05
    assert unit == "TiB" or float(number) < 1024


@given(st.floats(0, 47.9 * 3600))
def test_a_duration_reads_back_to_the_second(seconds):
    hours, minutes, rest = map(int, duration(seconds).split(":"))
    assert hours * 3600 + minutes * 60 + rest == round(seconds)
    assert max(minutes, rest) < 60


def test_many_hours_are_days():
    assert duration(47 * 3600) == "47:00:00"
    assert duration(48 * 3600) == "2.0 days"
    assert duration(1e6) == "11.5 days"


@given(st.sets(st.integers(0, 40)))
def test_ranges_list_the_same_numbers(numbers):
    said = ranges(sorted(numbers))
    found = []
    for low, high in re.findall(r"(\d+)(?:-(\d+))?(?:,|$)", said):
        found += range(int(low), int(high or low) + 1)
    assert found == sorted(numbers)
    # And no two ranges could be one.
    ends = [int(end) for end in re.findall(r"(\d+)(?:,|$)", said)]
    assert not {end + 1 for end in ends} & numbers
