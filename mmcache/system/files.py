"""Open, list, read, map and remove files and folders. `system/atomic.py` has the writes.

The calls used to open and close a shard keep the GIL where they can (see system/threads.py): measured, Python's own
calls cost a second for the first batches of a store of 24 shards.

Source: man page statx(2) and struct statx of <linux/stat.h>.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import mmap
import os
import shutil
import stat
import struct
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mmcache.errors import CorruptError, DiskFullError, IncompleteError, StoreNotFoundError, WriteError
from mmcache.system.memory import PAGE, anonymous
from mmcache.system.no_symlinks import NO_FOLLOW, make_below, move_below, opened_parent, refuse_link, status_in
from mmcache.system.os_errors import FULL, our_error, read_at
from mmcache.system.syscalls import LIBC, LINUX, PORTABLE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

__all__ = [
    "O_DIRECT",
    "REFUSALS",
    "Descriptor",
    "FileStatus",
    "advise_random",
    "close_read",
    "count_names",
    "explained",
    "file_status",
    "free_bytes",
    "list_names",
    "make_folder",
    "make_folders",
    "map_file",
    "name_batches",
    "open_file",
    "open_known",
    "read_file",
    "read_page",
    "read_through",
    "remove_file",
    "remove_tree",
    "set_aside",
    "sync_folder",
]

_EMPTY_PATH, _BASIC, _DIOALIGN = 0x1000, 0x07FF, 0x2000
# Mask, owner, mode, inode, size, modification time (s, ns), alignment of memory and of offsets.
_STATX = struct.Struct("=I 16x I 4x H 2x Q Q 64x q I 28x II")


class FileStatus(NamedTuple):
    """Status of an open file: times in nanoseconds, sizes in bytes.

    Offsets, sizes and addresses of direct I/O must be multiples of `alignment`. It is a page where the kernel does not
    say (before Linux 6.1), and where the file has no direct I/O (an encrypted one, for example): there a direct open is
    refused, or its reads go through the page cache and may have any size.
    """

    mode: int
    size: int
    inode: int
    modified: int
    owner: int
    alignment: int


def file_status(fd: int) -> FileStatus:
    """Status of an open file; keeps the GIL on Linux."""
    told = ctypes.create_string_buffer(256)
    if not LINUX or LIBC.statx(fd, b"", _EMPTY_PATH, _BASIC | _DIOALIGN, told):
        found = os.fstat(fd)
        return FileStatus(found.st_mode, found.st_size, found.st_ino, found.st_mtime_ns, found.st_uid, PAGE)
    mask, owner, mode, inode, size, seconds, nanoseconds, memory, offset = _STATX.unpack_from(told.raw)
    alignment = max(memory, offset) if mask & _DIOALIGN else 0
    return FileStatus(mode, size, inode, seconds * 10**9 + nanoseconds, owner, alignment or PAGE)


def open_known(path: str, flags: int) -> int:
    """Open a file that was open recently, so that looking it up needs no disk access. The descriptor; keeps the GIL.

    Raises:
        OSError: as `os.open`.
    """
    if not LINUX:
        return os.open(path, flags)
    fd = LIBC.open(os.fsencode(path), flags | os.O_CLOEXEC)
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return int(fd)


def close_read(fd: int) -> None:
    """Close a file that was only read, which does not block; keeps the GIL."""
    if LINUX:
        LIBC.close(fd)
    else:
        os.close(fd)


class Descriptor:
    """An open file that is closed with its last reference."""

    # A reference here, since module globals may be gone when `__del__` runs at exit.
    _close = staticmethod(close_read)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        self._close(self.fd)


# Errors of a kernel or file system without direct or asynchronous reads, or without resources for more.
REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EAGAIN, errno.ENOMEM, errno.EPERM, errno.EMFILE)

O_DIRECT: int = 0 if PORTABLE else getattr(os, "O_DIRECT", 0)
# Non-blocking, so that a pipe in a foreign store cannot hang the reader; no links, which might lead out of the store.
_READ = os.O_RDONLY | os.O_NONBLOCK | NO_FOLLOW
_PIECE = 8 << 20
# Distance of the pages that are probed, and the flag for probing without waiting.
_SAMPLE, _NO_WAIT = 256 << 10, 0 if PORTABLE else getattr(os, "RWF_NOWAIT", 0)
# Names held in memory at a time when listing a folder.
_NAMES = 1 << 14


@contextlib.contextmanager
def explained(path: Path, doing: str, needed: int = 0) -> Iterator[None]:
    """Raise an OSError of the body as DiskFullError (with bytes needed and free) or WriteError, with the path."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            free = free_bytes(path.parent)
            message = (
                f"no room while {doing}: {needed} bytes needed, {free} free there ({error.strerror}). What "
                f"was committed is intact: make room and run it again"
            )
            raise DiskFullError(error.errno, message, str(path)) from error
        raise WriteError(error.errno, f"failed while {doing} ({error.strerror})", str(path)) from error


def free_bytes(folder: Path) -> int:
    """Bytes free for an unprivileged user in the file system of `folder`, which need not exist yet."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def make_folder(root: Path, name: str = "") -> None:
    """Create a folder below a root, or the root, with its parents, durably. Arguments and errors as `make_folders`."""
    for changed in make_folders(root, [name]):
        sync_folder(changed)


def make_folders(root: Path, names: Iterable[str]) -> list[Path]:
    """Create folders and their missing parents. Existing ones are fine.

    Args:
        root: the folder below which no link is followed; it is created too.
        names: the folders' names relative to it.

    Returns:
        The parents of the new folders: call `sync_folder` on these to make the new folders durable.

    Raises:
        LinkError: a folder below the root is a symbolic link. WriteError: one cannot be created.
    """
    changed: dict[Path, None] = {}
    missing = itertools.takewhile(lambda folder: not folder.is_dir(), (root, *root.parents))
    for folder in reversed(list(missing)):
        with explained(folder, "making the folder"):
            folder.mkdir(exist_ok=True)
        changed[folder.parent] = None
    for name in filter(None, names):
        with explained(root / name, "making the folder"):
            changed |= dict.fromkeys(make_below(root, name))
    return list(changed)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable; blocks until they are."""
    with explained(path, "making the folder durable"):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def list_names(path: Path) -> list[str]:
    """The names in a folder, without `.` and `..`; none if it does not exist."""
    return list(itertools.chain.from_iterable(name_batches(path)))


def name_batches(path: Path) -> Iterator[list[str]]:
    """The names in a folder, as `list_names`, in lists of at most 16,384: for folders that hold millions."""
    try:
        entries = os.scandir(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise our_error(error, path) from error
    with entries:
        names = (entry.name for entry in entries)
        while batch := list(itertools.islice(names, _NAMES)):
            yield batch


def count_names(path: Path) -> int:
    """The number of names in a folder."""
    return sum(map(len, name_batches(path)))


def remove_file(root: Path, name: str) -> None:
    """Remove a file, if it exists. Durable only after `sync_folder`.

    Raises:
        LinkError: a folder on the way is a symbolic link. WriteError: the system refuses.
    """
    with (
        explained(root / name, "removing the file"),
        contextlib.suppress(FileNotFoundError),
        opened_parent(root, name) as (folder, last),
    ):
        os.unlink(last, dir_fd=folder)


def remove_tree(path: Path) -> None:
    """Remove a folder and everything in it, ignoring errors; only for folders that mmcache made."""
    shutil.rmtree(path, ignore_errors=True)


def _refuse_link(error: OSError, path: Path) -> None:
    """Raise LinkError if opening failed since the file is a link, or StoreNotFoundError if links form a cycle."""
    if error.errno not in (errno.ELOOP, errno.EMLINK):
        return
    with contextlib.suppress(OSError):
        found = status_in(None, path)
        if found is not None:
            refuse_link(found.st_mode, path)
    raise StoreNotFoundError(errno.ELOOP, "a part of the path is a link that leads to itself", str(path)) from error


def read_file(path: Path, limit: int) -> bytes:
    """Read a whole file of at most `limit` bytes.

    Raises:
        StoreNotFoundError: there is no such file.
        CorruptError: it is larger than `limit`, or no plain file. LinkError: it is a symbolic link.
    """
    try:
        fd = os.open(path, _READ)
    except FileNotFoundError as error:
        raise StoreNotFoundError(errno.ENOENT, "there is no such file", str(path)) from error
    except NotADirectoryError as error:
        raise StoreNotFoundError(errno.ENOTDIR, "a part of the path is no folder", str(path)) from error
    except OSError as error:
        _refuse_link(error, path)
        raise our_error(error, path) from error
    try:
        file = os.fdopen(fd, "rb")
    except IsADirectoryError as error:
        os.close(fd)
        raise CorruptError(f"{path} is a folder where a file belongs") from error
    with file:
        try:
            # Not `limit`: `read` allocates as much as it is asked for.
            data = file.read(min(limit, os.fstat(fd).st_size) + 1)
        except OSError as error:
            raise our_error(error, path) from error
    if data is None:
        raise CorruptError(f"{path} is no plain file: set it aside")
    if len(data) > limit:
        raise CorruptError(f"{path} is larger than the {limit} bytes such a file can have")
    return data


def open_file(path: Path, *, what: str, direct: bool = False, known: bool = False) -> tuple[int, FileStatus]:
    """Open a plain file for reading. Its descriptor, which the caller must close, and its status.

    Args:
        path: the file.
        what: what it is, for the error.
        direct: open with O_DIRECT, to read past the page cache.
        known: it was open recently, so that opening it needs no disk access: keeps the GIL.

    Raises:
        IncompleteError: there is no such file.
        CorruptError: the file is empty, or no plain file.
        OSError: the file system has no direct reads.
    """
    flags = _READ | (O_DIRECT if direct else 0)
    try:
        fd = open_known(str(path), flags) if known else os.open(path, flags)
    except FileNotFoundError as error:
        raise IncompleteError(f"{what} is not there: no file {path}") from error
    except OSError as error:
        _refuse_link(error, path)
        raise our_error(error, path) from error
    try:
        status = file_status(fd)
    except BaseException:
        close_read(fd)
        raise
    if not stat.S_ISREG(status.mode) or not status.size:
        close_read(fd)
        raise CorruptError(f"{path} is empty, or no plain file: set it aside and make it again")
    return fd, status


def read_page(fd: int) -> bytes:
    """Read the first 4096 bytes of a file, or fewer if it is shorter; works on O_DIRECT descriptors too."""
    page = anonymous(PAGE)
    return page[: read_at(fd, page.data, 0)].tobytes()


def advise_random(fd: int) -> None:
    """Turn off readahead for an open file, where the system supports it."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)


def set_aside(root: Path, name: str, into: str) -> str:
    """Move a file or folder into another folder, created if missing, durably; blocks until then. Its new name.

    Raises:
        LinkError: A folder on the way is a symbolic link.
        WriteError: the system refuses.
    """
    make_folder(root, into)
    with explained(root / name, "setting it aside"):
        there = move_below(root, name, into)
    # New folder first: a crash may leave both names, but never none.
    sync_folder(root / into)
    sync_folder((root / name).parent)
    return there


def read_through(fd: int, start: int, stop: int) -> None:
    """Read the bytes from `start` to `stop` into the page cache, and discard them; blocks until then.

    Pieces of 8 MiB that are already there, judged by a sample of their pages, are skipped.
    """
    piece = anonymous(min(_PIECE, max(1, stop - start)))
    while start < stop:
        size = min(len(piece), stop - start)
        if _seems_cached(fd, start, start + size):
            start += size
            continue
        done = read_at(fd, piece[:size].data, start)
        if not done:
            return  # the file is too short; reading the rows raises
        start += done


def _seems_cached(fd: int, start: int, stop: int) -> bool:
    """Whether bytes seem to be in the page cache, by a sample of pages; False where the system does not say."""
    if not _NO_WAIT:
        return False
    byte = bytearray(1)
    try:
        # Probing a missing page may start to read it: in ascending order, that is where reading starts.
        return all(os.preadv(fd, [byte], at, _NO_WAIT) for at in (*range(start, stop, _SAMPLE), stop - 1))
    except OSError:
        return False


def map_file(path: Path, *, what: str) -> np.ndarray:
    """Map a whole file for reading: `[bytes]` uint8.

    The memory is the file's pages: it must never be written to (that kills the process) and is never returned to a
    user. The mapping lives as long as the array or any view of it. It starts at offset 0, which is a page boundary on
    every machine.

    Raises:
        IncompleteError: there is no such file.
        CorruptError: the file is empty, or no plain file.
    """
    fd, status = open_file(path, what=what)
    size = status.size
    try:
        mapped = mmap.mmap(fd, size, access=mmap.ACCESS_READ)
    finally:
        os.close(fd)
    # torch warns about arrays that are not writable, as one of the mapping would be.
    address = np.frombuffer(mapped, np.uint8).ctypes.data
    pages = (ctypes.c_uint8 * size).from_address(address)
    pages._keep = mapped  # type: ignore[attr-defined]  # noqa: SLF001 -- ties the mapping to the views of it
    return np.ctypeslib.as_array(pages)
