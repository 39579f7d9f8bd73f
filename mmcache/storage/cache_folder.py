"""The folder for files that can be fetched again, which must be the user's own: a writer of it decides what is read.

A folder that mmcache creates is private (mode 700, as in the XDG base directory specification). A folder of another
user, or one that everybody may write to, is refused: a stranger may have created `/tmp/mmcache` first. A
group-writable one is allowed: many systems give each user a group, and a umask of 002.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path

from mmcache.errors import ArgumentError
from mmcache.system.files import explained, make_folder, sync_folder

__all__ = ["cache_folder", "private_folder"]

_PRIVATE = 0o700
_REMEDY = "choose a folder of your own with cache_dir= or $MMCACHE_CACHE"


def cache_folder() -> Path:
    """The cache folder: `$MMCACHE_CACHE`, or `mmcache` in `$XDG_CACHE_HOME` or `~/.cache`."""
    chosen = os.environ.get("MMCACHE_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmcache"


def private_folder(above: Path, *names: str) -> Path:
    """A folder in a cache, created if missing; blocks until it is durable.

    Args:
        above: the cache. It may be a link, or a folder such as `/tmp`, whose sticky bit protects each user's files.
        *names: the folders below it, each in the previous one.

    Raises:
        ArgumentError: one of them belongs to another user, is writable by everybody, is a link, or is no folder.
        WriteError: one cannot be created.
    """
    make_folder(above.parent)
    _make(above)
    with explained(above, "looking at the cache"):
        found = above.stat()
    # Other users cannot replace our files in a folder of root that is not world-writable, or has the sticky bit.
    kept = found.st_uid == 0 and (not found.st_mode & stat.S_IWOTH or found.st_mode & stat.S_ISVTX)
    if not kept or not stat.S_ISDIR(found.st_mode):
        _check(above, found)
    folder = above
    for name in names:
        folder = folder / name
        _make(folder)
        with explained(folder, "looking at the cache"):
            found = folder.lstat()
        _check(folder, found)
    return folder


def _make(folder: Path) -> None:
    with explained(folder, "making the folder"), contextlib.suppress(FileExistsError):
        folder.mkdir(_PRIVATE)
        sync_folder(folder.parent)


def _check(folder: Path, found: os.stat_result) -> None:
    if not stat.S_ISDIR(found.st_mode):
        what = "a link: link the whole cache, or" if stat.S_ISLNK(found.st_mode) else "no folder: remove it, or"
        raise ArgumentError(f"{folder}, where fetched files are kept, is {what} {_REMEDY}")
    if not _is_ours(folder, found):
        raise ArgumentError(
            f"{folder}, where fetched files are kept, belongs to another user (uid {found.st_uid}, this one is "
            f"{os.geteuid()}), who could change what is read: {_REMEDY}"
        )
    if found.st_mode & stat.S_IWOTH:
        raise ArgumentError(
            f"{folder}, where fetched files are kept, may be written to by everybody, who could change what is read: "
            f"`chmod o-w {folder}`, or {_REMEDY}"
        )


def _is_ours(folder: Path, found: os.stat_result) -> bool:
    if found.st_uid == os.geteuid():
        return True
    # Some file systems assign all files to one user, or root's to `nobody`: a file that we create has that owner too.
    with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=folder) as made:
        return os.fstat(made.fileno()).st_uid == found.st_uid
    return False
