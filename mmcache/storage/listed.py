"""What a bucket has of a store, by one listing: its shards, its metadata, and keys that no store has.

What is not a store's at all, such as somebody's notes, is none of our business. What has a form that no key of a store
has, or lies where a file of it is, is named.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from mmcache.format.names import STATISTICS_FOLDER, TOKENIZER_FOLDER
from mmcache.format.signed_json import ROOT

if TYPE_CHECKING:
    from mmcache.storage.bucket import Bucket

__all__ = ["FOLDERS", "Listed", "is_metadata"]

# Folders of metadata, and how deep files are in them.
FOLDERS, _DEEPEST = (STATISTICS_FOLDER, TOKENIZER_FOLDER), 8
# What a file of metadata is called, beside chunks: what lies below such a one is no store's.
_FILES = (ROOT, "tokenizer.json", "0")


def is_metadata(key: str) -> bool:
    """Whether an object with such a key is metadata of a store."""
    parts = key.split("/")
    known = (parts[-1] == ROOT and len(parts) <= 2) or (parts[0] in FOLDERS and 1 < len(parts) <= _DEEPEST)
    return known and all(map(_is_name, parts))


def _is_name(part: str) -> bool:
    """Whether a part of a key can be the name of a file of a store."""
    return part[:1] not in ("", ".") and _is_plain(part)


def _is_plain(part: str) -> bool:
    return part.isprintable() and len(part.encode(errors="replace")) < 256


def _above(key: str) -> list[str]:
    """The folders that a key is in."""
    parts = key.split("/")
    return ["/".join(parts[:depth]) for depth in range(1, len(parts))]


class Listed:
    """What one listing of a bucket says, or of its folder `under`; blocks until it is there. Errors as `Bucket.names`.

    `metadata` has the tag of each object that is metadata, `shards` the names of the shards of each array, and
    `strange` the keys that no store has.
    """

    def __init__(self, bucket: Bucket, under: str = "") -> None:
        self.metadata: dict[str, str | None] = {}
        self.shards: dict[str, set[str]] = {}
        self.strange: list[str] = []
        # What is not empty: an empty object may stand for a folder, as some tools make.
        sizes: dict[str, int] = {}
        for key, size, tag in itertools.chain.from_iterable(bucket.names(under)):
            parts = key.split("/")
            if len(parts) == 2 and parts[1].startswith("c.") and all(map(_is_name, parts)):
                self.shards.setdefault(parts[0], set()).add(parts[1])
            elif is_metadata(key):
                self.metadata[key], sizes[key] = tag, size
            elif not any(part.startswith(".") for part in parts):
                if not all(map(_is_plain, parts)):
                    self.strange.append(key)
                elif size:
                    sizes[key] = size
        self._part(sizes)

    def _part(self, sizes: dict[str, int]) -> None:
        """Keep of a file and what lies below its name only one of the two: in a folder there cannot be both."""
        folders = {folder for key in self.metadata for folder in _above(key)}
        for key in folders & self.metadata.keys():
            if not sizes[key] or key.rpartition("/")[2] not in _FILES:
                del self.metadata[key]
        for key in list(self.metadata):
            if any(folder in self.metadata for folder in _above(key)):
                del self.metadata[key]
        folders |= self.shards.keys()
        for key, size in sizes.items():
            if key not in self.metadata and size and (key in folders or any(map(self._is_file, _above(key)))):
                self.strange.append(key)

    def _is_file(self, key: str) -> bool:
        array, _, name = key.partition("/")
        return key in self.metadata or name in self.shards.get(array, ())
