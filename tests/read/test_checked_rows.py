"""The careful reader: equal to the simple one, and never wrong about a damaged file."""

import os
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mmcache
from damaged_stores import grown
from mmcache.read.local_rows import CheckedRows, PortableRows
from stores_and_processes import damage, flip, same, shards


@pytest.fixture(scope="module", params=["token", "layer"])
def made(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "acts"
    torch.manual_seed(0)
    with mmcache.create(
        path, sites={"a": 1024}, n_layers=3, layout=request.param, shard_tokens=2048, dtype=torch.float32
    ) as writer:
        writer.append(torch.arange(5000), {"a": torch.randn(3, 5000, 1024)})
    return path


@given(st.lists(st.integers(0, 4999), max_size=40), st.lists(st.integers(0, 2), min_size=1, max_size=4))
def test_it_is_equal_to_the_simple_reader(made, positions, slots):
    store = mmcache.open(made)
    folder = store["a"]._folder
    assert folder.spec.chunks_per_shard > 1
    wanted = np.array(positions, np.int64)
    found, right = (torch.empty(len(positions), len(slots), 1024) for _ in range(2))
    CheckedRows(folder, store.layout).take(wanted, slots, found)
    PortableRows(folder, store.layout, 3, 8).take(wanted, slots, right)
    assert same(found, right)


def test_the_store_reads_by_it_wherever_rows_are_read(made):
    plain, checked = mmcache.open(made)["a"], mmcache.open(made, check=True)["a"]
    assert same(checked.get_position(1, -1), plain.get_position(1, -1))
    assert same(checked.get_layer(2), plain.get_layer(2))
    assert same(checked[0, 2040:2060], plain[0, 2040:2060])
    assert same(checked.gather([4999, 0, 0, -3], layers=[2, 0]), plain.gather([4999, 0, 0, -3], layers=[2, 0]))
    again = pickle.loads(pickle.dumps(mmcache.open(made, check=True)))  # noqa: S301 -- our own
    assert again.check
    assert not mmcache.open(made).check
    data = mmcache.ActivationDataset(again, batch_size=512, drop=())
    batch = next(iter(data))
    assert same(batch["a"], plain.gather(batch.positions))
    assert pickle.loads(pickle.dumps(data)).store.check  # noqa: S301


def test_damage_is_found_where_it_is_read_and_nowhere_else(tmp_path):
    path = tmp_path / "acts"
    grown(path)
    damage(shards(path / "a")[1], flip(4096 + 40))
    store = mmcache.open(path, check=True)
    with pytest.raises(mmcache.CorruptError, match="inner chunk 0"):
        store["a"].get_position(0, 300)
    store["a"].gather([*range(256), *range(512, 600)])
    # Without, what is on the disk is what comes.
    mmcache.open(path)["a"].get_position(0, 300)


@pytest.mark.parametrize("size", [4096, 5000, 0])
def test_a_file_that_is_cut_short_while_it_is_read_is_an_error_and_no_crash(tmp_path, monkeypatch, size):
    path = tmp_path / "acts"
    grown(path)
    file = shards(path / "a")[0]
    file.chmod(0o644)
    real, inode = os.preadv, file.stat().st_ino

    def preadv(fd, buffers, offset, *flags):
        if offset and os.fstat(fd).st_ino == inode:
            os.truncate(file, size)  # behind the check of its header
        return real(fd, buffers, offset, *flags)

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(mmcache.CorruptError, match="cut short"):
        mmcache.open(path, check=True)["a"].gather([0, 200])


def test_a_file_that_was_replaced_is_noticed_before_the_next_read(tmp_path):
    path = tmp_path / "acts"
    grown(path)
    store = mmcache.open(path, check=True)
    row = store["a"].get_position(0, 0)
    one, two = shards(path / "a")[:2]
    data = one.read_bytes()
    damage(one, lambda _: two.read_bytes())
    with pytest.raises(mmcache.CorruptError, match="not the one that belongs there"):
        store["a"].get_position(0, 0)
    damage(one, lambda _: data)
    assert same(store["a"].get_position(0, 0), row)
