"""What of a store is handed on: choices that are checked, rows in pieces."""

import numpy as np
import pytest
import torch

import mmcache
from mmcache.errors import ArgumentError, DtypeError, IncompleteError, OutOfRangeError, UnknownSiteError
from mmcache.ops import export
from mmcache.ops.export import Selection, bytes_of
from stores_and_processes import random_bits, raw, shards, without_sync

TOTAL = 300


@pytest.fixture(scope="module", params=["layer", "token"])
def made(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("selection") / "acts"
    rows = {"a": random_bits(3, TOTAL, 8, dtype=torch.float32), "b": random_bits(3, TOTAL, 24, dtype=torch.float32)}
    with pytest.MonkeyPatch.context() as patch:
        without_sync(patch)
        with mmcache.create(
            path, sites={"a": 8, "b": 24}, n_layers=3, dtype=torch.float32, layout=request.param, shard_tokens=256
        ) as writer:
            writer.append(torch.arange(TOTAL), rows)
    return path, rows


def test_all_of_it_unless_told_otherwise(made):
    chosen = Selection(mmcache.open(made[0]), None, None, None)
    assert (list(chosen.views), chosen.layers, chosen.n_tokens) == (["a", "b"], [0, 1, 2], TOTAL)
    assert chosen.nbytes == 3 * TOTAL * 32 * 4
    assert chosen.whole
    assert chosen.groups() == ([(0, [0, 1, 2])] if chosen.deep else [(0, [0]), (1, [1]), (2, [2])])


def test_what_makes_shards_as_they_are_not_enough(made):
    store = mmcache.open(made[0])
    assert Selection(store, ["b"], None, torch.float32).whole
    assert not Selection(store, None, None, "float16").whole
    for layers in ([1], [0, 2, 1]):
        assert Selection(store, None, layers, None).whole == (store.layout == "layer")


@pytest.mark.parametrize("piece", [1, 3000, 1 << 20])
def test_pieces_are_the_rows(made, piece, monkeypatch):
    path, rows = made
    monkeypatch.setattr(export, "_PIECE_BYTES", piece)
    chosen = Selection(mmcache.open(path), ["b"], [2, 0], None)
    found = [(start, some.clone()) for start, some in chosen.pieces(chosen.views["b"], [2, 0], 250, 290)]
    step = max(1, piece // (2 * 24 * 4))
    assert [start for start, _ in found] == list(range(250, 290, step))
    assert all(some.numel() * 4 <= max(piece, 192) for _, some in found)
    assert raw(torch.cat([some for _, some in found])) == raw(rows["b"][[2, 0], 250:290].transpose(0, 1))


def test_columns(made):
    chosen = Selection(mmcache.open(made[0]), None, None, None)
    assert np.concatenate(list(chosen.columns("tokens"))).view("<i4").tolist() == list(range(TOTAL))
    assert np.concatenate(list(chosen.columns("flags"))).tolist() == [
        4 if at in chosen.store.sequences.numpy()[:, 0] else 0 for at in range(TOTAL)
    ]


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"sites": ["c"]}, UnknownSiteError, r"'c' not in .* \(sites: a, b\)"),
        ({"sites": []}, ArgumentError, "0 sites, 300 tokens"),
        ({"layers": [1, 3]}, OutOfRangeError, "layer 3 not in"),
        ({"layers": []}, ArgumentError, "at least one"),
        ({"layers": [1, 1]}, ArgumentError, "each once"),
        ({"dtype": torch.int32}, DtypeError, "int32"),
    ],
)
def test_what_makes_no_sense_is_refused(made, options, error, said):
    with pytest.raises(error, match=said):
        Selection(mmcache.open(made[0]), **{"sites": None, "layers": None, "dtype": None} | options)


@pytest.mark.parametrize("layout", ["layer", "token"])
def test_only_what_is_selected_must_be_there(tmp_path, layout):
    small = pytest.importorskip("small_models")
    path = tmp_path / "acts"
    mmcache.extract(
        small.llama(), small.byte_tokenizer(), ["some text. " * 60], path, sites=("mlp_in", "mlp_out"),
        context_length=64, batch_size=1, dtype=torch.float32, layout=layout, shard_tokens=256,
    )  # fmt: skip
    shards(path / "mlp_in")[0].unlink()
    store = mmcache.open(path, partial=True)
    assert Selection(store, ["mlp_out"], None, None).whole
    with pytest.raises(IncompleteError, match="1 shards of mlp_in"):
        Selection(store, None, None, None)
    if layout == "layer":
        Selection(store, None, [1, 2], None)
        with pytest.raises(IncompleteError):
            Selection(store, None, [0], None)


def test_bytes_of_views_and_does_not_copy():
    rows = torch.zeros(2, 3)
    bytes_of(rows)[:4] = np.frombuffer(np.float32(1.5).tobytes(), np.uint8)
    assert rows[0, 0] == 1.5
