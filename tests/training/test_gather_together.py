"""Several gathers at once, equal to one after the other, whatever way their rows come."""

import os

import numpy as np
import pytest
import torch

import mmcache
from dataset_feeds import LAYERS, SITES, make_store
from mmcache.read.local_rows import MappedRows, PortableRows, Way
from mmcache.system.syscalls import LINUX
from mmcache.training.fetcher import Gather, gather_together
from stores_and_processes import same, shards, without_sync

LENGTHS = [900, 7, 2000, 1193]
LAYER_SETS = (None, [2], [1, 0])


@pytest.fixture(scope="module", params=["token", "layer"])
def path(tmp_path_factory, request):
    with pytest.MonkeyPatch.context() as patch:
        without_sync(patch)
        path = tmp_path_factory.mktemp("together") / "acts"
        make_store(path, LENGTHS, layout=request.param, shard_tokens=1024).close()
        return path


def cold(store):
    """Let go of the maps and of the page cache."""
    path = store.path
    store.close()
    for site in SITES:
        for file in shards(path / site):
            fd = os.open(file, os.O_RDONLY)
            os.fdatasync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
    return mmcache.open(path)


def wanted(store, seed):
    generator = np.random.default_rng(seed)
    found = []
    for turn in range(3):
        for site, width in SITES.items():
            layers = LAYER_SETS[(turn + seed) % 3]
            where = generator.integers(0, store.n_tokens, [300, 0, 70][turn])
            out = torch.full((len(where), LAYERS if layers is None else len(layers), width), 7.0).bfloat16()
            found.append(Gather(store[site], where, layers, out))
    return found


@pytest.mark.parametrize("reader", ["fast", "simple"])
def test_gathers_together_are_those_one_by_one(path, reader):
    store = mmcache.open(path)
    for seed in range(6):
        if seed % 2 == 0:
            store = cold(store)
        if reader == "simple":
            for site in SITES:
                view = store[site]
                view._reader = PortableRows(view._folder, view._layout, LAYERS, 16)
        some = wanted(store, seed)
        gather_together(some)
        for view, where, layers, out in some:
            assert same(out, view.gather(where, layers=layers))
    store.close()


@pytest.mark.skipif(not LINUX, reason="no windows here, or the fast paths are switched off")
def test_each_goes_its_own_way(path, monkeypatch):
    """Warm ones, cold ones and ones that are worth keeping, in one call."""
    store = cold(mmcache.open(path))
    some, real = wanted(store, 0), MappedRows.way
    turns = iter([*Way] * 10)
    monkeypatch.setattr(MappedRows, "way", lambda self, piece: real(self, piece) and next(turns))
    gather_together(some)
    monkeypatch.undo()
    for view, where, layers, out in some:
        assert same(out, view.gather(where, layers=layers))
    store.close()


def test_a_layer_that_is_not_there_is_refused(path):
    with mmcache.open(path) as store:
        out = torch.empty(1, 1, SITES["wide"], dtype=torch.bfloat16)
        with pytest.raises(mmcache.OutOfRangeError, match="layer 9 not in cache"):
            gather_together([Gather(store["wide"], np.zeros(1, np.int64), [9], out)])
