"""Access to files and folders below a root without following symbolic links.

A store or cache may contain links that somebody else put there, leading to the user's own files. So files below a root
are written, renamed and removed relative to a descriptor of their folder (`dir_fd`), which is opened step by step from
the root. The root itself is the user's choice, and may be reached through links.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import TYPE_CHECKING

from mmcache.errors import CorruptError, LinkError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

__all__ = [
    "NO_FOLLOW",
    "check_links",
    "check_path",
    "make_below",
    "make_empty",
    "move_below",
    "open_in",
    "open_in_place",
    "opened_folder",
    "opened_parent",
    "refuse_link",
    "status_in",
]

# 0 where the system has no such flag: there `open_in` compares the file before and after the open.
NO_FOLLOW: int = getattr(os, "O_NOFOLLOW", 0)
_NO_WAIT: int = getattr(os, "O_NONBLOCK", 0)
# For use as `dir_fd`; O_PATH needs no permission to list the folder.
_FOLDER: int = getattr(os, "O_PATH", os.O_RDONLY) | getattr(os, "O_DIRECTORY", 0)
# Nested folders that are checked: statistics/SITE/dimensions/c/0/0 has five, and no store has more.
_DEEPEST = 8


@contextlib.contextmanager
def opened_parent(root: Path, name: str) -> Iterator[tuple[int, str]]:
    """Open the parent folder of a name below a root. Its descriptor, for `dir_fd`, and the last part of the name.

    Args:
        root: the folder below which no link is followed.
        name: the name relative to it, with slashes.

    Raises:
        LinkError: A folder on the way is a symbolic link.
        CorruptError: The name leads out of the root.
        OSError: A folder on the way does not exist, or is no folder.
    """
    folders, _, last = name.rpartition("/")
    if last in ("", ".", ".."):
        raise CorruptError(f"{name!r} names nothing below {root}: it is no name of ours")
    with opened_folder(root, folders) as fd:
        yield fd, last


@contextlib.contextmanager
def opened_folder(root: Path, name: str = "") -> Iterator[int]:
    """Open a folder below a root, or the root. Its descriptor, for `dir_fd`. Errors as `opened_parent`."""
    fd, where = os.open(root, _FOLDER), root
    try:
        for part in name.split("/") if name else ():
            if part in ("", ".", ".."):
                raise CorruptError(f"{name!r} leads out of {root}: it is no name of ours")
            where /= part
            above, fd = fd, open_in(fd, part, _FOLDER, where)
            os.close(above)
        yield fd
    finally:
        os.close(fd)


def open_in_place(root: Path, name: str, flags: int) -> int:
    """Open a file below a root that is written in place, such as a lock. Its descriptor.

    It must be a plain file with one name (hard link). Anything else is refused before it is opened: opening a pipe may
    block, and opening a device may have effects.

    Args:
        root: the folder below which no link is followed.
        name: the file's name relative to it.
        flags: as of `os.open`; O_CREAT creates a missing file. Never O_TRUNC, which would act before the check.

    Raises:
        LinkError: It, or a folder on the way, is a symbolic link; or the file has other names.
        CorruptError: It is no plain file.
        OSError: The system refuses.
    """
    where = root / name
    with opened_parent(root, name) as (folder, last):
        while True:
            found = status_in(folder, last)
            # Another process may create or remove it meanwhile.
            if found is None and not flags & os.O_CREAT:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(where))
            if found is None:
                with contextlib.suppress(FileExistsError):
                    # O_EXCL never follows a link, on any system.
                    return os.open(last, flags | os.O_EXCL, 0o644, dir_fd=folder)
                continue
            _check_plain(found, where)
            with contextlib.suppress(FileNotFoundError):
                fd = open_in(folder, last, flags & ~os.O_CREAT | _NO_WAIT, where)
                try:
                    _check_plain(os.fstat(fd), where)
                except BaseException:
                    os.close(fd)
                    raise
                return fd


def make_below(root: Path, name: str) -> list[Path]:
    """Create a folder below a root, and missing parents. The parents of the new folders. Errors as `opened_parent`."""
    with contextlib.suppress(FileNotFoundError), opened_folder(root, name):
        return []
    parts, changed = name.split("/"), []
    for depth in range(len(parts)):
        # Another process may create it too.
        with opened_parent(root, "/".join(parts[: depth + 1])) as (above, last), contextlib.suppress(FileExistsError):
            os.mkdir(last, dir_fd=above)
            changed.append(root.joinpath(*parts[:depth]))
    with opened_folder(root, name):
        return changed  # anything that existed already is a folder


def make_empty(root: Path, folder: str, names: Iterable[str]) -> None:
    """Create empty files in a folder below a root; existing ones stay as they are. Errors as `opened_parent`."""
    with opened_folder(root, folder) as fd:
        for name in names:
            with contextlib.suppress(FileExistsError):
                os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666, dir_fd=fd))


def move_below(root: Path, name: str, into: str) -> str:
    """Move a file or folder into another folder, under a free name there. The new name. Errors as `opened_parent`."""
    with opened_parent(root, name) as (above, last), opened_folder(root, into) as folder:
        number = 1
        while status_in(folder, f"{last}.{number}") is not None:
            number += 1
        os.rename(last, f"{last}.{number}", src_dir_fd=above, dst_dir_fd=folder)
    return f"{into}/{last}.{number}"


def check_links(root: Path, names: Iterable[str]) -> None:
    """Check that some names in a folder, and what is below them, are no symbolic links. Missing ones are fine.

    Reads only folder entries.

    Raises:
        LinkError: There is one.
    """
    for name in names:
        found = check_path(root, name)
        if found is not None and stat.S_ISDIR(found.st_mode):
            _check_below(root / name, _DEEPEST)


def _check_below(folder: Path, deepest: int) -> None:
    # A folder that cannot be listed raises when something is written there.
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            # The type is in the folder's entry: no further disk access.
            if entry.is_symlink():
                refuse_link(stat.S_IFLNK, folder / entry.name)
            if deepest and entry.is_dir(follow_symlinks=False):
                _check_below(folder / entry.name, deepest - 1)


def check_path(root: Path, name: str) -> os.stat_result | None:
    """Check that no part of a path below a root is a symbolic link. The path's status; None if it does not exist.

    Raises:
        LinkError: There is one.
    """
    where, found = root, None
    for part in name.split("/"):
        where /= part
        found = status_in(None, where)
        if found is None:
            break
        refuse_link(found.st_mode, where)
    return found


def open_in(folder: int, part: str, flags: int, where: Path) -> int:
    """Open an entry of an open folder, unless it is a link. Its descriptor. Raises LinkError, OSError."""
    before = None if NO_FOLLOW else status_in(folder, part)
    if before is not None:
        refuse_link(before.st_mode, where)
    try:
        fd = os.open(part, flags | NO_FOLLOW, dir_fd=folder)
    except OSError:
        found = status_in(folder, part)
        if found is not None:
            refuse_link(found.st_mode, where)
        raise
    if before is not None and not os.path.samestat(before, os.fstat(fd)):
        os.close(fd)
        raise LinkError(f"{where} was replaced while it was opened: see who else writes there, and run it again")
    return fd


def status_in(folder: int | None, part: str | Path) -> os.stat_result | None:
    """Status of an entry of an open folder, without following a link; None if it does not exist."""
    try:
        return os.stat(part, dir_fd=folder, follow_symlinks=False)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _check_plain(found: os.stat_result, where: Path) -> None:
    refuse_link(found.st_mode, where)
    if not stat.S_ISREG(found.st_mode):
        raise CorruptError(f"{where} is no plain file, and mmcache writes one there: move it away")
    if found.st_nlink > 1:
        raise LinkError(
            f"{where} has {found.st_nlink} names, and to write to it would change the file under all of them: remove "
            f"this name, the file is made again"
        )


def refuse_link(mode: int, where: Path) -> None:
    """Raise LinkError, with the target, if `mode` is that of a symbolic link."""
    if not stat.S_ISLNK(mode):
        return
    target = "something that cannot be told"
    with contextlib.suppress(OSError):
        target = repr(os.readlink(where))  # noqa: PTH115 -- as it stands in the link
    raise LinkError(
        f"{where} is a symbolic link to {target}, and below a store's or a cache's folder none is followed: put the "
        f"file or folder itself there, or mount the other disk there"
    )
