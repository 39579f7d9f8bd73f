"""The bytes of one shard that was opened: of a file, or of an object in a bucket."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from mmcache.system.files import advise_random, close_read, read_page
from mmcache.system.memory import PAGE
from mmcache.system.os_errors import read_at

if TYPE_CHECKING:
    from mmcache.storage.shard_objects import ShardObjects

__all__ = ["FileBytes", "ObjectBytes", "ShardBytes"]


class ShardBytes(Protocol):
    """A shard that is open for reading pieces of it, until it is closed."""

    @property
    def size(self) -> int:
        """Bytes of all of it."""

    def head(self) -> bytes:
        """Read its first page, or what there is of it."""

    def read(self, into: memoryview, offset: int) -> bool:
        """Fill `into` from `offset` on; False if it ends before. Blocks until it is there."""

    def scattered(self) -> None:
        """Say that little of it will be read, so that nothing is read ahead."""

    def close(self) -> None:
        """Let go of it."""


class FileBytes:
    """Those of a file, whose descriptor it closes."""

    def __init__(self, fd: int, size: int, *, direct: bool = False) -> None:
        self._fd, self.size, self._direct = fd, size, direct

    def head(self) -> bytes:
        """Read its first page."""
        return read_page(self._fd)

    def read(self, into: memoryview, offset: int) -> bool:
        """As `ShardBytes.read`; where the file was opened for direct reads, all of it has to be in whole pages."""
        done = 0
        while done < len(into):
            count = read_at(self._fd, into[done:], offset + done)
            done += count
            # Direct reads cannot go on from within a page: there the file ends.
            if not count or (self._direct and count % PAGE):
                break
        return done == len(into)

    def scattered(self) -> None:
        """Tell the system so."""
        advise_random(self._fd)

    def close(self) -> None:
        """Close the file."""
        close_read(self._fd)


class ObjectBytes:
    """Those of an object, by ranged reads."""

    def __init__(self, objects: ShardObjects, array: str, key: str) -> None:
        self._objects, self._array, self._key = objects, array, key
        self._head, self.size = objects.head(array, key)

    def head(self) -> bytes:
        """Give its first page, which was read when it was opened."""
        return self._head

    def read(self, into: memoryview, offset: int) -> bool:
        """As `ShardBytes.read`; one request. Errors as `ShardObjects.read`."""
        stop = min(offset + len(into), self.size)
        if stop > offset:
            into[: stop - offset] = self._objects.read(self._array, self._key, offset, stop)
        return stop - offset == len(into)

    def scattered(self) -> None:
        """Do nothing: no more comes than is asked for."""

    def close(self) -> None:
        """Do nothing: it keeps no connection."""
