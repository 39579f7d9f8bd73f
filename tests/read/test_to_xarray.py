"""A store as a lazy xarray.Dataset: the same bits by every key, and nothing read that was not asked for."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mmcache
from stores_and_processes import DTYPES, damage, numpy_dtype, random_bits, raw, shards, tree, without_sync

xarray = pytest.importorskip("xarray")

LAYOUTS = ("layer", "token")
TOTAL = 300


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    without_sync(monkeypatch)


def build(path, layout, dtype, sites, n_layers=3, total=TOTAL):
    """Make a store of two blocks and two sequences, and give what each site holds: `[layers, tokens, width]`."""
    held = {site: random_bits(n_layers, total, width, dtype=dtype, seed=width) for site, width in sites.items()}
    with mmcache.create(
        path, sites=sites, n_layers=n_layers, dtype=dtype, layout=layout, shard_tokens=2048 if total > 2048 else 256,
        special_tokens=[7], metadata={"why": "to see"},
    ) as writer:  # fmt: skip
        for start, stop in [(0, 100), (100, total)]:
            writer.append(torch.arange(start, stop), {site: values[:, start:stop] for site, values in held.items()})
    return held


@pytest.fixture(scope="module", params=LAYOUTS)
def made(request, tmp_path_factory):
    """Give a float32 store, and what it holds as numpy arrays."""
    path = tmp_path_factory.mktemp("xarray") / "acts"
    held = build(path, request.param, torch.float32, {"mlp_in": 8, "mlp_out": 16})
    with mmcache.open(path) as store:
        yield store, {site: values.numpy() for site, values in held.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_gives_the_same_bits(tmp_path, layout, dtype):
    held = build(tmp_path / "acts", layout, dtype, {"a": 8, "b": 8})
    with mmcache.open(tmp_path / "acts") as store:
        data = store.to_xarray()
        for site, expected in held.items():
            assert data[site].dtype == numpy_dtype(dtype)
            assert data[site].dims == ("layer", "token", "d_model")
            assert raw(data[site].values) == raw(expected)
            assert raw(data[site].isel(token=[270, 3, 3]).sel(layer=2).values) == raw(expected[2, [270, 3, 3]])


def test_what_the_dataset_says(made):
    store, _ = made
    data = store.to_xarray()
    assert dict(data.sizes) == {"layer": 3, "token": TOTAL, "d_model_mlp_in": 8, "d_model_mlp_out": 16}
    assert data["mlp_out"].dims == ("layer", "token", "d_model_mlp_out")
    assert set(data.coords) == {"layer", "token_id", "flags", "sequence"}
    assert data["layer"].values.tolist() == [0, 1, 2]
    assert data["token_id"].values.tolist() == store.tokens.tolist()
    first = dict.fromkeys((0, 100), 4)
    assert data["flags"].values.tolist() == [2 if token == 7 else first.get(token, 0) for token in range(TOTAL)]
    assert data["flags"].attrs == {"flag_masks": [1, 2, 4], "flag_meanings": "bos special first"}
    assert data["sequence"].values.tolist() == [0] * 100 + [1] * 200
    assert (data["token_id"].dtype, data["flags"].dtype, data["sequence"].dtype) == (np.int32, np.uint8, np.int64)
    assert data.attrs["metadata"] == {"why": "to see"}
    assert (data.attrs["path"], data.attrs["kind"]) == (str(store.path), "grown")
    assert (data.attrs["layout"], data.attrs["storage_dtype"]) == (store.layout, "float32")
    data.attrs["metadata"]["why"] = "changed"
    assert store.metadata == {"why": "to see"}


def keys(size, data):
    """Draw what indexes a dimension: a whole number, a slice, or a list, negative ones too."""
    whole = st.integers(-size, size - 1)
    edge = st.none() | st.integers(-size - 2, size + 2)
    step = st.none() | st.integers(1, 5) | st.integers(-5, -1)
    # xarray itself has no empty slice that goes backwards: it looks for its last element.
    slices = st.builds(slice, edge, edge, step).filter(lambda key: (key.step or 1) > 0 or range(size)[key])
    return data.draw(whole | slices | st.lists(whole, max_size=6))


@given(data=st.data())
def test_any_key_gives_what_numpy_gives(made, data):
    store, held = made
    drawn = [keys(size, data) for size in held["mlp_in"].shape]
    expected = held["mlp_in"]
    # An axis at a time, from the last, so that whole numbers move none of those still to come.
    for axis in (2, 1, 0):
        at = np.array(drawn[axis], np.int64) if isinstance(drawn[axis], list) else drawn[axis]
        expected = expected[(slice(None),) * axis + (at,)]
    found = store.to_xarray()["mlp_in"][tuple(drawn)].values
    assert found.shape == expected.shape
    assert raw(found) == raw(expected)


@given(data=st.data())
def test_columns_too(made, data):
    store, _ = made
    dataset = store.to_xarray()
    key = keys(TOTAL, data)
    at = np.array(key, np.int64) if isinstance(key, list) else key
    assert np.array_equal(dataset["token_id"][key].values, store.tokens.numpy()[at])
    assert np.array_equal(dataset["sequence"][key].values, (np.arange(TOTAL) >= 100)[at])


def test_pointwise_selection(made):
    store, held = made
    layers = xarray.DataArray([2, 0, 2], dims="point")
    tokens = xarray.DataArray([299, 0, 5], dims="point")
    found = store.to_xarray()["mlp_out"].isel(layer=layers, token=tokens).values
    assert raw(found) == raw(held["mlp_out"][[2, 0, 2], [299, 0, 5]])


def test_selections_are_put_off_and_computed(made):
    store, held = made
    data = store.to_xarray()
    picked = data["mlp_in"].isel(token=slice(10, 200)).sel(layer=[2, 0]).isel(token=[5, 1])
    assert not picked.variable._in_memory
    assert raw(picked.values) == raw(held["mlp_in"][[2, 0]][:, [15, 11]])
    inside = data.isel(token=slice(100, 300))
    with np.errstate(all="ignore"):
        means = inside["mlp_out"].mean("token").values
        assert raw(means) == raw(xarray.DataArray(held["mlp_out"][:, 100:300]).mean("dim_1").values)
    assert (inside["sequence"] == 1).all()


def test_bfloat16_is_computed_with_as_another_dtype(tmp_path):
    rows = torch.randn(2, TOTAL, 8).bfloat16()
    with mmcache.create(tmp_path / "acts", sites={"a": 8}, n_layers=2) as writer:
        writer.append(torch.arange(TOTAL), {"a": rows})
    store = mmcache.open(tmp_path / "acts")
    expected = rows.float().numpy().mean(axis=1)
    np.testing.assert_allclose(store.to_xarray(dtype="float32")["a"].mean("token"), expected, rtol=1e-5, atol=1e-6)
    later = store.to_xarray()["a"].sel(layer=1).astype("float32").mean("token")
    np.testing.assert_allclose(later, expected[1], rtol=1e-5, atol=1e-6)
    assert store.to_xarray(dtype=torch.float64)["a"].dtype == np.float64
    with pytest.raises(mmcache.DtypeError, match="int8"):
        store.to_xarray(dtype=torch.int8)


def test_opening_and_printing_read_nothing_and_reading_reads_what_is_asked(tmp_path):
    path, total = tmp_path / "acts", (1 << 20) + 100
    build(path, "token", torch.float32, {"a": 1}, n_layers=1, total=total)
    for name in ("a", "tokens", "flags"):
        damage(shards(path / name)[-1], lambda data: bytes(len(data)))
    store = mmcache.open(path)
    data = store.to_xarray()
    assert "token_id" in repr(data)
    assert "token_id" in data._repr_html_()
    assert data["token_id"][[5, 1000]].values.tolist() == [5, 1000]
    assert data.isel(token=slice(1 << 19, (1 << 19) + 3))["token_id"].values.tolist() == [524288, 524289, 524290]
    assert data["a"][0, 4, 0].shape == ()
    for name in ("a", "token_id", "flags"):
        with pytest.raises(mmcache.CorruptError):
            data[name].isel(token=-1).load()


def test_writing_to_the_dataset_never_reaches_the_file(made):
    store, held = made
    before = tree(store.path)
    data = store.to_xarray()
    data["mlp_in"][0, 0, 0] = 5.0
    data["mlp_in"].values[:] = 1.0
    loaded = store.to_xarray().isel(token=slice(0, 4)).load()
    loaded["mlp_out"][:] = 2.0
    loaded["token_id"][:] = 0
    assert tree(store.path) == before
    assert raw(store.to_xarray()["mlp_in"].values) == raw(held["mlp_in"])
    assert store.tokens[:4].tolist() == [0, 1, 2, 3]


def test_a_cache(tmp_path):
    layers = torch.randn(2, 40, 8)
    with mmcache.FullActivationCache.with_capacity(2, tmp_path / "acts") as cache:
        for layer in layers:
            cache.push(layer)
    data = mmcache.open(tmp_path / "acts").to_xarray()
    assert raw(data["resid_post"].values) == raw(layers)
    assert data["token_id"][[3, 4]].values.tolist() == [-1, -1]
    assert data["flags"].values.tolist() == [0] * 40
    assert data["sequence"].values.tolist() == [0] * 40


def test_an_extraction_keeps_the_models_layer_numbers_and_where_it_came_from(tmp_path):
    small = pytest.importorskip("small_models")
    store = mmcache.extract(
        small.llama(), small.byte_tokenizer(), ["a text"], tmp_path / "acts", sites=("mlp_in",), layers=[0, 2],
        context_length=16, batch_size=1, dtype=torch.float32,
    )  # fmt: skip
    data = store.to_xarray()
    assert data["layer"].values.tolist() == [0, 2]
    assert raw(data["mlp_in"].sel(layer=2).values) == raw(store["mlp_in"].get_layer(2))
    with pytest.raises(KeyError):
        data["mlp_in"].sel(layer=1)
    assert data.attrs["source"] == store.source
    assert len(data["mlp_in"].attrs["modules"]) == 2


def test_a_partial_store_raises_for_rows_that_are_not_there(tmp_path):
    small = pytest.importorskip("small_models")
    store = mmcache.extract(
        small.llama(), small.byte_tokenizer(), ["some text. " * 60], tmp_path / "acts", sites=("mlp_in",),
        context_length=64, batch_size=1, dtype=torch.float32, layout="token", shard_tokens=256,
    )  # fmt: skip
    expected = store["mlp_in"].get_layer(1)
    shards(tmp_path / "acts" / "mlp_in")[0].unlink()
    data = mmcache.open(tmp_path / "acts", partial=True).to_xarray()
    with pytest.raises(mmcache.IncompleteError):
        data["mlp_in"][1, 100].load()
    assert raw(data["mlp_in"][1, 300:].values) == raw(expected[300:])


@pytest.mark.parametrize("name", ["layer", "token", "d_model", "token_id", "sequence"])
def test_a_site_with_a_name_of_the_dataset_is_refused(tmp_path, name):
    build(tmp_path / "acts", "token", torch.float32, {name: 8})
    with pytest.raises(mmcache.ArgumentError, match=f"site '{name}' of .* read it with store"):
        mmcache.open(tmp_path / "acts").to_xarray()


def test_without_xarray_it_says_what_to_install(made, monkeypatch):
    monkeypatch.setitem(sys.modules, "xarray", None)
    monkeypatch.delitem(sys.modules, "mmcache.read.to_xarray")
    with pytest.raises(ImportError, match=r"pip install 'mmcache\[xarray\]'"):
        made[0].to_xarray()
