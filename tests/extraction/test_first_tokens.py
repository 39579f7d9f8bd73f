"""First tokens, where attention sinks are whether a tokenizer adds a BOS or not: flagged, and left out by default."""

import sys

import numpy as np
import pytest
import torch

import mmcache
from mmcache.training.token_filter import KeptTokens
from mmcache.write import writer as module
from stores_and_processes import without_sync

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
    return (
        KeptTokens.from_store(store, drop, None)
        .positions(np.arange(len(KeptTokens.from_store(store, drop, None))))
        .tolist()
    )


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
    monkeypatch.setattr("mmcache.training.token_filter._PIECE", piece)
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


# What the views say of them, and of rows like them that no flag marks.


MIDDLE = (60, 400, 401)


def strange(path, version=2, *, layout="token", middle=MIDDLE, flags=None):
    """The store with three more rows as long as those of first tokens, in the middle of sequences, at layer 1."""
    with pytest.MonkeyPatch.context() as patch:
        made = rows()
        made[1, list(middle)] *= SINK
        patch.setitem(globals(), "rows", lambda: made)
        return make(path, version, layout=layout, flags=flags), made


@pytest.mark.parametrize("layout", ["token", "layer"])
def test_health_names_rows_that_are_far_from_the_rest(tmp_path, layout):
    store, made = strange(tmp_path / "acts", layout=layout)
    view = mmcache.view.health(store, "mlp_out")
    norms = made[1].double().norm(dim=-1)
    (far,) = view["far"]
    assert (far["layer"], far["rows"], far["exact"], far["first"], far["starts"]) == (1, 3, True, 60, 0)
    assert far["positions"] == list(MIDDLE)
    assert far["max_norm"] == pytest.approx(norms[list(MIDDLE)].max().item(), rel=1e-6)
    assert far["median"] == pytest.approx(norms[others()].median().item(), rel=0.02)
    assert [one["n_far"] for one in view["layers"]] == [0, 3]
    assert view["left_out"] == {"first": len(LENGTHS)}
    (problem,) = view["problems"]
    assert problem.startswith("layer 1: 3 rows that count have norms over 20 times the median (8")
    assert problem.endswith(", the first at position 60")
    assert view.sampled is None
    assert view.bytes_read < 8 << 20


def test_of_a_store_without_flags_it_says_that_first_tokens_are_such(tmp_path):
    store, _ = strange(tmp_path / "acts", 1)
    view = mmcache.view.health(store, "mlp_out")
    assert view["left_out"] == {}
    assert [(one["rows"], one["first"], one["starts"]) for one in view["far"]] == [(6, 0, 6), (9, 0, 6)]
    assert all(
        "; 6 of them are the first tokens of their sequences, which this store does not flag" in problem
        for problem in view["problems"]
    )


def test_without_them_nothing_is_said(tmp_path):
    store, _ = strange(tmp_path / "acts", middle=())
    view = mmcache.view.health(store, "mlp_out")
    assert (view["far"], view["problems"]) == ([], [])
    # No more is read than the rows that the median is of.
    assert view.bytes_read <= TOTAL * 2 * WIDTH * 4 + (1 << 16)


def test_what_is_read_of_them_is_bounded_and_said(tmp_path, monkeypatch):
    store, _ = strange(tmp_path / "acts")
    chunk = store.shards("mlp_out").spec.chunk_rows
    # Room for one inner chunk of rows: where the first is stays exact, how many there are does not.
    monkeypatch.setattr(sys.modules["mmcache.view.health"], "_BYTES", 1)
    (far,) = mmcache.view.health(store, "mlp_out")["far"]
    inside = [at for at in MIDDLE if at // chunk == MIDDLE[0] // chunk]
    assert (far["rows"], far["exact"], far["first"]) == (len(inside), False, 60)
    assert far["chunks"] == len({at // chunk for at in MIDDLE}) == 2
    assert f"at least {len(inside)} rows that count" in mmcache.view.health(store, "mlp_out")["problems"][0]
    monkeypatch.setattr(sys.modules["mmcache.view.health"], "_MOST_FAR_SHARDS", 1)
    view = mmcache.view.health(store, "mlp_out")
    assert view.sampled == "the norms of 1 of 4 blocks, evenly spread"
    assert not view["far"][0]["exact"]


def test_a_shard_that_is_ahead_of_the_commit_has_none_that_do_not_count(tmp_path):
    path = tmp_path / "acts"
    with mmcache.create(path, sites={"a": 8}, n_layers=1, dtype=torch.float32) as writer:
        writer.append(range(100), {"a": torch.ones(1, 100, 8)})
        writer.commit()
        root = (path / "zarr.json").read_bytes()
        writer.append(range(100), {"a": torch.full((1, 100, 8), 1e4)})
    (path / "zarr.json").unlink()
    (path / "zarr.json").write_bytes(root)
    view = mmcache.view.health(mmcache.open(path), "a")
    assert (view["far"], [one["n_far"] for one in view["layers"]]) == ([], [0])


@pytest.mark.parametrize("version", [1, 2])
def test_views_tell_first_from_special(tmp_path, version):
    ids = torch.arange(TOTAL) % 50
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "NEW_STORES", ("first",) if version == 2 else ())
        with mmcache.create(tmp_path / "acts", sites={"a": 4}, n_layers=1, special_tokens=[7]) as writer:
            for start, length in zip(STARTS, LENGTHS, strict=True):
                flags = torch.full((length,), 4 if version == 1 else 8)
                writer.append(ids[start : start + length], {"a": torch.ones(1, length, 4)}, flags=flags)
    store = mmcache.open(tmp_path / "acts")
    first, special = STARTS, np.flatnonzero(ids == 7)
    assert not set(first) & set(special)
    view = mmcache.view.norms(store, "a", stop=100)
    marks = 2 * np.isin(np.arange(100), first) + np.isin(np.arange(100), special)
    assert view["apart"].tolist() == marks.tolist()
    apart = mmcache.view.apart(store, "a")
    assert (apart["first"]["of"], apart["special"]["of"]) == (len(first), len(special))
    assert mmcache.view.token(store, "a", 0)["flagged"] == (["first"] if version == 2 else [])
    assert mmcache.view.token(store, "a", 7)["flagged"] == ["special"]
    assert mmcache.view.row_view(store, "a", 0, -TOTAL)["flagged"] == (["first"] if version == 2 else [])
    # A bit of the user's own marks nothing.
    assert mmcache.view.token(store, "a", 1)["flagged"] == []
    looked = mmcache.view.top(store, "a", 0, 0)["looked"]
    assert looked == TOTAL - len(special) - (len(first) if version == 2 else 0)
