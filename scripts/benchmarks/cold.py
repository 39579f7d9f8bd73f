"""Drop files from the page cache, and check that they are cold; or warm them."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["files_of", "make_cold", "make_durable", "make_warm", "resident_bytes"]

_DROP = Path("/proc/sys/vm/drop_caches")
_PIECE = 8 << 20
# The kernel may keep a page that another process just used.
_TOLERATED = 0.002

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)


def files_of(folder: Path) -> list[Path]:
    """Every file below a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def resident_bytes(path: Path) -> int:
    """The bytes of a file that are in the page cache, found by a mapping that is never touched."""
    size = path.stat().st_size
    if not size:
        return 0
    pages = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    address = np.frombuffer(mapped, np.uint8).ctypes.data
    if _libc.mincore(address, size, pages.ctypes.data):
        raise OSError(ctypes.get_errno(), "mincore", str(path))
    return int((pages & 1).sum()) * mmap.PAGESIZE


def make_cold(files: Iterable[Path], *, names: bool = False) -> None:
    """Drop files from the page cache. Unmap them first: mapped pages stay, and are detected here.

    Args:
        files: the files.
        names: also drop names and inodes, if permitted (root only).

    Raises:
        RuntimeError: they are not cold afterwards; so a warm cache is never reported as the disk's speed.
    """
    files = list(files)
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
    if os.access(_DROP, os.W_OK):
        _DROP.write_text("3" if names else "1")
    held = sum(map(resident_bytes, files))
    total = sum(path.stat().st_blocks * 512 for path in files)
    if held > _TOLERATED * total + mmap.PAGESIZE:
        raise RuntimeError(f"{held} of {total} bytes are still in the page cache: not cold")


def make_warm(files: Iterable[Path]) -> None:
    """Read files into the page cache."""
    piece = bytearray(_PIECE)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(piece):
                pass


def make_durable(folder: Path) -> None:
    """Sync every file and folder below `folder`, as needed for data to survive a power cut."""
    for path in [*folder.rglob("*"), folder]:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
