"""Listing the keys of the objects below a prefix, even if some keys are ones that obstore cannot address.

obstore refuses a whole listing if one key has `..`, an empty part or a control character in it, and strips a slash at
the end of a key. In these cases boto3 lists S3, and this module a folder; such keys are left out, and noted.
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

# Objects per batch of a listing.
_LISTED = 5000
# Prefix of objects that are still being uploaded: nothing reads them.
UPLOADS = ".uploads"
# Keys that obstore refuses; and the suffix of its temporary files in a folder.
_ODD, _HALF = re.compile(r"(^|/)\.{0,2}(/|$)|[\x00-\x1f\x7f]"), re.compile(r"#\d+$")


class ObjectKeys:
    """The keys below one prefix.

    Args:
        url: the prefix.
        obstore: the client's library.
        store: returns the client.
        again: retries a function, as `try_again`; its first argument names the object in errors.
    """

    def __init__(
        self,
        url: str,
        obstore: ModuleType,
        store: Callable[[], Any],
        again: Callable[[str, Callable[[], list[Entry]]], list[Entry]],
    ) -> None:
        self._url, self._obstore, self._store, self._again = url, obstore, store, again
        # Keys that obstore cannot address; and whether to list without obstore, since there are such.
        self.refused: set[str] = set()
        self._by_hand = False

    def batches(self, under: str) -> Iterator[list[Entry]]:
        """Keys that begin with the folder `under`, some thousands at a time; errors as `ObjectStore.names`.

        A listing that fails half-way starts again, so a key may come twice.
        """
        listing: Iterator[list[Entry]] | None = None
        given, more, last = 0, True, list[str]()

        def some() -> list[Entry]:
            nonlocal listing, given, more, last
            # A failed listing cannot be resumed. The new one must get further than it, so that the retries end.
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
        """Whether keys are in order, as S3 lists them; otherwise obstore has stripped a slash at the end of one."""
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
        asked = {"Bucket": store.config["bucket"], "Prefix": f"{above}{under}/" if under else above}
        for page in _pages(self._url, asked):
            batch = []
            for found in page.get("Contents", ()):
                key = found["Key"].removeprefix(above)
                if not _ODD.search(key):
                    batch.append((key, found["Size"], found["ETag"]))
                elif found["Size"] or (key and (key[-1] != "/" or _ODD.search(key[:-1]))):
                    # Not an empty object with a slash at its end, which some tools make for a folder.
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
        """The entry of a file in a folder, by obstore; empty if obstore cannot address it."""
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
    """Pages of a listing of S3 by boto3. Errors as `ObjectStore.names`."""
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
