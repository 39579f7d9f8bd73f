"""The only place that touches the disk: drafts of shards, durable publishing, maps, locks.

A file is written under a temporary name, made durable, renamed to its own name, and its folder made durable:
a name that can be seen is a file that is whole. Linux is where this is fast; what another system or file
system refuses (O_DIRECT, preallocation) is probed and done without.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import secrets
import shutil
import stat
from typing import TYPE_CHECKING

import numpy as np

from mmcache.errors import CorruptError, DiskFullError, IncompleteError, StoreNotFoundError, WriteError
from mmcache.geometry import PAGE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = [
    "Draft",
    "explained",
    "free_bytes",
    "list_names",
    "make_folder",
    "map_file",
    "publish",
    "read_file",
    "remove_drafts",
    "remove_file",
    "remove_tree",
    "sync_folder",
]

_DRAFT = ".tmp"
# MMCACHE_PORTABLE=1 takes the portable paths everywhere, as on a system that has no others.
_PORTABLE = bool(os.environ.get("MMCACHE_PORTABLE"))
_O_DIRECT: int = 0 if _PORTABLE else getattr(os, "O_DIRECT", 0)
# The sealed file's mode: a zarr writer that touched a shard would re-encode it and lose the header.
_SEALED = 0o444
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def explained(path: Path, doing: str, needed: int = 0) -> Iterator[None]:
    """Turn the system's refusal into one of our errors, with the path and the numbers."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            free = free_bytes(path.parent)
            message = (
                f"no room while {doing}: {needed} bytes needed, {free} free there ({error.strerror}). What "
                f"was committed is intact: make room and run it again"
            )
            raise DiskFullError(error.errno, message, str(path)) from error
        raise WriteError(error.errno, f"failed while {doing} ({error.strerror})", str(path)) from error


def free_bytes(folder: Path) -> int:
    """Give the bytes that an ordinary user may still write in `folder`'s file system."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, durably. One that is there already is fine."""
    if path.is_dir():
        return
    if path.parent != path:
        make_folder(path.parent)
    with explained(path, "making the folder"):
        path.mkdir(exist_ok=True)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable; blocks until they are."""
    with explained(path, "making the folder durable"):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def list_names(path: Path) -> list[str]:
    """List the names in a folder, without `.` and `..`; a folder that is not there has none."""
    try:
        return os.listdir(path)  # noqa: PTH208 -- a million names need no Path objects
    except (FileNotFoundError, NotADirectoryError):
        return []


def remove_file(path: Path) -> None:
    """Remove a file that can be made again; one that is not there is fine. Durable with `sync_folder`."""
    with explained(path, "removing the file"):
        path.unlink(missing_ok=True)


def remove_tree(path: Path) -> None:
    """Remove a folder and everything in it; only ever called on a temporary cache's own folder."""
    shutil.rmtree(path, ignore_errors=True)


def remove_drafts(folder: Path) -> None:
    """Remove what writers that died left half-written. A draft that a live writer holds is left alone."""
    for name in list_names(folder):
        if not (name.startswith(".") and name.endswith(_DRAFT)):
            continue
        path = folder / name
        # Whatever cannot be locked or removed is only litter, and no reason to stop.
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            try:
                # Shared: NFS gives an exclusive lock only to those who may write, and a draft may be sealed.
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(fd)


class Draft:
    """A file that is being written, and is not yet there under its own name.

    Not for use by several threads at the same time. The draft holds a lock on its temporary file, by which
    `remove_drafts` tells live writers from dead ones.

    Args:
        path: the final name.
        reserve: bytes to allocate at once, so that a full disk is met now; 0 to allocate as it grows.
        direct: write whole pages past the page cache where the file system lets us.
    """

    _temporary: Path
    _maker = 0  # the process that may have made the temporary file, which is still there

    def __init__(self, path: Path, *, reserve: int = 0, direct: bool = False) -> None:
        self.path = path
        self._direct_fd = self._fd = -1
        with explained(path, "starting the file", reserve):
            try:
                while not self._create():
                    pass
                self._reserve(reserve)
                if direct and _O_DIRECT:
                    with contextlib.suppress(OSError):
                        self._direct_fd = os.open(self._temporary, os.O_WRONLY | _O_DIRECT)
            except BaseException:
                self.discard()
                raise

    def _create(self) -> bool:
        """Make the temporary file, and lock it; False if `remove_drafts` took it for a dead one's in between."""
        self._temporary = self.path.with_name(f".{self.path.name}.{secrets.token_hex(8)}{_DRAFT}")
        # Before it is there: an interrupt may come between the system's making it and our knowing so.
        self._maker = os.getpid()
        self._fd = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self._temporary.exists():
                return True
        self.discard()
        return False

    def _reserve(self, size: int) -> None:
        if size and hasattr(os, "posix_fallocate") and not _PORTABLE:
            try:
                os.posix_fallocate(self._fd, 0, size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    raise

    def write(self, data: np.ndarray, offset: int) -> None:
        """Write contiguous uint8 `data` at `offset`; returns once the system has taken all of it.

        Whole pages in page-aligned memory go directly to the device where that was asked for.
        """
        aligned = not (offset % PAGE or data.ctypes.data % PAGE)
        pages = data.nbytes // PAGE * PAGE if aligned and self._direct_fd >= 0 else 0
        view = data.data
        with explained(self.path, f"writing at offset {offset}", data.nbytes):
            if pages and not self._write_directly(view[:pages], offset):
                pages = 0
            self._write_all(self._fd, view[pages:], offset + pages)

    def _write_directly(self, view: memoryview, offset: int) -> bool:
        try:
            self._write_all(self._direct_fd, view, offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # Opened, but not written, directly: some file systems want larger sectors.
            os.close(self._direct_fd)
            self._direct_fd = -1
            return False
        return True

    @staticmethod
    def _write_all(fd: int, view: memoryview, offset: int) -> None:
        while view:
            written = os.pwrite(fd, view, offset)
            if not written:
                raise OSError(errno.EIO, "the system took no bytes")
            view, offset = view[written:], offset + written

    def publish(self, size: int, *, durable: bool = True) -> None:
        """Give the file exactly `size` bytes, make it durable and read-only, and rename it to its own name.

        Blocks until the bytes are on the device (the name becomes durable with `sync_folder`). A failed sync
        is never tried again on the same file: the system may have dropped the bytes.
        """
        with explained(self.path, "making the file durable", size):
            os.ftruncate(self._fd, size)
            os.fchmod(self._fd, _SEALED)
            if durable:
                os.fsync(self._fd)
            self._temporary.rename(self.path)
        self._maker = 0
        self._close()

    def discard(self) -> None:
        """Remove the draft; what is under the final name stays as it is. Safe to call twice."""
        if self._maker:
            # What cannot be removed is litter; saying so would hide why the draft is given up.
            with contextlib.suppress(OSError):
                self._temporary.unlink()
            self._maker = 0
        self._close()

    def __del__(self) -> None:
        # An interrupt may come before the draft is kept anywhere. A forked process only has a copy.
        if self._maker == os.getpid():
            self.discard()

    def _close(self) -> None:
        fds, self._direct_fd, self._fd = (self._direct_fd, self._fd), -1, -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)


def publish(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Put a small file in place, whole or not at all, and make it and its name durable; blocks until then."""
    draft = Draft(path)
    try:
        draft.write(np.frombuffer(data, np.uint8), 0)
        draft.publish(len(data), durable=durable)
    except BaseException:
        draft.discard()
        raise
    if durable:
        sync_folder(path.parent)


def read_file(path: Path, limit: int) -> bytes:
    """Read a whole file of at most `limit` bytes.

    Raises:
        StoreNotFoundError: there is no such file.
        CorruptError: it is larger, or no plain file.
    """
    try:
        # Non-blocking, so that a pipe put there by a stranger cannot hang the reader.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise StoreNotFoundError(errno.ENOENT, "there is no such file", str(path)) from error
    except NotADirectoryError as error:
        raise StoreNotFoundError(errno.ENOTDIR, "a part of the path is no folder", str(path)) from error
    try:
        file = os.fdopen(fd, "rb")
    except IsADirectoryError as error:
        os.close(fd)
        raise CorruptError(f"{path} is a folder where a file belongs") from error
    with file:
        data = file.read(limit + 1)
    if data is None or len(data) > limit:
        raise CorruptError(f"{path} is larger than the {limit} bytes such a file can have")
    return data


def map_file(path: Path, *, what: str) -> np.ndarray:
    """Map a whole file for reading: `[bytes]` uint8.

    The memory is the file's own pages: it must never be written to (that ends the process) and never reaches
    a user. The mapping lives as long as the array, or any view of it. It starts at the file's offset 0, which
    is a page boundary on every machine.

    Raises:
        IncompleteError: there is no such file.
        CorruptError: the file is empty, or no plain file.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise IncompleteError(f"{what} is not there: no file {path}") from error
    try:
        status = os.fstat(fd)
        size = status.st_size
        if not stat.S_ISREG(status.st_mode) or not size:
            raise CorruptError(f"{path} is empty, or no plain file: set it aside and make it again")
        mapped = mmap.mmap(fd, size, access=mmap.ACCESS_READ)
    finally:
        os.close(fd)
    # torch takes only memory that calls itself writable without a warning, which the mapping does not.
    address = np.frombuffer(mapped, np.uint8).ctypes.data
    pages = (ctypes.c_uint8 * size).from_address(address)
    pages._keep = mapped  # type: ignore[attr-defined]  # noqa: SLF001 -- ties the mapping to the views of it
    return np.ctypeslib.as_array(pages)
