"""Rows of a store in a bucket are those of the local store: however they come, whatever fails, whoever else reads."""

import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mmcache
import remote_stores
from mmcache.read import remote_rows
from mmcache.storage import object_store, shard_folder
from mmcache.storage.mirror import ShardObjects
from stores_and_processes import python, same, shards, widened, without_sync

MIB = 1 << 20
KINDS = ("token", "layer")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    without_sync(monkeypatch)
    monkeypatch.setattr(object_store, "PATIENCE", 5.0)


@pytest.fixture(scope="module", params=KINDS)
def path(request, tmp_path_factory):
    """A store of four blocks."""
    return remote_stores.make(tmp_path_factory.mktemp("rows") / "acts", layout=request.param, sites={"a": 256})


@pytest.fixture
def url(path, s3_server):
    return remote_stores.upload(s3_server, path)


def test_any_rows_are_right_whatever_is_here(path, url):
    right, found = mmcache.open(path)["a"], mmcache.open(url, cache_bytes=2 * MIB)
    shards_of_a = [(slot, block) for slot in range(remote_stores.LAYERS) for block in range(4)]
    if found.layout == "token":
        shards_of_a = [(0, block) for block in range(4)]
    tokens = st.lists(st.integers(0, right.shape[1] - 1), min_size=1, max_size=60)
    layers = st.lists(st.integers(0, remote_stores.LAYERS - 1), min_size=1, max_size=5)

    @given(tokens, layers, st.sets(st.sampled_from(shards_of_a), max_size=2), st.tuples(*[st.integers(0, 900)] * 2))
    def check(positions, wanted, here, ahead):
        reader, _ = found["a"].rows_of(None)
        for slot, block in here:
            reader.remote.fetch_later(found.shards("a").bring, slot, block).result()
        start, stop = sorted(ahead)
        found["a"].read_ahead(start, stop)
        assert same(found["a"].gather(positions, layers=wanted), right.gather(positions, layers=wanted))
        assert same(found["a"].gather(positions), right.gather(positions))
        assert same(found["a"].get_position(wanted[0], positions[0]), right.get_position(wanted[0], positions[0]))

    check()
    assert found.remote.cache.used() <= 2 * MIB


def test_a_row_is_one_small_request_and_the_first_of_a_shard_two(path, url, s3_proxy):
    found, right = mmcache.open(url)["a"], mmcache.open(path)["a"]
    s3_proxy.reset()
    assert same(found.get_position(1, 7), right.get_position(1, 7))
    assert s3_proxy.n_requests() == 2
    s3_proxy.reset()
    assert same(found.get_position(1, 200), right.get_position(1, 200))
    assert s3_proxy.n_requests() == 1
    assert s3_proxy.bytes_sent() < 4096


def test_rows_that_lie_close_come_in_one_request(path, url, s3_proxy):
    found, right = mmcache.open(url)["a"], mmcache.open(path)["a"]
    found.get_position(2, 0)
    s3_proxy.reset()
    positions = [3, 40, 9, 9, 20]
    assert same(found.get_positions(2, positions), right.get_positions(2, positions))
    assert s3_proxy.n_requests() == 1


@pytest.mark.parametrize("quick", [True, False])
def test_nearly_all_of_a_shard_comes_in_one_request_or_beside_others_where_it_is_slow(
    path, url, s3_proxy, monkeypatch, quick
):
    monkeypatch.setattr(ShardObjects, "quick", property(lambda _: quick, lambda *_: None), raising=False)
    monkeypatch.setattr(remote_rows, "_REQUEST_BYTES", 100_000)
    right, found = mmcache.open(path)["a"], mmcache.open(url)["a"]
    found.rows_of(None)
    s3_proxy.reset()
    assert same(found.gather(range(5, 255), layers=[1]), right.gather(range(5, 255), layers=[1]))
    # Ranges go beside a slow one.
    assert s3_proxy.n_requests() == 1 if quick else s3_proxy.n_requests() > 1
    scattered = np.random.default_rng(0).permutation(250)
    assert same(found.gather(scattered), right.gather(scattered))


def test_many_rows_do_not_bring_the_shard_that_the_first_is_in(path, url, monkeypatch):
    monkeypatch.setattr(shard_folder, "MANY", 1000)
    found = mmcache.open(url)
    assert same(found["a"].gather(range(20)), mmcache.open(path)["a"].gather(range(20)))
    names = [name for name in (file.name for file in shards(path / "a")) if remote_stores.is_here(found, "a", name)]
    assert not names


@pytest.fixture
def coming(url, s3_proxy, monkeypatch):  # noqa: ARG001 -- which it is opened through
    """A site all of which is being brought here, as it is told, and quickly."""
    monkeypatch.setattr(ShardObjects, "quick", property(lambda _: True, lambda *_: None), raising=False)
    going, found = threading.Event(), mmcache.open(url)["a"]
    going.set()
    found.read_ahead(0, 1, all_come=going)
    return going, found


def shards_of(path, blocks):
    return blocks * (remote_stores.LAYERS if mmcache.open(path).layout == "layer" else 1)


def test_where_all_comes_and_quickly_rows_wait_for_it(path, coming, s3_proxy):
    right, (_, found) = mmcache.open(path)["a"], coming
    s3_proxy.reset()
    positions = list(range(0, 900, 50))
    assert same(found.gather(positions), right.gather(positions))
    # The shards, each once; those of the first block are here.
    assert s3_proxy.n_requests() == shards_of(path, 3)
    s3_proxy.down()
    assert same(found.gather(range(900)), right.gather(range(900)))


def test_when_no_more_comes_no_row_waits(path, coming, s3_proxy):
    right, (going, found) = mmcache.open(path)["a"], coming
    going.clear()
    s3_proxy.reset()
    assert same(found.get_positions(1, [300]), right.get_positions(1, [300]))
    assert s3_proxy.bytes_sent() < 3 * 4096


@pytest.mark.parametrize("shuffle", ["global", None])
def test_an_iteration_that_was_broken_off_has_no_row_wait(url, shuffle):
    found = mmcache.open(url)
    loop = iter(mmcache.ActivationDataset(found, batch_size=8, shuffle=shuffle, sites=["a"]))
    next(loop)
    going = found["a"].rows_of(None)[0].all_come
    assert going.is_set()
    del loop
    gc.collect()
    remote_stores.wait_for(lambda: not going.is_set())


def test_what_is_waited_for_and_damaged_is_told(path, coming, s3_server):
    _, found = coming
    file = max(shards(path / "a"))
    broken = bytearray(file.read_bytes())
    broken[5000] ^= 1
    remote_stores.replace(s3_server, f"acts/a/{file.name}", bytes(broken))
    with pytest.raises(mmcache.CorruptError, match=file.name):
        found.gather(range(900))


def test_what_is_waited_for_and_does_not_come_is_told_in_time(coming, s3_proxy, monkeypatch):
    monkeypatch.setattr(object_store, "PATIENCE", 1.0)
    _, found = coming
    s3_proxy.down()
    began = time.monotonic()
    with pytest.raises(mmcache.RemoteError, match="run it again"):
        found.gather(range(900))
    # Not once for each of the shards, and then for each of their ranges.
    assert time.monotonic() - began < 10


def test_where_there_is_no_room_nothing_is_waited_for(path, coming, s3_proxy, monkeypatch):
    right, (_, found) = mmcache.open(path)["a"], coming
    monkeypatch.setattr(found.rows_of(None)[0].remote.cache, "most_bytes", MIB)
    s3_proxy.reset()
    assert same(found.gather(range(0, 900, 50)), right.gather(range(0, 900, 50)))
    assert found.rows_of(None)[0].remote.cache.used() <= shards_of(path, 1) * 2 * MIB


def test_a_gather_moves_no_more_than_whole_shards(path, url, s3_proxy):
    right = mmcache.open(path)
    whole = sum(file.stat().st_size for file in shards(path / "a"))
    for count in (5, 60, 890):
        found = mmcache.open(url, cache_bytes=MIB // 8)  # so small that nothing is kept
        found["a"].rows_of(None)
        s3_proxy.reset()
        positions = np.random.default_rng(count).permutation(900)[:count]
        assert same(found["a"].gather(positions), right["a"].gather(positions))
        assert s3_proxy.bytes_sent() < whole + 20_000


def test_what_is_read_again_and_again_is_brought_here(url, s3_proxy):
    found = mmcache.open(url)
    for _ in range(10):
        found["a"].get_positions(1, [0, 100, 200, 30])
    slot = 1 if found.layout == "layer" else 0
    remote_stores.wait_for(lambda: remote_stores.is_here(found, "a", f"c.{slot}.0.0"))
    s3_proxy.reset()
    found["a"].get_position(1, 255)
    assert s3_proxy.n_requests() == 0


@pytest.mark.parametrize("seed", range(2))
def test_whatever_fails_nothing_wrong_is_returned(path, url, s3_proxy, seed, tmp_path, request):
    right, dice = mmcache.open(path), np.random.default_rng(seed)
    s3_proxy.hang_s = 0.2
    rates = {"close": 0.05, "cut_response": 0.08, "short": 0.08, "error_500": 0.05, "slow_down": 0.05, "hang": 0.02}
    s3_proxy.set_rates(**rates)
    for turn in range(widened(request, (1, 40))):
        with mmcache.open(url, cache_dir=tmp_path / f"cache-{turn}", cache_bytes=2 * MIB) as found:
            for count in (1, 20, 300):
                positions = dice.integers(0, 900, count)
                assert same(found["a"].gather(positions), right["a"].gather(positions))
            found["a"].read_ahead(*sorted(dice.integers(0, 900, 2).tolist()))
            assert same(found["a"].get_layer(3), right["a"].get_layer(3))
            assert same(found["a"].statistics.mean, right["a"].statistics.mean)
    assert {"cut_response", "short"} <= set(s3_proxy.met())


def test_a_server_that_stays_down_is_told_with_the_object_and_reading_goes_on_behind_it(
    path, url, s3_proxy, monkeypatch
):
    monkeypatch.setattr(object_store, "PATIENCE", 1.0)
    right, found = mmcache.open(path)["a"], mmcache.open(url)["a"]
    s3_proxy.down()
    slot = "1" if mmcache.open(path).layout == "layer" else "0"
    for work in (lambda: found.get_position(1, 300), lambda: found.gather(range(256, 512), layers=[1])):
        with pytest.raises(mmcache.RemoteError, match=rf"acts/a/c\.{slot}\.1\.0.*run it again"):
            work()
    s3_proxy.up()
    assert same(found.gather(range(900)), right.gather(range(900)))


def test_one_that_comes_back_in_time_is_waited_for(path, url, s3_proxy):
    right, found = mmcache.open(path)["a"], mmcache.open(url)["a"]
    s3_proxy.down()
    threading.Timer(0.7, s3_proxy.up).start()
    assert same(found.gather([1, 500, 899]), right.gather([1, 500, 899]))


def test_threads_share_one_cache(path, url):
    right, found = mmcache.open(path)["a"], mmcache.open(url, cache_bytes=2 * MIB)

    def work(number):
        dice = np.random.default_rng(number)
        for _ in range(12):
            positions = dice.integers(0, 900, int(dice.integers(1, 400)))
            assert same(found["a"].gather(positions), right.gather(positions))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert found.remote.cache.used() <= 2 * MIB
    assert remote_stores.tidy(found.remote.cache.folder)


PROCESS = """
import sys, numpy as np, mmcache
sys.path.insert(0, sys.argv[4])
from stores_and_processes import same
right, found = mmcache.open(sys.argv[1])["a"], mmcache.open(sys.argv[2], cache_bytes=int(sys.argv[3]))
dice = np.random.default_rng(int(sys.argv[5]))
for turn in range(4):
    found["a"].read_ahead(0, 900)
    positions = dice.integers(0, 900, 300)
    assert same(found["a"].gather(positions), right.gather(positions))
    assert found.remote.cache.used() <= int(sys.argv[3])
"""


@pytest.mark.parametrize("room", [2 * MIB, 64 * MIB], ids=["too small", "enough"])
def test_two_processes_share_one_cache(path, url, s3_proxy, room, request):
    s3_proxy.reset()
    with ThreadPoolExecutor(2) as pool:
        started = [
            pool.submit(python, PROCESS, path, url, room, request.path.parents[1] / "helpers", seed, timeout=120)
            for seed in range(2)
        ]
        for process in started:
            assert process.result().returncode == 0, process.result().stderr
    if room == 64 * MIB:
        whole = sum(file.stat().st_size for file in shards(path / "a"))
        assert s3_proxy.bytes_sent(substring="/a/c.") < 1.1 * whole, "each shard came once, for both of them"


def test_a_longer_shard_of_the_same_store_takes_the_place_of_what_is_here(s3_server, tmp_path):
    here = remote_stores.make(tmp_path / "acts", sites={"a": 256}, tokens=600)
    url = remote_stores.upload(s3_server, here)
    mmcache.open(url)["a"].read_ahead(0, 600)
    with mmcache.append(here) as writer:
        remote_stores.extend(writer, {"a": 256}, torch.float32, 100, torch.Generator().manual_seed(9))
    remote_stores.upload(s3_server, here)
    right, found = mmcache.open(here), mmcache.open(url)
    assert same(found["a"].gather(range(700)), right["a"].gather(range(700)))
