"""A folder that is filled under a temporary name and appears atomically under its final one: for exports."""

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
# Another file system, no hard links, another user's file, too many links: the file is copied instead.
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS)


class AtomicFolder:
    """A temporary folder beside `target`; `publish` renames it to that. A context: without `publish`, it is removed.

    It is locked while its process lives. Folders of dead processes are removed when the next one with the same target
    is entered.

    Raises:
        StoreExistsError: `target` exists.
        WriteError: the folder cannot be created.
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
        """Create the folder and lock it; False if another process removed it before it was locked."""
        self.path = self.target.with_name(f".{self.target.name}.{secrets.token_hex(8)}{_SUFFIX}")
        self.path.mkdir()
        self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        with contextlib.suppress(OSError):
            # Some network file systems cannot lock folders; no other process can lock and remove it there either.
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
            # A folder that cannot be locked is in use, or does no harm.
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
        """Hard-link a durable file into the folder; False where that is not possible."""
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
        """Remove a link that `link` made."""
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
        """A file of `size` bytes to write in the `with` body; durable and read-only when that ends."""
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
        """Sync all names, and rename the folder to `target`; blocks until that is durable too."""
        for folder in [*(path for path in self.path.iterdir() if path.is_dir()), self.path]:
            sync_folder(folder)
        self._check_free()
        with explained(self.target, "giving the folder its name"):
            self.path.rename(self.target)
        self._close()
        sync_folder(self.target.parent)
