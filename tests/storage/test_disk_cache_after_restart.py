"""What a cache has is whole after a restart of the machine, too; the locks on its files leave nothing behind."""

import os
import signal
import stat
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mmcache.errors import ArgumentError, WriteError
from mmcache.storage import disk_cache
from mmcache.storage.disk_cache import DiskCache, identity
from mmcache.system.locks import locked
from stores_and_processes import python, wait_for

PAGE = 4096
FILE = 4 * PAGE


def add(cache, name, size=FILE):
    made = size, lambda draft: draft.write(np.full(size, ord(name), np.uint8), 0)
    return cache.add(name, lambda: made, lambda _: None)


def names(cache):
    return sorted(path.name for path in cache.folder.iterdir() if not path.name.startswith("."))


def test_a_file_may_take_all_of_the_cache_and_no_more(tmp_path):
    cache = DiskCache(tmp_path, FILE)
    add(cache, "a")
    add(cache, "b", FILE - 1)
    assert names(cache) == ["b"]
    with pytest.raises(ArgumentError, match=f"a file of {FILE + 1} bytes .* at least cache_bytes={FILE + PAGE}"):
        add(cache, "c", FILE + 1)
    assert names(cache) == ["b"]
    add(DiskCache(tmp_path, FILE + PAGE), "c", FILE + 1)
    assert names(cache) == ["c"]


def test_a_file_is_there_before_it_is_durable(tmp_path, monkeypatch):
    go, synced, real, cache = threading.Event(), [], os.fsync, DiskCache(tmp_path, 4 * FILE)
    monkeypatch.setattr(os, "fsync", lambda fd: (go.wait(20), real(fd), synced.append(fd)))
    file = add(cache, "a")
    before = identity(file)
    assert not synced
    assert stat.S_IMODE(file.stat().st_mode) == 0o444
    go.set()
    wait_for(lambda: synced)
    assert identity(file) == before, "to make it durable is no change of it"


def test_where_the_system_does_not_say_when_it_started_files_are_durable_first(tmp_path, monkeypatch):
    synced, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_ino), real(fd)))
    monkeypatch.setattr(disk_cache, "_boot", lambda: "")
    assert add(DiskCache(tmp_path, 4 * FILE), "a").stat().st_ino in synced


def test_what_does_not_get_to_the_disk_goes(tmp_path, monkeypatch):
    def fsync(_):
        raise OSError(5, "Input/output error")

    cache = DiskCache(tmp_path / "cache", 4 * FILE)
    monkeypatch.setattr(os, "fsync", fsync)
    file = add(cache, "a")
    wait_for(lambda: not file.exists())
    wait_for(lambda: cache.generation)


ALONE = """
import sys, pathlib, threading
from mmcache.system.locks import locked
folder, failed = pathlib.Path(sys.argv[1]), []
def work():
    try:
        for _ in range(100):
            with locked(folder, "lock"):
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
    with pytest.raises(KeyError), locked(tmp_path, "lock"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    code = "import sys, os, pathlib; from mmcache.system.locks import locked; held = locked(pathlib.Path(sys.argv[1]), 'lock')"  # noqa: E501
    assert python(code + "; held.__enter__(); os.kill(os.getpid(), 9)", tmp_path).returncode == -signal.SIGKILL
    assert (tmp_path / "lock").exists()
    with locked(tmp_path, "lock"):
        pass
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(WriteError, match="locking"), locked(tmp_path / "nowhere", "lock"):
        pass
