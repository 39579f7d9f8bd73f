"""Objects below a prefix, read: by the range, as a stream, and whole. What breaks off goes on from where it was."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from mmcache.errors import CorruptError
from mmcache.storage.retries import short_answer

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

__all__ = ["ObjectReads"]

T = TypeVar("T")

# What is handed on at a time of what comes: memory that is used again is far quicker than fresh memory.
_PIECE_BYTES = 2 << 20


class ObjectReads:
    """What can be read of a `Bucket`, which says where, and tries again."""

    url: str
    _obstore: Any

    @property
    def _store(self) -> Any:
        """The client."""
        raise NotImplementedError

    def _again(self, where: str, work: Callable[[], T], short: Callable[[], None] = lambda: None) -> T:
        """Do some work until it succeeds, or will not, or patience is over."""
        raise NotImplementedError

    def where(self, key: str) -> str:
        """The address of an object."""
        return f"{self.url}/{key}"

    def size(self, key: str, alive: Callable[[], None] = lambda: None) -> int:
        """Give the bytes of an object; `alive` as in `upload`. Raises StoreNotFoundError and the others of `read`."""

        def look() -> int:
            alive()
            return int(self._obstore.head(self._store, key)["size"])

        return self._again(self.where(key), look)

    def read(self, key: str, start: int, stop: int) -> memoryview:
        """Read the bytes from `start` to before `stop` of an object: exactly so many; blocks until they are there.

        Raises:
            StoreNotFoundError: there is no such object, or no such bucket.
            CorruptError: it ends before `stop`.
            AccessError: no right to it.
            RemoteError: the server gave no whole answer in all the time that there was.
        """
        if start == stop:
            return memoryview(b"")

        def get() -> memoryview:
            found = memoryview(self._obstore.get_range(self._store, key, start=start, end=stop))
            if len(found) != stop - start:
                raise short_answer(len(found), stop - start)
            return found

        return self._again(self.where(key), get, lambda: self._check_size(key, stop))

    def stream(self, key: str, start: int, stop: int) -> Iterator[memoryview]:
        """Read the bytes from `start` to before `stop` of an object, some megabytes at a time as they come.

        What breaks off goes on from there. Blocks until the next are there; errors as `read`.
        """
        return self._stream(key, start, stop, None)

    def whole(self, key: str) -> tuple[int, Generator[memoryview]]:
        """Read a whole object as `stream` does, in one request, and give its size; blocks until that is known."""

        def begin() -> tuple[int, Iterator[Any]]:
            # An answer to a range says how long the object is, whatever of it comes.
            answer = self._obstore.get(self._store, key, options={"range": {"offset": 0}})
            return answer.meta["size"], iter(answer.stream(min_chunk_size=_PIECE_BYTES))

        size, coming = self._again(self.where(key), begin, lambda: self._check_size(key, 1))
        return size, self._stream(key, 0, size, coming)

    def _stream(self, key: str, start: int, stop: int, coming: Iterator[Any] | None) -> Generator[memoryview]:
        """As `stream`; `coming` has begun already."""
        at = start

        def more() -> memoryview:
            nonlocal coming
            # One that fails is not gone on with.
            stream, coming = coming, None
            if stream is None:
                answer = self._obstore.get(self._store, key, options={"range": (at, stop)})
                stream = iter(answer.stream(min_chunk_size=_PIECE_BYTES))
            data = next(stream, None)
            if data is None or len(data) > stop - at:
                raise short_answer(at - start + len(data or b""), stop - start)
            coming = stream
            return memoryview(data)

        while at < stop:
            data = self._again(self.where(key), more, lambda: self._check_size(key, stop))
            at += len(data)
            yield data

    def read_head(self, key: str, count: int) -> tuple[bytes, int]:
        """Read the first `count` bytes of an object, or all where it has fewer, and give its size. Errors as `read`."""

        def empty() -> None:
            self._check_size(key, 1)

        def get() -> tuple[bytes, int]:
            result = self._obstore.get(self._store, key, options={"range": (0, count)})
            size, data = result.meta["size"], bytes(result.bytes())
            if len(data) != min(count, size):
                raise short_answer(len(data), min(count, size))
            return data, size

        return self._again(self.where(key), get, empty)

    def read_whole(self, key: str, limit: int) -> bytes:
        """Read a whole object of at most `limit` bytes. Errors as `read`; CorruptError if it is larger."""
        return self.read_tagged(key, limit)[0]

    def read_tagged(self, key: str, limit: int) -> tuple[bytes, str | None]:
        """Read a whole object as `read_whole`, and give its tag too, as `names` does."""

        def get() -> tuple[bytes, str | None]:
            result = self._obstore.get(self._store, key)
            size = result.meta["size"]
            if size > limit:
                raise CorruptError(f"{self.where(key)} is larger than the {limit} bytes such an object can have")
            data = bytes(result.bytes())
            if len(data) != self._obstore.head(self._store, key)["size"]:
                raise short_answer(len(data), size)
            return data, result.meta["e_tag"]

        return self._again(self.where(key), get)

    def _check_size(self, key: str, stop: int) -> None:
        size = self.size(key)
        if size < stop:
            raise CorruptError(f"{self.where(key)} has {size} bytes, at least {stop} belong there: make it again")
