"""The shards of a store in a bucket, as objects: read by the byte, by the range, and whole."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from mmcache.errors import IncompleteError, StoreNotFoundError
from mmcache.format.shard import HEADER_BYTES

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from mmcache.storage.bucket import Bucket

__all__ = ["ShardObjects"]

# Bytes a second from which on one stream is as good as several, and what has to come for it to be told.
_QUICK, _LEAST_MEASURED = 256e6, 1 << 20


class ShardObjects:
    """The objects that are shards. Safe to use from several threads.

    Args:
        bucket: the store's.
    """

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        # Whether a stream, by the latest that was measured, needs no others beside it.
        self.quick = False

    def where(self, array: str, key: str) -> str:
        """Give the address of a shard."""
        return f"{self.bucket.url}/{array}/{key}"

    def read(self, array: str, key: str, start: int, stop: int) -> memoryview:
        """Read bytes of a shard from the bucket, exactly so many; blocks until they are there.

        Raises:
            IncompleteError: the bucket has no such shard.
            CorruptError: it ends before `stop`.
            AccessError, RemoteError: as `Bucket.read`.
        """
        with _shard_errors(self.where(array, key)):
            return self.bucket.read(f"{array}/{key}", start, stop)

    def stream(self, array: str, key: str, start: int, stop: int) -> Iterator[memoryview]:
        """Read bytes of a shard from the bucket as they come, some megabytes at a time. Errors as `read`."""
        with _shard_errors(self.where(array, key)):
            yield from self.bucket.stream(f"{array}/{key}", start, stop)

    def whole(self, array: str, key: str) -> tuple[bytes, int, Generator[memoryview]]:
        """Read a whole shard from the bucket: its header, its size, and all of it, as it comes. Errors as `read`."""
        with _shard_errors(self.where(array, key)):
            size, coming = self.bucket.whole(f"{array}/{key}")
            began = time.perf_counter()
            first = next(coming, memoryview(b""))
            while len(first) < min(HEADER_BYTES, size):
                first = memoryview(bytes(first) + bytes(next(coming)))
            if len(first) >= _LEAST_MEASURED:
                self.quick = len(first) > _QUICK * (time.perf_counter() - began)
        return bytes(first[:HEADER_BYTES]), size, self._rest(array, key, first, coming)

    def _rest(self, array: str, key: str, first: memoryview, coming: Generator[memoryview]) -> Generator[memoryview]:
        with contextlib.closing(coming), _shard_errors(self.where(array, key)):
            yield first
            yield from coming

    def head(self, array: str, key: str) -> tuple[bytes, int]:
        """Read the header of a shard from the bucket, and its size. Errors as `read`."""
        with _shard_errors(self.where(array, key)):
            return self.bucket.read_head(f"{array}/{key}", HEADER_BYTES)


@contextlib.contextmanager
def _shard_errors(where: str) -> Iterator[None]:
    """Tell an object that is not there as a shard that is not there."""
    try:
        yield
    except StoreNotFoundError as error:
        raise IncompleteError(f"the bucket has no shard {where}: it was not uploaded yet, or removed") from error
