"""Stores of every format version that there ever was, made once: they must stay readable, to the last bit."""

import json
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

import mmcache
from stores_and_processes import same, tree

HERE = Path(__file__).parent
MAKE = HERE.parents[1] / "scripts" / "make_golden.py"
GOLDEN = sorted((HERE / "golden").glob("v*.zip"))
PLANNED = [file for file in GOLDEN if "-planned-" in file.name]
ARITHMETIC = [file for file in GOLDEN if file not in PLANNED]
made = runpy.run_path(str(MAKE))
value, GROWN, STORES, TEXTS = made["value"], made["GROWN"], made["STORES"], made["TEXTS"]


def unpacked(file, folder):
    with zipfile.ZipFile(file) as packed:
        packed.extractall(folder)
    return folder


@pytest.fixture(params=ARITHMETIC, ids=lambda file: file.stem)
def golden(request, tmp_path):
    return unpacked(request.param, tmp_path / "store")


def version_of(file):
    return int(file.stem[1])


def test_every_version_has_every_kind():
    kinds = {name.split("-", 1)[1] for name in STORES}
    found = {
        version: {file.stem.split("-", 1)[1] for file in GOLDEN if version_of(file) == version} for version in (1, 2)
    }
    assert found == {1: kinds, 2: kinds - {"cache-float16"}}
    assert set(STORES) <= {file.stem for file in GOLDEN}


@pytest.mark.parametrize("file", GOLDEN, ids=lambda file: file.stem)
def test_a_golden_store_is_of_its_version(file, tmp_path):
    path = unpacked(file, tmp_path / "store")
    store, version = mmcache.open(path), version_of(file)
    assert (store.manifest.version, store.manifest.uses) == (version, ("first",) if version == 2 else ())
    # Every file of it says so.
    for each in path.rglob("zarr.json"):
        assert json.loads(each.read_text())["attributes"]["mmcache"]["format"] == version
    for each in path.glob("*/c.*"):
        with safetensors.safe_open(each, "pt") as shard:
            assert shard.metadata()["format"] == f"mmcache/{version}"
    first = [span.start for span in store.sequences]
    flagged = (store.flags & 4).nonzero()[:, 0].tolist()
    assert flagged == (first if version == 2 else [])
    assert store.flag_bits == {"bos": 1, "special": 2, **({"first": 4} if version == 2 else {})}


@pytest.mark.parametrize("check", [False, True])
def test_a_golden_store_is_sound_and_holds_what_it_held(golden, check):
    report = mmcache.verify(golden)
    assert report.ok, report.findings
    with mmcache.open(golden, check=check) as store:
        for site in store.sites:
            view = store[site]
            right = value(store.n_layers, 0, store.n_tokens, view.d_model, store.dtype)
            for layer in store.layers:
                assert same(view.get_layer(layer), right[layer])
            some = [store.n_tokens - 1, 0, 255, 256, 257]
            assert same(view.gather(some), right[:, some].transpose(0, 1).contiguous())
            counted = torch.ones(store.n_tokens, dtype=torch.bool)
            if store.has_tokens:
                counted &= store.flags == 0
            wide = right[:, counted].double()
            assert torch.allclose(view.statistics.mean, wide.mean(1), atol=1e-9)
            assert torch.allclose(view.statistics.std, wide.std(1, correction=0), atol=1e-9)
        if store.has_tokens:
            assert store.tokens.tolist() == [position % 50 for position in range(sum(GROWN["lengths"]))]
            assert [span.stop - span.start for span in store.sequences] == list(GROWN["lengths"])
            assert (store.flags & 2 != 0).tolist() == [token == 0 for token in store.tokens.tolist()]
            assert store.metadata == {"made by": "make_golden.py"}


@pytest.mark.parametrize("file", PLANNED, ids=lambda file: file.stem)
def test_a_golden_planned_store_is_sound_and_holds_its_rows(file, tmp_path):
    path = unpacked(file, tmp_path / "store")
    assert mmcache.verify(path).ok
    store = mmcache.open(path)
    text = "".join(map(chr, store.tokens.tolist()))
    documents = ["".join(text[span.start : span.stop] for span in spans) for spans in by_document(store)]
    # The byte-level tokenizer puts its BOS, 256, before each context.
    assert [document.replace(chr(256), "") for document in documents] == TEXTS
    for site in store.sites:
        files = sorted((path / site).glob("c.*"), key=lambda file: int(file.name.split(".")[2]))
        rows = torch.cat([safetensors.torch.load_file(file)["activations"] for file in files])
        assert rows.shape == (store.n_tokens, 2, 128)
        assert same(store[site].gather(range(store.n_tokens)), rows)
        counted = rows[store.flags == 0].double()
        assert torch.allclose(store[site].statistics.mean, counted.mean(0), atol=1e-6)


def by_document(store):
    spans = {}
    for span in store.sequences:
        spans.setdefault(span.document, []).append(span)
    return list(spans.values())


def test_a_golden_store_can_be_gone_on_with(golden):
    if not mmcache.open(golden).has_tokens:
        pytest.skip("a cache is not appended to")
    store = mmcache.open(golden)
    start, dtype = store.n_tokens, store.dtype
    version, counted = store.manifest.version, int(store.counted(0, start).sum())
    # Ids without a special one, and a bit that is the user's own in version 1.
    flags = torch.full((40,), 4 if version == 1 else 8)
    with mmcache.append(golden) as writer:
        rows = {site: value(3, start, start + 40, width, dtype) for site, width in GROWN["sites"].items()}
        writer.append(torch.arange(1, 41), rows, flags=flags)
    with mmcache.open(golden) as store:
        for site, width in GROWN["sites"].items():
            assert same(store[site].get_layer(1), value(3, 0, start + 40, width, dtype)[1])
        assert store.manifest.version == version
        # In version 2 the first token of the sequence does not count.
        added = (40, [4] * 40) if version == 1 else (39, [12, *[8] * 39])
        assert store.flags[start:].tolist() == added[1]
        assert store.counted(0, start + 40).sum() == counted + added[0]
        assert store["mlp_in"].statistics.rows.tolist() == [counted + added[0]] * 3
    assert mmcache.verify(golden).ok
    for each in golden.glob("*/c.*"):
        with safetensors.safe_open(each, "pt") as shard:
            assert shard.metadata()["format"] == f"mmcache/{version}"


@pytest.mark.parametrize("file", GOLDEN, ids=lambda file: file.stem)
def test_a_golden_store_is_copied_exported_and_repaired_as_it_is(file, tmp_path):
    path = unpacked(file, tmp_path / "store")
    url = f"file://{tmp_path / 'bucket'}"
    mmcache.push(path, url)
    mmcache.pull(url, tmp_path / "again")
    before = tree(path)
    assert tree(tmp_path / "again") == before
    assert not mmcache.repair(path).report.findings
    assert tree(path) == before
    done = mmcache.export(path, tmp_path / "out", to="safetensors")
    said = json.loads((done.path / "index.json").read_text())
    assert said["flags"] == mmcache.open(path).flag_bits


def test_the_script_makes_the_same_files(tmp_path):
    subprocess.run([sys.executable, str(MAKE), "--folder", str(tmp_path)], check=True, timeout=120)
    for file in GOLDEN:
        if file.stem in STORES:
            with zipfile.ZipFile(file) as old, zipfile.ZipFile(tmp_path / file.name) as new:
                # A store's name is random, and sums may differ in the last bits on another processor, whose name is
                # in the root.
                sizes = [{one.filename: one.file_size for one in packed.infolist()} for packed in (old, new)]
                assert set(sizes[0]) == set(sizes[1])
                assert sizes[0] == sizes[1] | {"zarr.json": sizes[0]["zarr.json"]}
