"""A bounded folder of files that can be fetched again, shared by all processes of a machine: the least used go first.

A file is there under its name when it is whole; what is being fetched is a draft, whose room is taken from the
beginning. One is handed out only while it is known to be what was fetched: it is compared with its own checksums the
first time after the machine was started, since a power failure may have taken bytes, and when somebody wrote to it. One
that is damaged goes, and is fetched again. A file that goes while somebody has it mapped stays valid for them:
`generation` tells that it is time to let go, so that the disk has its room back.

Which files of a cache were compared with their checksums, and when each was used last: a small file for each. A file's
own times would not do: to set one changes the time of its last change, and that tells that somebody wrote to it. A
record counts until the machine is started again, since a power failure may have taken bytes that it had seen.
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


if TYPE_CHECKING:
    from collections.abc import Callable

    # Raises CorruptError where a file is not what belongs there, or OSError where the system cannot read it.
    Check: TypeAlias = Callable[[Path], None]


# Seconds between two looks at whether others are done, where all the room is taken by what is being fetched; and
# between two notes that a file is in use.
_AGAIN, _USED_AGAIN = 0.05, 1.0
_GONE = ".gone"
# How the system says that this file cannot be read, while others can.
_UNREADABLE = (errno.EIO, errno.EACCES, errno.EPERM, errno.ENXIO, errno.EBADMSG, getattr(errno, "EUCLEAN", errno.EIO))


class _Holder(Protocol):
    """What may have files of a cache mapped."""

    def forget(self) -> None:
        """Let go of those."""


# Who has files of a folder mapped in this process. Only ever appended to and removed from, which needs no lock.
_HOLDERS: list[tuple[Path, weakref.ref[_Holder]]] = []


def _boot() -> str:
    """Name the time since the machine was started; empty where the system does not say."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _tell(folder: Path) -> None:
    """Say, to all processes, that files of a folder have gone."""
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
    """Make a file durable. One that is gone is fine."""
    try:
        fd = open_in_place(path.parent, path.name, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except FileNotFoundError:
        pass
    except (OSError, CorruptError):
        # The system may have dropped the bytes, and would not say so again.
        path.unlink(missing_ok=True)
        _tell(path.parent)


class _Entry(NamedTuple):
    made: int
    size: int
    name: str


def _taken(size: int) -> int:
    """Give what a file takes on a disk, which gives whole pages."""
    return -(-size // PAGE) * PAGE


class DiskCache:
    """Files by name, of at most `most_bytes` together. Safe to use from several threads and processes.

    Args:
        folder: where they are; made if it is not there.
        most_bytes: what they may take. Of processes with different bounds each keeps to its own.

    Raises:
        WriteError: the folder cannot be made.
    """

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self.folder, self.most_bytes = folder, most_bytes
        self._crew, self._submitting, self._boot = ThreadPool(1, "settle"), threading.Lock(), _boot()
        make_folder(folder)
        self._records = CopyRecords(folder, self._boot)
        # As text, since both are asked for before each read.
        self._above, self._marker = f"{folder}/", str(folder / _GONE)
        # What was found whole by this process, as it was then, and when it was noted last that it is in use.
        self._whole: dict[str, Identity] = {}
        self._noted: dict[str, float] = {}

    @property
    def generation(self) -> int:
        """A number that is another one each time that files have gone, in whichever process."""
        try:
            return os.lstat(self._marker).st_mtime_ns
        except FileNotFoundError:
            return 0

    def hold(self, holder: _Holder) -> None:
        """Have `holder.forget` called when files have gone, before their room is given to others; weakly.

        It is called from any thread, and must not wait for the cache. Other processes look at `generation`.
        """
        _HOLDERS.append((self.folder, weakref.ref(holder)))

    def find(self, name: str, check: Check) -> Path | None:
        """A file that is here and whole, marked as used just now; None where there is none.

        Args:
            name: its name.
            check: compares it with its checksums, where no process has since the machine was started, or somebody wrote
                to it since. A file that does not match, or cannot be read, goes.
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
                    continue  # others needed the room
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
        """A file, made now where it is not here; blocks while another thread or process makes the same one.

        Args:
            name: its name.
            begin: called where it is not here; gives its bytes, and what writes all of them, compared with their
                checksums. What either raises is passed on, and leaves nothing behind.
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
                # Who adds up what is taken while a file gets another name may meet neither of the two.
                with locked(self.folder, ".room.lock"):
                    # Whoever waits for the rows need not wait for the disk: after a restart they are compared again.
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
        """Let a file go; False where it is not there."""
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
        """Add up the bytes that are taken, those of drafts too."""
        return sum(entry.size for entry in self._entries())

    def _begin(self, name: str, size: int) -> AtomicFile:
        """Take the room for a file; blocks while all of the room is taken by what others fetch."""
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
                # Others remove files at any moment.
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    found.append(_Entry(status.st_mtime_ns, _taken(status.st_size), entry.name))
        return found
