"""What a stranger's text could do to a terminal is shown instead, whichever character it takes."""

import json
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmcache.text import plain_json, visible, visible_lines

# Controls, formats (bidi, tags), halves of letters, ends of lines, what has no meaning or a private one.
OBEYED = {"Cc", "Cf", "Cs", "Zl", "Zp", "Co", "Cn"}


def test_no_character_is_left_that_is_obeyed_or_hides():
    everything = "".join(map(chr, range(sys.maxunicode + 1)))
    shown = visible(everything)
    assert {unicodedata.category(letter) for letter in set(shown)} & OBEYED == set()
    assert set(shown) >= {"a", "é", "東", "🦊", " "}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain — naïve 東京", "plain — naïve 東京"),
        ("\x1b[31mred\x07", "␛[31mred␇"),
        ("a\nb\tc\r\x00\x7f", "a⏎b⇥c␍␀␡"),
        ("\x9b2J", r"\x9b2J"),
        ("user\u202eexe.txt", r"user\u202eexe.txt"),
        ("\ud800", r"\ud800"),
        ("\U000e0041", r"\U000e0041"),
    ],
)
def test_what_is_obeyed_is_shown_as_a_picture_or_by_its_number(text, shown):
    assert visible(text) == shown


@given(st.text())
def test_printable_text_is_left_as_it_is_and_nothing_is_shown_twice(text):
    shown = visible(text)
    assert visible(shown) == shown
    assert (shown == text) == text.isprintable()


@given(st.lists(st.text(st.characters(exclude_characters="\n"))))
def test_lines_stay_lines(lines):
    assert visible_lines("\n".join(lines)).split("\n") == ([visible(line) for line in lines] or [""])


@given(
    st.recursive(
        st.text() | st.floats(allow_nan=False), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_json_says_the_same_without_what_is_obeyed(data):
    for indent in (None, 2):
        plain = plain_json(json.dumps(data, ensure_ascii=False, indent=indent))
        assert json.loads(plain) == data
        assert {unicodedata.category(letter) for letter in plain if letter != "\n"} & {"Cc", "Cf", "Zl", "Zp"} == set()


def test_json_of_any_character_reads_back():
    everything = [chr(code) for code in range(sys.maxunicode + 1)]
    plain = plain_json(json.dumps(everything, ensure_ascii=False))
    assert json.loads(plain) == everything
    assert {unicodedata.category(letter) for letter in set(plain)} & {"Cc", "Cf", "Cs", "Zl", "Zp"} == set()
    assert "東" in plain
