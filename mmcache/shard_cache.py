"""A bounded folder of files that can be fetched again, shared by all processes of a machine: the least used go first.

A file is there under its name when it is whole and durable; what is being fetched is a draft, whose room is taken from
the beginning. A file that goes while somebody has it mapped stays valid for them: `generation` tells that it is time to
let go, so that the disk has its room back.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from mmcache.crew import Crew
from mmcache.draft import SEALED, Draft, publish, remove_drafts
from mmcache.errors import ArgumentError
from mmcache.files import make_folder, remove_file
from mmcache.geometry import PAGE
from mmcache.lock import locked

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ShardCache"]

# Seconds between two looks at whether others are done, where all the room is taken by what is being fetched.
_AGAIN = 0.05
_GONE = ".gone"
# The mode of a file that is whole, and may not be on the disk yet; and what says since when such files are whole.
_UNSETTLED, _BOOT = 0o644, ".boot"


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
    marker, now = folder / _GONE, time.time_ns()
    marker.touch()
    os.utime(marker, ns=(now, now))
    for holder in list(_HOLDERS):
        held, found = holder[0], holder[1]()
        if found is None:
            with contextlib.suppress(ValueError):
                _HOLDERS.remove(holder)
        elif held == folder:
            found.forget()


def _settle(path: Path) -> None:
    """Make a file durable, and seal it: then it counts after a power cut too. One that is gone is fine."""
    try:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), SEALED & os.fstat(file.fileno()).st_mode)
    except FileNotFoundError:
        pass
    except OSError:
        # The system may have dropped the bytes, and would not say so again.
        path.unlink(missing_ok=True)
        _tell(path.parent)


class _Entry(NamedTuple):
    used: int
    size: int
    name: str


def _taken(size: int) -> int:
    """Give what a file takes on a disk, which gives whole pages."""
    return -(-size // PAGE) * PAGE


class ShardCache:
    """Files by name, of at most `most_bytes` together. Safe to use from several threads and processes.

    Args:
        folder: where they are; made if it is not there.
        most_bytes: what they may take. Of processes with different bounds each keeps to its own.

    Raises:
        WriteError: the folder cannot be made.
    """

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self.folder, self.most_bytes = folder, most_bytes
        self._crew, self._submitting, self._boot = Crew(1, "settle"), threading.Lock(), _boot()
        make_folder(folder)
        self._clear_unsettled()

    def _clear_unsettled(self) -> None:
        """Remove what was not on the disk yet when the machine last went down, and may have lost bytes."""
        if self._is_cleared():
            return
        with locked(self.folder / ".room.lock"):
            # Another one may have done it meanwhile, and made files since.
            if self._is_cleared():
                return
            for entry in self._entries():
                path = self.folder / entry.name
                with contextlib.suppress(FileNotFoundError):
                    if not entry.name.startswith(".") and path.stat().st_mode & stat.S_IWUSR:
                        remove_file(path)
            publish(self.folder / _BOOT, self._boot.encode(), durable=False)

    def _is_cleared(self) -> bool:
        marker = self.folder / _BOOT
        return marker.exists() and marker.read_text() == self._boot

    @property
    def generation(self) -> int:
        """A number that is another one each time that files have gone, in whichever process."""
        try:
            return os.stat(self.folder / _GONE).st_mtime_ns  # noqa: PTH116 -- asked for before each read
        except FileNotFoundError:
            return 0

    def hold(self, holder: _Holder) -> None:
        """Have `holder.forget` called when files have gone, before their room is given to others; weakly.

        It is called from any thread, and must not wait for the cache. Other processes look at `generation`.
        """
        _HOLDERS.append((self.folder, weakref.ref(holder)))

    def find(self, name: str) -> Path | None:
        """Give a file, marked as used just now, or None where it is not there."""
        path = self.folder / name
        try:
            # The time of modification is how readers know that a file is the one that they checked.
            os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
        except FileNotFoundError:
            return None
        return path

    def add(self, name: str, begin: Callable[[], tuple[int, Callable[[Draft], None]]]) -> Path:
        """Give a file, made now where it is not there; blocks while another thread or process makes the same one.

        Args:
            name: its name.
            begin: called where it is not there; gives its bytes, and what writes all of them. What either raises is
                passed on, and leaves nothing behind.

        Raises:
            ArgumentError: it is larger than the whole cache.
            DiskFullError: the disk has less room than the cache may take.
        """
        with locked(self.folder / f".{name}.lock"):
            found = self.find(name)
            if found is not None:
                return found
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
                with locked(self.folder / ".room.lock"):
                    # Whoever waits for the rows need not wait for the disk: until it is there, the mode says so.
                    draft.publish(size, durable=not self._boot, mode=_UNSETTLED if self._boot else SEALED)
            except BaseException:
                draft.discard()
                raise
        with self._submitting:
            self._crew.submit(_settle, self.folder / name)
        return self.folder / name

    def drop(self, name: str) -> bool:
        """Let a file go; False where it is not there."""
        try:
            (self.folder / name).unlink()
        except FileNotFoundError:
            return False
        _tell(self.folder)
        return True

    def used(self) -> int:
        """Add up the bytes that are taken, those of drafts too."""
        return sum(entry.size for entry in self._entries())

    def _begin(self, name: str, size: int) -> Draft:
        """Take the room for a file; blocks while all of the room is taken by what others fetch."""
        while True:
            with locked(self.folder / ".room.lock"):
                if self._make_room(size):
                    return Draft(self.folder / name, reserve=size)
            time.sleep(_AGAIN)

    def _make_room(self, size: int) -> bool:
        remove_drafts(self.folder)
        entries = self._entries()
        excess = sum(entry.size for entry in entries) + _taken(size) - self.most_bytes
        gone = False
        for entry in sorted(entries):
            if excess <= 0:
                break
            if not entry.name.startswith("."):
                with contextlib.suppress(FileNotFoundError):
                    remove_file(self.folder / entry.name)
                excess, gone = excess - entry.size, True
        if gone:
            _tell(self.folder)
        return excess <= 0

    def _entries(self) -> list[_Entry]:
        found = []
        with os.scandir(self.folder) as entries:
            for entry in (entry for entry in entries if entry.name != _BOOT):
                # Others remove files at any moment.
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    found.append(_Entry(status.st_atime_ns, _taken(status.st_size), entry.name))
        return found
