"""File locks: the one writer of a grown store, and short locks between threads and processes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from typing import TYPE_CHECKING, Self

from mmcache.errors import CorruptError, LockedError, WriteError
from mmcache.system.files import explained
from mmcache.system.no_symlinks import open_in_place, opened_parent, status_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

__all__ = ["FolderLock", "locked"]

_LOCK = ".lock"
# Seconds between two attempts.
_AGAIN = 0.2


@contextlib.contextmanager
def locked(root: Path, name: str) -> Iterator[None]:
    """Hold a lock on a file that exists only while locked; blocks while another thread or process has it.

    Args:
        root: the folder below which no link is followed.
        name: the file's name relative to it.

    Raises:
        WriteError: the file cannot be created, or its file system has no locks.
        LinkError, CorruptError: as `open_in_place`.
    """
    while True:
        with explained(root / name, "locking"):
            fd = open_in_place(root, name, os.O_RDWR | os.O_CREAT)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
            except BaseException:
                os.close(fd)
                raise
        try:
            if _is_at(fd, root, name):
                try:
                    yield
                finally:
                    # Before unlocking: a process that waits on the old file then notices that it is gone.
                    with contextlib.suppress(FileNotFoundError), opened_parent(root, name) as (folder, last):
                        os.unlink(last, dir_fd=folder)
                return
        finally:
            os.close(fd)


def _is_at(fd: int, root: Path, name: str) -> bool:
    with contextlib.suppress(FileNotFoundError), opened_parent(root, name) as (folder, last):
        found = status_in(folder, last)
        return found is not None and os.path.samestat(os.fstat(fd), found)
    return False


class FolderLock:
    """The lock of a grown store's only writer, held until it is released or its process dies.

    It is a lock on the file `.lock`, which the holder removes; a file left by a dead process is reused.

    Raises:
        LockedError: another writer has it; the error names its process and host.
        WriteError: the folder cannot be written to, or its file system has no locks.
        LinkError, CorruptError: `.lock` is a symbolic link, has other names, or is no plain file.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._fd = -1
        while self._fd < 0:
            with explained(folder / _LOCK, "locking the store"):
                fd = open_in_place(folder, _LOCK, os.O_RDWR | os.O_CREAT)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = os.pread(fd, 4096, 0).decode(errors="replace")
                os.close(fd)
                raise LockedError(
                    error.errno, f"another writer has this store open ({holder}); close it first", str(folder)
                ) from error
            except OSError as error:
                os.close(fd)
                raise WriteError(
                    error.errno,
                    f"this file system gives no locks ({error.strerror}), by which writers keep out of each other's "
                    f"way: mount it with locks, or put the store on another",
                    str(folder),
                ) from error
            if _is_at(fd, folder, _LOCK):
                self._fd = fd
            else:
                # The previous holder removed the file between our open and our lock.
                os.close(fd)
        # The holder's name is optional: a full disk must not refuse the lock, nor an interrupt leave it held.
        try:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, 0)
                os.pwrite(self._fd, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        except BaseException:
            self.release()
            raise

    @classmethod
    def wait(cls, folder: Path, waiting: Callable[[], None]) -> Self:
        """Take the lock; blocks while another writer has it, and calls `waiting` before each retry, every 0.2 seconds.

        Raises:
            WriteError: as above.
        """
        while True:
            try:
                return cls(folder)
            except LockedError:
                waiting()
                time.sleep(_AGAIN)

    def release(self) -> None:
        """Release the lock. Safe to call twice."""
        if self._fd >= 0:
            with contextlib.suppress(OSError, CorruptError):
                # Before unlocking: a process that locks the old file then notices that it is gone.
                if _is_at(self._fd, self._folder, _LOCK):
                    with opened_parent(self._folder, _LOCK) as (folder, last):
                        os.unlink(last, dir_fd=folder)
                # Closing is not enough if a forked process, such as a data loader worker, has the descriptor too.
                fcntl.flock(self._fd, fcntl.LOCK_UN)
            os.close(self._fd)
            self._fd = -1
