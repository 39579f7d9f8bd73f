"""Conversion of an OSError to one of our errors, with the errno, the path and the cause."""

from __future__ import annotations

import errno
import os

from mmcache.errors import (
    AccessError,
    CorruptError,
    DiskFullError,
    MmcacheError,
    ReadError,
    StoreNotFoundError,
    WriteError,
)

__all__ = ["FULL", "NO_PLACE", "our_error", "read_at"]

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Nothing exists at the path, or can: a file in place of a folder, a cycle of links, a name that is too long.
NO_PLACE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
# Our error for each errno, and its message.
_KINDS: tuple[tuple[tuple[int, ...], type[MmcacheError], str], ...] = (
    (FULL, DiskFullError, "there is no room ({}): make some, and do it again"),
    (NO_PLACE, StoreNotFoundError, "there is nothing to be read ({}): give another path"),
    ((errno.EACCES, errno.EPERM), AccessError, "the system gives no access ({}): ask the owner for the right to it"),
    ((errno.EROFS,), WriteError, "nothing can be written there ({}): choose another place"),
)
_OTHER = "it cannot be read ({}): see to the disk, or the limits of the system, and try again"
# Raised by opening a socket, or a device that does not exist.
_NO_FILE = (errno.ENXIO, errno.ENODEV)


def our_error(error: OSError, path: str | os.PathLike[str] | None = None) -> MmcacheError:
    """Our error for an OSError, with its errno and path; one of ours is returned unchanged.

    Args:
        error: the error of the system.
        path: the path, if the error has none.
    """
    if isinstance(error, MmcacheError):
        return error
    where = error.filename if error.filename is not None else None if path is None else str(path)
    said = error.strerror or str(error) or type(error).__name__
    if error.errno in _NO_FILE:
        return CorruptError(f"{where} is no plain file ({said}): set it aside and make it again")
    kinds = (entry[1:] for entry in _KINDS if error.errno in entry[0])
    kind, text = next(kinds, (ReadError, _OTHER))
    return kind(error.errno, text.format(said), where)


def read_at(fd: int, into: memoryview, offset: int) -> int:
    """Read into memory from an offset of an open file. The number of bytes, which may be fewer than requested.

    Raises:
        ReadError: The system refuses (or another error of `our_error`); with the errno, and the file's name if known.
    """
    try:
        return os.preadv(fd, (into,), offset)
    except OSError as error:
        raise our_error(error, _name_of(fd)) from error


def _name_of(fd: int) -> str | None:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115 -- a text, of an open file
    except OSError:
        return None
