"""Reads, writes and lists objects below one prefix of a bucket.

S3 and compatible servers, Google Cloud Storage, Azure and `file://`, through obstore. Transient failures (a server that
is down or slow, cuts a connection or sends too little) are retried for `PATIENCE` seconds; permanent ones (no such
bucket, no access) are raised at once.

For `file://`, `LocalObjects` adds durability, and follows no links. obstore renames a file when it is written, without
a sync: after a power failure it may be empty under its name.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote, urlsplit

from mmcache.errors import ArgumentError, CorruptError, MmcacheError, RemoteError, StoreNotFoundError
from mmcache.storage.connection import client_library, connect, short_answer, try_again
from mmcache.storage.object_keys import UPLOADS, ObjectKeys
from mmcache.system.arguments import outside
from mmcache.system.files import explained, make_folder, sync_folder
from mmcache.system.no_symlinks import check_path
from mmcache.urls import SCHEMES, address, is_url

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

__all__ = ["LocalObjects", "ObjectReads", "ObjectStore"]

T = TypeVar("T")

# Least bytes per piece of a stream; small, so that its memory is reused, which is far faster than fresh memory.
_PIECE_BYTES = 2 << 20


class ObjectReads:
    """The reading half of `ObjectStore`, which provides the client and the retries."""

    url: str
    _obstore: Any

    @property
    def _store(self) -> Any:
        """The obstore client."""
        raise NotImplementedError

    def _again(self, where: str, work: Callable[[], T], short: Callable[[], None] = lambda: None) -> T:
        """The result of `work`, retried as in `try_again`."""
        raise NotImplementedError

    def where(self, key: str) -> str:
        """The URL of an object."""
        return f"{self.url}/{key}"

    def size(self, key: str, alive: Callable[[], None] = lambda: None) -> int:
        """Size of an object in bytes; `alive` as in `upload`. Errors as `read`."""

        def look() -> int:
            alive()
            return int(self._obstore.head(self._store, key)["size"])

        return self._again(self.where(key), look)

    def read(self, key: str, start: int, stop: int) -> memoryview:
        """Bytes `start` to `stop` (exclusive) of an object; blocks until all are there.

        Raises:
            StoreNotFoundError: there is no such object, or no such bucket.
            CorruptError: it ends before `stop`.
            AccessError: the server refuses access.
            RemoteError: no complete answer within `PATIENCE` seconds.
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
        """Stream bytes `start` to `stop` (exclusive) of an object, some megabytes at a time.

        An interrupted stream is resumed where it stopped. Each step blocks for the next piece; errors as `read`.
        """
        return self._stream(key, start, stop, None)

    def whole(self, key: str) -> tuple[int, Generator[memoryview]]:
        """Size of an object, and all its bytes as `stream`, by one request; blocks until the size is known."""

        def begin() -> tuple[int, Iterator[Any]]:
            # The answer to a range request has the object's size, even if the body is cut short.
            answer = self._obstore.get(self._store, key, options={"range": {"offset": 0}})
            return answer.meta["size"], iter(answer.stream(min_chunk_size=_PIECE_BYTES))

        size, coming = self._again(self.where(key), begin, lambda: self._check_size(key, 1))
        return size, self._stream(key, 0, size, coming)

    def _stream(self, key: str, start: int, stop: int, coming: Iterator[Any] | None) -> Generator[memoryview]:
        """As `stream`; `coming` is a stream that is already open."""
        at = start

        def more() -> memoryview:
            nonlocal coming
            # A failed stream is not used again.
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
        """The first `count` bytes of an object (all, if it has fewer), and its size. Errors as `read`."""

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
        """All bytes of an object. Errors as `read`; CorruptError if it is larger than `limit` bytes."""
        return self.read_tagged(key, limit)[0]

    def read_tagged(self, key: str, limit: int) -> tuple[bytes, str | None]:
        """All bytes of an object, as `read_whole`, and its tag, as in `names`."""

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


class LocalObjects:
    """The folder of a `file://` URL, used as a bucket.

    Args:
        url: its URL.

    Raises:
        ArgumentError: the URL names another machine.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.netloc:
            raise ArgumentError(f"{url}: expected an address of this machine's, with three slashes: file:///folder")
        self.root = Path(unquote(parts.path))

    @property
    def is_there(self) -> bool:
        """Whether the folder exists."""
        return self.root.is_dir()

    def make(self) -> None:
        """Create the folder, durably. Raises WriteError."""
        make_folder(self.root)

    def check(self, keys: Iterable[str]) -> None:
        """Check that no folder of some keys is a symbolic link, which may lead out of the folder.

        Raises:
            LinkError: there is one.
        """
        for folder in {key.rpartition("/")[0] for key in keys if "/" in key}:
            check_path(self.root, folder)

    def prepare(self, key: str) -> None:
        """Create the folder of an object, durably. Raises WriteError, and LinkError as `check`."""
        self.check([key])
        make_folder(self.root, key.rpartition("/")[0])

    def sync(self, key: str) -> None:
        """Make the bytes of an object durable. Raises WriteError."""
        with explained(self.root / key, "making the object durable"):
            fd = os.open(self.root / key, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def sync_name(self, key: str) -> None:
        """Make the name of an object durable. Raises WriteError."""
        sync_folder((self.root / key).parent)


# Seconds for which a request is retried.
PATIENCE = 120.0
# Bytes per part of an upload, and parts sent in parallel.
PART_BYTES, _PARTS = 8 << 20, 4
# Most keys named in a warning.
_SHOWN = 5


class ObjectStore(ObjectReads):
    """The objects below one prefix. Safe to use from several threads, but not in a forked process.

    Credentials and endpoints are found in each provider's usual way: for S3 the AWS_… variables and, through boto3,
    profiles, SSO and instance roles; for Google its application default credentials; for Azure the AZURE_… variables.

    Args:
        url: `s3://bucket/prefix`, `gs://…`, `az://account/container/prefix` or `file:///folder`.

    Raises:
        ArgumentError: the URL is not valid, or obstore is not installed.
        AccessError: there are no credentials.
    """

    def __init__(self, url: str) -> None:
        if not is_url(url):
            raise ArgumentError(f"{url!r}: expected an address, such as s3://bucket/acts ({', '.join(SCHEMES)})")
        self.url = address(url).rstrip("/")
        self._obstore = client_library()
        self._local = LocalObjects(self.url) if self.url.startswith("file:") else None
        self._client: Any = None
        if self._local is None or self._local.is_there:
            self._client = connect(self.url, self._obstore, PATIENCE)
        self._names = ObjectKeys(self.url, self._obstore, lambda: self._store, self._again)
        self._process = os.getpid()

    @property
    def _store(self) -> Any:
        if self._client is None:
            if self._local is not None and not self._local.is_there:
                raise StoreNotFoundError(2, "there is no such folder", self.url)
            self._client = connect(self.url, self._obstore, PATIENCE)
        return self._client

    def __reduce__(self) -> tuple[type[ObjectStore], tuple[str]]:
        return ObjectStore, (self.url,)

    def names(self, under: str = "") -> Iterator[list[tuple[str, int, str | None]]]:
        """List the objects whose keys begin with the folder `under`: (key, bytes, tag), some thousands at a time.

        Keys are relative to the prefix. A listing that fails half-way starts again, so a key may come twice.

        Raises:
            StoreNotFoundError, AccessError, RemoteError: there is no such bucket; listing is refused; no answer.
        """
        if self._local is not None and not self._local.is_there:
            return
        for found in self._names.batches(under):
            if batch := [entry for entry in found if not entry[0].startswith(UPLOADS)]:
                yield batch

    @property
    def refused(self) -> tuple[str, ...]:
        """Keys found by listings so far that obstore cannot address, sorted; nothing reads them."""
        return tuple(sorted(self._names.refused))

    def warn_of(self, keys: Sequence[str]) -> None:
        """Warn about keys that no store has, on behalf of the line that called this package."""
        if keys:
            more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
            warnings.warn(
                f"{self.url} has keys that no store has: {', '.join(map(repr, keys[:_SHOWN]))}{more}. Nothing reads "
                f"them; remove these objects",
                stacklevel=outside(),
            )

    def put(self, key: str, data: bytes, alive: Callable[[], None] = lambda: None, *, replace: bool = True) -> bool:
        """Put a small object, atomically; False if it exists already and may not be replaced.

        `alive` as in `upload`. Errors as `read`.
        """
        if self._local is not None:
            # As a large one, so that the file is durable once it has its name.
            return self._upload(key, lambda whole: self._put_whole(whole, key, data), alive, replace=replace)
        mode = "overwrite" if replace else "create"

        def put() -> bool:
            nonlocal mode
            alive()
            try:
                made = self._obstore.put(self._store, key, data, mode=mode, use_multipart=False)
            except self._obstore.exceptions.AlreadyExistsError:
                return False
            # The object is now ours: if it arrived damaged, the retry must replace it, not report that it exists.
            mode = "overwrite"
            self._compare(key, key, data, made["e_tag"])
            return True

        return self._again(self.where(key), put)

    def upload(self, key: str, file: Path, alive: Callable[[], None] = lambda: None, *, replace: bool = False) -> bool:
        """Upload a file as an object, atomically; False if it exists already and may not be replaced.

        Sent in parallel parts, each retried separately; the server's checksum is compared with what was sent. Blocks
        until then. `alive` is called during the upload, and may raise to abort it.

        Raises:
            StoreNotFoundError, AccessError, RemoteError: as `read`.
            OSError: the file cannot be read.
        """
        if file.stat().st_size <= PART_BYTES:
            return self.put(key, file.read_bytes(), alive, replace=replace)
        return self._upload(key, lambda whole: self._send(whole, key, file, alive), alive, replace=replace)

    def _upload(self, key: str, send: Callable[[str], None], alive: Callable[[], None], *, replace: bool) -> bool:
        """Upload under a temporary key, which is passed to `send`, and then copy or rename to `key`."""
        # In a fork, the deletion below would wait forever.
        self.check_process(self.where(key))
        whole = f"{UPLOADS}/{secrets.token_hex(8)}"
        if self._local is not None:
            self._local.make()
            for name in (whole, key):
                self._local.prepare(name)

        def upload() -> bool:
            alive()
            try:
                send(whole)
                self._place(whole, key, replace=replace)
            except self._obstore.exceptions.AlreadyExistsError:
                return False
            return True

        try:
            return self._again(self.where(key), upload)
        finally:
            # A temporary object that stays does no harm.
            with contextlib.suppress(MmcacheError, OSError, self._obstore.exceptions.BaseError):
                self._obstore.delete(self._store, whole)

    def _place(self, whole: str, key: str, *, replace: bool) -> None:
        """Copy or rename a complete object to its key."""
        if self._local is None:
            self._obstore.copy(self._store, whole, key, overwrite=replace)
            return
        self._local.sync(whole)
        self._obstore.rename(self._store, whole, key, overwrite=replace)
        self._local.sync_name(key)

    def _put_whole(self, whole: str, key: str, data: bytes) -> None:
        made = self._obstore.put(self._store, whole, data, use_multipart=False)
        self._compare(whole, key, data, made["e_tag"])

    def _send(self, whole: str, key: str, file: Path, alive: Callable[[], None]) -> None:
        digests: list[bytes] = []

        def parts() -> Iterator[bytes]:
            with file.open("rb", buffering=0) as opened:
                while part := opened.read(PART_BYTES):
                    alive()
                    digests.append(hashlib.md5(part, usedforsecurity=False).digest())
                    yield part

        made = self._obstore.put(
            self._store, whole, parts(), use_multipart=True, chunk_size=PART_BYTES, max_concurrency=_PARTS
        )
        size = file.stat().st_size
        together = hashlib.md5(b"".join(digests), usedforsecurity=False).hexdigest()
        said = (made["e_tag"] or "").strip('"')
        if said == f"{together}-{len(digests)}":
            return
        # The tag is no MD5 (the server encrypts, for example), or differs: read the object back.
        for number, digest in enumerate(digests):
            start = number * PART_BYTES
            found = self.read(whole, start, min(start + PART_BYTES, size))
            if hashlib.md5(found, usedforsecurity=False).digest() != digest:
                raise RemoteError(f"{self.where(key)}: from byte {start} on, what arrived is not what {file} has")

    def _compare(self, whole: str, key: str, data: bytes, tag: str | None) -> None:
        """Compare an object with what was sent: by its tag if that is an MD5, otherwise by reading it back."""
        digest = hashlib.md5(data, usedforsecurity=False).hexdigest()
        if (tag or "").strip('"') == digest or bytes(self.read(whole, 0, len(data))) == data:
            return
        raise RemoteError(f"{self.where(key)}: what arrived is not what was sent")

    def delete(self, keys: Sequence[str]) -> None:
        """Remove objects; missing ones are fine. Errors as `read`."""

        def delete(some: list[str]) -> None:
            try:
                self._again(self.where(some[0]), lambda: self._obstore.delete(self._store, some))
            except StoreNotFoundError:
                # Some servers stop at the first missing object.
                for key in some if len(some) > 1 else ():
                    delete([key])

        if self._local is not None:
            self._local.check(keys)
        for start in range(0, len(keys), 1000):
            delete(list(keys[start : start + 1000]))

    def check_process(self, where: str = "") -> None:
        """Raise RemoteError in a forked process, where connections and threads do not work."""
        if self._process != os.getpid():
            raise RemoteError(
                f"{where or self.url}: this process was forked from one that uses object storage, and its connections "
                f"do not work here: give the DataLoader multiprocessing_context='spawn'"
            )

    def _again(self, where: str, work: Callable[[], T], short: Callable[[], None] = lambda: None) -> T:
        """The result of `work`, retried as in `try_again`."""
        self.check_process(where)
        return try_again(where, work, short, self._obstore.exceptions, PATIENCE)
