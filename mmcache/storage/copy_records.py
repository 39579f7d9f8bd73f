"""Which files of a cache were compared with their checksums, and when each was used last: a small file for each.

A file's own times would not do: to set one changes the time of its last change, and that tells that somebody wrote to
it. A record counts until the machine is started again, since a power failure may have taken bytes that it had seen.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from typing import TYPE_CHECKING, TypeAlias

from mmcache.errors import CorruptError, MmcacheError
from mmcache.system.atomic import publish, remove_drafts
from mmcache.system.files import make_folder, read_file, remove_file
from mmcache.system.no_symlinks import open_in_place

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

__all__ = ["RECORDS", "CopyRecords", "Identity", "identity"]

# Inode, size, and the times of the last write and of the last change of any kind, in nanoseconds.
Identity: TypeAlias = tuple[int, int, int, int]

RECORDS = ".checked"
# Machines that share a cache by a network, and whose records are kept; what a record has at most.
_MACHINES, _LIMIT = 8, 4096


def identity(path: Path | str) -> Identity | None:
    """What tells a file from the same one written to, or another in its place; None where there is no plain file."""
    try:
        found = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns) if stat.S_ISREG(found.st_mode) else None


class CopyRecords:
    """The records of one cache, shared by all its processes.

    Args:
        cache: the cache's folder; they are in one below it.
        boot: names the time since the machine was started; empty where that is not known, and nothing is recorded.
    """

    def __init__(self, cache: Path, boot: str) -> None:
        self._cache, self._boot = cache, boot
        make_folder(cache, RECORDS)

    def has(self, name: str, copy: Identity) -> bool:
        """Whether a file was compared, as it is now, since the machine was started, by whichever process."""
        return bool(self._boot) and self._line(copy) in self._lines(name)

    def note(self, name: str, copy: Identity) -> None:
        """Note that a file was compared, and used; where that cannot be kept, it is compared again."""
        others = [line for line in self._lines(name) if line.partition(" ")[0] != self._boot]
        lines = [*others[1 - _MACHINES :], self._line(copy)] if self._boot else []
        with contextlib.suppress(MmcacheError):
            publish(self._cache, f"{RECORDS}/{name}", "".join(f"{line}\n" for line in lines).encode(), durable=False)
            self.touch(name)

    def touch(self, name: str) -> bool:
        """Note that a file was used just now; False where there is no record of it."""
        now = time.time_ns()
        # What somebody put in its place is no record, and is replaced by one.
        with contextlib.suppress(FileNotFoundError, CorruptError):
            fd = open_in_place(self._cache, f"{RECORDS}/{name}", os.O_RDONLY)
            try:
                os.utime(fd, ns=(now, now))
            finally:
                os.close(fd)
            return True
        return False

    def used(self) -> dict[str, int]:
        """When each file was used last, in nanoseconds."""
        found = {}
        with os.scandir(self._cache / RECORDS) as entries:
            for entry in entries:
                # Others remove records at any moment.
                with contextlib.suppress(FileNotFoundError):
                    found[entry.name] = entry.stat(follow_symlinks=False).st_mtime_ns
        return found

    def drop(self, names: Collection[str]) -> None:
        """Remove the records of files that are gone, and what processes that died left half-written."""
        for name in names:
            remove_file(self._cache, f"{RECORDS}/{name}")
        if names:
            remove_drafts(self._cache, RECORDS)

    def _line(self, copy: Identity) -> str:
        return " ".join([self._boot, *map(str, copy)])

    def _lines(self, name: str) -> list[str]:
        with contextlib.suppress(MmcacheError, OSError):
            return read_file(self._cache / RECORDS / name, _LIMIT).decode(errors="replace").splitlines()
        return []
