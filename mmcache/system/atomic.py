"""Files that appear atomically under their final names, once they are complete and durable.

A file is written under a temporary name, synced and renamed, and its folder is synced: a file that is visible under its
final name is complete. This is fastest on Linux. Features that a system or file system lacks (O_DIRECT, RWF_DONTCACHE,
preallocation) are probed, and not used there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import secrets
import threading
from typing import TYPE_CHECKING

import numpy as np

from mmcache.errors import CorruptError
from mmcache.system.files import O_DIRECT, explained, make_folders, name_batches, sync_folder
from mmcache.system.memory import PAGE
from mmcache.system.no_symlinks import NO_FOLLOW, opened_folder, opened_parent, status_in
from mmcache.system.syscalls import LINUX, PORTABLE

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["AtomicFile", "publish", "publish_all", "remove_drafts"]

_DRAFT = ".tmp"
# Mode of a sealed file, less what the umask forbids. Read-only, since a zarr writer would re-encode a shard that it
# changes, and lose the header.
_SEALED = 0o444
# RWF_DONTCACHE (Linux 6.14): written through the page cache, then dropped from it; Python has no name for it.
_DONT_CACHE = 0x80


def remove_drafts(root: Path, folder: str = "") -> list[str]:
    """Remove dead writers' temporary files from a folder. The final names of the files that live ones are writing.

    Raises:
        LinkError: The folder, or one between it and the root, is a symbolic link; the root may be one.
    """
    alive = []
    # Removing while listing is safe: readdir returns each remaining name exactly once.
    names = itertools.chain.from_iterable(name_batches(root / folder))
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), opened_folder(root, folder) as opened:
        for name in (name for name in names if name.startswith(".") and name.endswith(_DRAFT)):
            # A file that cannot be locked or removed does no harm.
            with contextlib.suppress(OSError):
                fd = os.open(name, os.O_RDONLY | os.O_NONBLOCK | NO_FOLLOW, dir_fd=opened)
                try:
                    # Shared: on NFS an exclusive lock needs write access, and a draft may already be read-only.
                    fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    os.unlink(name, dir_fd=opened)
                except BlockingIOError:
                    alive.append(name[1:].removesuffix(_DRAFT).rpartition(".")[0])
                finally:
                    os.close(fd)
    return alive


class AtomicFile:
    """A file that is being written under a temporary name, and gets its final name in `publish`.

    Several threads may write ranges that do not overlap; all else is for one thread at a time. The object holds a lock
    on its temporary file, by which `remove_drafts` distinguishes live writers from dead ones.

    Args:
        root: the folder below which no link is followed.
        name: the final name relative to it, with slashes.
        reserve: bytes to allocate now, so that a full disk fails early; 0 to allocate as the file grows.

    Raises:
        LinkError: The file's folder, or one between it and the root, is a symbolic link.
    """

    _temporary: str
    _maker = 0  # pid of the process whose temporary file may exist; 0 for none

    def __init__(self, root: Path, name: str, *, reserve: int = 0) -> None:
        self._root, self._name, self.path = root, name, root / name
        self._direct_fd = self._fd = -1
        # Whether to try O_DIRECT; and where that is refused, RWF_DONTCACHE.
        self._direct, self._uncached, self._opening = bool(O_DIRECT), LINUX, threading.Lock()
        with explained(self.path, "starting the file", reserve):
            try:
                while not self._create():
                    pass
                self._reserve(reserve)
            except BaseException:
                self.discard()
                raise

    def _create(self) -> bool:
        """Create the temporary file and lock it; False if `remove_drafts` removed it before it was locked."""
        with opened_parent(self._root, self._name) as (folder, last):
            self._temporary = f".{last}.{secrets.token_hex(8)}{_DRAFT}"
            # Set first: an interrupt may come right after the file is created.
            self._maker = os.getpid()
            self._fd = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644, dir_fd=folder)
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if status_in(folder, self._temporary) is not None:
                    return True
        self.discard()
        return False

    def _reserve(self, size: int) -> None:
        if size and hasattr(os, "posix_fallocate") and not PORTABLE:
            try:
                os.posix_fallocate(self._fd, 0, size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    raise

    def write(self, data: np.ndarray, offset: int, *, direct: bool = False) -> None:
        """Write contiguous uint8 `data` at `offset`; returns once the system has taken all of it.

        Args:
            data: what to write.
            offset: where to.
            direct: write whole pages past the page cache, if the file system allows it and the memory's address modulo
                the page size equals the offset's; otherwise with RWF_DONTCACHE where the kernel has it.
        """
        view = data.data
        head = pages = 0
        if direct and offset % PAGE == data.ctypes.data % PAGE:
            head = min(-offset % PAGE, data.nbytes)
            pages = (data.nbytes - head) // PAGE * PAGE
        with explained(self.path, f"writing at offset {offset}", data.nbytes):
            self._write_all(self._fd, view[:head], offset)
            if pages and not self._write_directly(view[head : head + pages], offset + head):
                pages = 0
            rest = head + pages
            if direct and not self._direct:
                rest += self._write_uncached(view[rest:], offset + rest)
            self._write_all(self._fd, view[rest:], offset + rest)

    def _write_directly(self, view: memoryview, offset: int) -> bool:
        """Write whole pages with O_DIRECT; False where that is refused."""
        with self._opening:
            if self._direct and self._direct_fd < 0:
                try:
                    self._direct_fd = self._open_again(os.O_WRONLY | O_DIRECT)
                except (OSError, CorruptError):
                    self._direct = False
        if not self._direct:
            return False
        try:
            self._write_all(self._direct_fd, view, offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # Some file systems allow the open but need larger sectors. Not closed: other threads may be writing.
            self._direct = False
            return False
        return True

    def _open_again(self, flags: int) -> int:
        """Open the temporary file a second time, and check that it is still the same file."""
        with opened_parent(self._root, self._name) as (folder, _):
            fd = os.open(self._temporary, flags | NO_FOLLOW, dir_fd=folder)
        if os.path.samestat(os.fstat(fd), os.fstat(self._fd)):
            return fd
        os.close(fd)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self._temporary)

    def _write_uncached(self, view: memoryview, offset: int) -> int:
        """Write with RWF_DONTCACHE as far as the system accepts it. The number of bytes written."""
        done = 0
        try:
            while self._uncached and done < len(view):
                some = os.pwritev(self._fd, [view[done:]], offset + done, _DONT_CACHE)
                if not some:
                    break  # the ordinary write that follows reports it
                done += some
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
            self._uncached = False
        return done

    @staticmethod
    def _write_all(fd: int, view: memoryview, offset: int) -> None:
        while view:
            written = os.pwrite(fd, view, offset)
            if not written:
                raise OSError(errno.EIO, "the system took no bytes")
            view, offset = view[written:], offset + written

    def publish(self, size: int, *, durable: bool = True) -> None:
        """Truncate the file to `size` bytes, make it read-only, sync it if `durable`, and rename it to its final name.

        Blocks until the bytes are on the device (the name becomes durable with `sync_folder`). A failed sync
        is never retried on the same file: the system may have dropped the bytes.
        """
        with explained(self.path, "making the file durable", size):
            os.ftruncate(self._fd, size)
            # No more than the umask or the folder's default ACL allowed when the file was created.
            os.fchmod(self._fd, _SEALED & os.fstat(self._fd).st_mode)
            if durable:
                os.fsync(self._fd)
            with opened_parent(self._root, self._name) as (folder, last):
                os.rename(self._temporary, last, src_dir_fd=folder, dst_dir_fd=folder)
        self._maker = 0
        self._close()

    def discard(self) -> None:
        """Remove the temporary file; a file under the final name is not touched. Safe to call twice."""
        if self._maker:
            # An error here would hide the reason for the discard.
            with contextlib.suppress(OSError, CorruptError), opened_parent(self._root, self._name) as (folder, _):
                os.unlink(self._temporary, dir_fd=folder)
            self._maker = 0
        self._close()

    def __del__(self) -> None:
        # For an interrupt that comes before the caller has a reference. A forked process has only a copy.
        if self._maker and self._maker == os.getpid():
            self.discard()

    def _close(self) -> None:
        fds, self._direct_fd, self._fd = (self._direct_fd, self._fd), -1, -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)


def publish(root: Path, name: str, data: bytes, *, durable: bool = True) -> None:
    """Write a small file atomically, and make it and its name durable unless `durable` is False; blocks until then.

    Arguments and errors as `AtomicFile`.
    """
    draft = AtomicFile(root, name)
    try:
        draft.write(np.frombuffer(data, np.uint8), 0)
        draft.publish(len(data), durable=durable)
    except BaseException:
        draft.discard()
        raise
    if durable:
        sync_folder(draft.path.parent)


def publish_all(root: Path, contents: Mapping[str, bytes]) -> None:
    """Write small files, and make them, their names and their folders durable; blocks until then.

    Each file is atomic, the group is not: if one fails, the earlier ones stay. Missing folders are created.

    Args:
        root: the folder below which no link is followed.
        contents: the files' bytes by name, relative to the root.

    Raises:
        LinkError: A folder below the root is a symbolic link.
    """
    folders = dict.fromkeys(name.rpartition("/")[0] for name in contents)
    changed = make_folders(root, folders)
    for name, data in contents.items():
        draft = AtomicFile(root, name)
        try:
            draft.write(np.frombuffer(data, np.uint8), 0)
            draft.publish(len(data))
        except BaseException:
            draft.discard()
            raise
    for folder in dict.fromkeys([*changed, *(root / folder for folder in folders)]):
        sync_folder(folder)
