"""A folder that is being filled, and is not yet there under its own name: an export, whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
from typing import TYPE_CHECKING, Self

from mmcache.errors import StoreExistsError
from mmcache.system.atomic import AtomicFile
from mmcache.system.files import explained, list_names, make_folder, remove_tree, sync_folder
from mmcache.system.memory import anonymous
from mmcache.system.no_symlinks import NO_FOLLOW

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["AtomicFolder"]

_SUFFIX = ".tmp"
_PIECE_BYTES = 16 << 20
# Another file system, one without links, somebody else's file, too many links: then a copy does it.
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS)


class AtomicFolder:
    """A folder beside `target`, which `publish` gives that name. Left without that, it is removed with all in it.

    It is locked while its maker lives; those of dead makers are removed by the next one for the same target.

    Raises:
        StoreExistsError: there is something at `target`.
        WriteError: the folder cannot be made.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.files = self.linked_bytes = self.written_bytes = 0
        self._fd = -1

    def __enter__(self) -> Self:
        self._check_free()
        make_folder(self.target.parent)
        self._remove_dead()
        with explained(self.target, "making the folder"):
            while not self._create():
                pass
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            remove_tree(self.path)
            self._close()

    def _check_free(self) -> None:
        if os.path.lexists(self.target):
            raise StoreExistsError(
                errno.EEXIST, "there is something there already: remove it, or choose another folder", str(self.target)
            )

    def _create(self) -> bool:
        """Make the folder, and lock it; False if another maker took it for a dead one's in between."""
        self.path = self.target.with_name(f".{self.target.name}.{secrets.token_hex(8)}{_SUFFIX}")
        self.path.mkdir()
        self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        with contextlib.suppress(OSError):
            # Some network file systems lock no folders; then nobody else takes it for a dead one's either.
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if self.path.exists():
            return True
        self._close()
        return False

    def _remove_dead(self) -> None:
        for name in list_names(self.target.parent):
            if not (name.startswith(f".{self.target.name}.") and name.endswith(_SUFFIX)):
                continue
            path = self.target.with_name(name)
            # What cannot be locked is somebody's, or only litter.
            with contextlib.suppress(OSError):
                fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | NO_FOLLOW)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    remove_tree(path)
                finally:
                    os.close(fd)

    def _close(self) -> None:
        os.close(self._fd)
        self._fd = -1

    def link(self, source: Path, name: str) -> bool:
        """Give a durable file a second name in the folder; False where that cannot be done."""
        with explained(self.path / name, "linking the file"):
            try:
                os.link(source, self.path / name, follow_symlinks=False)
            except OSError as error:
                if error.errno in _NO_LINK:
                    return False
                raise
        self.files += 1
        self.linked_bytes += (self.path / name).lstat().st_size
        return True

    def unlink(self, name: str) -> None:
        """Take a link back."""
        self.files -= 1
        self.linked_bytes -= (self.path / name).lstat().st_size
        (self.path / name).unlink()

    def copy(self, fd: int, size: int, name: str) -> None:
        """Copy an open file of `size` bytes into the folder."""
        piece = anonymous(min(size, _PIECE_BYTES))
        with self.draft(name, size) as draft:
            done = 0
            while done < size:
                with explained(self.path / name, "reading what is copied"):
                    count = os.preadv(fd, [piece[: size - done].data], done)
                    if not count:
                        raise OSError(errno.EIO, "the file ends before its size")
                draft.write(piece[:count], done, direct=True)
                done += count

    @contextlib.contextmanager
    def draft(self, name: str, size: int) -> Iterator[AtomicFile]:
        """Write a file of `size` bytes, durable and sealed when the block ends."""
        draft = AtomicFile(self.path, name, reserve=size)
        try:
            yield draft
            draft.publish(size)
        except BaseException:
            draft.discard()
            raise
        self.files += 1
        self.written_bytes += size

    def publish(self) -> None:
        """Make all names durable, and give the folder its own; blocks until that is durable too."""
        for folder in [*(path for path in self.path.iterdir() if path.is_dir()), self.path]:
            sync_folder(folder)
        self._check_free()
        with explained(self.target, "giving the folder its name"):
            self.path.rename(self.target)
        self._close()
        sync_folder(self.target.parent)
