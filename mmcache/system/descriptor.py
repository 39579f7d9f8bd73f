"""Open files: what they are, how they close, and that nobody's read loses one.

All of it keeps the interpreter's lock, since Python's own calls let go of it each time, and to get it back beside a
busy thread takes 5 ms: measured, a second for the first batches of a store of 24 shards.

Source: man page statx(2) and struct statx of <linux/stat.h>.
"""

from __future__ import annotations

import ctypes
import os
import struct
from typing import NamedTuple

from mmcache.system.memory import PAGE
from mmcache.system.syscalls import LIBC, LINUX

__all__ = ["Descriptor", "FileStatus", "close_read", "file_status", "open_known"]

_EMPTY_PATH, _BASIC, _DIOALIGN = 0x1000, 0x07FF, 0x2000
# Mask, owner, mode, inode, size, time of modification, alignment of memory and of offsets.
_STATX = struct.Struct("=I 16x I 4x H 2x Q Q 64x q I 28x II")


class FileStatus(NamedTuple):
    """What the system says of an open file: times in nanoseconds, sizes in bytes.

    `alignment` is what offsets, sizes and addresses of direct I/O must be multiples of: a page where the kernel does
    not say (before Linux 6.1), and where it says that the file has none, as an encrypted one: opening it for direct
    I/O is refused there, or its reads go through the page cache and may be of any size.
    """

    mode: int
    size: int
    inode: int
    modified: int
    owner: int
    alignment: int


def file_status(fd: int) -> FileStatus:
    """Ask what an open file is; keeps the interpreter's lock."""
    told = ctypes.create_string_buffer(256)
    if not LINUX or LIBC.statx(fd, b"", _EMPTY_PATH, _BASIC | _DIOALIGN, told):
        found = os.fstat(fd)
        return FileStatus(found.st_mode, found.st_size, found.st_ino, found.st_mtime_ns, found.st_uid, PAGE)
    mask, owner, mode, inode, size, seconds, nanoseconds, memory, offset = _STATX.unpack_from(told.raw)
    alignment = max(memory, offset) if mask & _DIOALIGN else 0
    return FileStatus(mode, size, inode, seconds * 10**9 + nanoseconds, owner, alignment or PAGE)


def open_known(path: str, flags: int) -> int:
    """Open a file that was open not long ago, so that its name need not be looked up on the disk; keeps the lock.

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
    """Close a file that was only read, for which nothing is waited for; keeps the lock."""
    if LINUX:
        LIBC.close(fd)
    else:
        os.close(fd)


class Descriptor:
    """An open file that is closed with its last reference."""

    # Kept here, since modules are emptied before the last objects go.
    _close = staticmethod(close_read)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        self._close(self.fd)
