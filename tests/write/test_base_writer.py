"""What a grown store is after a crash: as of its last commit or of the one under way, never between."""

import itertools
import os
import shutil

import pytest
import torch

import mmcache
from mmcache.errors import StoreExistsError
from mmcache.write.base_writer import claim
from stores_and_processes import path_at

TOKENS = torch.arange(500, dtype=torch.int32)
ROWS = {site: torch.randn(2, 500, 16, generator=torch.Generator().manual_seed(seed)) for seed, site in enumerate("ab")}


def put(writer, start, stop, **options):
    writer.append(TOKENS[start:stop], {site: rows[:, start:stop] for site, rows in ROWS.items()}, **options)


def check(path, spans):
    """Everything that counts is there, bit for bit; `spans` are the sequences."""
    with mmcache.open(path) as store:
        total = spans[-1][1] if spans else 0
        assert (store.n_tokens, store.n_sequences) == (total, len(spans))
        assert [tuple(span) for span in store.sequences] == spans
        assert torch.equal(store.tokens, TOKENS[:total])
        for site in ROWS:
            if total:
                assert torch.equal(store[site].gather(range(total)), ROWS[site][:, :total].swapaxes(0, 1))
                # The first token of each sequence is left out.
                assert store[site].statistics.count.unique().tolist() == [total - len(spans)]


@pytest.fixture
def crashes(tmp_path, monkeypatch):
    """Copy the store as it is before every rename: what a crash may leave."""
    real, copies, numbers = os.rename, [], itertools.count()

    def rename(source, target, **folders):
        if path_at(target, folders["dst_dir_fd"]).is_relative_to(tmp_path / "acts"):
            copies.append(tmp_path / f"crash-{next(numbers)}")
            shutil.copytree(tmp_path / "acts", copies[-1], ignore=shutil.ignore_patterns(".*"))
        real(source, target, **folders)

    monkeypatch.setattr(os, "rename", rename)
    return copies


@pytest.mark.parametrize("layout", ["layer", "token"])
def test_a_crash_at_any_point_leaves_the_last_commit_or_the_next(layout, tmp_path, crashes):
    path = tmp_path / "acts"
    options = {"sites": {"a": 16, "b": 16}, "n_layers": 2, "dtype": "float32", "layout": layout, "shard_tokens": 64}
    with mmcache.create(path, **options) as writer:
        put(writer, 0, 100)
        writer.commit()
        crashes.clear()
        put(writer, 100, 130, continues=True)
        put(writer, 130, 200)
    before, after = [(0, 100, 0)], [(0, 130, 0), (130, 200, 1)]
    # Four shards of sites and three of columns at least, five arrays' metadata and the root.
    assert len(crashes) > 12
    for copy in crashes:
        check(copy, before)
    check(path, after)
    # What a crash left ahead of the commit is overwritten by whoever goes on, whatever comes then.
    for number, copy in enumerate(crashes):
        with mmcache.append(copy) as writer:
            put(writer, 100, 110, continues=number % 2 == 0)
        check(copy, [(0, 110, 0)] if number % 2 == 0 else [(0, 100, 0), (100, 110, 1)])


def test_a_crash_while_a_cache_is_filled_leaves_the_last_flush(tmp_path, crashes):
    layers = ROWS["a"]
    with mmcache.FullActivationCache.with_capacity(2, tmp_path / "acts", shard_tokens=64) as cache:
        cache.push(layers[0])
        cache.flush()
        crashes.clear()
        cache.push(layers[1])
    assert len(crashes) == 8 + 1 + 1  # the shards, the array's metadata, the root
    for copy in crashes:
        with mmcache.FullActivationCache.open(copy) as cache:
            assert cache.n_layers == 1
            assert torch.equal(cache.get_layer(0), layers[0])
    with mmcache.FullActivationCache.open(tmp_path / "acts") as cache:
        assert torch.equal(cache.get_layer(1), layers[1])


def test_a_path_that_is_taken_is_refused_and_left_as_it_is(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreExistsError, match="that is a file"):
        claim(tmp_path / "file", ("a",))
    for name, told in (("zarr.json", "already holds a store"), ("a", "already holds a"), ("tokens", "holds tokens")):
        folder = tmp_path / f"with-{name}"
        folder.mkdir()
        (folder / name).touch()
        with pytest.raises(StoreExistsError, match=told):
            claim(folder, ("a", "b"))
        assert os.listdir(folder) == [name]  # noqa: PTH208 -- names are what is compared
    (tmp_path / "notes.txt").touch()
    assert claim(tmp_path, ("a",)) == tmp_path
    assert claim(tmp_path / "new", ("a",)) == tmp_path / "new"
    assert not (tmp_path / "new").exists()
