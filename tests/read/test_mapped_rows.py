"""The fast way to rows, equal to the simple way: warm, cold, refused, in every order, by several threads."""

import errno
import os
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mmcache
from mmcache.read import local_rows, site_map
from mmcache.read.local_rows import MappedRows, PortableRows
from mmcache.system.syscalls import AIO, LINUX
from stores_and_processes import FORKS, forked, maps_below, same, shards, without_sync

pytestmark = pytest.mark.skipif(not LINUX, reason="no windows here, or the fast paths are switched off")
TOKENS, LAYERS = 3000, 3
# A store of several shards, and one whose only shard fills no whole pages; rows of whole and of odd sectors.
KINDS = {
    "token": ("token", 1024, 128),
    "layer": ("layer", 1024, 128),
    "token, odd": ("token", 2048, 37),
    "layer, odd": ("layer", 2048, 37),
    "token, one shard": ("token", None, 37),
    "layer, one shard": ("layer", None, 37),
}


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory):
    layout, shard_tokens, width = KINDS[request.param]
    path = tmp_path_factory.mktemp("rows") / "acts"
    rows = torch.randn(LAYERS, TOKENS, width, generator=torch.Generator().manual_seed(0)).bfloat16()
    with mmcache.create(
        path, sites={"mlp_in": width}, n_layers=LAYERS, layout=layout, shard_tokens=shard_tokens
    ) as writer:
        writer.append(torch.arange(TOKENS), {"mlp_in": rows})
    return path, rows


@pytest.fixture
def view(made):
    with mmcache.open(made[0]) as store:
        yield store["mlp_in"]


def ways(view):
    """The fast reader of a site, and the simple one."""
    given_to = (view._folder, view._layout, LAYERS, 16)
    return MappedRows(*given_to), PortableRows(*given_to)


def drop(path):
    """Let the page cache go of a store that nobody has mapped."""
    for file in shards(path / "mlp_in"):
        fd = os.open(file, os.O_RDONLY)
        os.fdatasync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def take(reader, positions, slots, width):
    out = torch.full((len(positions), len(slots), width), float("nan"), dtype=torch.bfloat16)
    reader.take(np.asarray(positions, np.int64), slots, out)
    return out


PICKS = [
    np.arange(TOKENS),
    np.arange(TOKENS)[::-1].copy(),
    np.random.default_rng(0).permutation(TOKENS),
    np.random.default_rng(1).integers(0, TOKENS, 5000),
    np.arange(0, TOKENS, 30),
    np.array([5, 5, 2999, 0]),
    np.array([TOKENS - 1]),
]


@pytest.mark.parametrize("slots", [[0, 1, 2], [1], [2, 0], [1, 1, 0, 2]], ids=str)
def test_cold_and_warm_as_the_simple_way(made, view, slots):
    fast, simple = ways(view)
    for positions in PICKS:
        expected = take(simple, positions, slots, view.d_model)
        simple.forget()
        for _ in range(3):
            fast.forget()
            drop(made[0])
            assert same(take(fast, positions, slots, view.d_model), expected)
            assert same(take(fast, positions, slots, view.d_model), expected)


def test_rows_one_by_one_cold_and_warm(made, view):
    fast, simple = ways(view)
    generator = np.random.default_rng(0)
    for turn in range(4):
        fast.forget()
        simple.forget()
        drop(made[0])
        for position in generator.integers(0, TOKENS, 60).tolist():
            for slot in range(LAYERS):
                assert same(fast.row(slot, position), made[1][slot, position])
                if turn % 2:
                    # Asked for again, and again warm.
                    assert same(fast.row(slot, position), made[1][slot, position])
        assert same(simple.row(1, 7), made[1][1, 7])


@given(st.lists(st.integers(0, TOKENS - 1), max_size=200), st.lists(st.integers(0, LAYERS - 1), min_size=1, max_size=4))
def test_any_positions_and_layers(made, positions, slots):
    with mmcache.open(made[0]) as store:
        found = store["mlp_in"].gather(positions, layers=slots)
        assert same(found, made[1][slots][:, positions].transpose(0, 1).contiguous())


def refuse_queue(monkeypatch):
    def refuse():
        raise OSError(errno.EAGAIN, "no more asynchronous I/O")

    monkeypatch.setattr(local_rows, "borrowed", refuse)


def refuse_direct(monkeypatch):
    real = site_map.SiteMap.opened

    def refuse(self, places):
        real(self, places)
        raise OSError(errno.EINVAL, "no direct reads")

    monkeypatch.setattr(site_map.SiteMap, "opened", refuse)


@pytest.mark.parametrize("refuse", [refuse_queue, refuse_direct])
def test_where_direct_reads_are_refused_advice_does(made, view, monkeypatch, refuse):
    refuse(monkeypatch)
    fast, _ = ways(view)
    # Far apart, so that it is not read through.
    positions = np.random.default_rng(0).permutation(TOKENS)[:100]
    fast._worth_caching = lambda *_: False
    drop(made[0])
    assert same(take(fast, positions, [1], view.d_model)[:, 0], made[1][1, positions])
    for position in range(40):
        assert same(fast.row(0, position), made[1][0, position])
    fast.forget()


@pytest.mark.skipif(not AIO, reason="no asynchronous I/O here")
def test_what_is_asked_for_again_comes_through_the_page_cache(made, view, monkeypatch):
    fast, _ = ways(view)
    read, copied = [], []
    real_read, real_copy = local_rows._read, fast.copy
    monkeypatch.setattr(local_rows, "_read", lambda wanted: read.append(1) or real_read(wanted))
    fast.copy = lambda *given, advised=False: copied.append(advised) or real_copy(*given, advised=advised)
    monkeypatch.setattr(local_rows, "available_memory", lambda: 0)  # as if the site did not fit
    drop(made[0])
    positions = np.random.default_rng(0).permutation(TOKENS)[:100]
    for _ in range(3):
        take(fast, positions, [1], view.d_model)
    if len(read) == 1:
        # First past it, then into it, then from it.
        assert copied == [True, False]
    else:
        assert not read  # this file system keeps its pages
    fast.forget()


@pytest.mark.skipif(not AIO, reason="no asynchronous I/O here")
def test_a_site_that_fits_is_kept_once_it_was_read_as_often_as_it_is_large(view):
    fast, _ = ways(view)
    table, size = fast._map.rows, fast._map.window.place_bytes * fast._map.window.count
    rows = np.array([0, table.tensor.shape[0] * 1000])  # far apart
    assert not fast._worth_caching(table, rows, rows)
    assert fast._worth_caching(table, rows, rows)  # asked again
    fast._bytes_past_cache = size
    assert fast._worth_caching(table, rows, rows + 1)
    dense = np.arange(100)
    fast._bytes_past_cache = 0
    assert fast._worth_caching(table, dense, dense)


def test_a_shard_that_was_cut_short_is_told(tmp_path, monkeypatch):
    without_sync(monkeypatch)
    path = tmp_path / "acts"
    rows = torch.randn(1, 4096, 1024).bfloat16()
    with mmcache.create(path, sites={"mlp_in": 1024}, n_layers=1, shard_tokens=2048) as writer:
        writer.append(torch.arange(4096), {"mlp_in": rows})
    with mmcache.open(path) as store:
        view = store["mlp_in"]
        view.get_position(0, 0)
        view.get_position(0, 4000)
        view._reader._worth_caching = lambda *_: False
        file = shards(path / "mlp_in")[1]
        file.chmod(0o644)
        os.truncate(file, 4096 + 4096)
        # Nothing is mapped any more where the map would be read; the direct read meets the end.
        monkeypatch.setattr(site_map.SiteMap, "cached", lambda *_: 0.0)
        if AIO:
            with pytest.raises(mmcache.CorruptError, match="cut short"):
                view.gather(range(2048, 4096, 20))


def test_shards_beyond_the_limit_of_maps(made, view):
    fast, _ = ways(view)
    fast._map.window.most_maps = 2
    for positions in PICKS:
        assert same(
            take(fast, positions, [2, 0], view.d_model), made[1][[2, 0]][:, positions].transpose(0, 1).contiguous()
        )
    assert fast._map.window.mapped.sum() <= 2
    fast.forget()


def test_descriptors_are_bounded(made, view):
    fast = MappedRows(view._folder, view._layout, LAYERS, 1)
    fast._worth_caching = lambda *_: False
    for positions in PICKS:
        drop(made[0])
        take(fast, positions, [0], view.d_model)
        assert len(fast._map.descriptors) <= 1
    fast.forget()
    assert not fast._map.descriptors


def test_nothing_is_mapped_after_forgetting(made, view):
    fast, simple = ways(view)
    for reader in (fast, simple):
        take(reader, PICKS[0], [0], view.d_model)
        assert maps_below(made[0])
        reader.forget()
        assert not maps_below(made[0])


def test_others_than_the_owner_read_the_same(made, view):
    fast, _ = ways(view)
    real = fast._map.map

    def as_another(place):
        real(place)
        fast._map.owned = False

    fast._map.map = as_another
    for positions in PICKS:
        drop(made[0])
        for _ in range(2):
            found = take(fast, positions, [1], view.d_model)[:, 0]
            assert same(found, made[1][1, positions])
    for position in range(50):
        assert same(fast.row(2, position), made[1][2, position])
    fast.forget()


def test_threads_read_while_others_let_go(made, view):
    fast, _ = ways(view)
    fast._map.window.most_maps = 2
    failures, stop = [], threading.Event()

    def work(seed):
        generator = np.random.default_rng(seed)
        try:
            while not stop.is_set():
                positions = generator.integers(0, TOKENS, 80)
                if not same(take(fast, positions, [1], view.d_model)[:, 0], made[1][1, positions]):
                    failures.append("gather")
                position = int(positions[0])
                if not same(fast.row(2, position), made[1][2, position]):
                    failures.append("row")
        except Exception as error:
            failures.append(repr(error))
            raise

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(40):
        fast.forget()
        drop(made[0])
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
    fast.forget()


def test_a_row_is_read_from_its_own_file_though_another_thread_forgets_it(made, view, monkeypatch):
    fast, _ = ways(view)
    drop(made[0])
    real, reads = os.preadv, []

    def preadv(fd, *rest):
        reads.append(fd)
        fast.forget()
        return real(fd, *rest)

    monkeypatch.setattr(local_rows.os, "preadv", preadv)
    fast._believed, fast._was_cached = 10, False
    position = TOKENS - 1
    assert same(fast.row(1, position), made[1][1, position])
    assert reads


@FORKS
def test_a_fork_reads_by_itself(made, view):
    positions = np.random.default_rng(0).permutation(TOKENS)
    view.gather(positions)
    view.get_position(0, 3)
    view._reader._bouncing.acquire()
    view._reader._map.window.enter()

    def read():
        drop(made[0])
        view._reader._bytes_past_cache = 0
        assert same(view.gather(positions, layers=[2])[:, 0], made[1][2, positions])
        for position in range(40):
            assert same(view.get_position(1, position), made[1][1, position])

    assert forked(read) == 0
    view._reader._map.window.leave()
    view._reader._bouncing.release()


def test_read_ahead_brings_rows_into_memory(made, view):
    drop(made[0])
    view.read_ahead(100, 2900)
    fast, _ = ways(view)
    rows = np.arange(100, 2900) * fast._map.position_step
    assert fast._map.cached(fast._map.rows, rows) == 1.0
    fast.forget()
    with pytest.raises(mmcache.OutOfRangeError, match="tokens 0 to 3001 out of range"):
        view.read_ahead(0, TOKENS + 1)


def test_as_an_array(made, view):
    array = np.asarray(view)
    assert array.shape == view.shape
    assert (array.view(np.uint16) == made[1].view(torch.int16).numpy().view(np.uint16)).all()
    assert np.asarray(view, dtype=np.float32).dtype == np.float32
    with pytest.raises(mmcache.ArgumentError, match="always a copy"):
        np.array(view, copy=False)
