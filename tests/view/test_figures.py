"""Figures: each shows its view's numbers, and no text of a stranger is taken for markup, in any of its places."""

import base64
import html
import json
import re
import sys

import numpy as np
import pytest
import torch

import planted_stores
from planted_stores import DEAD, INFINITE, LAYERS, NAN, OUTLIER, SITE, STARTS, TOTAL, WIDTH

pytest.importorskip("plotly", reason="figures need mmcache[view]")

import plotly.io

from mmcache import view as views
from mmcache.errors import ArgumentError
from mmcache.view import Unembedding, View
from mmcache.view.figures import _CHARTS, DARK, LIGHT, label, log_range, logs, token_label

EVIL = [
    "<script>alert(1)</script>",
    '<a href="javascript:x">y</a>',
    r"$\href{javascript:x}{y}$",
    "<b>&lt;b&gt;",
    "%{evil}",
]


def head(size=60):
    """A head of random numbers."""
    weights = torch.from_numpy(np.random.default_rng(5).normal(size=(size, WIDTH)) / 4)
    return Unembedding(lambda wide: wide @ weights.T, None, None, WIDTH, torch.float64)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return planted_stores.planted(tmp_path_factory.mktemp("figures") / "acts")


@pytest.fixture(scope="module")
def rows():
    return planted_stores.stored()


@pytest.fixture(scope="module")
def all_views(store):
    return {
        "health": views.health(store, SITE),
        "norms": views.norms(store, SITE, bins=2),
        "norms of tokens": views.norms(store, SITE, start=NAN - 5, stop=NAN + 16),
        "apart": views.apart(store, SITE),
        "dimensions": views.dimensions(store, SITE, most=5),
        "dimension": views.dimension(store, SITE, 1, OUTLIER),
        "sequence": views.sequence(store, SITE, 0, 2),
        "token": views.token(store, SITE, 350),
        "top": views.top(store, SITE, 0, 3, k=3),
        "find": views.find(store, token=11, most=5),
        "lens": views.lens(store, SITE, 350, head(), k=4),
    }


def strings(thing):
    """Every text in a figure, wherever it is."""
    if isinstance(thing, str):
        yield thing
    elif isinstance(thing, dict):
        for inner in thing.values():
            yield from strings(inner)
    elif isinstance(thing, list | tuple | np.ndarray) and getattr(thing, "dtype", np.dtype("O")).kind in "OU":
        for inner in thing:
            yield from strings(inner)


def counted(rows, layer):
    return rows[layer][planted_stores.counted()[layer]]


def test_every_view_has_a_figure(all_views):
    assert {view.name for view in all_views.values()} == set(_CHARTS)
    for view in all_views.values():
        for dark, style in ((False, LIGHT), (True, DARK)):
            figure = view.figure(dark=dark)
            assert figure.layout.paper_bgcolor == style.paper
            assert html.unescape(figure.layout.title.text) == view.title
            # What it is drawn from can be sent as it is.
            json.loads(figure.to_json())


def test_a_view_of_another_kind_has_none():
    with pytest.raises(ArgumentError, match="'layer' has no figure: these have one: health"):
        View("layer", "A layer", "", {}).figure()


def test_what_was_sampled_stands_below_the_title(store):
    view = views.top(store, SITE, 0, 3, k=2, budget=1)
    assert view.figure().layout.title.subtitle.text == view.sampled
    assert views.top(store, SITE, 0, 3, k=2).figure().layout.title.subtitle.text is None


def test_health_is_bars_of_what_is_wrong(all_views):
    bars = {trace.name: list(trace.y) for trace in all_views["health"].figure().data}
    assert bars == {
        "rows with NaN or infinity": [2, 0, 0], "rows of zeros": [0, 1, 0], "dead dimensions": [0, 0, 1],
        "rows far from the rest": [0, 0, 0],
    }  # fmt: skip


def test_the_norm_map_is_numpys(all_views, rows):
    trace = all_views["norms"].figure().data[0]
    norm = np.linalg.norm(rows, axis=-1)
    assert list(trace.y) == ["0", "1", "2"]
    edges = [0, 512, TOTAL]
    assert list(trace.x) == edges
    for layer in range(LAYERS):
        for at in range(2):
            here = norm[layer, edges[at] : edges[at + 1]]
            here = here[planted_stores.counted()[layer, edges[at] : edges[at + 1]]]
            assert trace.z[layer][at] == pytest.approx(np.log10(here.mean()), rel=1e-5)
            told = [here.mean(), here.min(), here.max(), len(here)]
            assert np.allclose(trace.customdata[layer][at], told, rtol=1e-6)
    assert list(trace.hovertext[0]) == ["positions 0 to 512", f"positions 512 to {TOTAL}"]


def test_norms_of_single_tokens_are_numpys_and_first_tokens_do_not_swamp_the_colours(store, rows):
    figure = views.norms(store, SITE, start=295, stop=305).figure()
    trace, marks = figure.data
    norm = np.linalg.norm(rows[:, 295:305], axis=-1)
    assert np.allclose(np.array(trace.customdata)[..., 0], norm, rtol=1e-6)
    others = np.delete(norm, [5, 6], axis=1)
    assert (trace.zmin, trace.zmax) == (pytest.approx(np.log10(others.min())), pytest.approx(np.log10(others.max())))
    assert np.allclose(trace.z, np.clip(np.log10(norm), trace.zmin, trace.zmax), rtol=1e-6)
    assert list(trace.x) == list(range(295, 305))
    assert np.isfinite(np.asarray(marks.z, float)[0]).tolist() == [at in STARTS for at in range(295, 305)]


def test_what_is_not_finite_is_a_gap_or_the_end_of_the_scale(all_views):
    trace = all_views["norms of tokens"].figure().data[0]
    z = np.asarray(trace.z, float)
    assert np.isnan(z[0, 5])
    assert z[0, INFINITE - NAN + 5] == pytest.approx(trace.zmax)
    assert np.isfinite(z[1:]).all()


def test_first_and_special_tokens_are_lines_beside_the_others(all_views, rows):
    lines = all_views["apart"].figure().data
    norm = np.linalg.norm(rows, axis=-1)
    others = [norm[layer][planted_stores.counted()[layer]].mean() for layer in range(LAYERS)]
    assert np.allclose(lines[0].y, others, rtol=1e-6)
    for line in lines[1:]:
        assert np.allclose(line.y, norm[:, STARTS].mean(axis=1), rtol=1e-9)
        assert f"({len(STARTS)})" in line.name


def test_outlier_dimensions_are_numpys_multiples_of_the_median(all_views, rows):
    trace = all_views["dimensions"].figure().data[0]
    rms = np.array([np.sqrt(np.square(counted(rows, layer)).mean(axis=0)) for layer in range(LAYERS)])
    ratios = rms / np.median(rms, axis=1)[:, None]
    assert trace.x[0] == str(OUTLIER)
    found = np.asarray(trace.customdata, float)[..., 0]
    assert np.allclose(found, ratios[:, list(map(int, trace.x))], rtol=1e-5)
    assert np.allclose(trace.z, np.clip(np.log10(found), trace.zmin, trace.zmax), rtol=1e-5)


def test_one_dimension_is_numpys_histogram(all_views, rows):
    figure = all_views["dimension"].figure()
    unflagged = np.setdiff1d(np.arange(TOTAL), STARTS)
    heights, edges = np.histogram(rows[1, unflagged, OUTLIER], bins=80)
    assert list(figure.data[0].y) == heights.tolist()
    assert np.allclose(figure.data[0].x, (edges[1:] + edges[:-1]) / 2)
    assert np.allclose(np.array(figure.data[0].customdata), np.stack([edges[:-1], edges[1:]], 1))
    here = counted(rows, 1)[:, OUTLIER]
    marks = {shape.label.text: shape.x0 for shape in figure.layout.shapes}
    assert marks["mean"] == pytest.approx(here.mean(), rel=1e-6)
    assert marks["+std"] == pytest.approx(here.mean() + here.std(), rel=1e-6)
    assert marks["-std"] == pytest.approx(here.mean() - here.std(), rel=1e-6)


def test_a_dead_dimension_is_one_bar(store):
    figure = views.dimension(store, SITE, 2, DEAD).figure()
    heights = np.asarray(figure.data[0].y)
    assert heights.max() == heights.sum() == TOTAL - len(STARTS)
    assert {shape.x0 for shape in figure.layout.shapes} == {planted_stores.DEAD_VALUE}


def test_a_sequence_is_a_bar_a_token(all_views, rows):
    bars = all_views["sequence"].figure().data[0]
    start = STARTS[2]
    assert np.allclose(bars.y, np.linalg.norm(rows[0, start : start + 500], axis=-1), equal_nan=True)
    assert list(bars.x) == list(range(start, start + 500))
    assert bars.hovertext[3] == f"'⟨{planted_stores.tokens()[start + 3]}⟩'"


def test_a_token_is_a_line_through_the_layers(all_views, rows):
    norm, cosine = all_views["token"].figure().data
    here = rows[:, 350]
    assert np.allclose(norm.y, np.linalg.norm(here, axis=-1))
    unit = here / np.linalg.norm(here, axis=-1, keepdims=True)
    assert np.allclose(cosine.y, [np.nan, unit[0] @ unit[1], unit[1] @ unit[2]], equal_nan=True)


@pytest.mark.parametrize("name", ["top", "find"])
def test_contexts_are_rows_of_a_table(all_views, name):
    view = all_views[name]
    told, positions, before, texts, after = view.figure().data[0].cells["values"]
    if name == "top":
        found = [one for band in view["bands"] for one in band["examples"]]
        values = [float(said.rsplit(": ", 1)[1]) for said in told]
        assert values == [float(f"{planted_stores.stored()[0, one['position'], 3]:.5g}") for one in found]
    else:
        found = view["matches"]
    assert [int(said.replace(",", "")) for said in positions] == [one["position"] for one in found]
    assert [html.unescape(said[3:-4]) for said in texts] == [one["text"] for one in found]
    assert [html.unescape(said) for said in before] == [one["before"][-40:] for one in found]
    assert [html.unescape(said) for said in after] == [one["after"][:40] for one in found]


def test_the_lens_is_the_probabilities_of_numpy(all_views, rows):
    trace = all_views["lens"].figure().data[0]
    weights = np.random.default_rng(5).normal(size=(60, WIDTH)) / 4
    logits = rows[:, 350] @ weights.T
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert np.allclose(trace.z, -np.sort(-chances, axis=1)[:, :4], rtol=1e-5)
    assert np.asarray(trace.customdata)[..., 0].tolist() == np.argsort(-chances, axis=1)[:, :4].tolist()


# What plotly itself makes of the templates that we write, and nothing else may stand in a figure.
OURS = {"<b>", "</b>", "<br>", "<extra>", "</extra>"}


def poisoned(view, evil):
    """The view as if every text of the store, and every name in it, was `evil`."""

    def spoil(thing, key=None):
        if isinstance(thing, dict):
            return {name: spoil(inner, name) for name, inner in thing.items()}
        if isinstance(thing, list):
            return [spoil(inner, key) for inner in thing]
        texts = {"texts", "text", "before", "after", "query", "site", "by", "name", "next_text"}
        return evil if isinstance(thing, str) and key in texts else thing

    return View(view.name, evil, evil, spoil(view.data), sampled=evil)


@pytest.mark.parametrize("evil", EVIL)
@pytest.mark.parametrize("name", [*_CHARTS, "norms of tokens"])
def test_no_text_of_a_stranger_is_markup_or_tex_in_any_figure(all_views, name, evil):
    drawn = poisoned(all_views[name], evil).figure().to_plotly_json()
    found = list(strings(drawn))
    assert any(html.unescape(text).find(evil) >= 0 for text in found), "the title at least"
    for text in found:
        assert set(re.findall("<[^>]*>?", text)) <= OURS, text
        # Between two of them plotly sees TeX.
        assert text.count("$") < 2, text
        # `<b>` is ours around the token of a context, and stands nowhere else.
        assert "<b>" not in text or text == f"<b>{label(evil)}</b>"
    # Templates name numbers of ours; a text in one would be filled in.
    templates = [text for trace in drawn["data"] for key, text in trace.items() if key.endswith("template")]
    assert evil not in "".join(map(str, templates))


@pytest.mark.parametrize("evil", [*EVIL, "plain", "a & b", "x" * 500])
def test_a_label_reads_as_what_it_is_of(evil):
    assert html.unescape(label(evil)) == (evil if len(evil) <= 120 else evil[:119] + "…")
    assert not {"<", ">", "$"} & set(label(evil))
    assert html.unescape(token_label(evil))[1:-1] == html.unescape(label(evil))


def test_spaces_of_a_token_are_seen():
    assert token_label(" a\n\t") == "' a↵⇥'"


def test_a_scale_is_of_what_is_finite():
    found = logs(np.array([0.0, 1.0, 100.0, np.nan, -3.0, np.inf]))
    assert np.array_equal(found, [-np.inf, 0, 2, np.nan, -np.inf, np.inf], equal_nan=True)
    assert log_range(found) == (0, 2)
    assert log_range(np.array([np.nan, np.inf])) == (0, 1)
    low, high = log_range(np.array([1.0, 1.0]))
    assert low < 1 < high


def test_a_notebook_shows_the_figure(all_views, monkeypatch):
    monkeypatch.setattr(plotly.io.renderers, "default", "plotly_mimetype")
    view = all_views["dimension"]
    bundle = view._repr_mimebundle_()
    assert bundle["text/plain"] == repr(view)
    shown = bundle["application/vnd.plotly.v1+json"]
    bars = shown["data"][0]["y"]
    assert np.frombuffer(base64.b64decode(bars["bdata"]), bars["dtype"]).tolist() == view["counts"].tolist()
    assert shown["layout"]["title"]["text"] == view.title


def test_without_plotly_a_notebook_shows_what_the_view_is(all_views, monkeypatch):
    monkeypatch.setitem(sys.modules, "mmcache.view.figures", None)
    view = all_views["dimension"]
    assert view._repr_mimebundle_() == {"text/plain": repr(view)}
    with pytest.raises(ImportError):
        view.figure()
