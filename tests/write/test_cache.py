"""`FullActivationCache`: candle-mi's own checks, then what a cache on disk owes beyond them."""

import errno
import gc
import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import mmcache
from mmcache import FullActivationCache
from mmcache.read.store import open_store
from mmcache.stats.site_statistics import shard_statistics
from mmcache.storage.shard_folder import ShardFolder
from mmcache.system.atomic import AtomicFile
from stores_and_processes import (
    DTYPES,
    FORKS,
    Recorder,
    damage,
    flip,
    forked,
    python,
    random_bits,
    raw,
    same,
    shards,
    tree,
    without_sync,
)

pytestmark = pytest.mark.portable


@pytest.fixture
def path(tmp_path):
    return tmp_path / "acts"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    without_sync(monkeypatch)


def filled(path, layers=3, seq_len=5, d_model=4, **options):
    """Make a cache with something in it, and give the layers too."""
    cache = FullActivationCache.with_capacity(layers, path, **options)
    tensors = [random_bits(seq_len, d_model, dtype=torch.float32, seed=layer) for layer in range(layers)]
    for tensor in tensors:
        cache.push(tensor)
    return cache, tensors


def statistics(path, layer, block=0):
    """Read the statistics that one shard carries."""
    store = open_store(path)
    folder = ShardFolder(store.path, store._manifest, store.sites[0], store.n_tokens)
    return shard_statistics(folder, layer, block)[0]


# candle-mi's own checks


def test_empty_cache(path):
    with FullActivationCache.with_capacity(12, path) as cache:
        assert cache.is_empty
        assert cache.n_layers == len(cache) == 0
        assert cache.get_layer(0) is None
        for question in ("seq_len", "d_model", "dtype"):
            with pytest.raises(mmcache.EmptyCacheError, match=f"has no {question} before the first push"):
                getattr(cache, question)
        with pytest.raises(IndexError, match=r"layer 0 not in cache \(n_layers=0\)"):
            cache.get_position(0, 0)
        with pytest.raises(IndexError, match=r"layer 3 not in cache \(n_layers=0\)"):
            cache.get_positions(3, [0])


def test_push_and_shapes(path):
    with FullActivationCache.with_capacity(12, path) as cache:
        for layer in range(12):
            cache.push(torch.full((10, 64), float(layer)))
            assert cache.n_layers == layer + 1
        assert not cache.is_empty
        assert (cache.seq_len, cache.d_model, cache.dtype) == (10, 64, torch.float32)
        assert cache.get_layer(11).shape == (10, 64)
        assert cache.get_layer(12) is None


def test_get_position_is_the_row(path):
    cache, tensors = filled(path, layers=4, seq_len=7)
    with cache:
        for layer, tensor in enumerate(tensors):
            for position in range(7):
                assert same(cache.get_position(layer, position), tensor[position])


@pytest.mark.parametrize("layer", [12, 13, -1])
def test_layer_out_of_range(path, layer):
    cache, _ = filled(path, layers=12)
    with cache:
        with pytest.raises(mmcache.OutOfRangeError) as caught:
            cache.get_position(layer, 0)
        assert isinstance(caught.value, IndexError)
        assert str(caught.value) == f"layer {layer} not in cache (n_layers=12)"
        with pytest.raises(IndexError, match=f"layer {layer} not in cache"):
            cache.get_positions(layer, [0])
        assert cache.get_layer(layer) is None


@pytest.mark.parametrize("position", [5, 6, -6, 2**40])
def test_position_out_of_range(path, position):
    cache, _ = filled(path, seq_len=5)
    with cache:
        for ask in (lambda: cache.get_position(0, position), lambda: cache.get_positions(0, [0, position])):
            with pytest.raises(
                mmcache.OutOfRangeError, match=rf"position {position} out of range \(seq_len=5"
            ) as caught:
                ask()
            assert isinstance(caught.value, IndexError)


# What goes in

STRIDES = {
    "contiguous": lambda: random_bits(6, 8, dtype=torch.float32),
    "transposed": lambda: random_bits(8, 6, dtype=torch.float32).T,
    "rows expanded": lambda: random_bits(1, 8, dtype=torch.float32).expand(6, 8),
    "one number expanded": lambda: torch.tensor(1.5).expand(6, 8),
    "columns sliced": lambda: random_bits(6, 20, dtype=torch.float32)[:, 3:19:2],
    "rows sliced": lambda: random_bits(20, 8, dtype=torch.float32)[2:20:3],
    "one of a batch": lambda: random_bits(3, 6, 8, dtype=torch.float32)[1],
    "overlapping windows": lambda: random_bits(40, dtype=torch.float32).as_strided((6, 8), (3, 1)),
    "in the middle of a storage": lambda: random_bits(49, dtype=torch.float32)[1:].view(6, 8),
    "a parameter": lambda: torch.nn.Parameter(random_bits(6, 8, dtype=torch.float32)),
    "part of a graph": lambda: torch.nn.Parameter(torch.randn(6, 8)) * 2,
}


@pytest.mark.parametrize("kind", STRIDES)
def test_any_strides_and_grad(path, kind):
    tensor = STRIDES[kind]()
    expected = tensor.detach().clone()
    with FullActivationCache.with_capacity(1, path) as cache:
        cache.push(tensor)
        assert same(cache.get_layer(0), expected)
        assert not cache.get_layer(0).requires_grad
    assert same(FullActivationCache.open(path).get_layer(0), expected)


def test_push_under_inference_mode(path):
    with torch.inference_mode(), FullActivationCache.with_capacity(1, path) as cache:
        tensor = torch.arange(12.0).view(3, 4)
        cache.push(tensor)
        assert torch.equal(cache.get_layer(0), tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_keeps_every_bit(path, dtype):
    tensor = random_bits(64, 33, dtype=dtype)
    with FullActivationCache.with_capacity(1, path) as cache:
        cache.push(tensor)
        assert cache.dtype == dtype
        assert same(cache.get_layer(0), tensor)
    assert same(FullActivationCache.open(path).get_layer(0), tensor)


@pytest.mark.parametrize("given", DTYPES, ids=str)
@pytest.mark.parametrize("kept", DTYPES, ids=str)
def test_explicit_dtype_casts(path, given, kept):
    tensor = torch.randn(9, 5, dtype=torch.float64).to(given)
    with FullActivationCache.with_capacity(1, path, dtype=str(kept).removeprefix("torch.")) as cache:
        cache.push(tensor)
        assert cache.dtype == kept
        assert same(cache.get_layer(0), tensor.to(kept))


@pytest.mark.parametrize(
    ("given", "kept", "too_large"),
    [
        (torch.float32, torch.float16, 7e4),
        (torch.bfloat16, torch.float16, -1e5),
        (torch.float32, torch.bfloat16, 3.4e38),
        (torch.float64, torch.float32, 1e39),
        (torch.float64, torch.bfloat16, -1e300),
    ],
)
def test_overflow_in_the_cast_is_counted(path, given, kept, too_large):
    # An infinity that was there before is no overflow of ours, and neither is a NaN.
    tensor = torch.ones(6, 4, dtype=given)
    tensor[1, 2] = tensor[4, 0] = too_large
    tensor[5, 0], tensor[5, 1] = torch.inf, torch.nan
    with FullActivationCache.with_capacity(2, path, dtype=kept) as cache:
        cache.push(tensor)
        cache.push(torch.ones(6, 4, dtype=given))
        assert same(cache.get_layer(0), tensor.to(kept))
    assert statistics(path, 0)["overflow"].tolist() == [2]
    assert statistics(path, 0)["non_finite"].tolist() == [3]
    assert statistics(path, 1)["overflow"].tolist() == [0]


def test_nothing_overflows_where_the_range_is_wide_enough(path):
    with FullActivationCache.with_capacity(1, path, dtype=torch.float32) as cache:
        cache.push(torch.full((2, 2), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16))
    assert statistics(path, 0)["overflow"].tolist() == [0]


def test_shards_carry_right_moments(path):
    tensors = [torch.randn(50, 3, dtype=torch.float64) * 10 + layer for layer in range(2)]
    with FullActivationCache.with_capacity(2, path) as cache:
        for tensor in tensors:
            cache.push(tensor)
    for layer, tensor in enumerate(tensors):
        found = statistics(path, layer)
        assert found["count"].tolist() == [[50.0] * 3]
        np.testing.assert_allclose(found["mean"][0], tensor.mean(dim=0), rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(found["m2"][0], tensor.var(dim=0, correction=0) * 50, rtol=1e-12)


def test_more_layers_than_the_hint(path):
    with FullActivationCache.with_capacity(2, path) as cache:
        for layer in range(5):
            cache.push(torch.full((2, 3), float(layer)))
        assert cache.n_layers == 5
        assert cache.get_position(4, 1).tolist() == [4.0] * 3
    assert FullActivationCache.open(path).n_layers == 5


def test_the_tensor_may_be_reused_after_push(path):
    # Frameworks hand out the same buffer for every layer.
    buffer = torch.empty(300, 40)
    with FullActivationCache.with_capacity(8, path) as cache:
        for layer in range(8):
            cache.push(buffer.fill_(layer))
        buffer.fill_(-1)
        for layer in range(8):
            assert (cache.get_layer(layer) == layer).all()


@pytest.mark.parametrize("read", ["get_layer", "get_position", "get_positions"])
def test_read_straight_after_push(path, monkeypatch, read):
    # The shard is held back until the reader has begun to wait for it.
    waiting = threading.Event()
    publish = AtomicFile.publish

    def held_back(draft, *args, **options):
        if draft.path.name.startswith("c."):
            assert waiting.wait(30)
        publish(draft, *args, **options)

    monkeypatch.setattr(AtomicFile, "publish", held_back)
    with FullActivationCache.with_capacity(1, path) as cache:
        wait = cache._writer.wait
        monkeypatch.setattr(cache._writer, "wait", lambda *where: (waiting.set(), wait(*where)))
        tensor = torch.randn(4, 3)
        cache.push(tensor)
        arguments = {"get_layer": (0,), "get_position": (0, 2), "get_positions": (0, [2, 0])}[read]
        expected = {"get_layer": tensor, "get_position": tensor[2], "get_positions": tensor[[2, 0]]}[read]
        assert same(getattr(cache, read)(*arguments), expected)


# What comes out


def test_negative_positions_count_from_the_end(path):
    cache, tensors = filled(path, seq_len=5)
    with cache:
        for position in range(-5, 0):
            assert same(cache.get_position(1, position), tensors[1][position])
        assert same(cache.get_positions(1, [-1, 0, -5]), tensors[1][[-1, 0, -5]])


POSITIONS = {
    "list": [3, 0, 4],
    "repeats": [2, 2, 2, 0, 2],
    "numpy array": np.array([1, 4], dtype=np.int32),
    "unsigned array": np.array([1, 4], dtype=np.uint8),
    "tensor": torch.tensor([4, 3, 2, 1, 0]),
    "strided tensor": torch.arange(10)[::3],
    "range": range(4, -1, -2),
    "tuple": (0, 1),
    "one": [0],
}


@pytest.mark.parametrize("kind", POSITIONS)
def test_get_positions_takes(path, kind):
    positions = POSITIONS[kind]
    cache, tensors = filled(path, seq_len=10)
    with cache:
        found = cache.get_positions(2, positions)
    assert same(found, tensors[2][[int(position) for position in positions]])


@pytest.mark.parametrize(
    "nothing", [[], (), range(0), np.empty(0, np.int64), torch.empty(0, dtype=torch.int64)], ids=str
)
def test_get_positions_of_nothing(path, nothing):
    cache, _ = filled(path, d_model=4)
    with cache:
        assert cache.get_positions(0, nothing).shape == (0, 4)


@pytest.mark.parametrize("number", [2, np.int64(2), np.uint8(2), torch.tensor(2), torch.tensor([1, 2])[1]], ids=repr)
def test_whole_numbers_of_any_kind_are_layers_and_positions(path, number):
    # `tokens.argmax()` is a tensor, `np.flatnonzero(…)[0]` a numpy number.
    cache, tensors = filled(path, layers=3)
    with cache:
        assert same(cache.get_position(number, number), tensors[2][2])
        assert same(cache.get_positions(number, [number, number]), tensors[2][[2, 2]])
        assert same(cache.get_layer(number), tensors[2])
        with pytest.raises(IndexError, match="position 7 out of range"):
            cache.get_position(number, number + 5)
        with pytest.raises(IndexError, match="layer 7 not in cache"):
            cache.get_position(number + 5, 0)


@pytest.mark.parametrize("number", [1.0, "1", None, torch.tensor(1.0), [1]], ids=repr)
def test_a_position_that_is_no_whole_number_is_refused(path, number):
    cache, _ = filled(path)
    with cache, pytest.raises(TypeError):
        cache.get_position(0, number)


@pytest.mark.parametrize(
    ("positions", "error"),
    [([[0, 1]], mmcache.ShapeError), (0, mmcache.ShapeError), ([0.5], mmcache.DtypeError), (["a"], mmcache.DtypeError)],
)
def test_positions_that_are_no_list_of_integers(path, positions, error):
    cache, _ = filled(path)
    with cache, pytest.raises(error, match="positions"):
        cache.get_positions(0, positions)


def test_positions_too_large_for_int64_do_not_wrap(path):
    cache, _ = filled(path)
    with cache, pytest.raises(IndexError, match=f"position {2**64 - 1} out of range"):
        cache.get_positions(0, np.array([2**64 - 1], dtype=np.uint64))


def test_what_is_returned_is_the_callers_own(path):
    cache, tensors = filled(path, layers=2, seq_len=6)
    cache.flush()
    before = tree(path)
    for one in (cache, FullActivationCache.open(path)):
        for found in (
            one.get_layer(0),
            one.get_position(0, 1),
            one.get_positions(0, [1, 2]),
            one.get_positions(0, [1]),
        ):
            assert found.is_contiguous()
            found.fill_(7)
        assert same(one.get_layer(0), tensors[0])
        assert same(one.get_position(0, 1), tensors[0][1])
        one.close()
    assert tree(path) == before


def test_reading_from_several_threads_while_layers_are_pushed(path):
    tensors = [torch.full((500, 16), float(layer)) for layer in range(24)]
    wrong, done = [], threading.Event()

    def read(cache):
        while not done.is_set():
            layers = range(cache.n_layers)
            wrong.extend(layer for layer in layers if not torch.equal(cache.get_layer(layer), tensors[layer]))

    with FullActivationCache.with_capacity(24, path) as cache:
        readers = [threading.Thread(target=read, args=(cache,)) for _ in range(3)]
        for reader in readers:
            reader.start()
        for tensor in tensors:
            cache.push(tensor)
        done.set()
        for reader in readers:
            reader.join()
        assert not wrong


# Sizes


@pytest.mark.parametrize("seq_len", [1, 2, 2047, 2048, 2049, 5000])
@pytest.mark.parametrize("layers", [1, 3])
def test_several_shards_a_layer(path, seq_len, layers):
    cache, tensors = filled(path, layers=layers, seq_len=seq_len, d_model=3, shard_tokens=2048)
    with cache:
        assert all(same(cache.get_layer(layer), tensor) for layer, tensor in enumerate(tensors))
    assert len(shards(path / "resid_post")) == layers * -(-seq_len // 2048)
    with FullActivationCache.open(path) as again:
        for layer, tensor in enumerate(tensors):
            assert same(again.get_layer(layer), tensor)
            picked = torch.randint(-seq_len, seq_len, (50,))
            assert same(again.get_positions(layer, picked), tensor[picked])
            for position in {0, seq_len - 1, seq_len // 2, min(2048, seq_len - 1)}:
                assert same(again.get_position(layer, position), tensor[position])


@pytest.mark.parametrize("d_model", [1, 7, 129])
@pytest.mark.parametrize("seq_len", [1, 77])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_odd_widths(path, d_model, seq_len, dtype):
    tensors = [random_bits(seq_len, d_model, dtype=dtype, seed=layer) for layer in range(2)]
    with FullActivationCache.with_capacity(2, path) as cache:
        for tensor in tensors:
            cache.push(tensor)
    with FullActivationCache.open(path) as cache:
        assert cache.d_model == d_model
        assert all(same(cache.get_layer(layer), tensor) for layer, tensor in enumerate(tensors))


def test_a_hundred_layers(path):
    cache, tensors = filled(path, layers=100)
    cache.close()
    with FullActivationCache.open(path) as again:
        assert again.n_layers == 100
        assert all(same(again.get_layer(layer), tensor) for layer, tensor in enumerate(tensors))


def test_a_layer_larger_than_the_staging_ring(path):
    # 80 MiB through a ring of 64: slots must come back while the same push goes on.
    tensor = torch.arange(10 << 20, dtype=torch.float64).view(-1, 1024)
    with FullActivationCache.with_capacity(1, path) as cache:
        cache.push(tensor)
        assert torch.equal(cache.get_layer(0), tensor)


def test_ten_tokens_take_little_room(path):
    with FullActivationCache.with_capacity(32, path) as cache:
        for _ in range(32):
            cache.push(torch.randn(10, 128))
    status = [file.stat() for file in path.rglob("*")]
    assert sum(file.st_blocks * 512 for file in status) < 2 << 20
    assert sum(file.st_size for file in status) < 2 << 20


MEMORY = """
import sys, torch, mmcache
from pathlib import Path

def peak():
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith("VmHWM"))

tensor = torch.ones((16384, 2048), dtype=torch.bfloat16)
Path("/proc/self/clear_refs").write_text("5")
before = peak()
with mmcache.FullActivationCache.with_capacity(8, sys.argv[1]) as cache:
    for layer in range(8):
        cache.push(tensor)
    cache.flush()
    print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_pushing_takes_bounded_memory(path):
    done = python(MEMORY, path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 200 << 10, f"{int(done.stdout) >> 10} MiB beyond the tensor of 64"


# What is refused: with a clear error, and nothing written

REFUSED = {
    "one dimension": (lambda: torch.ones(4), mmcache.ShapeError, r"layer 2 has shape \[4\]"),
    "three dimensions": (lambda: torch.ones(1, 5, 4), mmcache.ShapeError, r"a batch of one is squeezed"),
    "a number": (lambda: torch.tensor(1.0), mmcache.ShapeError, "layer 2 has shape"),
    "no rows": (lambda: torch.ones(0, 4), mmcache.ShapeError, "neither of them 0"),
    "no columns": (lambda: torch.ones(5, 0), mmcache.ShapeError, "neither of them 0"),
    "another seq_len": (lambda: torch.ones(6, 4), mmcache.ShapeError, r"\[6, 4\]: expected \[5, 4\]"),
    "another d_model": (lambda: torch.ones(5, 3), mmcache.ShapeError, r"\[5, 3\]: expected \[5, 4\]"),
    "another dtype": (
        lambda: torch.ones(5, 4, dtype=torch.float16),
        mmcache.DtypeError,
        "float16: expected torch.float32",
    ),
    "integers": (lambda: torch.ones(5, 4, dtype=torch.int64), mmcache.DtypeError, "layer 2 is torch.int64"),
    "booleans": (lambda: torch.ones(5, 4, dtype=torch.bool), mmcache.DtypeError, "cannot be stored"),
    "complex numbers": (lambda: torch.ones(5, 4, dtype=torch.complex64), mmcache.DtypeError, "cannot be stored"),
    "a list": (lambda: [[1.0] * 4] * 5, mmcache.DtypeError, "layer 2 is a list"),
    "an array": (lambda: np.ones((5, 4), np.float32), mmcache.DtypeError, "layer 2 is a ndarray"),
    "nothing": (lambda: None, mmcache.DtypeError, "layer 2 is a NoneType"),
    "no data": (lambda: torch.ones(5, 4, device="meta"), mmcache.DtypeError, "layer 2 .*meta"),
    "sparse": (lambda: torch.ones(5, 4).to_sparse(), mmcache.DtypeError, "layer 2 .*sparse"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_layer_that_does_not_fit_is_refused(path, kind):
    make, error, message = REFUSED[kind]
    cache, tensors = filled(path, layers=2)
    with cache:
        cache.flush()
        before = tree(path)
        with pytest.raises(error, match=message):
            cache.push(make())
        assert tree(path) == before
        # The refusal left nothing behind that could hurt the next one.
        cache.push(tensors[0])
        assert cache.n_layers == 3
        assert same(cache.get_layer(2), tensors[0])
    assert FullActivationCache.open(path).n_layers == 3


@pytest.mark.parametrize(
    "kind", [kind for kind in REFUSED if kind not in ("another seq_len", "another d_model", "another dtype")]
)
def test_a_first_layer_that_does_not_fit_is_refused(path, kind):
    make, error, _ = REFUSED[kind]
    with FullActivationCache.with_capacity(2, path) as cache:
        before = tree(path)
        with pytest.raises(error, match="layer 0"):
            cache.push(make())
        assert tree(path) == before
        assert cache.is_empty
        cache.push(torch.ones(2, 2))
    assert FullActivationCache.open(path).seq_len == 2


def test_shard_tokens_that_do_not_fit_the_first_layer_are_refused(path):
    with FullActivationCache.with_capacity(2, path, shard_tokens=1000) as cache:
        before = tree(path)
        with pytest.raises(mmcache.ArgumentError, match="the nearest good number is 2048"):
            cache.push(torch.ones(3000, 3, dtype=torch.bfloat16))
        assert tree(path) == before
        cache.push(torch.ones(1000, 3))


@pytest.mark.parametrize("options", [{"dtype": torch.int32}, {"dtype": "int8"}, {"dtype": "float8_e4m3fn"}], ids=str)
def test_a_dtype_that_cannot_be_stored(path, options):
    with pytest.raises(mmcache.DtypeError, match="expected one of float32, float16, bfloat16, float64"):
        FullActivationCache.with_capacity(1, path, **options)
    assert not path.exists()


@pytest.mark.parametrize(
    "options",
    [
        {"site": ""},
        {"site": "a/b"},
        {"site": ".."},
        {"site": "tokens"},
        {"site": "zarr.json"},
        {"site": "x" * 201},
        {"shard_tokens": 0},
        {"shard_tokens": -1},
        {"n_layers": -1},
        {"n_layers": 1.5},
    ],
    ids=str,
)
def test_arguments_that_make_no_sense(path, options):
    with pytest.raises(mmcache.ArgumentError):
        FullActivationCache.with_capacity(**{"n_layers": 1, "path": path} | options)
    assert not path.exists()


def test_a_path_that_holds_a_store_is_refused(path):
    filled(path)[0].close()
    before = tree(path)
    with pytest.raises(mmcache.StoreExistsError, match="already holds a store") as caught:
        FullActivationCache.with_capacity(3, path)
    assert isinstance(caught.value, FileExistsError)
    assert caught.value.filename == str(path)
    assert tree(path) == before


def test_a_path_that_is_a_file_is_refused(path):
    path.write_bytes(b"mine")
    with pytest.raises(mmcache.StoreExistsError, match="that is a file"):
        FullActivationCache.with_capacity(3, path)
    with pytest.raises(OSError, match="file"):
        FullActivationCache.with_capacity(3, path / "below")
    assert path.read_bytes() == b"mine"


def test_a_folder_with_something_in_the_way_is_refused(path):
    (path / "resid_post").mkdir(parents=True)
    with pytest.raises(mmcache.StoreExistsError, match="already holds resid_post"):
        FullActivationCache.with_capacity(3, path)
    assert tree(path) == {"resid_post": None}


def test_a_folder_with_other_things_in_it_is_fine(path):
    path.mkdir()
    (path / "notes.txt").write_text("mine")
    filled(path)[0].close()
    assert (path / "notes.txt").read_text() == "mine"


def test_a_closed_cache_refuses_everything(path):
    cache, tensors = filled(path)
    cache.close()
    before = tree(path)
    uses = [
        lambda: cache.push(tensors[0]),
        lambda: cache.get_layer(0),
        lambda: cache.get_position(0, 0),
        lambda: cache.get_positions(0, [0]),
        cache.flush,
        lambda: cache.seq_len,
        lambda: cache.d_model,
        lambda: cache.dtype,
        # A closed cache must not pass for an empty one.
        lambda: cache.n_layers,
        lambda: cache.is_empty,
        lambda: len(cache),
    ]
    for use in uses:
        with pytest.raises(mmcache.ClosedError, match="closed"):
            use()
    cache.close()
    assert cache.path == path
    assert "closed" in repr(cache)
    assert tree(path) == before


def test_an_opened_cache_is_read_only(path):
    filled(path)[0].close()
    before = tree(path)
    with FullActivationCache.open(path) as cache:
        with pytest.raises(mmcache.ReadOnlyError, match="opened for reading") as caught:
            cache.push(torch.ones(5, 4))
        assert isinstance(caught.value, PermissionError)
        cache.flush()
    assert tree(path) == before


def test_open_refuses_what_is_no_cache(tmp_path, path):
    with pytest.raises(mmcache.StoreNotFoundError):
        FullActivationCache.open(path)
    with mmcache.create(tmp_path / "many", sites={"a": 2}, n_layers=1) as writer:
        writer.append([1], {"a": torch.ones(1, 1, 2)})
    with pytest.raises(mmcache.ArgumentError, match=r"holds 1 sequences: open it with mmcache.open"):
        FullActivationCache.open(tmp_path / "many")


def test_a_cache_is_a_store_too(path):
    cache, tensors = filled(path, site="mlp_in")
    cache.close()
    with mmcache.open(path) as store:
        assert store.sites == ("mlp_in",)
        assert store["mlp_in"].shape == (3, 5, 4)
        assert same(store["mlp_in"].sequence(0), torch.stack(tensors))
        assert [tuple(span) for span in store.sequences] == [(0, 5, 0)]
        assert store.tokens.tolist() == [-1] * 5
        assert store.flags.tolist() == [0] * 5


# Failures behind the caller's back


class Refuses:
    """Stands for a call to the system that goes wrong from the `after`-th use of a shard on."""

    def __init__(self, real, number, after=0):
        self.real, self.number, self.left = real, number, after

    def __call__(self, *args, **options):
        if threading.current_thread().name.startswith("mmcache-"):
            self.left -= 1
            if self.left < 0:
                raise OSError(self.number, os.strerror(self.number))
        return self.real(*args, **options)


@pytest.mark.parametrize("call", ["pwrite", "fsync", "rename", "ftruncate"])
@pytest.mark.parametrize(
    ("number", "error"),
    [(errno.ENOSPC, mmcache.DiskFullError), (errno.EDQUOT, mmcache.DiskFullError), (errno.EIO, mmcache.WriteError)],
)
def test_a_background_failure_surfaces_at_the_next_call(path, monkeypatch, call, number, error):
    cache, tensors = filled(path, layers=2)
    cache.flush()
    before = tree(path)
    monkeypatch.setattr(os, call, Refuses(getattr(os, call), number))
    cache.push(tensors[0])
    with pytest.raises(error) as caught:
        cache.get_layer(2)
    assert type(caught.value) is error
    assert caught.value.errno == number
    assert caught.value.filename == str(path / "resid_post" / "c.2.0.0")
    assert "in the background" in str(caught.value)
    for use in (lambda: cache.push(tensors[0]), cache.flush):
        with pytest.raises(error, match="in the background"):
            use()
    # What is there already can still be read, and the failure is not forgotten on close.
    with pytest.raises(error):
        cache.close()
    monkeypatch.undo()
    assert tree(path) == before, "a draft was left behind"
    with FullActivationCache.open(path) as again:
        assert again.n_layers == 2
        assert all(same(again.get_layer(layer), tensors[layer]) for layer in range(2))


def test_a_failure_while_the_ring_is_full_does_not_hang(path, monkeypatch):
    # 160 MiB through a ring of 64: the caller is waiting for a slot when the disk gives up.
    monkeypatch.setattr(os, "pwrite", Refuses(os.pwrite, errno.ENOSPC, after=2))
    cache = FullActivationCache.with_capacity(1, path)
    with pytest.raises(mmcache.DiskFullError, match="in the background"):
        cache.push(torch.zeros(20 << 10, 2048))
    with pytest.raises(mmcache.DiskFullError):
        cache.close()
    assert FullActivationCache.open(path).is_empty
    assert not shards(path / "resid_post")


@pytest.mark.skipif("MMCACHE_PORTABLE" in os.environ, reason="room is reserved where the system can")
def test_a_full_disk_is_met_before_a_byte_is_written(path, monkeypatch):
    cache, tensors = filled(path, layers=1)
    cache.flush()
    before = tree(path)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(AtomicFile, "write", lambda *_, **__: pytest.fail("written without room"))
    # The file is made behind the call, which has all its rows.
    cache.push(tensors[0])
    with pytest.raises(mmcache.DiskFullError, match="no room while starting the file") as caught:
        cache.flush()
    assert caught.value.filename.endswith("c.1.0.0")
    monkeypatch.undo()
    with pytest.raises(mmcache.DiskFullError, match="an earlier write failed in the background"):
        cache.close()
    assert tree(path) == before


def test_a_layer_whose_cast_fails_half_way_is_never_counted(path, monkeypatch):
    # Whatever goes wrong between the first byte staged and the last: the layer is not there afterwards.
    cache, tensors = filled(path, layers=1)
    cache.flush()

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cache._writer._stager, "stage", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.push(tensors[0])
    monkeypatch.undo()
    for use in (lambda: cache.push(tensors[0]), cache.flush, cache.close):
        with pytest.raises(mmcache.WriteError, match=r"push .* was interrupted half-way"):
            use()
    assert FullActivationCache.open(path).n_layers == 1
    assert [shard.name for shard in shards(path / "resid_post")] == ["c.0.0.0"]


def test_an_error_in_the_with_block_is_not_hidden(path, monkeypatch):
    def fail():
        with FullActivationCache.with_capacity(1, path) as cache:
            monkeypatch.setattr(os, "fsync", Refuses(os.fsync, errno.EIO))
            cache.push(torch.ones(2, 2))
            raise RuntimeError("the user's own")

    with pytest.raises(RuntimeError, match="the user's own") as caught:
        fail()
    monkeypatch.undo()
    assert "closing" in caught.value.__notes__[0]
    assert FullActivationCache.open(path).is_empty


def test_a_failing_close_at_the_end_of_a_with_block_is_raised(path, monkeypatch):
    def fail():
        with FullActivationCache.with_capacity(1, path) as cache:
            monkeypatch.setattr(os, "fsync", Refuses(os.fsync, errno.EIO))
            cache.push(torch.ones(2, 2))

    with pytest.raises(mmcache.WriteError, match="in the background"):
        fail()


def test_a_damaged_header_is_noticed(path):
    filled(path, layers=2)[0].close()
    damage(path / "resid_post" / "c.1.0.0", flip(100))
    with FullActivationCache.open(path) as cache:
        assert cache.get_layer(0) is not None
        with pytest.raises(mmcache.CorruptError, match=r"c\.1\.0\.0"):
            cache.get_layer(1)


# Durability


def test_flush_makes_durable_before_it_renames_and_counts_last(path, monkeypatch):
    recorder = Recorder(monkeypatch, path)
    with FullActivationCache.with_capacity(3, path, shard_tokens=2048) as cache:
        for _ in range(3):
            cache.push(torch.ones(5000, 3))
        cache.flush()
        recorder.events.clear()
        cache.push(torch.ones(5000, 3))
        cache.flush()
        names = recorder.check(recorder.events)
    assert {f"resid_post/c.3.{block}.0" for block in range(3)} <= set(names)


@FORKS
def test_after_a_crash_exactly_the_flushed_layers_are_there(path):
    def crash():
        cache = FullActivationCache.with_capacity(2, path, shard_tokens=2048)
        for layer in range(3):
            cache.push(torch.full((3000, 5), float(layer)))
        cache.flush()
        for layer in range(3, 6):
            cache.push(torch.full((3000, 5), float(layer)))
        cache.get_position(5, -1)
        os._exit(9)

    assert forked(crash) == 9
    assert (path / "resid_post" / "c.5.0.0").exists(), "the crash came too early to show anything"
    with FullActivationCache.open(path) as cache:
        assert cache.n_layers == 3
        for layer in range(3):
            assert torch.equal(cache.get_layer(layer), torch.full((3000, 5), float(layer)))
        assert cache.get_layer(3) is None


@FORKS
def test_a_forked_process_leaves_a_cache_to_its_parent(path, monkeypatch):
    # Nor does it remove a temporary one, nor wait for a layer that no thread of its own would ever write.
    started, publish = threading.Event(), AtomicFile.publish

    def held_back(draft, *args, **options):
        if draft.path.name == "c.1.0.0":
            assert started.wait(30)
        publish(draft, *args, **options)

    monkeypatch.setattr(AtomicFile, "publish", held_back)
    temporary = FullActivationCache.with_capacity(1)
    temporary.push(torch.ones(2, 2))
    temporary.flush()
    with FullActivationCache.with_capacity(2, path) as cache:
        cache.push(torch.ones(2, 2))
        assert cache.get_layer(0) is not None
        cache.push(torch.ones(2, 2))

        def child():
            assert cache.get_layer(0).tolist() == temporary.get_layer(0).tolist() == [[1.0, 1.0]] * 2
            with pytest.raises(mmcache.ClosedError):
                cache.get_layer(1)
            with pytest.raises(mmcache.ClosedError):
                cache.push(torch.ones(2, 2))
            cache.close()
            temporary.close()

        assert forked(child) == 0
        started.set()
        assert cache.get_layer(1) is not None
    assert temporary.get_layer(0) is not None
    temporary.close()
    assert FullActivationCache.open(path).n_layers == 2


def test_what_is_not_closed_when_python_ends_is_closed_then(path):
    code = (
        "import sys, torch, mmcache\n"
        "cache = mmcache.FullActivationCache.with_capacity(1, sys.argv[1])\n"
        "cache.push(torch.ones(3, 2))\n"
        "temporary = mmcache.FullActivationCache.with_capacity(1)\n"
        "temporary.push(torch.ones(3, 2))\n"
        "print(temporary.path)\n"
    )
    done = python(code, path)
    assert (done.returncode, done.stderr) == (0, "")
    assert FullActivationCache.open(path).n_layers == 1
    assert not Path(done.stdout.strip()).exists()


# Temporary caches, and Python's manners


def test_a_temporary_cache_goes_on_close():
    with FullActivationCache.with_capacity(2) as cache:
        cache.push(torch.ones(3, 2))
        assert cache.path.is_dir()
        assert cache.get_layer(0).tolist() == [[1.0] * 2] * 3
    assert not cache.path.exists()
    assert not cache.path.is_symlink()


@pytest.mark.parametrize("layers", [0, 40])
def test_a_temporary_cache_goes_with_its_last_reference(layers):
    cache = FullActivationCache.with_capacity(2)
    for _ in range(layers):
        cache.push(torch.ones(3, 2))
    folder = cache.path
    gc.disable()
    try:
        # Without a garbage collection: nothing in a cache may point back at it.
        with pytest.warns(ResourceWarning, match="never closed"):
            del cache
    finally:
        gc.enable()
    assert not folder.exists()


def test_a_cache_that_is_dropped_is_committed_with_a_warning(path):
    cache, _ = filled(path)
    with pytest.warns(ResourceWarning, match="never closed"):
        del cache
    assert FullActivationCache.open(path).n_layers == 3


def test_a_temporary_cache_that_cannot_be_made_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(mmcache.DiskFullError):
        FullActivationCache.with_capacity(1)
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())


def test_close_ends_the_threads(path):
    before = threading.active_count()
    cache, _ = filled(path)
    assert threading.active_count() > before
    cache.close()
    assert threading.active_count() == before


def test_repr_and_len(path):
    with FullActivationCache.with_capacity(3, path) as cache:
        assert repr(cache) == f"FullActivationCache({str(path)!r}, empty)"
        cache.push(torch.ones(5, 4))
        assert repr(cache) == (
            f"FullActivationCache({str(path)!r}, site='resid_post', n_layers=1, seq_len=5, d_model=4, "
            "dtype=torch.float32)"
        )
        assert len(cache) == 1


def test_with_capacity_takes_text_paths_and_makes_folders(tmp_path):
    with FullActivationCache.with_capacity(1, str(tmp_path / "a" / "b")) as cache:
        cache.push(torch.ones(1, 1))
    assert FullActivationCache.open(str(tmp_path / "a" / "b")).n_layers == 1


def test_an_empty_cache_can_be_opened(path):
    FullActivationCache.with_capacity(3, path).close()
    with FullActivationCache.open(path) as cache:
        assert cache.is_empty
        with pytest.raises(mmcache.EmptyCacheError):
            cache.seq_len  # noqa: B018 -- the property is the call
    with mmcache.open(path) as store:
        assert (store.n_layers, store.n_tokens, store.dtype) == (0, 0, None)


def test_flush_without_news_writes_nothing(path):
    cache, _ = filled(path)
    with cache:
        cache.flush()
        before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
        cache.flush()
        assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == before


def test_zarr_json_says_what_is_there(path):
    cache, tensors = filled(path)
    cache.close()
    said = json.loads((path / "resid_post" / "zarr.json").read_text())
    assert said["shape"] == [3, 5, 4]
    assert said["dimension_names"] == ["layer", "token", "d_model"]
    assert raw(tensors[0]) in (path / "resid_post" / "c.0.0.0").read_bytes()
