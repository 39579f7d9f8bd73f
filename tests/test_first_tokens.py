"""First tokens, where attention sinks are whether a tokenizer adds a BOS or not: flagged, and left out by default."""

import numpy as np
import pytest
import torch
from support import without_sync

import mmcache
from mmcache import writer as module
from mmcache.kept import Kept

LENGTHS = (40, 1, 300, 7, 512, 90)
STARTS = np.cumsum([0, *LENGTHS[:-1]])
TOTAL, WIDTH = sum(LENGTHS), 64
SINK = 700.0


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    without_sync(monkeypatch)


def rows(seed=0):
    """`[2, TOTAL, WIDTH]`, the first row of each sequence hundreds of times as long as the others."""
    made = torch.randn(2, TOTAL, WIDTH, generator=torch.Generator().manual_seed(seed))
    made[:, STARTS] *= SINK
    return made


def make(path, version=2, *, layout="token", flags=None, ids=None):
    """Make a store whose tokenizer has no special tokens, as the library did it at that format version."""
    given, ids = rows(), torch.arange(TOTAL) % 50 if ids is None else ids
    with pytest.MonkeyPatch.context() as patch:
        if version == 1:
            patch.setattr(module, "NEW_STORES", ())
        with mmcache.create(
            path, sites={"mlp_out": WIDTH}, n_layers=2, dtype=torch.float32, layout=layout, shard_tokens=256
        ) as writer:
            for start, length in zip(STARTS, LENGTHS, strict=True):
                span = slice(start, start + length)
                some = None if flags is None else flags[span]
                writer.append(ids[span], {"mlp_out": given[:, span]}, flags=some)
    store = mmcache.open(path)
    assert store.manifest.version == version
    return store


def others():
    return np.setdiff1d(np.arange(TOTAL), STARTS)


def left(store, drop):
    return Kept.from_store(store, drop, None).positions(np.arange(len(Kept.from_store(store, drop, None)))).tolist()


@pytest.mark.parametrize("version", [1, 2])
def test_first_tokens_are_dropped_by_default(tmp_path, version):
    store = make(tmp_path / "acts", version)
    data = mmcache.ActivationDataset(store, batch_size=100)
    seen = torch.cat([batch.positions for batch in data])
    assert sorted(seen.tolist()) == others().tolist()
    assert left(store, "first") == left(store, ("bos", "special", "first")) == others().tolist()
    assert left(store, ("bos", "special")) == list(range(TOTAL))


@pytest.mark.parametrize("piece", [1, 41, 1 << 20])
def test_first_tokens_of_version_1_are_those_of_the_sequences(tmp_path, monkeypatch, piece):
    flags = (torch.arange(TOTAL) % 3 == 0) * 4
    store = make(tmp_path / "acts", 1, flags=flags)
    monkeypatch.setattr("mmcache.kept._PIECE", piece)
    assert left(store, "first") == others().tolist()
    # The bit is the user's own there.
    assert store.flags.tolist() == flags.tolist()
    assert left(store, 4) == np.flatnonzero(flags == 0).tolist()
    assert left(store, ("first", 4)) == np.intersect1d(others(), left(store, 4)).tolist()
    mask = np.arange(TOTAL) % 5 == 0
    assert left(store, ("first", mask)) == np.setdiff1d(others(), np.flatnonzero(mask)).tolist()


def test_a_bit_of_the_users_that_the_store_sets_itself_is_refused(tmp_path):
    flags = torch.zeros(TOTAL, dtype=torch.int64)
    flags[5] = 8 | 4
    with pytest.raises(mmcache.ArgumentError, match=r"flags have bit 4, which .* set by the store itself: expected 1"):
        make(tmp_path / "acts", flags=flags)
    flags[5] = 8
    store = make(tmp_path / "again", flags=flags)
    assert {at: flag for at, flag in enumerate(store.flags.tolist()) if flag} == dict.fromkeys(STARTS, 4) | {5: 8}
    assert store.flag_bits == {"bos": 1, "special": 2, "first": 4}


def test_a_sequence_that_goes_on_has_one_first_token(tmp_path):
    with mmcache.create(tmp_path / "acts", sites={"a": 4}, n_layers=1, special_tokens=[0]) as writer:
        for continues in (False, True, True, False):
            writer.append([0, 5], {"a": torch.ones(1, 2, 4)}, continues=continues)
            writer.commit()
    with mmcache.append(tmp_path / "acts") as writer:
        writer.append([5, 5], {"a": torch.ones(1, 2, 4)}, continues=True)
        writer.append([5, 5], {"a": torch.ones(1, 2, 4)})
    assert mmcache.open(tmp_path / "acts").flags.tolist() == [7, 0, 2, 0, 2, 0, 7, 0, 0, 0, 4, 0]


def test_sequences_of_one_token_leave_nothing_and_say_why(tmp_path):
    with mmcache.create(tmp_path / "acts", sites={"a": 4}, n_layers=1) as writer:
        writer.append([[1], [2], [3]], {"a": torch.ones(1, 3, 1, 4)})
    store = mmcache.open(tmp_path / "acts")
    with pytest.raises(mmcache.ArgumentError, match="every sequence is one token long, the first one: drop less"):
        mmcache.ActivationDataset(store, batch_size=2)
    assert len(mmcache.ActivationDataset(store, batch_size=3, drop=())) == 1


@pytest.mark.parametrize("layout", ["token", "layer"])
def test_statistics_and_normalising_are_of_the_other_rows(tmp_path, layout):
    store, plain = make(tmp_path / "acts", layout=layout), rows()[:, others()].double()
    found = store["mlp_out"].statistics
    assert found.rows.tolist() == [len(others())] * 2
    torch.testing.assert_close(found.mean, plain.mean(dim=1), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.mean_norm, plain.norm(dim=-1).mean(dim=1), rtol=1e-6, atol=0)
    # As it should be: rows of the norm sqrt(d_model), so that what an SAE that says zero loses is d_model a row.
    (batch,) = mmcache.ActivationDataset(store, batch_size=TOTAL, normalize="scalar")
    loss = batch["mlp_out"].double().square().sum(dim=-1).mean(dim=0)
    torch.testing.assert_close(loss, torch.full((2,), float(WIDTH), dtype=torch.float64), rtol=0.03, atol=0)


def test_with_the_sinks_in_them_they_would_be_far_off(tmp_path):
    # What the flag is for: a store of version 1 has first tokens in its statistics.
    store, norms = make(tmp_path / "acts", 1), rows()[:, others()].double().norm(dim=-1).mean(dim=1)
    assert (store["mlp_out"].statistics.mean_norm > 4 * norms).all()
