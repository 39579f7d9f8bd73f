"""The keys of the objects below a prefix. One that no client can address does not hide the others: it is left out.

The client refuses a whole listing for one key with `..`, an empty part or a control character in it, and takes a slash
at the end of one for none. Then S3 is listed by boto3, and a folder by ourselves.
"""

from __future__ import annotations

import itertools
import os
import re
from typing import TYPE_CHECKING, Any

from mmcache.errors import AccessError, ArgumentError, BucketNotFoundError, RemoteError
from mmcache.storage.connection import said
from mmcache.urls import concealed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

__all__ = ["UPLOADS", "Entry", "ObjectKeys"]

# Key, bytes, tag.
Entry = tuple[str, int, "str | None"]

# Objects that are listed at a time.
_LISTED = 5000
# Where objects lie until they are whole: a name that nothing reads.
UPLOADS = ".uploads"
# What the client refuses, and what it writes beside an object in a folder while that comes.
_ODD, _HALF = re.compile(r"(^|/)\.{0,2}(/|$)|[\x00-\x1f\x7f]"), re.compile(r"#\d+$")


class ObjectKeys:
    """The keys below one prefix.

    Args:
        url: the prefix.
        obstore: the client's library.
        store: gives the client.
        again: does something until it succeeds, or will not, or patience is over; told what it is about.
    """

    def __init__(
        self,
        url: str,
        obstore: ModuleType,
        store: Callable[[], Any],
        again: Callable[[str, Callable[[], list[Entry]]], list[Entry]],
    ) -> None:
        self._url, self._obstore, self._store, self._again = url, obstore, store, again
        # Those that no client addresses, and whether there are any: then the client lists nothing.
        self.refused: set[str] = set()
        self._by_hand = False

    def batches(self, under: str) -> Iterator[list[Entry]]:
        """Keys that begin with the folder `under`, some thousands at a time; errors as `ObjectStore.names`.

        A listing that fails half-way begins anew, so a key may come twice.
        """
        listing: Iterator[list[Entry]] | None = None
        given, more, last = 0, True, list[str]()

        def some() -> list[Entry]:
            nonlocal listing, given, more, last
            # One that fails is not gone on with; the new one has to come further than it, or patience never ends.
            going, listing, skipped = listing, None, 0
            if going is None:
                going, skipped, last = self._begin(under), given, []
            try:
                batches = list(itertools.islice(going, skipped + 1))
                found = list(itertools.chain.from_iterable(batches))
                ordered = self._is_ordered([*last, *(key for key, _, _ in found)])
            except self._obstore.exceptions.BaseError as error:
                if not self._needs_a_hand(error):
                    raise
                ordered = False
            if not ordered:
                self._by_hand, given = True, 0
                return []
            listing, given, more = going, given + 1, len(batches) > skipped
            last = [found[-1][0]] if found else last
            return found

        while more:
            yield self._again(f"{self._url}/{under}", some)

    def _begin(self, under: str) -> Iterator[list[Entry]]:
        if self._by_hand:
            if not under:
                self.refused.clear()
            return self._folder_names(under) if self._url.startswith("file") else self._s3_names(under)
        listing = self._obstore.list(self._store(), under or None, chunk_size=_LISTED)
        return ([(entry["path"], entry["size"], entry["e_tag"]) for entry in batch] for batch in listing)

    def _is_ordered(self, keys: list[str]) -> bool:
        """Whether keys are in order; where they are not, one of S3 had a slash at its end, and seems to be another."""
        if self._by_hand or not self._url.startswith("s3"):
            return True
        return all(before < behind for before, behind in itertools.pairwise(keys))

    def _needs_a_hand(self, error: Exception) -> bool:
        if self._by_hand:
            return False
        if self._url.startswith("file"):
            return True  # also a link to itself, or one to nothing
        return self._url.startswith("s3") and isinstance(error, self._obstore.exceptions.InvalidPathError)

    def _s3_names(self, under: str) -> Iterator[list[Entry]]:
        store = self._store()
        above = f"{store.prefix}/" if store.prefix else ""
        asked = {"ObjectStore": store.config["bucket"], "Prefix": f"{above}{under}/" if under else above}
        for page in _pages(self._url, asked):
            batch = []
            for found in page.get("Contents", ()):
                key = found["Key"].removeprefix(above)
                if not _ODD.search(key):
                    batch.append((key, found["Size"], found["ETag"]))
                elif found["Size"] or (key and (key[-1] != "/" or _ODD.search(key[:-1]))):
                    # An empty one may stand for a folder, as some tools make, and is not worth a word.
                    self._refuse(key)
            yield batch

    def _folder_names(self, under: str) -> Iterator[list[Entry]]:
        store = self._store()
        root = os.fsencode(store.prefix)
        for folder, folders, files in os.walk(os.path.join(root, os.fsencode(under)), onerror=self._told):  # noqa: PTH118 -- bytes
            batch = []
            for name in (*files, *folders):
                path = os.path.join(folder, name)  # noqa: PTH118 -- as above
                key = os.path.relpath(path, root).decode(errors="backslashreplace")
                if name in folders:
                    if os.path.islink(path):  # noqa: PTH114 -- as above
                        self._refuse(key)
                elif not _HALF.search(key):
                    batch += self._known(store, key, path)
            yield batch

    def _known(self, store: Any, key: str, path: bytes) -> list[Entry]:
        """A file of a folder, as the client knows it; nothing of one that it does not."""
        if not _ODD.search(key) and os.fsencode(key) in path and os.path.isfile(path):  # noqa: PTH113 -- bytes
            found = self._obstore.head(store, key)
            return [(key, found["size"], found["e_tag"])]
        if os.path.lexists(path):
            self._refuse(key)
        return []

    def _refuse(self, key: str) -> None:
        if not key.startswith(UPLOADS):
            self.refused.add(key)

    def _told(self, error: OSError) -> None:
        raise AccessError(error.errno, f"the folder cannot be listed ({error.strerror})", self._url) from error


def _pages(url: str, asked: dict[str, str]) -> Iterator[Any]:
    """Pages of a listing of S3, by boto3. Errors as `ObjectStore.names`."""
    try:
        import boto3  # noqa: PLC0415 -- an extra, and slow to import
        from botocore import UNSIGNED  # noqa: PLC0415 -- as above
        from botocore.config import Config  # noqa: PLC0415 -- as above
        from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415 -- as above
    except ImportError:
        raise ArgumentError(
            f"{url} has a key that the client refuses, with an empty part or `..` in it: remove the object, or pip "
            f"install 'mmcache[remote]'"
        ) from None
    unsigned = os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true", "yes", "on")
    try:
        client = boto3.client(
            "s3",
            region_name=os.environ.get("AWS_REGION"),
            config=Config(signature_version=UNSIGNED) if unsigned else None,
        )
        yield from client.get_paginator("list_objects_v2").paginate(**asked)
    except (BotoCoreError, ClientError) as error:
        failure = error
    else:
        return
    code = getattr(failure, "response", {}).get("Error", {}).get("Code", "")
    if code in ("NoSuchBucket", "404"):
        raise BucketNotFoundError(2, "there is no such bucket: make it first, or correct the address", url)
    if code in ("AccessDenied", "403", "InvalidAccessKeyId", "SignatureDoesNotMatch"):
        raise AccessError(13, f"the server refuses to list it ({said(failure)})", url) from concealed(failure)
    raise RemoteError(f"{url}: {said(failure)}") from concealed(failure)
