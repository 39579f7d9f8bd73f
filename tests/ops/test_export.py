"""Exports, read back by programs that know nothing of mmcache: safetensors, numpy and json."""

import errno
import importlib
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open

import mmcache
from mmcache.cli import main
from mmcache.format.manifest import read_manifest
from mmcache.ops import export
from stores_and_processes import DTYPES, damage, numpy_dtype, python, random_bits, raw, shards, tree, without_sync

# Under its own name there is the function.
module = importlib.import_module("mmcache.ops.export")

LAYOUTS = ("layer", "token")
both_layouts = pytest.mark.parametrize("layout", LAYOUTS)
SITES = {"mlp_in": 8, "mlp_out": 24}
TOTAL = 700


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    without_sync(monkeypatch)


def build(path, layout, dtype=torch.float32, sites=SITES, total=TOTAL):
    """Make a store of three blocks and two sequences, and give what each site holds: `[layers, tokens, width]`."""
    held = {site: random_bits(3, total, width, dtype=dtype, seed=width) for site, width in sites.items()}
    with mmcache.create(
        path, sites=sites, n_layers=3, dtype=dtype, layout=layout, shard_tokens=256, special_tokens=[5],
        metadata={"why": "é"},
    ) as writer:  # fmt: skip
        for start, stop in [(0, 100), (100, total)]:
            writer.append(torch.arange(start, stop), {site: rows[:, start:stop] for site, rows in held.items()})
    return held


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def by_safetensors(out):
    """Put sites together as the index says, and read the tokens: knowing no more than the docstring."""
    index = json.loads((out / "index.json").read_text())
    sites = {}
    for site, said in index["sites"].items():
        parts = {layer: [] for layer in index["layers"]}
        for entry in said["files"]:
            with safe_open(out / entry["file"], "pt") as file:
                rows = file.get_tensor("activations")
            assert len(rows) == entry["tokens"][1] - entry["tokens"][0]
            rows = rows if index["axes"] == ["token", "layer", "d_model"] else rows[:, None]
            assert rows.shape[1:] == (len(entry["layers"]), said["d_model"])
            for place, layer in enumerate(entry["layers"]):
                parts[layer].append((entry["tokens"][0], rows[:, place]))
        for layer, found in parts.items():
            assert [start for start, _ in found] == sorted(start for start, _ in found), layer
        sites[site] = torch.stack([torch.cat([rows for _, rows in parts[layer]]) for layer in index["layers"]])
    columns = {}
    for name in index["tokens"]:
        with safe_open(out / name, "np") as file:
            columns |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 -- it is no dict
    return sites, columns


def check_columns(columns, total=TOTAL):
    assert columns["tokens"].dtype == np.int32
    assert columns["tokens"].tolist() == list(range(total))
    assert columns["flags"].tolist() == [4 if token in (0, 100) else 2 if token == 5 else 0 for token in range(total)]
    assert columns["sequences"].tolist() == [[0, 100, 0], [100, total, 1]]


@both_layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_safetensors_are_links_with_the_same_bits(tmp_path, layout, dtype):
    held = build(tmp_path / "acts", layout, dtype)
    done = mmcache.export(tmp_path / "acts", tmp_path / "out", to="safetensors")
    sites, columns = by_safetensors(tmp_path / "out")
    assert list(sites) == list(SITES)
    for site, rows in held.items():
        assert sites[site].dtype == dtype
        assert raw(sites[site]) == raw(rows)
        ours = {file.stat().st_ino for file in shards(tmp_path / "acts" / site)}
        linked = sorted((tmp_path / "out" / site).iterdir())
        assert {file.stat().st_ino for file in linked} == ours
        assert not any(file.stat().st_mode & 0o222 for file in linked)
    check_columns(columns)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert done.files == len(files)
    assert done.path == tmp_path / "out"
    assert done.linked_bytes == sum(file.stat().st_size for site in SITES for file in shards(tmp_path / "acts" / site))
    assert done.written_bytes == (tmp_path / "out" / "tokens.safetensors").stat().st_size
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["metadata"] == {"why": "é"}
    assert (index["dtype"], index["n_tokens"], index["n_sequences"]) == (str(dtype).split(".")[1], TOTAL, 2)


@both_layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("piece", [1, 5000, 1 << 20])
def test_npy_has_the_same_bits(tmp_path, layout, dtype, piece, monkeypatch):
    monkeypatch.setattr(export, "_PIECE_BYTES", piece)
    held = build(tmp_path / "acts", layout, dtype)
    done = mmcache.export(tmp_path / "acts", tmp_path / "out", to="npy")
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    for site, rows in held.items():
        (entry,) = index["sites"][site]["files"]
        found = np.load(tmp_path / "out" / entry["file"], mmap_mode="r")
        if dtype == torch.bfloat16:
            assert (entry["file"], found.dtype) == (f"{site}.bf16.npy", np.uint16)
            found = found.view(ml_dtypes.bfloat16)
        else:
            assert entry["file"] == f"{site}.npy"
        assert (found.dtype, found.shape) == (numpy_dtype(dtype), tuple(rows.shape))
        assert raw(found) == raw(rows)
    check_columns({name: np.load(tmp_path / "out" / f"{name}.npy") for name in ("tokens", "flags", "sequences")})
    sizes = [path.stat().st_size for path in (tmp_path / "out").iterdir() if path.suffix == ".npy"]
    assert (done.files, done.written_bytes, done.linked_bytes) == (len(sizes) + 1, sum(sizes), 0)


@both_layouts
@pytest.mark.parametrize("to", ["safetensors", "npy"])
def test_a_part_of_it_in_the_order_asked(tmp_path, layout, to, monkeypatch):
    monkeypatch.setattr(export, "_PIECE_BYTES", 5000)
    held = build(tmp_path / "acts", layout)
    done = mmcache.export(tmp_path / "acts", tmp_path / "out", to=to, sites=["mlp_out"], layers=[2, 0])
    if to == "npy":
        found = {"mlp_out": np.load(tmp_path / "out" / "mlp_out.npy")}
        assert not (tmp_path / "out" / "mlp_in.npy").exists()
    else:
        found, columns = by_safetensors(tmp_path / "out")
        check_columns(columns)
        # What does not fit a file is written anew, what does is linked.
        assert bool(done.linked_bytes) == (layout == "layer")
    assert list(found) == ["mlp_out"]
    assert raw(found["mlp_out"]) == raw(held["mlp_out"][[2, 0]])


@both_layouts
@pytest.mark.parametrize("to", ["safetensors", "npy"])
def test_a_cast(tmp_path, layout, to):
    rows = torch.randn(3, TOTAL, 8).bfloat16()
    with mmcache.create(tmp_path / "acts", sites={"a": 8}, n_layers=3, layout=layout, shard_tokens=256) as writer:
        writer.append(torch.arange(TOTAL), {"a": rows})
    done = mmcache.export(tmp_path / "acts", tmp_path / "out", to=to, dtype="float32")
    found = np.load(tmp_path / "out" / "a.npy") if to == "npy" else by_safetensors(tmp_path / "out")[0]["a"].numpy()
    assert found.dtype == np.float32
    assert raw(found) == raw(rows.float())
    assert done.linked_bytes == 0
    assert json.loads((tmp_path / "out" / "index.json").read_text())["dtype"] == "float32"


def uncount(path, total):
    """Make a grown store count fewer tokens than are in its shards, as after a crash."""
    manifest = read_manifest(path)
    damage(path / "zarr.json", lambda _: replace(manifest, n_tokens=total).to_json())


@both_layouts
@pytest.mark.parametrize("to", ["safetensors", "npy"])
def test_rows_that_do_not_count_are_left_out(tmp_path, layout, to):
    held = build(tmp_path / "acts", layout)
    uncount(tmp_path / "acts", 650)
    done = mmcache.export(tmp_path / "acts", tmp_path / "out", to=to)
    if to == "npy":
        found = {site: np.load(tmp_path / "out" / f"{site}.npy") for site in SITES}
        columns = {name: np.load(tmp_path / "out" / f"{name}.npy") for name in ("tokens", "flags", "sequences")}
    else:
        found, columns = by_safetensors(tmp_path / "out")
        counted = [len(shards(tmp_path / "acts" / site)) * 2 // 3 for site in SITES]
        linked = [file for file in (tmp_path / "out").rglob("*") if file.is_file() and file.stat().st_nlink == 2]
        assert len(linked) == sum(counted), "the last block is written anew, the others are linked"
        assert done.linked_bytes == sum(file.stat().st_size for file in linked)
    for site, rows in held.items():
        assert raw(found[site]) == raw(rows[:, :650])
    check_columns(columns, 650)


def test_an_export_is_of_the_store_as_it_was_opened(tmp_path):
    held = build(tmp_path / "acts", "token")
    store = mmcache.open(tmp_path / "acts")
    with mmcache.append(tmp_path / "acts") as writer:
        writer.append(torch.arange(50), {site: rows[:, :50] for site, rows in held.items()})
    mmcache.export(store, tmp_path / "out", to="safetensors")
    found, columns = by_safetensors(tmp_path / "out")
    assert all(raw(found[site]) == raw(rows) for site, rows in held.items())
    check_columns(columns)
    # And growing on does not change it.
    before = tree(tmp_path / "out")
    with mmcache.append(tmp_path / "acts") as writer:
        writer.append(torch.arange(50), {site: rows[:, :50] for site, rows in held.items()})
    assert tree(tmp_path / "out") == before


def test_a_cache_has_no_tokens(tmp_path):
    layers = random_bits(2, 90, 8, dtype=torch.bfloat16)
    with mmcache.FullActivationCache.with_capacity(2, tmp_path / "acts") as cache:
        for layer in layers:
            cache.push(layer)
    for to in ("safetensors", "npy"):
        mmcache.export(tmp_path / "acts", tmp_path / to, to=to)
        assert not list((tmp_path / to).glob("tokens*"))
    found, columns = by_safetensors(tmp_path / "safetensors")
    assert raw(found["resid_post"]) == raw(layers)
    assert columns == {}
    assert raw(np.load(tmp_path / "npy" / "resid_post.bf16.npy")) == raw(layers)


def test_another_file_system_gets_copies(tmp_path, monkeypatch):
    held = build(tmp_path / "acts", "token")

    def refuse(*_args, **_kwargs):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)
    done = mmcache.export(tmp_path / "acts", tmp_path / "out", to="safetensors")
    found, columns = by_safetensors(tmp_path / "out")
    assert all(raw(found[site]) == raw(rows) for site, rows in held.items())
    check_columns(columns)
    assert done.linked_bytes == 0
    assert all(path.stat().st_nlink == 1 for path in (tmp_path / "out").rglob("*") if path.is_file())


def test_a_shard_that_is_not_what_belongs_there_is_refused(tmp_path):
    build(tmp_path / "acts", "token")
    damage(shards(tmp_path / "acts" / "mlp_out")[1], lambda data: data[:4096] + data[8192:])
    with pytest.raises(mmcache.CorruptError, match="cut short"):
        mmcache.export(tmp_path / "acts", tmp_path / "out", to="safetensors")
    assert names(tmp_path) == ["acts"]


def test_damaged_tokens_are_refused(tmp_path):
    build(tmp_path / "acts", "token")
    damage(shards(tmp_path / "acts" / "tokens")[0], lambda data: data[:5000] + b"\x01" + data[5001:])
    for to in ("safetensors", "npy"):
        with pytest.raises(mmcache.CorruptError, match="checksum"):
            mmcache.export(tmp_path / "acts", tmp_path / "out", to=to)
    assert names(tmp_path) == ["acts"]


def test_what_is_missing_is_told_before_anything_is_written(tmp_path, monkeypatch):
    small = pytest.importorskip("small_models")
    path = tmp_path / "acts"
    mmcache.extract(
        small.llama(), small.byte_tokenizer(), ["some text. " * 60], path, sites=("mlp_in", "mlp_out"),
        layers=[0, 2], context_length=64, batch_size=1, layout="layer", shard_tokens=1024,
    )  # fmt: skip
    expected = mmcache.open(path)["mlp_in"].get_layer(2)
    (path / "mlp_in" / "c.0.0.0").unlink()
    monkeypatch.setattr(module, "AtomicFolder", None)
    with pytest.raises(mmcache.IncompleteError, match=r"1 shards of mlp_in .* `mmcache extract` again"):
        mmcache.export(path, tmp_path / "out", to="npy")
    monkeypatch.undo()
    mmcache.export(path, tmp_path / "out", to="safetensors", sites=["mlp_in"], layers=[2])
    assert raw(by_safetensors(tmp_path / "out")[0]["mlp_in"][0]) == raw(expected)
    assert (
        json.loads((tmp_path / "out" / "index.json").read_text())["source"] == mmcache.open(path, partial=True).source
    )


def test_a_full_disk_is_met_before_the_work(tmp_path, monkeypatch):
    build(tmp_path / "acts", "token")
    needed = 3 * TOTAL * 32 * 4 + TOTAL * 5
    monkeypatch.setattr(module, "free_bytes", lambda _: needed - 1)
    with pytest.raises(mmcache.DiskFullError, match=f"{needed} bytes, and {needed - 1} are free"):
        mmcache.export(tmp_path / "acts", tmp_path / "out", to="npy")
    assert names(tmp_path) == ["acts"]
    mmcache.export(tmp_path / "acts", tmp_path / "out", to="safetensors")  # links take none


@pytest.mark.parametrize("to", ["safetensors", "npy"])
def test_a_disk_that_fills_up_leaves_nothing(tmp_path, monkeypatch, to):
    build(tmp_path / "acts", "token")
    left, write = [5], os.pwrite

    def writing(fd, data, offset):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", writing)
    with pytest.raises(mmcache.DiskFullError, match="no room"):
        mmcache.export(tmp_path / "acts", tmp_path / "out", to=to, dtype="float16")
    assert names(tmp_path) == ["acts"]


def test_an_interrupt_leaves_nothing(tmp_path):
    build(tmp_path / "acts", "token")

    def interrupt(_done, _total):
        raise KeyboardInterrupt

    for to in ("safetensors", "npy"):
        with pytest.raises(KeyboardInterrupt):
            mmcache.export(tmp_path / "acts", tmp_path / "out", to=to, progress=interrupt)
    assert names(tmp_path) == ["acts"]


def test_progress_counts_every_byte(tmp_path):
    build(tmp_path / "acts", "token")
    for to, dtype in (("safetensors", None), ("safetensors", "float64"), ("npy", "float16")):
        seen = []
        out = tmp_path / f"{to} {dtype}"
        mmcache.export(tmp_path / "acts", out, to=to, dtype=dtype, progress=lambda *said, seen=seen: seen.append(said))
        total = 3 * TOTAL * 32 * {None: 4, "float64": 8, "float16": 2}[dtype]
        assert {said[1] for said in seen} == {total}
        assert [said[0] for said in seen] == sorted({said[0] for said in seen})
        assert seen[-1][0] == total


def test_the_store_is_not_touched(tmp_path):
    build(tmp_path / "acts", "token")
    before = tree(tmp_path / "acts")
    for to in ("safetensors", "npy"):
        mmcache.export(tmp_path / "acts", tmp_path / to, to=to)
    assert tree(tmp_path / "acts") == before


@pytest.mark.parametrize(
    ("out", "options", "error", "said"),
    [
        ("out", {"to": "zarr"}, mmcache.ArgumentError, "'zarr': expected 'safetensors' or 'npy'"),
        ("acts", {"to": "npy"}, mmcache.ArgumentError, "lies in the store"),
        ("acts/out", {"to": "npy"}, mmcache.ArgumentError, "lies in the store"),
        ("taken", {"to": "npy"}, mmcache.StoreExistsError, "something there already"),
        ("out", {"to": "npy", "layers": [7]}, mmcache.OutOfRangeError, "layer 7"),
        ("out", {"to": "npy", "sites": ["x"]}, mmcache.UnknownSiteError, "'x'"),
        ("out", {"to": "npy", "dtype": "int8"}, mmcache.DtypeError, "int8"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, out, options, error, said):
    build(tmp_path / "acts", "token")
    (tmp_path / "taken").mkdir()
    with pytest.raises(error, match=said):
        mmcache.export(tmp_path / "acts", tmp_path / out, **options)
    assert names(tmp_path) == ["acts", "taken"]


def test_a_process_that_never_imports_mmcache_reads_it(tmp_path):
    held = build(tmp_path / "acts", "token", torch.bfloat16)
    mmcache.export(tmp_path / "acts", tmp_path / "out", to="npy", dtype="float32")
    code = (
        "import sys, numpy; print(numpy.load(sys.argv[1])[2, 699].tobytes().hex()); assert 'mmcache' not in sys.modules"
    )
    done = python(code, tmp_path / "out" / "mlp_in.npy")
    assert done.stdout.strip() == raw(held["mlp_in"][2, 699].float()).hex(), done.stderr


def test_the_command(tmp_path):
    held = build(tmp_path / "acts", "layer")
    out = str(tmp_path / "out")
    given = [str(tmp_path / "acts"), "--out", out, "--to", "npy", "--sites", " mlp_in", "--layers", "0-1"]
    done = CliRunner().invoke(main, ["export", *given, "--dtype", "float64", "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert (said["path"], said["files"], said["linked_bytes"]) == (out, 5, 0)
    assert "KiB of" in done.stderr
    assert raw(np.load(Path(out) / "mlp_in.npy")) == raw(held["mlp_in"][:2].double())
    again = CliRunner().invoke(main, ["export", *given])
    assert again.exit_code == 2
    assert "something there already" in again.stderr
    drawn = CliRunner().invoke(main, ["export", given[0], "--out", out + "2", "--to", "safetensors"])
    assert "not to be edited" in drawn.stdout
    for file in shards(tmp_path / "acts" / "mlp_in"):
        damage(file, lambda data: data[:-4096])
    damaged = CliRunner().invoke(main, ["export", given[0], "--out", out + "3", "--to", "npy"])
    assert damaged.exit_code == 1
    assert not Path(out + "3").exists()


def test_memory_stays_bounded(tmp_path):
    rows = torch.zeros(1, 1 << 17, 512)  # 256 MiB
    with mmcache.create(tmp_path / "acts", sites={"a": 512}, n_layers=1, dtype=torch.float32) as writer:
        for start in range(0, 1 << 17, 1 << 14):
            writer.append(torch.zeros(1 << 14, dtype=torch.int64), {"a": rows[:, start : start + (1 << 14)]})
    code = """
import sys, mmcache
from pathlib import Path
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if "RssAnon" in line)
most = [0]
before = peak()
mmcache.export(sys.argv[1], sys.argv[2], to="npy", dtype="float64",
               progress=lambda *_: most.append(max(most.pop(), peak())))
print(most[0] - before)
"""
    done = python(code, tmp_path / "acts", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert math.prod(np.load(tmp_path / "out" / "a.npy", mmap_mode="r").shape) == 1 << 26
    assert int(done.stdout) < 256 << 10
