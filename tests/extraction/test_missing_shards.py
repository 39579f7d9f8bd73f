"""What is missing of a plan, and what it takes: as the files themselves say."""

import shutil

import numpy as np
import pytest

import mmcache
from damaged_stores import extracted
from mmcache.extraction.missing_shards import bytes_to_write, check_room, missing_of, shards_from
from mmcache.format.manifest import read_manifest
from stores_and_processes import shards


@pytest.fixture(scope="module", params=["layer", "token"])
def made(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("room") / "acts"
    extracted(path, layout=request.param)
    return path


@pytest.fixture
def store(made, tmp_path):
    return shutil.copytree(made, tmp_path / "acts")


def test_what_was_removed_is_missing_and_takes_what_it_took(store):
    manifest, dice = read_manifest(store), np.random.default_rng(1)
    for part in (0.0, 0.3, 0.7, 1.0):
        files = [file for site in manifest.sites for file in shards(store / site)]
        gone = [file for file in files if dice.random() < part]
        sizes = {file: file.stat().st_size for file in gone}
        for file in gone:
            file.rename(file.with_name(f".{file.name}"))
        missing = missing_of(store, manifest)
        assert {
            store / site / manifest.shard_key(site, block, slot)
            for site, which in missing.items()
            for slot, block in np.argwhere(which).tolist()
        } == set(gone)
        assert bytes_to_write(manifest, missing) == sum(sizes.values())
        for file in gone:
            file.with_name(f".{file.name}").rename(file)


def test_only_the_last_shard_is_smaller(store):
    manifest = read_manifest(store)
    for site in manifest.sites:
        for file in shards(store / site):
            size = file.stat().st_size
            file.unlink()
            assert bytes_to_write(manifest, missing_of(store, manifest)) == size
            file.touch()


def test_what_is_there_from_a_block_on_is_told(store):
    manifest = read_manifest(store)
    (store / "mlp_in" / "c.0.1.0").unlink()
    blocks = manifest.spec("mlp_in").blocks(manifest.n_tokens)
    for first in range(blocks + 2):
        found = shards_from(store, manifest, first)
        for site, which in found.items():
            expected = ~missing_of(store, manifest)[site]
            expected[:, :first] = False
            assert (which == expected).all()


def test_shards_that_are_replaced_are_made_again_in_the_room_that_they_leave(store, monkeypatch):
    manifest = read_manifest(store)
    (store / "mlp_out" / "c.0.0.0").unlink()
    lost = bytes_to_write(manifest, missing_of(store, manifest))
    again = bytes_to_write(manifest, shards_from(store, manifest, 2))
    assert again > lost > 0
    for free, replacing in ((lost, None), (lost, (manifest, 2)), (lost, (manifest, 0))):
        monkeypatch.setattr("mmcache.extraction.missing_shards.free_bytes", lambda _, free=free: free)
        check_room(store, manifest, replacing=replacing)
        monkeypatch.setattr("mmcache.extraction.missing_shards.free_bytes", lambda _, free=free: free - 1)
        with pytest.raises(mmcache.DiskFullError, match="are missing take"):
            check_room(store, manifest, replacing=replacing)
