"""What the system refuses, as one of our errors: with the system's number, the path and the cause."""

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
# Nothing is there, nor can be: a file where a folder belongs, links that lead to themselves, names that are too long.
NO_PLACE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
# Which of the system's numbers are which of our errors, and what to do.
_KINDS: tuple[tuple[tuple[int, ...], type[MmcacheError], str], ...] = (
    (FULL, DiskFullError, "there is no room ({}): make some, and do it again"),
    (NO_PLACE, StoreNotFoundError, "there is nothing to be read ({}): give another path"),
    ((errno.EACCES, errno.EPERM), AccessError, "the system gives no access ({}): ask the owner for the right to it"),
    ((errno.EROFS,), WriteError, "nothing can be written there ({}): choose another place"),
)
_OTHER = "it cannot be read ({}): see to the disk, or the limits of the system, and try again"
# What opening a socket says, or a device that is not there.
_NO_FILE = (errno.ENXIO, errno.ENODEV)


def our_error(error: OSError, path: str | os.PathLike[str] | None = None) -> MmcacheError:
    """Our error for one of the system's, whose number and path it has; ours are given back as they are.

    Args:
        error: what the system said.
        path: what it was about, where the error does not say.
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
    """Read into memory from an offset of an open file on; the number of bytes, which may be fewer than asked for.

    Raises:
        ReadError: The system refuses; it has the system's number, and the file's name where that is known.
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
