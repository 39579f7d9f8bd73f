"""Casts and normalising, against plain torch."""

import pytest
import torch

import mmcache
from dataset_feeds import LAYERS, make_store
from mmcache.training import fetcher as module
from mmcache.training.fetcher import Conversion
from stores_and_processes import DTYPES, same, without_sync


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        without_sync(patch)
        root = tmp_path_factory.mktemp("conversion")
        return {dtype: make_store(root / str(dtype), [40, 60], dtype=dtype, sites={"a": 24}) for dtype in DTYPES}


def converted(conversion, rows):
    out = torch.full(rows.shape, float("nan"), dtype=conversion.dtype)
    if not conversion.staged:
        out.copy_(rows)
        rows = out
    conversion.apply(rows, out)
    return out


@pytest.mark.parametrize("layers", [None, [2, 0]])
@pytest.mark.parametrize("normalize", [None, "scalar", "per_dim"])
@pytest.mark.parametrize("dtype", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("stored", DTYPES, ids=str)
def test_it_is_what_torch_makes_of_it(stores, stored, dtype, normalize, layers, monkeypatch):
    # Pieces of seven rows, the last of which is a part.
    monkeypatch.setattr(module, "_PIECE_BYTES", 7 * LAYERS * 24 * 4)
    view = stores[stored]["a"]
    rows = view.gather(range(100), layers=layers)
    wanted = rows
    if normalize is not None:
        wide = torch.float64 if stored == torch.float64 else torch.float32
        shift, scale = view.statistics.normalizer(normalize)
        slots = [0, 1, 2] if layers is None else layers
        wanted = (rows.to(wide) - shift[slots].to(wide)) * scale[slots].to(wide)
    wanted = wanted.to(stored if dtype is None else dtype)
    conversion = Conversion(view, layers, dtype, normalize)
    assert same(converted(conversion, rows), wanted)
    assert same(conversion.on_device(rows.clone()), wanted)
    assert converted(conversion, rows[:0]).shape == (0, *rows.shape[1:])


def test_normalised_rows_are_as_the_conventions_say(stores):
    store = stores[torch.float32]
    counted = (store.flags & 3) == 0
    rows = store["a"].gather(counted.nonzero()[:, 0])
    scaled = converted(Conversion(store["a"], None, None, "scalar"), rows)
    assert torch.allclose(scaled.norm(dim=2).mean(dim=0), torch.tensor(24.0).sqrt(), rtol=1e-5)
    centred = converted(Conversion(store["a"], None, None, "per_dim"), rows)
    assert centred.mean(dim=0).abs().max() < 1e-5
    assert torch.allclose(centred.std(dim=0, correction=0), torch.ones(LAYERS, 24), rtol=1e-4)


@pytest.mark.parametrize(("normalize", "empty"), [("scalar", "zeros"), ("scalar", "none"), ("per_dim", "none")])
def test_a_layer_without_statistics_is_refused(tmp_path, normalize, empty):
    rows = torch.randn(2, 10, 4)
    rows[1] = 0 if empty == "zeros" else float("nan")
    with mmcache.create(tmp_path / "acts", sites={"a": 4}, n_layers=2, dtype=torch.float32) as writer:
        writer.append(range(10), {"a": rows})
    view = mmcache.open(tmp_path / "acts")["a"]
    with pytest.raises(mmcache.ArgumentError, match=f"normalize='{normalize}': the statistics of a, layer 1,"):
        Conversion(view, None, None, normalize)
    assert same(converted(Conversion(view, [0], None, None), rows[:1].transpose(0, 1)), rows[:1].transpose(0, 1))
    Conversion(view, [0], None, normalize)
