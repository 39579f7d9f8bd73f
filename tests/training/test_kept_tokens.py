"""Exactly the tokens that `drop` and `split` leave, against the plain array of flags."""

import itertools
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mmcache
from dataset_feeds import make_store
from mmcache.storage.shard_folder import ShardFolder
from mmcache.training import token_filter as module
from mmcache.training.token_filter import KeptTokens, Split, members
from stores_and_processes import without_sync


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        without_sync(patch)
        return make_store(tmp_path_factory.mktemp("kept") / "acts", [5, 1, 300, 77, 2, 41, 1000, 3], specials=0.2)


def everything(kept):
    return kept.positions(np.arange(len(kept))).tolist()


@given(st.lists(st.booleans(), min_size=1, max_size=300), st.randoms())
def test_runs_say_where_each_token_is(keep, random):
    keep = np.array(keep)
    if not keep.any():
        keep[0] = True
    edges = np.flatnonzero(np.diff(keep, prepend=False, append=False))
    kept, expected = KeptTokens(edges[::2], edges[1::2]), np.flatnonzero(keep)
    assert len(kept) == len(expected)
    assert everything(kept) == expected.tolist()
    picked = np.array([random.randrange(len(expected)) for _ in range(700)])
    assert kept.positions(picked).tolist() == expected[picked].tolist()
    start = random.randrange(len(expected))
    stop = random.randrange(start, len(expected)) + 1
    for gap in (0, 1, 5, 1000):
        stretches = kept.stretches(start, stop, gap)
        covered = [position for first, last in stretches for position in range(first, last)]
        assert covered == sorted(set(covered))
        assert set(expected[start:stop].tolist()) <= set(covered)
        assert (covered[0], covered[-1]) == (expected[start], expected[stop - 1])
        assert all(then - last > gap for (_, last), (then, _) in itertools.pairwise(stretches))
        # Only what lies between two of them, and not more of it at a time than the gap, is read for nothing.
        assert len(covered) - (stop - start) <= gap * (stop - start)
        if not gap:
            assert covered == expected[start:stop].tolist()


@pytest.mark.parametrize(
    ("drop", "bits"),
    [
        (("bos", "special"), 3),
        ("bos", 1),
        (["special"], 2),
        ("first", 4),
        (("bos", "special", "first"), 7),
        (8, 8),
        (("bos", np.int64(8)), 9),
        (255, 255),
        ((), 0),
        (None, 0),
    ],
)
def test_flags_that_are_dropped(store, drop, bits):
    expected = np.flatnonzero((store.flags.numpy() & bits) == 0)
    assert everything(KeptTokens.from_store(store, drop, None)) == expected.tolist()


def test_masks_of_ones_own(store):
    mask = torch.rand(store.n_tokens, generator=torch.Generator().manual_seed(0)) < 0.3
    expected = np.flatnonzero(~mask.numpy())
    assert everything(KeptTokens.from_store(store, mask, None)) == expected.tolist()
    assert everything(KeptTokens.from_store(store, mask.numpy(), None)) == expected.tolist()
    both = np.flatnonzero(~mask.numpy() & ((store.flags.numpy() & 2) == 0))
    assert everything(KeptTokens.from_store(store, ("special", mask), None)) == both.tolist()


@pytest.mark.parametrize("by", ["sequence", "document", "shard"])
@pytest.mark.parametrize("drop", [(), ("bos", "special")])
def test_a_split_is_of_whole_sequences(store, by, drop):
    flags = store.flags.numpy()
    for fraction in (0.3, 0.7):
        found = []
        for part in ("train", "validation"):
            split = Split(part, fraction, by, seed=3)
            try:
                among = members(split, store)
            except mmcache.ArgumentError:
                continue
            spans = [span for span, inside in zip(store.sequences, among, strict=True) if inside]
            expected = [at for span in spans for at in range(span.start, span.stop) if not (drop and flags[at] & 3)]
            if expected:
                assert everything(KeptTokens.from_store(store, drop, split)) == expected
            found += expected
        assert sorted(found) == np.flatnonzero((flags & (3 if drop else 0)) == 0).tolist()


def test_pieces_join_where_they_meet(store, monkeypatch):
    expected = {
        (drop, part): everything(KeptTokens.from_store(store, drop, part))
        for drop in ((), ("bos", "special"), 8)
        for part in (None, "train")
    }
    runs = len(KeptTokens.from_store(store, (), "train")._ends)
    for piece in (7, 64, 1000):
        monkeypatch.setattr(module, "_PIECE", piece)
        for (drop, part), wanted in expected.items():
            assert everything(KeptTokens.from_store(store, drop, part)) == wanted
        assert len(KeptTokens.from_store(store, (), "train")._ends) == runs


def test_flags_are_read_in_pieces(store, monkeypatch):
    sizes = []
    read = ShardFolder.read

    def record(self, start, stop):
        sizes.append(stop - start)
        return read(self, start, stop)

    monkeypatch.setattr(ShardFolder, "read", record)
    monkeypatch.setattr(module, "_PIECE", 100)
    KeptTokens.from_store(store, "bos", None)
    assert max(sizes) == 100
    assert sum(sizes) == store.n_tokens


def test_a_run_takes_24_bytes_at_most():
    starts = np.arange(0, 100_000, 10)
    kept = KeptTokens(starts, starts + 9)
    assert kept._padded.nbytes + kept._offsets.nbytes <= 24 * len(starts)


def test_the_digest_tells_them_apart(store):
    parts = (None, Split("train", 0.5), Split("train", 0.5, seed=1))
    digests = {KeptTokens.from_store(store, drop, part).digest for drop in ((), "bos", 8) for part in parts}
    assert len(digests) == 9
    assert KeptTokens.from_store(store, "bos", None).digest in digests


def test_a_cache_has_no_flags_and_says_so_once(tmp_path):
    with mmcache.FullActivationCache.with_capacity(1, tmp_path / "cache") as cache:
        cache.push(torch.ones(20, 4))
    store = mmcache.open(tmp_path / "cache")
    module._warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for drop in (("bos", "special"), 8, ()):
            assert everything(KeptTokens.from_store(store, drop, None)) == list(range(20))
    assert [str(one.message)[:27] for one in caught] == ["a store without flags, such"]
    assert caught[0].category is UserWarning
    mask = np.arange(20) % 2 == 0
    assert everything(KeptTokens.from_store(store, mask, None)) == list(range(1, 20, 2))


@pytest.mark.parametrize(
    ("drop", "error", "said"),
    [
        ("pad", mmcache.ArgumentError, "'pad'"),
        (0, mmcache.ArgumentError, "0"),
        (256, mmcache.ArgumentError, "256"),
        (True, mmcache.ArgumentError, "True"),
        (("bos", 1.5), mmcache.ArgumentError, "1.5"),
        (np.zeros(7, bool), mmcache.ShapeError, r"\(7,\): expected \(1429,\)"),
        (np.zeros(1429, int), mmcache.DtypeError, "int64"),
        (torch.zeros(1429), mmcache.DtypeError, "float32"),
    ],
)
def test_what_cannot_be_dropped(store, drop, error, said):
    with pytest.raises(error, match=said):
        KeptTokens.from_store(store, drop, None)


def test_nothing_left_says_the_numbers(store):
    with pytest.raises(
        mmcache.ArgumentError, match=r"no token of .* is left \(n_tokens=1429, drop=\(an array of 1429\)"
    ):
        KeptTokens.from_store(store, (np.ones(1429, bool),), None)


def test_an_empty_store_has_none(tmp_path):
    with mmcache.create(tmp_path / "acts", sites={"a": 4}, n_layers=1, dtype=torch.float32):
        pass
    with pytest.raises(mmcache.ArgumentError, match="n_tokens=0"):
        KeptTokens.from_store(mmcache.open(tmp_path / "acts"), (), None)


def test_a_billion_tokens_take_no_gigabytes():
    # Flags that are made as they are read: a BOS every thousand tokens.
    n_tokens = 20_000_000
    largest = 0

    class Folder:
        def __init__(self, *_):
            pass

        def read(self, start, stop):
            nonlocal largest
            largest = max(largest, stop - start)
            return torch.from_numpy((np.arange(start, stop) % 1000 == 0).astype(np.uint8))

    store = SimpleNamespace(where="acts", n_tokens=n_tokens, has_tokens=True, array=Folder, flag_bits={"bos": 1})
    kept = KeptTokens.from_store(store, "bos", None)
    assert len(kept) == n_tokens // 1000 * 999
    assert largest == 1 << 20
    assert kept._padded.nbytes + kept._offsets.nbytes <= 24 * 20_000
    assert kept.positions(np.array([0, 998, 999, len(kept) - 1])).tolist() == [1, 999, 1001, n_tokens - 1]
