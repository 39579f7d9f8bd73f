"""Tokens among their neighbours: what is shown fits, says which token, and its numbers are the view's."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

import planted_stores
from mmcache import view as views
from mmcache.cli.render import cell
from mmcache.cli.render_views import draw_find, draw_sequence, draw_show, draw_token, draw_top, fitted, passage
from mmcache.text import visible
from mmcache.view import View
from planted_stores import INFINITE, NAN, SITE, STARTS, TOTAL, drawn, numbers, terminal, unstyled

WIDTHS = (20, 40, 60, 80, 200)
SAID = st.fixed_dictionaries({name: st.text(max_size=60) for name in ("before", "text", "after")})


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return planted_stores.planted(tmp_path_factory.mktemp("passages") / "acts")


def told(draw, view, width=80, **options):
    console = terminal(width, **options)
    draw(console, view)
    return drawn(console)


@given(SAID, st.integers(5, 120), st.booleans())
def test_a_passage_fits_and_its_token_is_marked(said, width, colours):
    line = passage(said, width, colours=colours)
    assert cell_len(line.plain) <= width
    parts = [visible(said[name]) for name in ("before", "text", "after")]
    if colours:
        marked = line.plain[line.spans[0].start : line.spans[0].end] if line.spans else ""
        assert marked == parts[1] or (marked.endswith("…") and parts[1].startswith(marked[:-1].rstrip()))
    elif cell_len(parts[1]) <= width - 2:
        assert f"«{parts[1]}»" in line.plain
    if cell_len("".join(parts)) + 2 <= width:
        assert line.plain == ("{}{}{}" if colours else "{}«{}»{}").format(*parts)


def test_the_shorter_side_gives_its_room_to_the_other():
    said = {"before": "x" * 50, "text": "T", "after": "yy"}
    assert passage(said, 20, colours=False).plain == f"…{'x' * 14}«T»yy"
    said = {"before": "xx", "text": "T", "after": "y" * 50}
    assert passage(said, 20, colours=False).plain == f"xx«T»{'y' * 14}…"
    said = {"before": "x" * 50, "text": "T", "after": "y" * 50}
    assert passage(said, 21, colours=False).plain == f"…{'x' * 8}«T»{'y' * 8}…"


@given(st.text(max_size=40), st.integers(2, 30))
def test_a_fitted_text_is_exactly_as_wide_as_asked(text, width):
    found = fitted(text, width)
    assert cell_len(found) == width
    assert found.rstrip() == visible(text).rstrip() or found.endswith("…")


def test_a_row_is_told_with_its_numbers_and_its_text(store):
    view = views.row_view(store, SITE, 1, 350) | {"before": "be", "text": "TOKEN", "after": "af"}
    found = told(draw_show, view)
    for name in ("mean", "std", "min", "max", "mean_norm"):
        assert re.search(rf"^{name.replace('_', ' ')} +{re.escape(cell(view[name]))} *$", found, re.MULTILINE)
    for one in view["largest"]:
        assert f"[{one['dimension']}] {one['value']:.6g}" in " ".join(found.split())
    assert "be«TOKEN»af" in found
    assert "values" not in found


def test_a_sequence_without_colours_is_a_token_a_line_with_its_number(store):
    view = views.sequence(store, SITE, 0, 2)
    start = STARTS[2]
    lines = [line.split() for line in told(draw_sequence, view).splitlines()]
    found = {line[0]: line for line in lines if re.fullmatch(r"\d+", line[0])}
    rows = planted_stores.stored()[0]
    for at in range(start, start + 500):
        assert found[str(at)][1] == f"{np.linalg.norm(rows[at]):.4g}"
        assert found[str(at)][-1] == f"⟨{planted_stores.tokens()[at]}⟩"
    assert found[str(NAN)][2] == found[str(INFINITE)][2] == "!"
    assert found[str(start)][2].endswith("*")
    said = told(draw_sequence, view)
    assert re.search(r"not finite +2 tokens", said)
    assert f"median      {np.median(view['values'][np.isfinite(view['values'])]):.4g}" in said
    assert "*: bos or special or first, left out of the statistics" in said


def test_a_sequence_in_colours_is_its_text_and_each_token_has_its_shade(store):
    view = views.sequence(store, SITE, 1, 1, by="value", direction=3)
    texts = ["a[red]b", "line\n", "\x1b[2J", "z"]
    values = np.array([-2.0, 0.0, 1.0, np.nan])
    data = view.data | {
        "texts": texts, "values": values, "positions": np.arange(4), "flags": np.array([7, 0, 0, 8]), "tokens": range(4)
    }  # fmt: skip
    found = told(draw_sequence, View("sequence", "A sequence", "", data), colours=True)
    shown = unstyled(found).split("\n")
    assert "a[red]bline⏎" in shown
    assert "␛[2Jz" in shown
    assert "\x1b[2J" not in found
    # The ends of a signed scale and its middle, and what is no number.
    blue, grey, red = "48;2;33;102;172", "48;2;235;235;235", "41m"
    styles = {text: next(style for style, part in re.findall(r"\x1b\[([0-9;]+m)([^\x1b]*)", found) if part == text)
              for text in ("a[red]b", "line⏎", "z")}  # fmt: skip
    assert blue in styles["a[red]b"]
    assert grey in styles["line⏎"]
    assert red in styles["z"]
    assert styles["a[red]b"].startswith("4;"), "underlined: BOS"


def test_a_token_has_a_line_for_every_layer(store):
    view = views.token(store, SITE, 350)
    console = terminal(100)
    draw_token(console, view, layer=1)
    lines = [line.split() for line in drawn(console).splitlines()]
    rows = planted_stores.stored()[:, 350]
    for layer in range(3):
        line = next(line for line in lines if line[:1] == [str(layer)])
        line = [part for part in line if part != "◀"]
        assert line[1:4] == [
            f"{np.linalg.norm(rows[layer]):.4g}",
            f"{rows[layer].mean():.3g}",
            f"{rows[layer].std():.3g}",
        ]
        largest = int(np.abs(rows[layer]).argmax())
        assert line[5:7] == [f"[{largest}]", f"{rows[layer, largest]:.3g},"]
    assert "1 ◀" in drawn(console)
    assert "0, 350 tokens in" not in drawn(console)
    assert f"2, {350 - STARTS[2]} tokens in" in drawn(console)


def test_a_token_that_is_left_out_of_the_statistics_says_so(store):
    told_of = told(draw_token, views.token(store, SITE, 0))
    assert "bos and special and first: left out of the statistics" in " ".join(told_of.split())
    assert "left out" not in told(draw_token, views.token(store, SITE, 1))


def test_the_tokens_at_the_top_are_told_band_by_band(store):
    view = views.top(store, SITE, 0, 3, k=4)
    found = told(draw_top, view)
    assert f"{TOTAL - len(STARTS)} tokens, 1 of them not finite" in found
    for band in view["bands"]:
        assert f"{band['name']}: {band['tokens']} tokens, {band['low']:.4g} to {band['high']:.4g}" in found
        for one in band["examples"]:
            assert re.search(
                rf"^ *{one['position']} +{one['value']:.4g}  .*«{re.escape(one['text'])}»", found, re.MULTILINE
            )


def test_a_band_without_tokens_is_left_out(store):
    view = views.top(store, SITE, 0, 3, k=4)
    bands = [band if band["name"] != "50 to 90 %" else band | {"tokens": 0, "examples": []} for band in view["bands"]]
    assert "50 to 90 %" not in told(draw_top, View("top", "t", "", view.data | {"bands": bands}))


def test_what_was_found_says_where_and_how_much_is_not_listed(store):
    view = views.find(store, token=11, most=3)
    found = told(draw_find, view)
    assert view.title in found
    for one in view["matches"]:
        assert re.search(rf"^ *{one['position']}  {one['sequence']}\+{one['offset']} +.*«⟨11⟩»", found, re.MULTILINE)
    assert f"and {view['count'] - 3} more: raise --limit to list them" in found
    assert "raise --limit" not in told(draw_find, views.find(store, token=11))
    assert "looked at: 200 of 900 tokens" in told(draw_find, views.find(store, token=11, most_tokens=200))


FAR, SMALL = 12_345_678_901, -1.2346e-07
ONE = {"position": FAR, "value": SMALL, "sequence": 0, "offset": 5}
ONE |= {"before": "b" * 90, "text": "東" * 30, "after": "a" * 90}
WIDE = [
    (draw_top, {
        "looked": FAR, "non_finite": FAR,
        "bands": [{"name": "top", "low": 1e-12, "high": 1.2345e30, "tokens": FAR, "examples": [ONE]}],
    }),
    (draw_find, {"count": FAR, "matches": [ONE], "sequences": 1}),
    (draw_sequence, {
        "by": "value", "document": FAR, "positions": np.array([FAR]), "texts": ["東\x1b[2J" * 20],
        "flags": np.array([0]), "flag_bits": {"bos": 1}, "values": np.array([SMALL]),
    }),
]  # fmt: skip


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("colours", [False, True])
@pytest.mark.parametrize(("draw", "data"), WIDE, ids=["top", "find", "sequence"])
def test_positions_of_any_length_fit_and_are_not_cut(draw, data, width, colours):
    found = unstyled(told(draw, View("any", "title", "", data), width, colours=colours))
    assert max(map(cell_len, found.split("\n"))) <= width
    assert f"{FAR:,}" in numbers(found), found
    assert draw is draw_find or f"{SMALL:.4g}" in numbers(found)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_title_says_what_was_looked_at(store, width):
    view = views.top(store, SITE, 0, 3, k=1, budget=1)
    assert view.sampled
    assert f"looked at: {view.sampled}" in " ".join(told(draw_top, view, width).split())
