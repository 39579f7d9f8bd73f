"""Tables on terminals of any width: every line fits, no number is cut, and no text is taken for markup."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from mmcache.cli.render import cell, draw_lines, draw_pairs, draw_rows, draw_text
from mmcache.text import visible
from planted_stores import drawn, terminal, unstyled

WIDTHS = (20, 40, 60, 80, 200)
HOSTILE = ["[red]x[/red]", "[/]", "\x1b[31mred", ":smile:", "user\u202eexe", "\x07", "[link=file:///x]y[/link]", "a\rb"]
NUMBERS = [1234567, -1.89815e-07, 0.00393062, float("nan"), -4.49412, 12_345_678_901]


def fits(text, width):
    return [line for line in text.split("\n") if cell_len(line) > width] == []


def words(text):
    """What stands between spaces, without the marks behind names and values."""
    return {word.rstrip(",:") for word in text.split()}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("colours", [False, True])
def test_every_value_is_drawn_whole_whatever_the_width(width, colours):
    pairs = {"mean norm": cell(NUMBERS[1]), "non finite": 12_345_678, "largest": ", ".join(map(cell, NUMBERS))}
    rows = [{"layer": at, "from_to": f"{cell(value)} - {cell(value)}", "scale": cell(value)}
            for at, value in enumerate(NUMBERS)]  # fmt: skip
    for draw, given_ in ((draw_pairs, pairs), (draw_rows, rows)):
        console = terminal(width, colours=colours)
        draw(console, "about numbers", given_)
        found = unstyled(drawn(console))
        assert fits(found, width)
        assert {cell(value) for value in NUMBERS} <= words(found), found
        assert found.startswith("about numbers\n")


@given(st.lists(st.lists(st.text(max_size=30), min_size=3, max_size=3), max_size=4), st.sampled_from(WIDTHS))
def test_any_text_fits_and_keeps_its_letters(texts, width):
    rows = [dict(zip(("one", "two", "three"), line, strict=True)) for line in texts]
    for draw, given_ in ((draw_rows, rows), (draw_pairs, {f"{at} {a}": b for at, (a, b, _) in enumerate(texts)})):
        console = terminal(width)
        draw(console, "any", given_)
        assert fits(drawn(console), width)
        shown = set("".join(map(visible, (value for row in texts for value in row[:2]))))
        assert shown - set(" ") <= set(drawn(console))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_is_taken_for_markup_or_steers_the_terminal(width, text):
    console = terminal(width)
    draw_text(console, text)
    draw_pairs(console, text, {text: text})
    draw_rows(console, text, [{"name": text, text: 1}])
    draw_lines(console, [text])
    found = drawn(console)
    assert all(letter.isprintable() or letter == "\n" for letter in found)
    # A line; a title and a pair; a title, a name of a column and a cell; a line.
    assert found.count(visible(text)) == 8 or width < 60
    assert visible(text) in found


def test_columns_that_fit_are_one_line_a_row():
    console = terminal(80)
    draw_rows(console, "rows", [{"a_b": 1, "c": 2.5}, {"a_b": 30, "c": float("inf")}])
    lines = [line.split() for line in drawn(console).splitlines() if line.strip()]
    assert lines[0] == ["rows"]
    assert lines[1] == ["a", "b", "c"]
    assert lines[3:] == [["1", "2.5"], ["30", "inf"]]


def test_a_table_that_does_not_fit_becomes_sentences():
    console = terminal(20)
    draw_rows(console, "rows", [{"layer": 3, "mean_norm": "1.234e-05", "said": "", "std": "9.876e-05"}])
    assert " ".join(drawn(console).split()) == "rows layer 3: mean norm 1.234e-05, std 9.876e-05"


def test_a_table_without_rows_is_its_title():
    console = terminal(40)
    draw_rows(console, "nothing", [])
    draw_pairs(console, "", {})
    assert drawn(console).split() == ["nothing"]


def test_paths_are_not_folded_where_lines_are_searched():
    path = "a/very/long/path/" * 20
    console = terminal(40)
    draw_lines(console, [path, *map(str, range(50))])
    lines = drawn(console).splitlines()
    assert lines[0] == path
    assert lines[39] == "38"
    assert lines[40:] == ["and 11 more, which --json lists"]


def test_numbers_are_short_and_other_things_as_they_are():
    assert [cell(value) for value in (1 / 3, 7, "x", None, np.float64(1e-9))] == ["0.333333", "7", "x", "None", "1e-09"]
