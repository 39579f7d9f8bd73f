"""Ranges of bytes of one shard that is open: a file, or an object in a bucket. Loads no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from mmcache.system.files import advise_random, close_read, read_page
from mmcache.system.memory import PAGE
from mmcache.system.os_errors import read_at

if TYPE_CHECKING:
    from mmcache.storage.mirror import ShardObjects

__all__ = ["FileBytes", "ObjectBytes", "ShardBytes"]


class ShardBytes(Protocol):
    """A shard that is open for reading ranges of it."""

    @property
    def size(self) -> int:
        """Size of the shard in bytes."""

    def head(self) -> bytes:
        """The first 4096 bytes, or fewer if it is shorter."""

    def read(self, into: memoryview, offset: int) -> bool:
        """Fill `into` with the bytes from `offset`; False if the shard is too short. Blocks until done."""

    def scattered(self) -> None:
        """Turn off readahead, since little of it will be read."""

    def close(self) -> None:
        """Close it."""


class FileBytes:
    """`ShardBytes` of a file; owns the descriptor."""

    def __init__(self, fd: int, size: int, *, direct: bool = False) -> None:
        self._fd, self.size, self._direct = fd, size, direct

    def head(self) -> bytes:
        """As `ShardBytes.head`."""
        return read_page(self._fd)

    def read(self, into: memoryview, offset: int) -> bool:
        """As `ShardBytes.read`; if the file was opened with O_DIRECT, memory, size and offset must be whole pages."""
        done = 0
        while done < len(into):
            count = read_at(self._fd, into[done:], offset + done)
            done += count
            # A direct read of part of a page means that the file ends there.
            if not count or (self._direct and count % PAGE):
                break
        return done == len(into)

    def scattered(self) -> None:
        """As `ShardBytes.scattered`."""
        advise_random(self._fd)

    def close(self) -> None:
        """Close the file."""
        close_read(self._fd)


class ObjectBytes:
    """`ShardBytes` of an object, by range requests."""

    def __init__(self, objects: ShardObjects, array: str, key: str) -> None:
        self._objects, self._array, self._key = objects, array, key
        self._head, self.size = objects.head(array, key)

    def head(self) -> bytes:
        """The first page, which was read when it was opened."""
        return self._head

    def read(self, into: memoryview, offset: int) -> bool:
        """As `ShardBytes.read`; one request. Errors as `ShardObjects.read`."""
        stop = min(offset + len(into), self.size)
        if stop > offset:
            into[: stop - offset] = self._objects.read(self._array, self._key, offset, stop)
        return stop - offset == len(into)

    def scattered(self) -> None:
        """No-op: range requests have no readahead."""

    def close(self) -> None:
        """No-op: it keeps no connection."""
