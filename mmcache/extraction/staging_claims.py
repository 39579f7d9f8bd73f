"""Claims on shards in a staging folder: which process makes or sends each, and how many bytes all of them need.

A process lists its shards in a file that it locks while it lives. An existing shard without a living claim was left by
a dead process: any other may adopt and send it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from typing import TYPE_CHECKING

from mmcache.system.files import explained, list_names, make_folder, remove_file
from mmcache.system.locks import locked
from mmcache.system.no_symlinks import open_in, opened_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

__all__ = ["MARKER", "STAGING", "Claims", "claimed", "is_staging"]

# Files of a staging folder that are not part of the store: the marker with the store's address, claims, and a lock.
STAGING, MARKER = ".staging", "url"
_CLAIMS, _LOCK = ".claims", f"{STAGING}/.claims.lock"


def is_staging(folder: Path) -> bool:
    """Whether a folder is the staging folder of a store in a bucket."""
    return (folder / STAGING / MARKER).exists()


def claimed(folder: Path) -> list[str]:
    """Keys of the shards that living processes are making or sending; none if it is no staging folder."""
    if not is_staging(folder):
        return []
    with locked(folder, _LOCK):
        return [key for theirs in _living(folder) for key in theirs]


class Claims:
    """The shards that this process is making or sending, with their bytes. Thread-safe.

    Raises:
        WriteError: the folder cannot be written to, or its file system has no locks.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        make_folder(folder, STAGING)
        self._own = f"{secrets.token_hex(8)}{_CLAIMS}"
        self._sizes: dict[str, int] = {}
        with self._alone(), explained(self._where, "making the file"), opened_folder(folder, STAGING) as opened:
            self._fd = os.open(self._own, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644, dir_fd=opened)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    @property
    def _where(self) -> Path:
        return self._folder / STAGING / self._own

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        with locked(self._folder, _LOCK):
            yield

    def claim(self, sizes: Mapping[str, int], most: Callable[[int], int]) -> bool:
        """Claim shards before they are made; False if all claims together would exceed the limit.

        Args:
            sizes: their keys and bytes.
            most: returns the limit in bytes for all processes, given their number.
        """
        with self._alone():
            others = list(_living(self._folder, self._own))
            there = sum(self._sizes.values()) + sum(sum(theirs.values()) for theirs in others)
            if there + sum(sizes.values()) > most(len(others) + 1):
                return False
            self._sizes |= sizes
            self._write()
        return True

    def adopt(self, sizes: Mapping[str, int]) -> list[str]:
        """Claim the unclaimed ones of `sizes`, without a limit; returns their keys."""
        with self._alone():
            taken = self._sizes.keys() | {key for theirs in _living(self._folder, self._own) for key in theirs}
            mine = [key for key in sizes if key not in taken]
            self._sizes |= {key: sizes[key] for key in mine}
            self._write()
        return mine

    def release(self, keys: Iterable[str]) -> None:
        """Release shards that are sent, or will not be made."""
        with self._alone():
            for key in keys:
                self._sizes.pop(key, None)
            self._write()

    def leave(self, last: Callable[[], None] = lambda: None) -> None:
        """Release everything; the last process calls `last` under the lock, so none can join. Safe to call twice."""
        if self._fd < 0:
            return
        with self._alone():
            remove_file(self._folder, f"{STAGING}/{self._own}")
            os.close(self._fd)
            self._fd = -1
            if not any(True for _ in _living(self._folder)):
                last()

    def _write(self) -> None:
        text = "".join(f"{size} {key}\n" for key, size in self._sizes.items()).encode()
        with explained(self._where, "saying what is made", len(text)):
            if self._fd >= 0:
                os.pwrite(self._fd, text, 0)
                os.ftruncate(self._fd, len(text))


def _living(folder: Path, own: str | None = None) -> Iterator[dict[str, int]]:
    """The claims of each living process except `own`; removes the files of dead ones. Needs the lock."""
    for name in list_names(folder / STAGING):
        if not name.endswith(_CLAIMS) or name == own:
            continue
        where = folder / STAGING / name
        with explained(where, "reading what is made"), opened_folder(folder, STAGING) as opened:
            fd = open_in(opened, name, os.O_RDONLY | os.O_NONBLOCK, where)
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                os.unlink(name, dir_fd=opened)
                continue
            except BlockingIOError:
                lines = os.pread(fd, os.fstat(fd).st_size, 0).decode().splitlines()
            finally:
                os.close(fd)
        yield {key: int(size) for size, _, key in (line.partition(" ") for line in lines)}
