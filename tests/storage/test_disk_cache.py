"""A cache takes what it may take and no more, whoever uses it, and what is in it is whole."""

import itertools
import os
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest

import remote_stores
from mmcache.errors import ArgumentError, CorruptError, DiskFullError
from mmcache.storage import disk_cache
from mmcache.storage.disk_cache import DiskCache
from stores_and_processes import FORKS, exit_code, start_fork, widened, without_sync

PAGE = 4096


@pytest.fixture
def folder(tmp_path, monkeypatch):
    without_sync(monkeypatch)
    return tmp_path / "shards"


def content(name, size):
    """Give the bytes that a file of a name has here."""
    return np.frombuffer((name.encode() * (size // len(name) + 1))[:size], np.uint8)


def fill(name, size):
    return lambda draft: draft.write(content(name, size), 0)


def check(path):
    """Compare a file with what one of its name has."""
    data = path.read_bytes()
    if data != content(path.name, len(data)).tobytes() or not data:
        raise CorruptError(path.name)


def find(cache, name):
    return cache.find(name, check)


def add(cache, name, size=PAGE):
    return cache.add(name, lambda: (size, fill(name, size)), check)


def names(cache):
    return sorted(file.name for file in cache.folder.iterdir() if not file.name.startswith("."))


def test_a_file_is_made_once_and_found_again(folder):
    cache = DiskCache(folder, 10 * PAGE)
    assert find(cache, "a") is None
    path = add(cache, "a", 5000)
    assert path.read_bytes() == content("a", 5000).tobytes()
    assert find(cache, "a") == path
    assert find(DiskCache(folder, PAGE), "a") == path, "another one knows it, too"
    cache.add("a", lambda: pytest.fail("it is there already"), check)
    assert cache.drop("a")
    assert not cache.drop("a")
    assert find(cache, "a") is None
    assert remote_stores.tidy(folder)


def test_the_least_used_go_first(folder):
    cache = DiskCache(folder, 3 * PAGE)
    for name in "abc":
        add(cache, name)
    find(cache, "a")
    add(cache, "d")
    assert names(cache) == ["a", "c", "d"]
    add(cache, "e", 2 * PAGE)
    assert names(cache) == ["d", "e"]
    assert cache.used() == 3 * PAGE
    add(cache, "f", 3 * PAGE)
    assert names(cache) == ["f"], "all of the room is for one, if it must be"


def test_what_is_larger_than_the_cache_is_refused_and_nothing_goes_for_it(folder):
    cache = DiskCache(folder, 4 * PAGE)
    add(cache, "a")
    with pytest.raises(ArgumentError, match=r"a file of 20000 bytes .* 16384: give at least cache_bytes=20480"):
        add(cache, "b", 20000)
    # On a disk it takes whole pages.
    with pytest.raises(ArgumentError, match="16385"):
        add(cache, "b", 16385)
    assert names(cache) == ["a"]


@pytest.mark.parametrize("error", [OSError(5, "broken"), KeyboardInterrupt(), ValueError("no")])
def test_a_file_that_could_not_be_filled_leaves_nothing(folder, error):
    cache = DiskCache(folder, 4 * PAGE)

    def broken(draft):
        draft.write(content("a", 100), 0)
        raise error

    with pytest.raises(type(error)):
        cache.add("a", lambda: (PAGE, broken), check)
    assert names(cache) == []
    assert remote_stores.tidy(folder)
    add(cache, "a")


def test_who_holds_files_is_told_before_their_room_is_given_away(folder):
    told = []

    class Holder:
        def forget(self):
            told.append((names(cache), cache.used()))

    cache, holder, gone = DiskCache(folder, 2 * PAGE), Holder(), Holder()
    other = DiskCache(folder.with_name("other"), PAGE * 2)
    cache.hold(holder)
    cache.hold(gone)
    del gone
    before = cache.generation
    add(cache, "a")
    add(other, "a")
    add(other, "b")
    assert (told, cache.generation) == ([], before), "nothing has gone"
    add(cache, "b", 2 * PAGE)
    assert told == [([], 0)], "no draft has taken the room yet"
    assert cache.generation != before
    del holder
    add(cache, "c")
    assert len(told) == 1
    assert not [one for one in disk_cache._HOLDERS if one[0] == folder]


@FORKS
def test_what_a_killed_process_left_is_removed_by_the_next(folder):
    cache = DiskCache(folder, 5 * PAGE)

    def killed(draft):
        draft.write(content("a", 100), 0)
        os.kill(os.getpid(), signal.SIGKILL)

    child = start_fork(lambda: DiskCache(folder, 5 * PAGE).add("a", lambda: (4 * PAGE, killed), check))
    assert exit_code(child) == -signal.SIGKILL
    assert cache.used() == 4 * PAGE, "its draft takes room"
    add(cache, "b", 4 * PAGE)
    assert names(cache) == ["b"]
    add(cache, "a")
    assert remote_stores.tidy(folder)


def test_who_needs_room_waits_for_what_is_under_way(folder):
    cache, order = DiskCache(folder, 4 * PAGE), []

    def slow(name, seconds, begun):
        def work(draft):
            begun.set()
            time.sleep(seconds)
            fill(name, 3 * PAGE)(draft)
            order.append(name)

        return cache.add(name, lambda: (3 * PAGE, work), check)

    with ThreadPoolExecutor(2) as pool:
        begun = threading.Event()
        first = pool.submit(slow, "a", 0.3, begun)
        assert begun.wait(60)
        pool.submit(slow, "b", 0, begun).result()
        first.result()
    assert order == ["a", "b"]
    assert names(cache) == ["b"]


def _use_much(folder, seed, count):
    """Use more files than there is room for, in a folder that others use too; every one is right."""
    dice, cache = np.random.default_rng(seed), DiskCache(folder, 12 * PAGE)
    for _ in range(count):
        number = int(dice.integers(40))
        size = PAGE * (number % 4) + 1 + number
        path = add(cache, f"n{number}", size)
        try:
            found = path.read_bytes()
        except FileNotFoundError:
            continue  # others needed the room
        assert found == content(f"n{number}", size).tobytes()


@FORKS
def test_processes_and_threads_share_a_folder_and_stay_within_its_bound(folder, request):
    count = widened(request, (60, 1000))
    with remote_stores.Watch(folder) as watch:
        children = [start_fork(partial(_use_much, folder, seed, count)) for seed in range(2)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda seed: _use_much(folder, seed, count), range(10, 18)))
        assert [exit_code(child) for child in children] == [0, 0]
    assert 8 * PAGE < watch.most <= 12 * PAGE
    assert remote_stores.tidy(folder)


def test_of_many_who_want_a_file_one_makes_it(folder):
    cache, made = DiskCache(folder, 40 * PAGE), itertools.count()

    def make(draft):
        next(made)
        time.sleep(0.05)
        fill("a", PAGE)(draft)

    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(lambda _: cache.add("a", lambda: (PAGE, make), check), range(20)))
    assert (paths, next(made)) == ({folder / "a"}, 1)


def test_a_disk_with_less_room_than_the_cache_may_take_says_so(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", place], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
    try:
        cache = DiskCache(place / "shards", 100 * PAGE)
        add(cache, "a", 4 * PAGE)
        with pytest.raises(DiskFullError, match="81920 bytes needed"):
            add(cache, "b", 20 * PAGE)
        assert names(cache) == ["a"]
        assert remote_stores.tidy(cache.folder)
        assert add(cache, "c", PAGE).read_bytes() == content("c", PAGE).tobytes()
    finally:
        subprocess.run(["umount", "-l", place], check=False)
