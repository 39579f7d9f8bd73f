"""Shades say how large a number is: in order, readable, and never for what is no number."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.color import ColorType

from mmcache.cli.render import NOTHING, ColourScale, coloured, strip
from planted_stores import drawn, terminal, unstyled

FINITE = st.floats(-1e6, 1e6)


def luminance(colour):
    """WCAG's relative luminance of a colour."""
    parts = [part / 255 for part in colour.get_truecolor()]
    wide = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * wide[0] + 0.7152 * wide[1] + 0.0722 * wide[2]


@given(st.lists(FINITE, min_size=1), st.booleans(), st.booleans())
def test_the_larger_the_number_the_further_up_the_scale(values, log, signed):
    heat = ColourScale.of(values, log=log and not signed, signed=signed)
    parts = [heat.part(value) for value in sorted(values)]
    assert all(0 <= part <= 1 for part in parts)
    assert parts == sorted(parts)
    if heat.high > heat.low and not log:
        assert parts[-1] == pytest.approx(1) or signed
        assert heat.part(heat.high) == 1


@pytest.mark.parametrize("signed", [False, True])
def test_letters_can_be_read_on_every_shade(signed):
    heat = ColourScale(-1 if signed else 0, 1, signed=signed)
    for value in np.linspace(heat.low, heat.high, 500):
        style = heat.style(value)
        assert style.bgcolor.type is ColorType.TRUECOLOR
        light, dark = sorted((luminance(style.color), luminance(style.bgcolor)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) > 4.5, value


def test_shades_rise_from_dark_to_light_and_signed_ones_are_lightest_at_zero():
    rising = [luminance(ColourScale(0, 1).style(value).bgcolor) for value in np.linspace(0, 1, 100)]
    assert rising == sorted(rising)
    signed = [luminance(ColourScale(-1, 1, signed=True).style(value).bgcolor) for value in np.linspace(-1, 1, 101)]
    assert max(signed) == signed[50]
    assert signed[:51] == sorted(signed[:51])
    assert signed[50:] == sorted(signed[50:], reverse=True)


def test_characters_rise_and_signed_ones_are_empty_at_zero():
    assert "".join(ColourScale(0, 1).character(value) for value in (0, 0.3, 0.5, 0.7, 1)) == " ░▒▓█"
    assert "".join(ColourScale(-1, 1, signed=True).character(value) for value in (-1, -0.5, 0, 0.5, 1)) == "█▒ ▒█"
    assert "".join(ColourScale(1, 10_000, log=True).character(value) for value in (1, 10, 100, 1000, 10_000)) == " ░▒▓█"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_has_no_shade(value):
    for heat in (ColourScale(0, 1), ColourScale(1, 2, log=True), ColourScale(-1, 1, signed=True)):
        assert heat.part(value) is None
        assert heat.character(value) == "!"
        assert heat.style(value).bgcolor.name == "red"


@given(st.lists(st.floats() | FINITE), st.booleans(), st.booleans())
def test_a_scale_is_of_the_numbers_that_are_finite_and_of_logarithms_above_zero(values, log, signed):
    heat = ColourScale.of(values, log=log, signed=signed)
    fit = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
    if not fit:
        assert heat.part(0.5) is not None
    elif signed:
        assert heat.high == -heat.low == max(map(abs, fit))
    else:
        assert (heat.low, heat.high) == (min(fit), max(fit))


def test_numbers_that_are_all_alike_are_in_the_middle():
    for heat in (ColourScale.of([3, 3]), ColourScale.of([3, 3], log=True), ColourScale.of([0, 0], signed=True)):
        assert heat.part(3) == 0.5
        heat.legend(colours=True)


def test_a_cell_says_nothing_where_there_is_nothing():
    for colours in (False, True):
        assert ColourScale(0, 1).cell(math.nan, 3, colours=colours).plain == NOTHING * 3
    assert ColourScale(0, 1).cell(1, 3, colours=False).plain == "███"
    shade = ColourScale(0, 1).cell(1, 3, colours=True)
    assert (shade.plain, shade.style) == ("   ", ColourScale(0, 1).style(1))


@pytest.mark.parametrize("log", [False, True])
def test_a_legend_has_both_ends_as_numbers_and_the_shades_between(log):
    said = ColourScale(0.5, 2048, log=log).legend(colours=False).plain
    assert said.startswith("0.5   ")
    assert said.split()[-2 if log else -1] == "2048"
    assert said.endswith("(log)") == log
    shades = [" ░▒▓█".index(letter) for letter in said[4:14]]
    assert shades == sorted(shades)
    assert shades[0] == 0
    assert shades[-1] == 4


def test_colours_are_for_terminals_that_have_them():
    assert coloured(terminal(80, colours=True))
    assert not coloured(terminal(80))
    assert not coloured(terminal(80, colours=True, no_color=True))
    console = terminal(80, colours=True)
    console.print(ColourScale(0, 1).cell(0.5, 4, colours=coloured(console)))
    assert "\x1b[" in drawn(console)
    assert unstyled(drawn(console)) == "    \n"


@given(st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), min_size=1, max_size=100), st.integers(1, 120))
def test_a_strip_fits_and_calls_nothing_whole_that_is_not(parts, width):
    drawn_strip = strip(parts, width)
    assert len(drawn_strip) == min(width, len(parts))
    edges = [at * len(parts) // len(drawn_strip) for at in range(len(drawn_strip) + 1)]
    assert edges[-1] == len(parts)
    for letter, (start, stop) in zip(drawn_strip, pairwise(edges), strict=True):
        assert (letter == "█") == (min(parts[start:stop]) == 1)
        assert (letter == NOTHING) == (max(parts[start:stop]) == 0)


def test_a_strip_of_nothing_is_empty():
    assert strip([], 10) == ""
