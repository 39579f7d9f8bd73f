import copy
import pickle

import torch
from torch.utils.data import default_convert

import mmcache
from stores_and_processes import same


def make():
    rows = {"a": torch.randn(4, 2, 3), "b": torch.randn(4, 2, 5)}
    return mmcache.Batch.of(rows, torch.arange(4), torch.arange(4, dtype=torch.int32), {"epoch": 1, "step": 2})


def assert_equal(one, other):
    assert type(one) is type(other) is mmcache.Batch
    assert list(one) == list(other)
    assert all(same(one[site], other[site]) for site in one)
    assert same(one.positions, other.positions)
    assert same(one.tokens, other.tokens)
    assert one.state == other.state


def test_it_survives_what_loaders_do_to_it():
    batch = make()
    assert_equal(pickle.loads(pickle.dumps(batch)), batch)  # noqa: S301 -- our own
    assert_equal(copy.copy(batch), batch)
    assert_equal(copy.deepcopy(batch), batch)
    assert_equal(default_convert(batch), batch)
    # As pin_memory does with a mapping.
    clone = copy.copy(batch)
    clone.update({site: rows.clone() for site, rows in batch.items()})
    assert_equal(clone, batch)
    assert clone["a"] is not batch["a"]


def test_to_another_device():
    batch = make()
    moved = batch.to("meta", non_blocking=True)
    assert moved["b"].is_meta
    assert moved["b"].shape == (4, 2, 5)
    assert moved.positions is batch.positions
    assert moved.state == batch.state
    assert_equal(batch.to("cpu"), batch)


def test_its_repr_is_a_line():
    assert repr(make()) == "Batch('a': [4, 2, 3] torch.float32 on cpu, 'b': [4, 2, 5] torch.float32 on cpu)"
