"""What a cache has is whole after a restart of the machine, too; the locks on its files leave nothing behind."""

import os
import signal
import stat
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from remote import wait_for
from support import python

from mmcache import shard_cache
from mmcache.errors import ArgumentError, WriteError
from mmcache.lock import locked
from mmcache.shard_cache import ShardCache

PAGE = 4096
FILE = 4 * PAGE


def add(cache, name, size=FILE):
    return cache.add(name, lambda: (size, lambda draft: draft.write(np.full(size, ord(name), np.uint8), 0)))


def names(cache):
    return sorted(path.name for path in cache.folder.iterdir() if not path.name.startswith("."))


def test_a_file_may_take_all_of_the_cache_and_no_more(tmp_path):
    cache = ShardCache(tmp_path, FILE)
    add(cache, "a")
    add(cache, "b", FILE - 1)
    assert names(cache) == ["b"]
    with pytest.raises(ArgumentError, match=f"a file of {FILE + 1} bytes .* at least cache_bytes={FILE + PAGE}"):
        add(cache, "c", FILE + 1)
    assert names(cache) == ["b"]
    add(ShardCache(tmp_path, FILE + PAGE), "c", FILE + 1)
    assert names(cache) == ["c"]


def test_files_are_sealed_in_the_background(tmp_path, monkeypatch):
    go, real = threading.Event(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (go.wait(20), real(fd))[1])
    cache = ShardCache(tmp_path, 4 * FILE)
    file = add(cache, "a")
    assert file.stat().st_mode & stat.S_IWUSR
    assert cache.find("a") == file
    go.set()
    wait_for(lambda: stat.S_IMODE(file.stat().st_mode) == 0o444)


def test_what_was_not_sealed_when_the_machine_went_down_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_cache, "_settle", lambda _: None)
    cache = ShardCache(tmp_path, 4 * FILE)
    for name in "abc":
        add(cache, name)
    (tmp_path / "b").chmod(0o444)
    assert names(ShardCache(tmp_path, 4 * FILE)) == ["a", "b", "c"]
    monkeypatch.setattr(shard_cache, "_boot", lambda: "another one")
    again = ShardCache(tmp_path, 4 * FILE)
    assert names(again) == ["b"]
    add(again, "d")
    assert names(ShardCache(tmp_path, 4 * FILE)) == ["b", "d"]
    # Where the system does not say, files are sealed before they have their names.
    monkeypatch.setattr(shard_cache, "_boot", lambda: "")
    last = ShardCache(tmp_path, 4 * FILE)
    assert names(last) == ["b"]
    assert stat.S_IMODE(add(last, "e").stat().st_mode) == 0o444


def test_who_comes_second_after_a_restart_leaves_what_the_first_has_made(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_cache, "_settle", lambda _: None)
    real, made = ShardCache._is_cleared, []

    def is_cleared(cache):
        found = real(cache)
        if not made:
            made.append(True)
            add(ShardCache(tmp_path, 4 * FILE), "a")
        return found

    monkeypatch.setattr(ShardCache, "_is_cleared", is_cleared)
    assert names(ShardCache(tmp_path, 4 * FILE)) == ["a"]


def test_what_does_not_get_to_the_disk_goes(tmp_path, monkeypatch):
    def fsync(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    (tmp_path / "cache").mkdir()
    cache = ShardCache(tmp_path / "cache", 4 * FILE)
    file = add(cache, "a")
    wait_for(lambda: not file.exists())
    wait_for(lambda: cache.generation)


ALONE = """
import sys, pathlib, threading
from mmcache.lock import locked
folder, failed = pathlib.Path(sys.argv[1]), []
def work():
    try:
        for _ in range(100):
            with locked(folder / "lock"):
                with open(folder / "inside", "x"):
                    count = int((folder / "count").read_text())
                    (folder / "count").write_text(str(count + 1))
                (folder / "inside").unlink()
    except BaseException as error:
        failed.append(error)
threads = [threading.Thread(target=work) for _ in range(3)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
assert not failed, failed
"""


def test_one_thread_of_one_process_at_a_time_has_a_lock_and_no_file_is_left(tmp_path):
    (tmp_path / "count").write_text("0")
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda _: python(ALONE, tmp_path), range(2)))
    assert [(process.returncode, process.stderr) for process in done] == [(0, "")] * 2
    assert (tmp_path / "count").read_text() == "600"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["count"]


def test_a_lock_goes_with_an_error_and_with_its_process(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path / "lock"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    code = "import sys, os, pathlib; from mmcache.lock import locked; held = locked(pathlib.Path(sys.argv[1]))"
    assert python(code + "; held.__enter__(); os.kill(os.getpid(), 9)", tmp_path / "lock").returncode == -signal.SIGKILL
    assert (tmp_path / "lock").exists()
    with locked(tmp_path / "lock"):
        pass
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(WriteError, match="locking"), locked(tmp_path / "nowhere" / "lock"):
        pass
