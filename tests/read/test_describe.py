"""What a store is, from names alone: equal to what it says of itself, and without torch."""

import subprocess
import sys

import pytest
import torch

import mmcache
from damaged_stores import MAKERS, extracted
from mmcache.read.describe import overview


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_it_says_what_the_store_says(tmp_path, make):
    make(tmp_path / "acts").close()
    store, said = mmcache.open(tmp_path / "acts"), overview(tmp_path / "acts")
    for name in ("kind", "layout", "n_tokens", "n_sequences", "n_layers", "shard_tokens", "metadata", "source"):
        assert said[name] == getattr(store, name), name
    assert said["complete"]
    assert said["layers"] == list(store.layers)
    assert said["dtype"] == str(store.dtype).removeprefix("torch.")
    assert list(said["sites"]) == list(store.sites)
    for site, about in said["sites"].items():
        assert about["shards"] == store.n_shards(site) == len(list((tmp_path / "acts" / site).glob("c.*")))
        assert about["d_model"] == store.d_model(site)
        assert about["missing"] == 0
        assert set(about["present"]) == {1.0}
    sizes = [file.stat().st_size for site in store.sites for file in (tmp_path / "acts" / site).glob("c.*")]
    assert said["bytes"] == sum(sizes)


@pytest.mark.parametrize("layout", ["token", "layer"])
def test_it_says_where_shards_are_missing(tmp_path, layout):
    path = tmp_path / "acts"
    extracted(path, layout=layout)
    (path / "mlp_in" / "c.0.1.0").unlink()
    said = overview(path)
    deep = 3 if layout == "layer" else 1
    assert said["sites"]["mlp_in"]["missing"] == 1
    assert said["sites"]["mlp_in"]["present"] == [1.0, pytest.approx(1 - 1 / deep), *[1.0] * 3]
    assert not said["complete"]


def test_many_shards_are_told_in_a_hundred_stretches(tmp_path):
    path = tmp_path / "acts"
    with mmcache.create(path, sites={"a": 2048}, n_layers=1, dtype=torch.float32, shard_tokens=2) as writer:
        writer.append(torch.arange(406), {"a": torch.randn(1, 406, 2048)})
    for block in (0, 3, 202):
        (path / "a" / f"c.0.{block}.0").unlink()
    about = overview(path)["sites"]["a"]
    assert (about["shards"], about["missing"], len(about["present"])) == (203, 3, 100)
    assert [at for at, part in enumerate(about["present"]) if part < 1] == [0, 1, 99]
    edges = [at * 203 // 100 for at in range(101)]
    there = sum(part * (stop - start) for part, start, stop in zip(about["present"], edges, edges[1:], strict=False))
    assert there == pytest.approx(200)


def test_a_store_that_is_not_there(tmp_path):
    with pytest.raises(mmcache.StoreNotFoundError):
        overview(tmp_path)


def test_the_command_that_answers_at_once_loads_no_torch(tmp_path):
    extracted(tmp_path / "acts").close()
    code = (
        "import sys; from click.testing import CliRunner; from mmcache.cli import main;"
        f"done = CliRunner().invoke(main, ['info', {str(tmp_path / 'acts')!r}]);"
        "print(done.exit_code, 'torch' in sys.modules, 'mlp_in' in done.output)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "False", "True"]
