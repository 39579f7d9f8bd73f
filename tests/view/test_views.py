"""What views say equals numpy on the same rows, and whatever is planted is pointed out."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch

import mmcache
from damaged_stores import extracted, grown
from mmcache.view import (
    apart,
    dimension,
    dimensions,
    find,
    health,
    norms,
    sequence,
    token,
    top,
)
from mmcache.view.base import Sampler
from stores_and_processes import abandon, shards

LAYERS, WIDTH, LENGTHS = 3, 24, (300, 1, 800, 411, 64)
TOTAL = sum(LENGTHS)
NAN, ZERO, OUTLIER, DEAD = 700, 40, 5, 9
BOS = 1


def rows_of(seed=0):
    """What is stored: an outlier dimension in layer 1, a dead one in layer 2, a row of zeros, and one with a NaN."""
    rows = np.random.default_rng(seed).normal(0, 1, (LAYERS, TOTAL, WIDTH)).astype(np.float32)
    rows[1, :, OUTLIER] += 40
    rows[2, :, DEAD] = 0.5
    rows[0, NAN, 3] = np.nan
    rows[2, ZERO] = 0
    starts = np.cumsum([0, *LENGTHS[:-1]])
    # Attention sinks.
    rows[:, starts] *= 50
    return rows, starts


def make(path, layout="token", **options):
    rows, starts = rows_of()
    with mmcache.create(
        path, sites={"resid_post": WIDTH}, n_layers=LAYERS, layout=layout, dtype=torch.float32, shard_tokens=512,
        special_tokens=[BOS], **options,
    ) as writer:  # fmt: skip
        for start, length in zip(starts, LENGTHS, strict=True):
            ids = 2 + np.arange(start, start + length) % 47
            ids[0] = BOS
            part = torch.from_numpy(rows[:, start : start + length])
            writer.append(torch.from_numpy(ids), {"resid_post": part})
    return mmcache.open(path)


@pytest.fixture(scope="module", params=["token", "layer"])
def store(request, tmp_path_factory):
    return make(tmp_path_factory.mktemp("views") / "acts", request.param)


@pytest.fixture(scope="module")
def rows():
    return rows_of()[0].astype(np.float64)


@pytest.fixture(scope="module")
def counts():
    """Which rows count in the statistics, by layer."""
    found, starts = rows_of()
    keep = np.isfinite(found).all(axis=-1)
    keep[:, starts] = False
    return keep


def test_health_points_at_what_was_planted(store):
    view = health(store, "resid_post")
    by_layer = {one["layer"]: one for one in view["layers"]}
    assert [by_layer[layer]["non_finite"] for layer in range(3)] == [1, 0, 0]
    assert by_layer[0]["first_non_finite"] == NAN
    assert [by_layer[layer]["zero_rows"] for layer in range(3)] == [0, 0, 1]
    # But for the row of zeros, it would be dead.
    assert [by_layer[layer]["n_dead"] for layer in range(3)] == [0, 0, 0]
    places = {(place["layer"], tuple(place["tokens"])) for place in view["places"]}
    assert places == {(0, (512, 1024)), (2, (0, 512))}
    assert "layer 0: 1 rows with NaN or infinity, the first at position 700" in view["problems"]
    assert "layer 2: 1 rows of zeros only" in view["problems"]
    assert view.sampled is None


def test_a_dead_dimension_is_named_with_its_value(tmp_path):
    with mmcache.create(tmp_path / "acts", sites={"a": 8}, n_layers=2, dtype=torch.float32) as writer:
        part = torch.randn(2, 100, 8)
        part[1, :, 6] = -2.5
        writer.append(torch.arange(100), {"a": part})
    view = health(mmcache.open(tmp_path / "acts"), "a")
    assert [one["dead"] for one in view["layers"]] == [[], [{"dimension": 6, "value": -2.5}]]
    assert view["problems"] == ["layer 1: 1 dimensions are the same in every row: 6"]


def test_the_whole_norm_map_equals_numpy(store, rows, counts):
    view = norms(store, "resid_post")
    assert view["level"] == "chunks"
    length = np.linalg.norm(rows, axis=-1)
    edges = view["edges"]
    assert edges[0] == 0
    assert edges[-1] == TOTAL
    for at, (start, stop) in enumerate(pairwise(edges.tolist())):
        for layer in range(LAYERS):
            here = length[layer, start:stop][counts[layer, start:stop]]
            assert view["rows"][layer, at] == len(here)
            assert view["mean"][layer, at] == pytest.approx(here.mean(), rel=1e-6)
            assert view["min"][layer, at] == pytest.approx(here.min(), rel=1e-6)
            assert view["max"][layer, at] == pytest.approx(here.max(), rel=1e-6)


@pytest.mark.parametrize("bins", [1, 2, 3, 1000])
def test_stretches_are_whole_inner_chunks_and_leave_nothing_out(store, bins):
    view = norms(store, "resid_post", start=513, stop=1500, bins=bins)
    if view["level"] == "chunks":
        assert len(view["edges"]) - 1 <= bins
        assert view["edges"][0] <= 513
        assert view["edges"][-1] >= 1500
        assert view["rows"].sum() > 0
    else:
        assert view["edges"].tolist() == list(range(513, 1501))


def test_few_tokens_are_each_a_stretch(store, rows):
    view = norms(store, "resid_post", start=290, stop=310, layers=[2, 0])
    assert view["level"] == "tokens"
    assert np.allclose(view["mean"], np.linalg.norm(rows[[2, 0], 290:310], axis=-1), rtol=1e-12)
    assert view["tokens"].tolist() == store.tokens[290:310].tolist()
    # The second sequence is one token long, so two begin here.
    assert view["apart"].tolist() == [3 if position in (300, 301) else 0 for position in range(290, 310)]
    assert view["texts"][0] == f"⟨{int(store.tokens[290])}⟩", "no tokenizer is kept"


def test_a_not_finite_row_has_a_norm_that_is_not_finite(store):
    view = norms(store, "resid_post", start=NAN, stop=NAN + 1)
    assert math.isnan(view["mean"][0, 0])
    assert json.loads(json.dumps(view.to_json()))["data"]["mean"][0][0] == "NaN"


def test_first_and_special_tokens_are_apart(store, rows):
    view = apart(store, "resid_post")
    starts = rows_of()[1]
    length = np.linalg.norm(rows, axis=-1)
    assert view["first"]["tokens"] == view["special"]["tokens"] == len(starts)
    assert np.allclose(view["first"]["mean"], length[:, starts].mean(axis=1))
    assert np.allclose(view["special"]["max"], length[:, starts].max(axis=1))
    assert np.allclose(view["others"], store["resid_post"].statistics.mean_norm)
    assert (view["first"]["mean"] > 10 * view["others"]).all()


def test_outlier_dimensions_are_found(store, rows, counts):
    view = dimensions(store, "resid_post", most=3)
    for layer in range(LAYERS):
        here = rows[layer][counts[layer]]
        rms = np.sqrt((here**2).mean(axis=0))
        ranked = [one for one in view["outliers"] if one["layer"] == layer]
        assert view["median"][layer] == pytest.approx(np.median(rms), rel=1e-5)
        assert [one["dimension"] for one in ranked] == np.argsort(-rms, kind="stable")[:3].tolist()
        for one in ranked:
            assert one["rms"] == pytest.approx(rms[one["dimension"]], rel=1e-5)
            assert one["ratio"] == pytest.approx(rms[one["dimension"]] / np.median(rms), rel=1e-5)
            assert one["mean"] == pytest.approx(here[:, one["dimension"]].mean(), rel=1e-4, abs=1e-6)
            assert one["std"] == pytest.approx(here[:, one["dimension"]].std(), rel=1e-4)
    assert view["shown"][0] == OUTLIER
    assert view["ratios"].shape == (LAYERS, 3)
    assert view["ratios"][1, 0] == pytest.approx(view["outliers"][3]["ratio"])


def test_one_dimension_equals_numpy(store, rows, counts):
    view = dimension(store, "resid_post", 1, OUTLIER)
    flagged = np.zeros(TOTAL, bool)
    flagged[rows_of()[1]] = True
    values = rows[1, ~flagged, OUTLIER]
    assert view["mean"] == pytest.approx(rows[1][counts[1]][:, OUTLIER].mean(), rel=1e-6)
    assert view["std"] == pytest.approx(rows[1][counts[1]][:, OUTLIER].std(), rel=1e-4)
    wanted, edges = np.histogram(values, bins=len(view["counts"]))
    assert view["counts"].tolist() == wanted.tolist()
    assert np.allclose(view["edges"], edges)
    assert view["quantiles"]["median"] == pytest.approx(np.median(values))
    assert view["looked"] == len(values)
    assert view.sampled is None


def test_values_that_are_not_finite_are_left_out_and_counted(store):
    view = dimension(store, "resid_post", 0, 3)
    assert view["non_finite"] == 1
    assert view["counts"].sum() == view["looked"] - 1


@pytest.mark.parametrize("what", ["dimension", "direction"])
def test_top_contexts_equal_numpy(store, rows, what):
    vector = np.random.default_rng(4).normal(size=WIDTH)
    direction = 4 if what == "dimension" else vector
    values = rows[1, :, 4] if what == "dimension" else rows[1] @ vector
    starts = rows_of()[1]
    positions = np.setdiff1d(np.arange(TOTAL), starts)
    order = positions[np.argsort(-values[positions], kind="stable")]
    view = top(store, "resid_post", 1, direction, k=6, context=3)
    first = view["bands"][0]
    assert [one["position"] for one in first["examples"]] == order[:6].tolist()
    for band in view["bands"]:
        for one in band["examples"]:
            assert one["value"] == pytest.approx(values[one["position"]])
            assert band["low"] - 1e-9 <= one["value"] <= band["high"] + 1e-9
            assert store.locate(one["position"]) == (one["sequence"], one["offset"], one["token"])
    bands = view["bands"][1:]
    assert sum(band["tokens"] for band in bands) == len(order), "each token is in one band"
    quantiles = [np.quantile(values[positions], at) for at in (0.99, 0.9, 0.5)]
    for band, edge in zip(bands, quantiles, strict=False):
        assert band["low"] >= edge - 1e-9
    example = first["examples"][0]
    span = store.sequences[example["sequence"]]
    around = store.tokens[max(span.start, example["position"] - 3) : example["position"]].tolist()
    assert example["before"] == "".join(f"⟨{one}⟩" for one in around)


def test_a_sequence_by_norm_value_direction_and_difference(store, rows):
    start, stop, _ = store.sequences[3]
    length = np.linalg.norm(rows, axis=-1)
    by_norm = sequence(store, "resid_post", 2, 3)
    assert np.allclose(by_norm["values"], length[2, start:stop])
    assert by_norm["positions"].tolist() == list(range(start, stop))
    by_value = sequence(store, "resid_post", 2, 3, by="value", direction=7)
    assert np.allclose(by_value["values"], rows[2, start:stop, 7])
    vector = np.arange(WIDTH) / 3
    by_vector = sequence(store, "resid_post", 2, -2, by="value", direction=torch.from_numpy(vector))
    assert np.allclose(by_vector["values"], rows[2, start:stop] @ vector)
    by_difference = sequence(store, "resid_post", 2, 3, by="difference")
    assert np.allclose(by_difference["values"], np.linalg.norm(rows[2] - rows[1], axis=-1)[start:stop])
    assert by_norm["sequence"] == by_vector["sequence"] == 3


def test_a_long_sequence_is_shown_in_pieces(tmp_path):
    with mmcache.create(tmp_path / "acts", sites={"a": 4}, n_layers=1, dtype=torch.float32) as writer:
        writer.append(torch.arange(3000), {"a": torch.randn(1, 3000, 4)})
    store = mmcache.open(tmp_path / "acts")
    first, second = (sequence(store, "a", 0, 0, start=start) for start in (0, 2000))
    assert first["positions"].tolist() == list(range(1024))
    assert second["positions"].tolist() == list(range(2000, 3000))
    assert first.sampled == "tokens 0 to 1,024 of 3,000"
    with pytest.raises(mmcache.OutOfRangeError):
        sequence(store, "a", 0, 0, start=3000)


def test_a_token_through_the_layers(store, rows):
    view = token(store, "resid_post", -1)
    row = rows[:, TOTAL - 1]
    assert view["position"] == TOTAL - 1
    assert np.allclose(view["norm"], np.linalg.norm(row, axis=-1))
    assert np.allclose(view["std"], row.std(axis=-1))
    cosine = [(row[at] @ row[at - 1]) / np.linalg.norm(row[at]) / np.linalg.norm(row[at - 1]) for at in (1, 2)]
    assert np.allclose(view["cosine"][1:], cosine)
    assert math.isnan(view["cosine"][0])
    assert view["largest"][1][0] == {"dimension": OUTLIER, "value": row[1, OUTLIER]}
    assert view["counts"]
    assert not token(store, "resid_post", 0)["counts"]


def test_a_search_for_a_token_counts_all_and_lists_some(store):
    tokens = store.tokens.numpy()
    view = find(store, token=11, most=5)
    places = np.flatnonzero(tokens == 11)
    assert view["count"] == len(places)
    assert [one["position"] for one in view["matches"]] == places[:5].tolist()
    assert view["sequences"] == len({store.locate(int(at)).sequence for at in places})
    assert find(store, token=999)["count"] == 0
    part = find(store, token=11, start=100, most_tokens=200)
    assert part["count"] == ((tokens[100:300] == 11).sum())
    assert part.sampled == f"200 of {TOTAL:,} tokens, from position 100 on"


@pytest.mark.parametrize(
    "ask",
    [
        find,
        lambda store: find(store, ""),
        lambda store: find(store, "a", token=3),
        lambda store: find(store, "text"),
        lambda store: norms(store, "resid_post", bins=0),
        lambda store: dimensions(store, "resid_post", most=0),
        lambda store: top(store, "resid_post", 0, 0, k=0),
        lambda store: sequence(store, "resid_post", 0, 0, by="loudness"),
        lambda store: sequence(store, "resid_post", 0, 0, by="value"),
        lambda store: sequence(store, "resid_post", 0, 0, by="difference"),
        lambda store: Sampler(store, "resid_post", [0, 0]),
        lambda store: Sampler(store, "resid_post", budget=0),
    ],
)
def test_what_makes_no_sense_is_refused(store, ask):
    with pytest.raises(mmcache.ArgumentError):
        ask(store)


@pytest.mark.parametrize(
    "ask",
    [
        lambda store: norms(store, "resid_post", start=TOTAL),
        lambda store: norms(store, "resid_post", start=-1),
        lambda store: norms(store, "resid_post", start=9, stop=9),
        lambda store: norms(store, "resid_post", layers=[7]),
        lambda store: dimension(store, "resid_post", 0, WIDTH),
        lambda store: dimension(store, "resid_post", 0, -1),
        lambda store: dimension(store, "resid_post", 9, 0),
        lambda store: top(store, "resid_post", 0, WIDTH),
        lambda store: token(store, "resid_post", TOTAL),
        lambda store: sequence(store, "resid_post", 0, 5),
        lambda store: sequence(store, "resid_post", 5, 0),
    ],
)
def test_what_is_not_there_is_an_index_error(store, ask):
    with pytest.raises(mmcache.OutOfRangeError):
        ask(store)


def test_a_direction_of_another_width_is_refused(store):
    with pytest.raises(mmcache.ShapeError, match=r"\(24,\)"):
        top(store, "resid_post", 0, np.ones(23))
    with pytest.raises(mmcache.UnknownSiteError):
        health(store, "mlp_in")


def test_a_sample_is_of_what_is_there_evenly_and_says_so(store):
    look = Sampler(store, "resid_post", [1], budget=200 * Sampler(store, "resid_post", [1]).record_bytes)
    sample = look.sample()
    assert 64 <= sample.looked <= 200
    assert sample.total == TOTAL
    assert f"{sample.looked:,} of {TOTAL:,} tokens" in sample.said
    assert np.array_equal(np.unique(sample.positions), sample.positions)
    assert sample.positions[0] < 64
    assert sample.positions[-1] > TOTAL - 64
    view = top(store, "resid_post", 1, OUTLIER, budget=look.budget)
    assert view.sampled == sample.said
    assert view.bytes_read <= look.budget


def test_shards_that_are_missing_are_gaps(tmp_path):
    store = make(tmp_path / "acts", "layer")
    (tmp_path / "acts" / "resid_post" / "c.1.1.0").unlink()
    store = mmcache.open(tmp_path / "acts", partial=True)
    view = norms(store, "resid_post")
    middles = (view["edges"][:-1] + view["edges"][1:]) / 2
    gone = (middles >= 512) & (middles < 1024)
    assert np.isnan(view["mean"][:, gone]).all()
    assert np.isfinite(view["mean"][:, ~gone]).all()
    assert health(store, "resid_post")["layers"][1]["rows"] < TOTAL - 512
    sample = Sampler(store, "resid_post", [1]).sample()
    assert not ((sample.positions >= 512) & (sample.positions < 1024)).any()
    assert sample.said
    assert Sampler(store, "resid_post", [0]).sample().said is None
    for file in shards(tmp_path / "acts" / "resid_post"):
        if file.name.startswith("c.1."):
            file.unlink()
    store = mmcache.open(tmp_path / "acts", partial=True)
    with pytest.raises(mmcache.IncompleteError):
        top(store, "resid_post", 1, 0)


def test_what_a_crash_left_ahead_of_the_commit_is_not_shown(tmp_path):
    path = tmp_path / "acts"
    grown(path).close()
    before = norms(mmcache.open(path), "a")
    writer = mmcache.append(path)
    writer.append(torch.zeros(100, dtype=torch.int64), {"a": torch.full((2, 100, 8), 1e6), "b": torch.ones(2, 100, 4)})
    abandon(writer)
    after = norms(mmcache.open(path), "a")
    assert after["edges"].tolist() == before["edges"].tolist()
    assert np.nanmax(after["max"]) == np.nanmax(before["max"]) or np.isnan(after["mean"][:, -1]).all()
    assert np.nanmax(after["max"]) < 1e5


def test_every_view_is_plain_data(store):
    for view in (
        health(store, "resid_post"), norms(store, "resid_post"), norms(store, "resid_post", stop=20),
        apart(store, "resid_post"), dimensions(store, "resid_post"), dimension(store, "resid_post", 0, 3),
        sequence(store, "resid_post", 0, 0), token(store, "resid_post", 3), top(store, "resid_post", 0, 1),
        find(store, token=3),
    ):  # fmt: skip
        said = json.loads(json.dumps(view.to_json(), allow_nan=False))
        assert said["view"] == view.name
        # The Python that it offers makes the same.
        again = eval(view.python, {"mmcache": mmcache, "store": store})  # noqa: S307 -- our own
        assert again.to_json()["data"] == view.to_json()["data"], view.python
        assert view.title in repr(view)


def test_text_is_found_across_tokens_and_not_across_sequences(tmp_path):
    texts = ["the shard is a shard", "shards", "is a", "nothing"]
    store = extracted(tmp_path / "acts", texts)
    view = find(store, "shard")
    assert view["count"] == 3
    assert view["sequences"] == 2
    first = view["matches"][0]
    assert (first["before"][-4:], first["text"], first["after"][:3]) == ("the ", "shard", " is")
    assert first["tokens"] == 5
    assert find(store, "a")["count"] == 5
    assert find(store, "shardshards")["count"] == 0, "these are two sequences"
    assert find(store, "s a")["count"] == 2
    overlapping = extracted(tmp_path / "other", ["aaaa"])
    assert find(overlapping, "aa")["count"] == 3
