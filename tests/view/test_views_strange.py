"""Views of stores in which next to nothing is as it should be: they say so, and never warn on a user's terminal."""

import math

import numpy as np
import pytest
import torch

import mmcache
import planted_stores
from mmcache import view as views

WIDTH = 16


def make(path, rows, layout="token", *, special=None, commits=1):
    """Make a grown store of `[layers, tokens, 16]`, in so many commits."""
    parts = torch.tensor_split(torch.as_tensor(rows).float(), commits, dim=1)
    with mmcache.create(
        path, sites={"a": WIDTH}, n_layers=len(rows), layout=layout, dtype=torch.float32, shard_tokens=512,
        special_tokens=special,
    ) as writer:  # fmt: skip
        for part in parts:
            writer.append(torch.arange(part.shape[1]), {"a": part})
            writer.commit()
    return mmcache.open(path)


def every_view(store, layer=0, position=0):
    """All views of a store without a tokenizer."""
    return [
        *(view(store, "a") for view in (views.health, views.norms, views.apart, views.dimensions)),
        views.norms(store, "a", stop=min(5, store.n_tokens)),
        views.dimension(store, "a", layer, 3),
        *(views.sequence(store, "a", layer, 0, **by) for by in ({}, {"by": "value", "direction": np.eye(WIDTH)[2]})),
        views.sequence(store, "a", 1, 0, by="difference"),
        views.token(store, "a", position),
        views.top(store, "a", layer, 3),
        views.top(store, "a", layer, np.eye(WIDTH)[2]),
        views.find(store, token=1),
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("layout", ["token", "layer"])
def test_a_layer_of_which_nothing_is_finite_is_told_beside_one_that_is_fine(tmp_path, value, layout):
    rows = np.random.default_rng(0).normal(size=(2, 700, WIDTH))
    rows[0] = value
    found = {view.name: view for view in every_view(make(tmp_path / "acts", rows, layout))}
    assert found["health"]["problems"] == ["layer 0: 700 rows with NaN or infinity, the first at position 0"]
    assert np.isnan(found["dimensions"]["median"]).tolist() == [True, False]
    # The first token of the sequence does not count.
    rms = np.sqrt(np.square(rows[1, 1:].astype(np.float32).astype(float)).mean(axis=0))
    assert found["dimensions"]["median"][1] == pytest.approx(np.median(rms), rel=1e-5)
    assert all(one["layer"] != 0 or math.isnan(one["ratio"]) for one in found["dimensions"]["outliers"])
    assert (found["dimension"]["looked"], found["dimension"]["non_finite"]) == (699, 699)
    assert (found["token"]["norm"][1], np.isfinite(found["token"]["norm"][0])) == (
        pytest.approx(np.linalg.norm(rows[1, 0]), rel=1e-6), False,
    )  # fmt: skip


def test_a_row_that_is_infinite_in_two_layers_has_no_difference(tmp_path):
    rows = np.random.default_rng(0).normal(size=(2, 5, WIDTH))
    rows[:, 3, 7] = np.inf
    view = views.sequence(make(tmp_path / "acts", rows), "a", 1, 0, by="difference")
    assert np.isnan(view["values"]).tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("layout", ["token", "layer"])
def test_one_row_alone_has_no_dead_dimensions(tmp_path, layout):
    store = make(tmp_path / "acts", np.random.default_rng(0).normal(size=(2, 1, WIDTH)), layout)
    views_of = {view.name: view for view in every_view(store)}
    assert views_of["health"]["problems"] == []
    assert [one["dead_dimensions"] for one in views.statistics_view(store, "a")["layers"]] == [0, 0]


def test_a_store_of_special_tokens_only_has_norms_of_no_rows(tmp_path):
    rows = np.random.default_rng(0).normal(size=(2, 3, WIDTH))
    found = {view.name: view for view in every_view(make(tmp_path / "acts", rows, special=[0, 1, 2]))}
    assert [one["rows"] for one in found["health"]["layers"]] == [0, 0]
    assert np.isnan(found["apart"]["others"]).all()
    assert found["apart"]["special"]["tokens"] == 3
    assert found["dimension"]["looked"] == found["top"]["looked"] == 0


def ahead(path, layout):
    """A store that was longer before a crash: a shard holds rows that do not count, all of them bad."""
    rows = torch.randn(2, 700, WIDTH)
    rows[0, 5], rows[0, 690], rows[1, 600] = torch.nan, torch.inf, 0
    before = make(path, rows, layout)
    root = (path / "zarr.json").read_bytes()
    wrong = torch.full((2, 150, WIDTH), torch.nan)
    wrong[:, 100:] = 0
    with mmcache.append(path) as writer:
        writer.append(torch.zeros(150, dtype=torch.int64), {"a": wrong})
    (path / "zarr.json").unlink()
    (path / "zarr.json").write_bytes(root)
    assert before.n_tokens == mmcache.open(path).n_tokens == 700
    return mmcache.open(path), rows


@pytest.mark.parametrize("layout", ["token", "layer"])
def test_bad_rows_that_a_crash_left_ahead_of_the_commit_are_not_told(tmp_path, layout):
    store, _ = ahead(tmp_path / "acts", layout)
    view = views.health(store, "a")
    assert view["places"] == [
        {"layer": 0, "tokens": [0, 512], "non_finite": 1, "first_non_finite": 5, "zero_rows": 0},
        {"layer": 0, "tokens": [512, 700], "non_finite": 1, "first_non_finite": 690, "zero_rows": 0},
        {"layer": 1, "tokens": [512, 700], "non_finite": 0, "first_non_finite": -1, "zero_rows": 1},
    ]
    assert view["problems"] == [
        "layer 0: 2 rows with NaN or infinity, the first at position 5",
        "layer 1: 1 rows of zeros only",
    ]


@pytest.mark.parametrize("layout", ["token", "layer"])
def test_norms_that_are_left_out_since_their_file_is_ahead_of_the_commit_are_told(tmp_path, layout):
    store, rows = ahead(tmp_path / "acts", layout)
    view = views.norms(store, "a", bins=3)
    assert view["edges"].tolist() == [0, 512, 700]
    assert view["rows"].tolist() == [[510, 0], [511, 0]]
    assert view["mean"][1, 0] == pytest.approx(rows[1, 1:512].double().norm(dim=-1).mean().item(), rel=1e-6)
    assert np.isnan(view["mean"][:, 1]).all()
    assert view.sampled == "all but the last 188 tokens: their file holds more than counts"
    assert views.norms(store, "a", stop=512, bins=1).sampled is None


@pytest.mark.parametrize(
    "ask",
    [
        lambda store: views.find(store, token=1, start=-1),
        lambda store: views.find(store, token=1, most_tokens=-1),
        lambda store: views.find(store, token=1, most=-1),
        lambda store: views.find(store, token=2, context=-1),
        lambda store: views.token(store, planted_stores.SITE, 0, context=-1),
        lambda store: views.top(store, planted_stores.SITE, 0, 0, context=-1),
    ],
)
def test_a_number_below_zero_is_refused(tmp_path, ask):
    with pytest.raises(mmcache.ArgumentError, match="is -1: expected a whole number"):
        ask(planted_stores.planted(tmp_path / "acts"))


def test_a_search_behind_the_end_looks_at_nothing(tmp_path):
    view = views.find(planted_stores.planted(tmp_path / "acts"), token=1, start=planted_stores.TOTAL + 5)
    assert (view["count"], view["looked"], view["matches"]) == (0, 0, [])
    assert view.sampled == f"0 of {planted_stores.TOTAL} tokens, from position {planted_stores.TOTAL + 5} on"


def test_a_store_without_rows_is_not_complete_enough_for_any_view(tmp_path):
    mmcache.create(tmp_path / "acts", sites={"a": 8}, n_layers=2, dtype=torch.float32).close()
    store = mmcache.open(tmp_path / "acts")
    for view in (views.health, views.apart, views.dimensions, views.statistics_view):
        with pytest.raises(mmcache.IncompleteError):
            view(store, "a")
    assert views.find(store, token=1)["count"] == 0
