import errno
import fcntl
import os
import signal
import subprocess
import sys

import pytest

from mmcache.errors import LockedError, WriteError
from mmcache.system.locks import FolderLock


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def refuse(code):
    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    return fail


def test_a_store_has_one_writer_until_it_lets_go(tmp_path):
    lock = FolderLock(tmp_path)
    with pytest.raises(LockedError, match=rf'"pid": {os.getpid()}, "host": ".+"'):
        FolderLock(tmp_path)
    lock.release()
    lock.release()
    assert names(tmp_path) == []
    FolderLock(tmp_path).release()


def test_a_lock_that_its_holder_removed_meanwhile_is_none(tmp_path, monkeypatch):
    # Between our open and our lock the holder lets go, and another takes over: its file is the one that counts.
    before, real, others = FolderLock(tmp_path), fcntl.flock, []

    def flock(fd, operation):
        if not others:
            others.append(None)
            before.release()
            others[0] = FolderLock(tmp_path)
        return real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(LockedError):
        FolderLock(tmp_path)
    others[0].release()
    FolderLock(tmp_path).release()


def test_a_lock_removed_by_hand_takes_nobody_elses_with_it(tmp_path):
    old = FolderLock(tmp_path)
    (tmp_path / ".lock").unlink()
    new = FolderLock(tmp_path)
    old.release()
    with pytest.raises(LockedError):
        FolderLock(tmp_path)
    new.release()


def test_a_forked_process_does_not_keep_the_lock(tmp_path):
    lock = FolderLock(tmp_path)
    inherited = os.dup(lock._fd)  # what a data loader's worker has
    lock.release()
    FolderLock(tmp_path).release()
    os.close(inherited)


@pytest.mark.parametrize("call", ["pwrite", "ftruncate"])
def test_a_full_disk_does_not_stand_in_the_way_of_the_lock(call, tmp_path, monkeypatch):
    monkeypatch.setattr(os, call, refuse(errno.ENOSPC))
    lock = FolderLock(tmp_path)
    with pytest.raises(LockedError):
        FolderLock(tmp_path)
    lock.release()


def test_the_lock_of_a_process_that_was_killed_is_free(tmp_path):
    code = "import sys, time, pathlib; from mmcache.system.locks import FolderLock; lock = FolderLock(pathlib.Path(sys.argv[1]))"  # noqa: E501
    code += "; print('locked', flush=True); time.sleep(600)"
    holder = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        with holder.stdout:
            assert holder.stdout.readline() == "locked\n"
            with pytest.raises(LockedError, match=f'"pid": {holder.pid}'):
                FolderLock(tmp_path)
    finally:
        holder.kill()
    assert holder.wait() == -signal.SIGKILL
    FolderLock(tmp_path).release()


def test_a_folder_that_cannot_be_locked_is_an_error(tmp_path):
    with pytest.raises(WriteError, match="locking the store"):
        FolderLock(tmp_path / "nowhere")


def test_who_waits_gets_the_lock_when_it_is_free(tmp_path):
    before, asked = FolderLock(tmp_path), []

    def waiting():
        asked.append(True)
        if len(asked) == 2:
            before.release()

    FolderLock.wait(tmp_path, waiting).release()
    assert len(asked) == 2
    FolderLock.wait(tmp_path, lambda: pytest.fail("nobody has it")).release()


def test_a_file_system_without_locks_is_an_error_that_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", refuse(errno.ENOLCK))
    with pytest.raises(WriteError, match="gives no locks") as told:
        FolderLock(tmp_path)
    assert told.value.filename == str(tmp_path)
