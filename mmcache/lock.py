"""The right to write to a grown store, or to plan one: one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from typing import TYPE_CHECKING, Self

from mmcache.errors import LockedError, WriteError
from mmcache.files import explained

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

__all__ = ["FolderLock", "locked"]

# Seconds between two tries.
_AGAIN = 0.2


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock on a file that is made for it, and removed behind it; blocks while another thread or process has it.

    Raises:
        WriteError: the file cannot be made, or its file system has no locks.
    """
    while True:
        with explained(path, "locking"):
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
            except BaseException:
                os.close(fd)
                raise
        try:
            if _is_at(fd, path):
                try:
                    yield
                finally:
                    # While it is still ours: who waits on the old file notices that it is gone.
                    path.unlink(missing_ok=True)
                return
        finally:
            os.close(fd)


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


class FolderLock:
    """The right to write to a grown store, held by one process until it is released or dies.

    It is a lock on the file `.lock`, which the holder removes; one that a dead process left behind is taken over.

    Raises:
        LockedError: another writer has it; the error names its process and host.
        WriteError: the folder cannot be written to, or its file system has no locks.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / ".lock"
        self._fd = -1
        while self._fd < 0:
            with explained(self._path, "locking the store"):
                fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
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
            if _is_at(fd, self._path):
                self._fd = fd
            else:
                # The holder before removed the file between our open and our lock.
                os.close(fd)
        # Who holds it is a courtesy: neither a full disk nor an interrupt must refuse the lock and leave it held.
        try:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, 0)
                os.pwrite(self._fd, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        except BaseException:
            self.release()
            raise

    @classmethod
    def wait(cls, folder: Path, waiting: Callable[[], None]) -> Self:
        """Take the lock; blocks while somebody else has it, and calls `waiting` now and then.

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
        """Let others write. Safe to call twice."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                # Removed while it is still ours: whoever locks the old file notices that it is no longer there.
                if _is_at(self._fd, self._path):
                    self._path.unlink()
                # Closing is not enough where a forked process, such as a data loader's, has the descriptor too.
                fcntl.flock(self._fd, fcntl.LOCK_UN)
            os.close(self._fd)
            self._fd = -1
