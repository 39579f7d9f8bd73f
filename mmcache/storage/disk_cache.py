"""A bounded LRU cache on disk, of files that can be fetched again, shared by all processes of a machine.

A file appears under its name once it is complete. While it is fetched it is an `AtomicFile` that reserves its whole
size. Before first use after a boot (a power failure may lose bytes), and after somebody wrote to it, a file is compared
with its checksums; a damaged one is removed and fetched again. An evicted file stays valid for those that have it
mapped; `generation` says when to unmap, so that the disk gets its space back.

`CopyRecords` has a small file per cached file: that it was compared with its checksums, and when it was last used. The
file's own times cannot record that, since setting them changes its ctime, by which writes are detected. A record is
valid until the next boot.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

from mmcache.errors import ArgumentError, CorruptError, IncompleteError, MmcacheError
from mmcache.system.atomic import AtomicFile, publish, remove_drafts
from mmcache.system.files import explained, make_folder, read_file, remove_file
from mmcache.system.locks import locked
from mmcache.system.memory import PAGE
from mmcache.system.no_symlinks import open_in_place
from mmcache.system.threads import ThreadPool

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["RECORDS", "CopyRecords", "DiskCache", "Identity", "identity"]

# Inode, size, mtime and ctime in nanoseconds.
Identity: TypeAlias = tuple[int, int, int, int]

RECORDS = ".checked"
# How many machines' records are kept where they share a cache over a network; most bytes of a record.
_MACHINES, _LIMIT = 8, 4096


def identity(path: Path | str) -> Identity | None:
    """Identity of a file, which changes if it is written to or replaced; None if there is no plain file."""
    try:
        found = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns) if stat.S_ISREG(found.st_mode) else None


class CopyRecords:
    """The records of one cache: which files were compared and when each was used. Shared by all its processes.

    Args:
        cache: the cache's folder; the records are in a folder below it.
        boot: the boot id of the machine; empty if unknown, then no comparison is recorded.
    """

    def __init__(self, cache: Path, boot: str) -> None:
        self._cache, self._boot = cache, boot
        make_folder(cache, RECORDS)

    def has(self, name: str, copy: Identity) -> bool:
        """Whether any process has compared the file, in its present state, since boot."""
        return bool(self._boot) and self._line(copy) in self._lines(name)

    def note(self, name: str, copy: Identity) -> None:
        """Record that a file was compared and used; if that fails, it is compared again later."""
        others = [line for line in self._lines(name) if line.partition(" ")[0] != self._boot]
        lines = [*others[1 - _MACHINES :], self._line(copy)] if self._boot else []
        with contextlib.suppress(MmcacheError):
            publish(self._cache, f"{RECORDS}/{name}", "".join(f"{line}\n" for line in lines).encode(), durable=False)
            self.touch(name)

    def touch(self, name: str) -> bool:
        """Record that a file was used just now; False if it has no record."""
        now = time.time_ns()
        # Anything but a plain file is no record, and `note` replaces it.
        with contextlib.suppress(FileNotFoundError, CorruptError):
            fd = open_in_place(self._cache, f"{RECORDS}/{name}", os.O_RDONLY)
            try:
                os.utime(fd, ns=(now, now))
            finally:
                os.close(fd)
            return True
        return False

    def used(self) -> dict[str, int]:
        """When each file was last used, in nanoseconds, by name."""
        found = {}
        with os.scandir(self._cache / RECORDS) as entries:
            for entry in entries:
                # Other processes remove records at any time.
                with contextlib.suppress(FileNotFoundError):
                    found[entry.name] = entry.stat(follow_symlinks=False).st_mtime_ns
        return found

    def drop(self, names: Collection[str]) -> None:
        """Remove the records of evicted files, and temporary files of dead processes."""
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


if TYPE_CHECKING:
    from collections.abc import Callable

    # Raises CorruptError if a file is not the expected one, or OSError if the system cannot read it.
    Check: TypeAlias = Callable[[Path], None]


# Seconds between two attempts to get room while files being fetched take all of it; and between two records of a
# file's use.
_AGAIN, _USED_AGAIN = 0.05, 1.0
_GONE = ".gone"
# Errors that mean that this one file cannot be read.
_UNREADABLE = (errno.EIO, errno.EACCES, errno.EPERM, errno.ENXIO, errno.EBADMSG, getattr(errno, "EUCLEAN", errno.EIO))


class _Holder(Protocol):
    """An object that may have files of a cache mapped."""

    def forget(self) -> None:
        """Unmap files that were evicted."""


# The holders in this process, by cache folder. Needs no lock, since append and remove are atomic.
_HOLDERS: list[tuple[Path, weakref.ref[_Holder]]] = []


def _boot() -> str:
    """The boot id of the machine; empty if the system does not say."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _tell(folder: Path) -> None:
    """Notify all processes that files of a folder were evicted."""
    now = time.time_ns()
    with explained(folder / _GONE, "saying that files have gone"):
        fd = open_in_place(folder, _GONE, os.O_WRONLY | os.O_CREAT)
        try:
            os.utime(fd, ns=(now, now))
        finally:
            os.close(fd)
    for holder in list(_HOLDERS):
        held, found = holder[0], holder[1]()
        if found is None:
            with contextlib.suppress(ValueError):
                _HOLDERS.remove(holder)
        elif held == folder:
            found.forget()


def _settle(path: Path) -> None:
    """Make a file durable, if it still exists; remove it if that fails."""
    try:
        fd = open_in_place(path.parent, path.name, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except FileNotFoundError:
        pass
    except (OSError, CorruptError):
        # The system may have dropped the bytes, and reports that only once.
        path.unlink(missing_ok=True)
        _tell(path.parent)


class _Entry(NamedTuple):
    made: int
    size: int
    name: str


def _taken(size: int) -> int:
    """Bytes that a file of `size` bytes takes on disk, in whole pages."""
    return -(-size // PAGE) * PAGE


class DiskCache:
    """Files by name, of at most `most_bytes` together. Safe to use from several threads and processes.

    Args:
        folder: where they are; created if missing.
        most_bytes: the bound of their total size. Processes may have different bounds; each enforces its own.

    Raises:
        WriteError: the folder cannot be created.
    """

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self.folder, self.most_bytes = folder, most_bytes
        self._crew, self._submitting, self._boot = ThreadPool(1, "settle"), threading.Lock(), _boot()
        make_folder(folder)
        self._records = CopyRecords(folder, self._boot)
        # As str, since both are used before each read.
        self._above, self._marker = f"{folder}/", str(folder / _GONE)
        # Identities of files that this process found intact, and when it last recorded their use.
        self._whole: dict[str, Identity] = {}
        self._noted: dict[str, float] = {}

    @property
    def generation(self) -> int:
        """A number that changes whenever any process evicts files."""
        try:
            return os.lstat(self._marker).st_mtime_ns
        except FileNotFoundError:
            return 0

    def hold(self, holder: _Holder) -> None:
        """Register a holder, weakly: `holder.forget` is called when files were evicted, before their room is reused.

        It is called from any thread, and must not wait for the cache. Other processes watch `generation`.
        """
        _HOLDERS.append((self.folder, weakref.ref(holder)))

    def find(self, name: str, check: Check) -> Path | None:
        """The path of a file that is cached and intact, marked as used; None if there is none.

        Args:
            name: its name.
            check: compares it with its checksums; called if no process has done so since boot and since the last write
                to it. A file that does not match, or cannot be read, is removed.
        """
        copy = identity(self._above + name)
        if copy is None:
            return None
        if self._whole.get(name) != copy:
            with locked(self.folder, self._lock_of(name)):
                if not self._is_whole(name, check):
                    return None
        self._use(name)
        return self.folder / name

    @staticmethod
    def _lock_of(name: str) -> str:
        return f".{name}.lock"

    def _is_whole(self, name: str, check: Check) -> bool:
        """As `find`, with the file's lock held."""
        path = self.folder / name
        while (copy := identity(path)) is not None:
            if not self._records.has(name, copy):
                try:
                    check(path)
                except (IncompleteError, FileNotFoundError):
                    continue  # evicted meanwhile
                except CorruptError:
                    self.drop(name)
                    continue
                except OSError as error:
                    if error.errno not in _UNREADABLE:
                        raise
                    self.drop(name)
                    continue
                if identity(path) != copy:
                    continue
                self._records.note(name, copy)
            self._whole[name] = copy
            return True
        return False

    def _use(self, name: str) -> None:
        now = time.monotonic()
        if now - self._noted.get(name, -_USED_AGAIN) >= _USED_AGAIN:
            self._noted[name] = now
            if not self._records.touch(name) and (copy := self._whole.get(name)):
                self._records.note(name, copy)

    def add(self, name: str, begin: Callable[[], tuple[int, Callable[[AtomicFile], None]]], check: Check) -> Path:
        """The path of a file, made now if it is not cached; blocks while another thread or process makes the same one.

        Args:
            name: its name.
            begin: called if it is not cached; returns its size and a function that writes all of it, compared with its
                checksums. An error of either is passed on, and nothing is left behind.
            check: as in `find`.

        Raises:
            ArgumentError: it is larger than the whole cache.
            DiskFullError: the disk has less room than the cache may take.
        """
        path = self.folder / name
        with locked(self.folder, self._lock_of(name)):
            if self._is_whole(name, check):
                self._use(name)
                return path
            size, fill = begin()
            if _taken(size) > self.most_bytes:
                raise ArgumentError(
                    f"a file of {size} bytes is wanted in {self.folder}, which may take {self.most_bytes}: give at "
                    f"least cache_bytes={_taken(size)}"
                )
            draft = self._begin(name, size)
            try:
                fill(draft)
                # Locked: a listing during the rename may see neither name, and count too little.
                with locked(self.folder, ".room.lock"):
                    # Synced later, in the background: after a reboot the file is compared with its checksums anyway.
                    draft.publish(size, durable=not self._boot)
            except BaseException:
                draft.discard()
                raise
            if (copy := identity(path)) is not None:
                self._whole[name] = copy
                self._records.note(name, copy)
        with self._submitting:
            self._crew.submit(_settle, path)
        return path

    def drop(self, name: str) -> bool:
        """Remove a file; False if it is not there."""
        with explained(self.folder / name, "removing a file of the cache"):
            try:
                (self.folder / name).unlink()
            except FileNotFoundError:
                return False
        self._forget([name])
        _tell(self.folder)
        return True

    def _forget(self, names: list[str]) -> None:
        for name in names:
            self._whole.pop(name, None)
            self._noted.pop(name, None)
        self._records.drop(names)

    def used(self) -> int:
        """Bytes that all files take, temporary ones included."""
        return sum(entry.size for entry in self._entries())

    def _begin(self, name: str, size: int) -> AtomicFile:
        """Reserve room for a file, evicting others; blocks while files being fetched take all of it."""
        while True:
            with locked(self.folder, ".room.lock"):
                if self._make_room(size):
                    return AtomicFile(self.folder, name, reserve=size)
            time.sleep(_AGAIN)

    def _make_room(self, size: int) -> bool:
        remove_drafts(self.folder)
        entries, used = self._entries(), self._records.used()
        excess = sum(entry.size for entry in entries) + _taken(size) - self.most_bytes
        gone = (used.keys() | self._whole.keys()) - {entry.name for entry in entries}
        told = False
        for entry in sorted(entries, key=lambda entry: used.get(entry.name, entry.made)):
            if excess <= 0:
                break
            if not entry.name.startswith("."):
                with contextlib.suppress(FileNotFoundError):
                    remove_file(self.folder, entry.name)
                gone.add(entry.name)
                excess, told = excess - entry.size, True
        self._forget([*gone])
        if told:
            _tell(self.folder)
        return excess <= 0

    def _entries(self) -> list[_Entry]:
        found = []
        with os.scandir(self.folder) as entries:
            for entry in (entry for entry in entries if entry.name != RECORDS):
                # Other processes remove files at any time.
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    found.append(_Entry(status.st_mtime_ns, _taken(status.st_size), entry.name))
        return found
