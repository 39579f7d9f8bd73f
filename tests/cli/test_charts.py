"""A site's numbers on a terminal: each is numpy's on the stored values, and what was planted stands there."""

import re

import numpy as np
import pytest
from rich.cells import cell_len

import planted_stores
from mmcache import view as views
from mmcache.cli.render import ColourScale
from mmcache.cli.render_views import draw_apart, draw_dimensions, draw_health, draw_norms, draw_statistics, map_width
from mmcache.view import View
from planted_stores import DEAD, LAYERS, NAN, OUTLIER, SITE, STARTS, TOTAL, WIDTH, drawn, numbers, terminal, unstyled

WIDTHS = (20, 40, 60, 80, 200)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return planted_stores.planted(tmp_path_factory.mktemp("charts") / "acts")


@pytest.fixture(scope="module")
def rows():
    return planted_stores.stored()


def told(draw, view, width=200, **options):
    console = terminal(width, **options)
    draw(console, view)
    return drawn(console)


def lines_of(text):
    """The lines that begin with a layer's number, split."""
    lines = [line.split() for line in text.splitlines()]
    return {int(line[0]): line for line in lines if len(line) > 3 and line[0].isdigit()}


def test_statistics_are_numpys(store, rows):
    lines = lines_of(told(draw_statistics, views.statistics_view(store, SITE)))
    for layer in range(LAYERS):
        here = rows[layer][planted_stores.counted()[layer]]
        norm, std = np.linalg.norm(here, axis=-1), here.std(axis=0)
        assert lines[layer] == [
            str(layer), str(len(here)), f"{norm.mean():.4g}", f"{norm.min():.3g}", "-", f"{norm.max():.3g}",
            f"{np.sqrt(WIDTH) / norm.mean():.4g}", f"{std.mean():.3g}", f"{std.max():.3g}", f"[{std.argmax()}]",
            "1" if layer == 2 else "0", "1" if layer == 1 else "0",
            *(["2,", "first", "at", str(NAN)] if layer == 0 else ["0"]),
        ]  # fmt: skip


def test_health_is_told_in_sentences_and_places(store):
    found = told(draw_health, views.health(store, SITE))
    assert f"layer 0: 2 rows with NaN or infinity, the first at position {NAN}\n" in found
    assert f"layer 2: 1 dimensions are the same in every row: {DEAD}\n" in found
    assert f"layer 0, positions 512 to {TOTAL - 1}: 2 rows with NaN or infinity, the first at {NAN}\n" in found
    assert "layer 1, positions 0 to 511: 1 rows of zeros\n" in found
    assert "nothing is wrong" not in found


def test_a_site_that_is_well_is_called_so_and_many_places_are_counted(store):
    view = views.health(store, SITE)
    well = View("health", "Health", "", view.data | {"problems": [], "places": []})
    assert "nothing is wrong" in told(draw_health, well)
    many = View("health", "Health", "", view.data | {"places": view["places"] * 7})
    found = told(draw_health, many)
    assert found.count("positions") == 10 + view.data["problems"][0].count("positions")
    assert "and 4 more places, which --json lists" in found


def test_norms_of_first_and_special_tokens_stand_beside_the_others(store, rows):
    lines = lines_of(told(draw_apart, views.apart(store, SITE)))
    norm = np.linalg.norm(rows, axis=-1)
    for layer in range(LAYERS):
        first = norm[layer, STARTS]
        others = norm[layer][planted_stores.counted()[layer]].mean()
        pair = [f"{first.mean():.4g}", f"{first.max():.4g}"]
        assert lines[layer] == [str(layer), f"{others:.4g}", *pair, *pair]


def test_kinds_of_which_there_are_no_tokens_have_no_columns(store):
    view = views.apart(store, SITE)
    none = {"special": view["special"] | {"tokens": 0}}
    found = told(draw_apart, View("apart", "Apart", "", view.data | none))
    assert "special" not in found
    assert "mean norms: others, and 4 first" in found


def test_the_planted_outlier_is_the_largest_multiple_of_its_layers_median(store, rows):
    lines = lines_of(told(draw_dimensions, views.dimensions(store, SITE)))
    for layer in range(LAYERS):
        here = rows[layer][planted_stores.counted()[layer]]
        rms = np.sqrt(np.square(here).mean(axis=0))
        order = np.argsort(-rms, kind="stable")[:3]
        times = [part for at in order for part in (f"[{at}]", f"{rms[at] / np.median(rms):.1f}x")]
        assert lines[layer] == [str(layer), f"{np.median(rms):.3g}", *times]
    assert lines[1][2] == f"[{OUTLIER}]"
    assert float(lines[1][3].rstrip("x")) > 30


def test_a_ratio_without_measure_is_short(store):
    view = views.dimensions(store, SITE)
    outliers = [one | {"ratio": 1.5e30} for one in view["outliers"]]
    assert "1.5e+30x" in told(draw_dimensions, View("dimensions", "d", "", view.data | {"outliers": outliers}))


@pytest.mark.parametrize("width", WIDTHS)
def test_a_norm_map_has_a_line_a_layer_with_its_shades_and_its_ends(store, rows, width):
    view = views.norms(store, SITE, bins=min(map_width(terminal(width)), 2))
    found = told(draw_norms, view, width)
    norm = np.linalg.norm(rows, axis=-1)
    heat = ColourScale.of(view["mean"], log=True)
    each = map_width(terminal(width)) // 2
    for layer in range(LAYERS):
        here = norm[layer][planted_stores.counted()[layer]]
        line = next(line for line in found.splitlines() if line.startswith(f"{layer:>4} "))
        shades = "".join(heat.character(value) * each for value in view["mean"][layer])
        assert line[5:].startswith(shades.rstrip())
        if width >= 40:
            assert line.split()[-2:] == [f"{here.min():.3g}", f"{here.max():.3g}"]
    assert re.search(rf"^ {{5}}0 +{TOTAL}$", found, re.MULTILINE)
    assert f"{view['mean'].min():.4g}" in found
    assert f"{view['mean'].max():.4g} (log)" in " ".join(found.split())


def test_a_norm_map_in_colours_has_the_shades_of_its_numbers(store):
    view = views.norms(store, SITE, bins=2)
    found = told(draw_norms, view, 60, colours=True)
    heat = ColourScale.of(view["mean"], log=True)
    for layer, line in enumerate(line for line in found.splitlines() if re.match(r" +\d \x1b", line)):
        shades = re.findall(r"48;2;(\d+);(\d+);(\d+)m( +)", line)
        wanted = [heat.style(value).bgcolor.get_truecolor() for value in view["mean"][layer]]
        assert [tuple(map(int, shade[:3])) for shade in shades] == wanted
        assert {len(shade[3]) for shade in shades} == {(60 - 5 - 20) // 2}


def test_stretches_of_which_nothing_is_there_are_dots(store):
    view = views.norms(store, SITE, bins=2)
    mean, low = view["mean"].copy(), view["min"].copy()
    mean[1], low[1] = np.nan, np.nan
    data = view.data | {"mean": mean, "min": low, "max": low}
    found = told(draw_norms, View("norms", "Norms", "", data), 60)
    line = next(line for line in found.splitlines() if line.startswith("   1 "))
    assert line.split() == ["1", "·" * 34, "-", "-"]
    assert "· nothing counts there" in " ".join(found.split())


def test_the_ends_of_a_line_are_two_numbers_however_long_they_are(store):
    view = views.norms(store, SITE, bins=1)
    data = view.data | {"min": np.full((LAYERS, 1), 1.25e-100), "max": np.full((LAYERS, 1), 1.25e100)}
    found = told(draw_norms, View("norms", "Norms", "", data), 60)
    assert [line.split()[-2:] for line in found.splitlines()[2:5]] == [["1.25e-100", "1.25e+100"]] * LAYERS


@pytest.mark.parametrize("width", WIDTHS)
def test_single_tokens_have_a_line_each_with_their_norms_and_what_they_are(store, rows, width):
    view = views.norms(store, SITE, start=295, stop=305)
    found = told(draw_norms, view, width)
    heat = ColourScale.of(view["mean"], log=True)
    wide, tall = width >= 60, np.linalg.norm(rows, axis=-1)
    marks = {300: "first", 301: "first"} if wide else {300: "^", 301: "^"}
    for at, position in enumerate(range(295, 305)):
        line = next(line for line in found.splitlines() if line.startswith(f"{position} "))
        assert f"⟨{view['tokens'][at]}⟩" in line
        found_marks = [mark for mark in ("first", "special", "^", "*") if mark in line]
        assert found_marks == ([marks[position]] if position in marks else [])
        # Behind the position, the token and the mark; three columns a layer, or as many as there are.
        begin, ends = 26 if wide else 12, 20 if width >= 40 else 0
        each = min(3, (width - begin - ends) // LAYERS)
        shades = "".join(heat.character(value) * each for value in view["mean"][:, at])
        assert line[begin:].ljust(LAYERS * each).startswith(shades)
        if ends:
            assert line.split()[-2:] == [f"{tall[:, position].min():.3g}", f"{tall[:, position].max():.3g}"]


def test_a_token_whose_row_is_not_finite_is_marked(store):
    found = told(draw_norms, views.norms(store, SITE, start=NAN - 3, stop=NAN + 3), 60)
    marked = [line for line in found.splitlines() if "!!!" in line]
    assert [line.split()[0] for line in marked] == [str(NAN)]
    assert "! not finite" in " ".join(found.split())


def test_of_more_layers_than_there_is_room_for_some_are_drawn_and_told(store):
    view = views.norms(store, SITE, start=295, stop=305)
    norm = np.linspace(1, 2, 126)[:, None].repeat(10, 1)
    data = view.data | {"layers": list(range(126)), "mean": norm, "min": norm, "max": norm}
    found = told(draw_norms, View("norms", "Norms", "", data), 60)
    assert "norms of layers 0 to 125, 34 of 126" in " ".join(found.split())
    assert max(map(len, found.splitlines())) <= 60


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("colours", [False, True])
def test_every_chart_fits_and_no_number_is_cut(store, width, colours):
    norms = views.norms(store, SITE, bins=1)
    far = {"edges": np.array([0, 123_456_789_012]), "mean": norms["mean"] * 1e100, "min": norms["min"] * 1e100,
           "max": norms["max"] * 1e100}  # fmt: skip
    tokens = views.norms(store, SITE, start=NAN - 3, stop=NAN + 3)
    for draw, view in (
        (draw_statistics, views.statistics_view(store, SITE)),
        (draw_health, views.health(store, SITE)),
        (draw_apart, views.apart(store, SITE)),
        (draw_dimensions, views.dimensions(store, SITE)),
        (draw_norms, norms),
        (draw_norms, tokens),
        (draw_norms, View("norms", "Norms", "", norms.data | far)),
    ):
        found = unstyled(told(draw, view, width, colours=colours))
        assert max(map(cell_len, found.split("\n"))) <= width
        # A wide terminal cuts nothing, so what a narrow one draws are some of its numbers.
        whole = numbers(unstyled(told(draw, view, 200, colours=colours)))
        assert numbers(found) <= whole | {"2", str(TOTAL)}, draw
