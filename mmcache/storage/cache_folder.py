"""Where what can be fetched again is kept: a folder of the user's own. Whoever may write to it decides what is read.

Made by us, it is for nobody else to look into, as the XDG base directory specification wants it. One that belongs to
another user, or that everybody may write to, is refused: a stranger may have made `/tmp/mmcache` before us. One that a
group may write to is the user's choice: many systems give each user a group, and a umask of 002.
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
    """The folder for what can be fetched again: `$MMCACHE_CACHE`, or `mmcache` where caches go on this system."""
    chosen = os.environ.get("MMCACHE_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmcache"


def private_folder(above: Path, *names: str) -> Path:
    """A folder in a cache, made where there is none; blocks until it is durable.

    Args:
        above: the cache. It may be a link, and a folder such as `/tmp`, where what is made is the maker's own.
        *names: the folders below it, each in the one before.

    Raises:
        ArgumentError: one of them is another user's, may be written to by everybody, is a link, or is no folder.
        WriteError: one cannot be made.
    """
    make_folder(above.parent)
    _make(above)
    with explained(above, "looking at the cache"):
        found = above.stat()
    # Nobody else takes away what is made in a folder of root's, or in one with the sticky bit, as `/tmp`.
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
    # Some file systems give all files to one user, or root's to nobody: then they give what we make to that one, too.
    with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=folder) as made:
        return os.fstat(made.fileno()).st_uid == found.st_uid
    return False
