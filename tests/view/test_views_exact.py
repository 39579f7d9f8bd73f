"""Every number of every view equals numpy on the stored values, in both layouts and every dtype."""

from itertools import pairwise

import numpy as np
import pytest
import torch

import planted_stores
from mmcache import view as views
from mmcache.view import Unembedding
from planted_stores import DEAD, DEAD_VALUE, INFINITE, LAYERS, NAN, OUTLIER, SITE, STARTS, TOTAL, WIDTH, ZERO
from stores_and_processes import DTYPES

# What the statistics promise: sums of norms, and squares about the mean.
NORMS, SPREAD = 1e-6, 5e-6
MAKES = [(layout, dtype) for layout in ("token", "layer") for dtype in DTYPES]


@pytest.fixture(scope="module", params=MAKES, ids=lambda make: f"{make[0]}, {str(make[1]).removeprefix('torch.')}")
def made(request, tmp_path_factory):
    layout, dtype = request.param
    return planted_stores.planted(tmp_path_factory.mktemp("exact") / "acts", layout, dtype), planted_stores.stored(
        dtype
    )


@pytest.fixture(scope="module")
def store(made):
    return made[0]


@pytest.fixture(scope="module")
def rows(made):
    return made[1]


@pytest.fixture(scope="module")
def counted():
    return planted_stores.counted()


def about(expected, rel):
    return pytest.approx(expected, rel=rel, abs=1e-12, nan_ok=True)


def test_health(store, rows):
    view = views.health(store, SITE)
    broken, zero = ~np.isfinite(rows).all(axis=-1), (rows == 0).all(axis=-1)
    counts = planted_stores.counted()
    for layer, one in enumerate(view["layers"]):
        here = rows[layer][counts[layer]]
        dead = np.flatnonzero((here == here[0]).all(axis=0))
        assert one["layer"] == layer
        assert one["rows"] == len(here)
        assert one["non_finite"] == broken[layer].sum()
        assert one["first_non_finite"] == (np.flatnonzero(broken[layer])[0] if broken[layer].any() else -1)
        assert one["zero_rows"] == zero[layer].sum()
        assert one["n_dead"] == len(dead)
        assert one["dead"] == [{"dimension": at, "value": here[0, at]} for at in dead]
    assert view["problems"] == [
        f"layer 0: 2 rows with NaN or infinity, the first at position {NAN}",
        "layer 1: 1 rows of zeros only",
        f"layer 2: 1 dimensions are the same in every row: {DEAD}",
    ]
    assert view["places"] == [
        {"layer": 0, "tokens": [512, TOTAL], "non_finite": 2, "first_non_finite": NAN, "zero_rows": 0},
        {"layer": 1, "tokens": [0, 512], "non_finite": 0, "first_non_finite": -1, "zero_rows": 1},
    ]


def test_statistics(store, rows, counted):
    for layer, one in enumerate(views.statistics_view(store, SITE)["layers"]):
        here = rows[layer][counted[layer]]
        norm, std = np.linalg.norm(here, axis=-1), here.std(axis=0)
        assert one["rows"] == len(here)
        assert one["mean_norm"] == about(norm.mean(), NORMS)
        assert (one["min_norm"], one["max_norm"]) == (about(norm.min(), NORMS), about(norm.max(), NORMS))
        assert one["scalar_scale"] == about(np.sqrt(WIDTH) / norm.mean(), NORMS)
        assert one["mean"] == pytest.approx(here.mean(), rel=1e-5, abs=1e-7)
        assert one["std"] == about(std.mean(), SPREAD)
        assert one["largest_std"] == {"dimension": std.argmax(), "value": about(std.max(), SPREAD)}
        assert one["dead_dimensions"] == (std == 0).sum() == (layer == 2)


@pytest.mark.parametrize("layers", [None, [2, 0]])
def test_the_norm_map_by_chunks(store, rows, counted, layers):
    view = views.norms(store, SITE, layers=layers, bins=5)
    assert view["level"] == "chunks"
    assert (view["edges"][0], view["edges"][-1]) == (0, TOTAL)
    norm = np.linalg.norm(rows, axis=-1)
    for line, layer in enumerate(layers or range(LAYERS)):
        for at, (start, stop) in enumerate(pairwise(view["edges"].tolist())):
            here = norm[layer, start:stop][counted[layer, start:stop]]
            assert view["rows"][line, at] == len(here)
            assert view["mean"][line, at] == about(here.mean(), NORMS)
            assert (view["min"][line, at], view["max"][line, at]) == (
                about(here.min(), NORMS),
                about(here.max(), NORMS),
            )


def test_the_norm_map_by_tokens(store, rows):
    view = views.norms(store, SITE, start=NAN - 5, stop=NAN + 16)
    wanted = np.linalg.norm(rows[:, NAN - 5 : NAN + 16], axis=-1)
    assert view["level"] == "tokens"
    assert np.array_equal(view["mean"], view["max"], equal_nan=True)
    assert np.allclose(view["mean"], wanted, rtol=1e-12, equal_nan=True)
    assert np.isnan(view["mean"][0, 5])
    assert np.isinf(view["mean"][0, INFINITE - NAN + 5])
    assert view["tokens"].tolist() == planted_stores.tokens()[NAN - 5 : NAN + 16].tolist()


def test_first_and_special_tokens(store, rows, counted):
    view = views.apart(store, SITE)
    norm = np.linalg.norm(rows, axis=-1)
    for kind in ("first", "special"):
        assert view[kind]["tokens"] == len(STARTS)
        assert np.allclose(view[kind]["mean"], norm[:, STARTS].mean(axis=1), rtol=1e-12)
        assert np.allclose(view[kind]["max"], norm[:, STARTS].max(axis=1), rtol=1e-12)
    others = [norm[layer][counted[layer]].mean() for layer in range(LAYERS)]
    assert np.allclose(view["others"], others, rtol=NORMS)


def test_outlier_dimensions(store, rows, counted):
    view = views.dimensions(store, SITE, most=WIDTH)
    rms = np.array([np.sqrt(np.square(rows[layer][counted[layer]]).mean(axis=0)) for layer in range(LAYERS)])
    ratios = rms / np.median(rms, axis=1)[:, None]
    assert np.allclose(view["median"], np.median(rms, axis=1), rtol=SPREAD)
    assert np.allclose(view["ratios"], ratios[:, view["shown"]], rtol=2 * SPREAD)
    for one in view["outliers"]:
        here = rows[one["layer"]][counted[one["layer"]]][:, one["dimension"]]
        assert one["rms"] == about(rms[one["layer"], one["dimension"]], SPREAD)
        assert one["ratio"] == about(ratios[one["layer"], one["dimension"]], 2 * SPREAD)
        assert one["mean"] == pytest.approx(here.mean(), rel=1e-5, abs=1e-6)
        assert one["std"] == about(here.std(), SPREAD)
    for layer in range(LAYERS):
        told = [one["ratio"] for one in view["outliers"] if one["layer"] == layer]
        assert told == sorted(told, reverse=True)
        assert len(told) == WIDTH
    first = max(view["outliers"], key=lambda one: one["ratio"])
    assert (first["layer"], first["dimension"], view["shown"][0]) == (1, OUTLIER, OUTLIER)
    assert first["ratio"] > 30


@pytest.mark.parametrize(("layer", "at"), [(1, OUTLIER), (2, DEAD), (0, 3), (0, 4)])
def test_one_dimension(store, rows, counted, layer, at):
    view = views.dimension(store, SITE, layer, at)
    unflagged = np.setdiff1d(np.arange(TOTAL), STARTS)
    values, here = rows[layer, unflagged, at], rows[layer][counted[layer]][:, at]
    finite = values[np.isfinite(values)]
    heights, edges = np.histogram(finite, bins=len(view["counts"]))
    assert view["counts"].tolist() == heights.tolist()
    assert np.array_equal(view["edges"], edges)
    assert (view["looked"], view["non_finite"]) == (len(values), len(values) - len(finite))
    assert view["count"] == len(here)
    assert view["mean"] == pytest.approx(here.mean(), rel=1e-5, abs=1e-6)
    assert view["std"] == about(here.std(), SPREAD)
    for name, part in {"min": 0, "1 %": 0.01, "25 %": 0.25, "median": 0.5, "99 %": 0.99, "max": 1}.items():
        assert view["quantiles"][name] == about(np.quantile(finite, part), 1e-12)


def test_a_dead_dimension_and_a_nan_are_seen_in_the_view_of_one_dimension(store):
    dead = views.dimension(store, SITE, 2, DEAD)
    assert (dead["std"], dead["mean"], dead["quantiles"]["min"], dead["quantiles"]["max"]) == (0, *[DEAD_VALUE] * 3)
    assert [views.dimension(store, SITE, 0, at)["non_finite"] for at in (2, 3, 4)] == [0, 1, 1]


@pytest.mark.parametrize("by", ["norm", "value", "vector", "difference"])
def test_a_sequence(store, rows, by):
    vector = np.random.default_rng(3).normal(size=WIDTH)
    start, stop, _ = store.sequences[2]
    asked = {"norm": {}, "difference": {"by": by}, "value": {"by": "value", "direction": 7}}
    asked["vector"] = {"by": "value", "direction": vector}
    wanted = {
        "norm": np.linalg.norm(rows[1], axis=-1), "value": rows[1, :, 7], "vector": rows[1] @ vector,
        "difference": np.linalg.norm(rows[1] - rows[0], axis=-1),
    }  # fmt: skip
    view = views.sequence(store, SITE, 1, 2, **asked[by])
    assert np.allclose(view["values"], wanted[by][start:stop], rtol=1e-10, atol=1e-12, equal_nan=True)
    assert view["tokens"].tolist() == planted_stores.tokens()[start:stop].tolist()
    assert view["flags"].tolist() == [7] + [0] * (stop - start - 1)


@pytest.mark.parametrize("position", [0, ZERO, NAN, INFINITE, TOTAL - 1])
def test_a_token_at_every_layer(store, rows, position):
    view, here = views.token(store, SITE, position), rows[:, position]
    norm = np.linalg.norm(here, axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = [(here[at] @ here[at - 1]) / (norm[at] * norm[at - 1]) for at in (1, 2)]
        std = here.std(axis=-1)
    assert np.allclose(view["norm"], norm, rtol=1e-12, equal_nan=True)
    assert np.allclose(view["mean"], here.mean(axis=-1), rtol=1e-10, equal_nan=True)
    assert np.allclose(view["std"], std, rtol=1e-12, equal_nan=True)
    assert np.allclose(view["cosine"][1:], cosine, rtol=1e-10, equal_nan=True)
    for layer, largest in enumerate(view["largest"]):
        size = np.abs(here[layer])
        found = [size[one["dimension"]] for one in largest]
        # What is not finite comes first, whichever it is.
        wanted = sorted(size[np.isfinite(size)], reverse=True)
        assert [one for one in found if np.isfinite(one)] == wanted[: sum(map(np.isfinite, found))]
        assert all(map(np.isfinite, found[(~np.isfinite(size)).sum() :]))
        assert len(found) == 10
    assert (view["token"], view["counts"]) == (planted_stores.tokens()[position], position not in STARTS)


@pytest.mark.parametrize("what", ["dimension", "vector"])
def test_top_contexts(store, rows, what):
    vector = np.random.default_rng(4).normal(size=WIDTH)
    values = rows[0, :, 3] if what == "dimension" else rows[0] @ vector
    unflagged = np.setdiff1d(np.arange(TOTAL), STARTS)
    finite = unflagged[np.isfinite(values[unflagged])]
    order = finite[np.argsort(-values[finite], kind="stable")]
    view = views.top(store, SITE, 0, 3 if what == "dimension" else vector, k=7)
    assert (view["looked"], view["non_finite"]) == (len(unflagged), len(unflagged) - len(finite))
    assert [one["position"] for one in view["bands"][0]["examples"]] == order[:7].tolist()
    rank = {position: at for at, position in enumerate(order.tolist())}
    at = 0
    for band, part in zip(view["bands"][1:], (0.99, 0.9, 0.5, 0), strict=True):
        last = len(order) - int(np.ceil(part * len(order)))
        here = values[order[at:last]]
        assert (band["tokens"], band["low"], band["high"]) == (
            len(here),
            about(here.min(), 1e-9),
            about(here.max(), 1e-9),
        )
        ranks = [rank[one["position"]] for one in band["examples"]]
        assert ranks == sorted(ranks)
        assert (ranks[0], ranks[-1]) == (at, last - 1)
        assert [one["value"] for one in band["examples"]] == [about(values[order[one]], 1e-9) for one in ranks]
        at = last
    assert at == len(order)


def test_a_search(store):
    places = np.flatnonzero(planted_stores.tokens() == 11)
    view = views.find(store, token=11, most=4)
    assert (view["count"], view["looked"]) == (len(places), TOTAL)
    assert [one["position"] for one in view["matches"]] == places[:4].tolist()
    starts = np.searchsorted(STARTS, places, side="right") - 1
    assert view["sequences"] == len(np.unique(starts))
    assert [one["sequence"] for one in view["matches"]] == starts[:4].tolist()
    assert [one["offset"] for one in view["matches"]] == (places - STARTS[starts])[:4].tolist()


def test_the_logit_lens(store, rows):
    head = np.random.default_rng(5).normal(size=(60, WIDTH)) / 4
    unembedding = Unembedding(lambda wide: wide @ torch.from_numpy(head).T, None, None, WIDTH, torch.float64)
    view = views.lens(store, SITE, 350, unembedding, k=4)
    # The head gives float32.
    logits = (rows[:, 350] @ head.T).astype(np.float32).astype(np.float64)
    chances = np.exp(logits - logits.max(axis=1, keepdims=True))
    chances /= chances.sum(axis=1, keepdims=True)
    order = np.argsort(-chances, axis=1, kind="stable")[:, :4]
    assert view["tokens"].tolist() == order.tolist()
    assert np.allclose(view["probabilities"], np.take_along_axis(chances, order, 1), rtol=1e-5)
    assert np.allclose(view["entropy"], -(chances * np.log(chances)).sum(axis=1), rtol=1e-5)
    coming = planted_stores.tokens()[351]
    assert view["next"] == coming
    assert view["next_rank"].tolist() == (chances > chances[:, [coming]]).sum(axis=1).tolist()


def test_the_overview(store):
    said = views.overview(store.path)
    assert (said["n_tokens"], said["n_sequences"], said["n_layers"]) == (TOTAL, len(STARTS), LAYERS)
    about = said["sites"][SITE]
    assert (about["d_model"], about["missing"]) == (WIDTH, 0)
    assert about["shards"] == 2 * (LAYERS if store.layout == "layer" else 1)
    assert said["bytes"] == sum(file.stat().st_size for file in (store.path / SITE).glob("c.*"))


def test_a_row_and_a_layer(store, rows):
    said = views.row_view(store, SITE, 1, 350)
    assert said["values"] == rows[1, 350].tolist()
    assert said["mean_norm"] == about(np.linalg.norm(rows[1, 350]), 1e-12)
    assert said["largest"][0] == {"dimension": OUTLIER, "value": rows[1, 350, OUTLIER]}
    said = views.layer_view(store, SITE, 0)
    finite = rows[0][np.isfinite(rows[0]).all(axis=-1)]
    assert (said["rows"], said["non_finite"]) == (TOTAL, 2)
    wanted = {"mean": finite.mean(), "std": finite.std(), "min": finite.min(), "max": finite.max()}
    norm = np.linalg.norm(finite, axis=-1)
    wanted |= {"mean_norm": norm.mean(), "max_norm": norm.max()}
    assert {name: said[name] for name in wanted} == {name: about(value, 1e-9) for name, value in wanted.items()}
