"""Stores made by the public interface, read by programs that know nothing of mmcache, to the last bit."""

import hashlib
import json
import math

import numpy as np
import pytest
import tensorstore
import torch
import zarr
from obstore.store import from_url
from safetensors import safe_open
from zarr.storage import ObjectStore

import mmcache
from stores_and_processes import DTYPES, numpy_dtype, python, random_bits, raw, same, shards, without_sync

LAYOUTS = ("layer", "token")
# Tokens of the first append, by which inner chunks are kept small.
FIRST = 10


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    without_sync(monkeypatch)


def build(path, layout, dtype, widths, n_layers=2):
    """Make a store of several inner chunks a shard, and a last shard that is partly filled.

    Gives what each site holds, `[n_layers, n_tokens, d_model]`, of random bits.
    """
    rows = [width * dtype.itemsize * (n_layers if layout == "token" else 1) for width in widths]
    # Whole pages in each site, and at least three of the smallest inner chunks (64 KiB) in the narrowest.
    shard = max(4096 // math.gcd(row, 4096) for row in rows)
    while shard * min(rows) < 192 << 10:
        shard *= 2
    total = shard + shard // 2 + 5
    sites = {f"site_{width}": width for width in widths}
    held = {site: random_bits(n_layers, total, width, dtype=dtype, seed=width) for site, width in sites.items()}
    with mmcache.create(
        path, sites=sites, n_layers=n_layers, dtype=dtype, layout=layout, shard_tokens=shard, special_tokens=[0]
    ) as writer:
        for start, stop in [(0, FIRST), (FIRST, total)]:
            writer.append(torch.arange(start, stop), {site: values[:, start:stop] for site, values in held.items()})
    return held


def by_zarr(path):
    return zarr.open_array(path, mode="r")[:]


def by_tensorstore(path):
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}
    return tensorstore.open(spec, open=True, read=True).result().read().result()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", [(1, 7), (64, 129)], ids=str)
def test_every_reader_gives_the_same_bits(tmp_path, layout, dtype, widths):
    path = tmp_path / "acts"
    held = build(path, layout, dtype, widths)
    with mmcache.open(path) as store:
        for site, expected in held.items():
            said = json.loads((path / site / "zarr.json").read_text())
            grid = said["chunk_grid"]["configuration"]["chunk_shape"]
            inner = said["codecs"][0]["configuration"]["chunk_shape"]
            assert grid[1] >= 2 * inner[1], "one inner chunk a shard shows little"
            assert expected.shape[1] % inner[1], "the last inner chunk is not partly filled"
            assert all(same(store[site].get_layer(layer), expected[layer]) for layer in range(2))
            for read in (by_zarr, by_tensorstore):
                found = read(path / site)
                assert found.shape == tuple(expected.shape)
                assert found.dtype == numpy_dtype(dtype)
                assert raw(found) == raw(expected), read.__name__
            assert raw(by_safetensors(path / site, layout, expected.shape)) == raw(expected)
        for name, expected in {
            "tokens": store.tokens,
            "flags": store.flags,
            "sequences": store.sequences.numpy(),
        }.items():
            for read in (by_zarr, by_tensorstore):
                assert read(path / name).dtype == np.asarray(expected).dtype
                assert raw(read(path / name)) == raw(expected)


def by_safetensors(folder, layout, shape):
    """Put a site together from the shards as safetensors reads them: `[n_layers, n_tokens, d_model]`."""
    layers = [[] for _ in range(shape[0])]
    for block in range(len(shards(folder)) // (shape[0] if layout == "layer" else 1)):
        if layout == "layer":
            for layer in range(shape[0]):
                with safe_open(folder / f"c.{layer}.{block}.0", "pt") as file:
                    layers[layer].append(file.get_tensor("activations"))
        else:
            with safe_open(folder / f"c.0.{block}.0", "pt") as file:
                for layer, rows in enumerate(file.get_tensor("activations").unbind(1)):
                    layers[layer].append(rows)
    return torch.stack([torch.cat(parts) for parts in layers])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("seq_len", "d_model"), [(1, 1), (5000, 3), (33, 129)])
def test_every_reader_gives_a_caches_bits(tmp_path, dtype, seq_len, d_model):
    layers = [random_bits(seq_len, d_model, dtype=dtype, seed=layer) for layer in range(3)]
    path = tmp_path / "acts"
    with mmcache.FullActivationCache.with_capacity(3, path, shard_tokens=2048) as cache:
        for layer in layers:
            cache.push(layer)
    expected = torch.stack(layers)
    for found in (by_zarr(path / "resid_post"), by_tensorstore(path / "resid_post")):
        assert found.shape == (3, seq_len, d_model)
        assert raw(found) == raw(expected)
    assert raw(by_safetensors(path / "resid_post", "layer", expected.shape)) == raw(expected)


def test_the_group_lists_its_arrays(tmp_path):
    path = tmp_path / "acts"
    build(path, "token", torch.float32, (8, 16))
    group = zarr.open_group(path, mode="r")
    assert sorted(group.array_keys()) == ["flags", "sequences", "site_16", "site_8", "tokens"]
    assert group["site_8"].metadata.dimension_names == ("layer", "token", "d_model")
    assert np.isnan(group["site_8"].fill_value)
    assert group.attrs["mmcache"]["layout"] == "token"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_shard_that_is_gone_reads_as_nan_never_as_zeros(tmp_path, layout, dtype):
    path = tmp_path / "acts"
    held = build(path, layout, dtype, (8,))["site_8"]
    shards(path / "site_8")[0].unlink()
    for read in (by_zarr, by_tensorstore):
        found = torch.from_numpy(read(path / "site_8").astype(np.float32))
        size = json.loads((path / "site_8" / "zarr.json").read_text())["chunk_grid"]["configuration"]["chunk_shape"][1]
        gone = found[0, :size]
        assert gone.isnan().all()
        assert raw(found[1, size:]) == raw(held[1, size:].float())


def test_readers_see_the_last_commit_while_the_store_grows(tmp_path):
    path = tmp_path / "acts"
    rows = random_bits(2, 300, 8, dtype=torch.float32)
    with mmcache.create(path, sites={"a": 8}, n_layers=2, dtype=torch.float32, shard_tokens=256) as writer:
        for stop in (10, 200, 300):
            start = writer.n_tokens
            writer.append(torch.arange(start, stop), {"a": rows[:, start:stop]}, continues=start > 0)
            writer.commit()
            for read in (by_zarr, by_tensorstore):
                assert raw(read(path / "a")) == raw(rows[:, :stop])
                assert read(path / "tokens").tolist() == list(range(stop))
                assert read(path / "sequences").tolist() == [[0, stop, 0]]


STRANGER = """
import hashlib, json, sys
import numpy as np, tensorstore, zarr
from pathlib import Path
from safetensors import safe_open

found = {}
for path in sys.argv[1:]:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": path + "/"}}
    read = {"zarr": zarr.open_array(path, mode="r")[:], "tensorstore": tensorstore.open(spec).result().read().result()}
    for name, array in read.items():
        digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
        found[path + " " + name] = [str(array.dtype), list(array.shape), digest]
    for file in sorted(Path(path).glob("c.*")):
        with safe_open(file, "np") as opened:
            assert "activations" in opened.keys()
            assert opened.metadata()["array"] == Path(path).name
assert not [name for name in sys.modules if name.startswith("mmcache")]
print(json.dumps(found))
"""


def test_a_process_that_never_imports_mmcache_reads_them(tmp_path):
    expected = {}
    for layout in LAYOUTS:
        for dtype in (torch.float16, torch.float32, torch.float64):
            path = tmp_path / f"{layout} {dtype}"
            for site, held in build(path, layout, dtype, (7, 64)).items():
                said = [str(dtype).removeprefix("torch."), list(held.shape), hashlib.sha256(raw(held)).hexdigest()]
                expected |= {f"{path / site} {reader}": said for reader in ("zarr", "tensorstore")}
    done = python(STRANGER, *sorted({name.rsplit(" ", 1)[0] for name in expected}))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.filterwarnings("ignore::UserWarning:zarr")  # bfloat16 is no core dtype of its own
def test_zarr_and_tensorstore_read_it_from_the_bucket(tmp_path, s3_server, layout, dtype):
    held = build(tmp_path / "acts", layout, dtype, (64,))
    mmcache.push(tmp_path / "acts", s3_server.url("acts"))
    kvstore = {
        "driver": "s3", "bucket": s3_server.bucket, "endpoint": s3_server.endpoint, "aws_region": "us-east-1",
        "aws_credentials": {"type": "environment"},
    }  # fmt: skip
    for site, values in held.items():
        client = from_url(s3_server.url("acts"))
        assert zarr.open_array(ObjectStore(client, read_only=True), path=site, mode="r")[:].tobytes() == raw(values)
        spec = {"driver": "zarr3", "kvstore": {**kvstore, "path": f"acts/{site}/"}}
        assert tensorstore.open(spec, open=True, read=True).result().read().result().tobytes() == raw(values)
