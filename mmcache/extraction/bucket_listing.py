"""What a bucket has of a store that is being made: its root, the objects of its plan, and the shards of its sites."""

from __future__ import annotations

import errno
import itertools
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from mmcache.errors import (
    BucketNotFoundError,
    CorruptError,
    PlanMismatchError,
    ReadOnlyError,
    StoreExistsError,
    StoreNotFoundError,
)
from mmcache.extraction.staging_claims import is_staging
from mmcache.format.manifest import METADATA_LIMIT, Manifest, is_store, read_manifest
from mmcache.format.names import RESERVED, TOKENIZER_FOLDER
from mmcache.format.shard import Layout
from mmcache.format.signed_json import ROOT, check_signed
from mmcache.storage.tokenizer_file import TOKENIZER

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from mmcache.storage.object_store import Bucket

__all__ = ["Listing", "is_column", "manifest_of", "read_if_there", "read_planned", "shard_numbers"]

_KEY = re.compile(r"c\.(0|[1-9]\d{0,17})\.(0|[1-9]\d{0,17})\.0", re.ASCII)
_COLUMN = re.compile(r"c\.(0|[1-9]\d{0,17})(\.0)?", re.ASCII)


def read_if_there(bucket: Bucket, key: str) -> bytes | None:
    """The bytes of a small object, such as the root; None where there is none. Errors as `Bucket.read`."""
    try:
        return bucket.read_whole(key, METADATA_LIMIT)
    except BucketNotFoundError:
        raise
    except StoreNotFoundError:
        return None


def manifest_of(bucket: Bucket, root: bytes) -> Manifest:
    """Check the bytes of a root. Errors as `read_manifest`."""
    where = bucket.where(ROOT)
    return Manifest.from_attributes(check_signed(root, where), where)


def read_planned(bucket: Bucket, folder: Path) -> Manifest | None:
    """Read the plan that the bucket has, or else the one that was begun in a folder; writes nothing.

    Raises:
        AccessError, RemoteError, CorruptError: as `Bucket.read`; it is damaged.
    """
    root = read_if_there(bucket, ROOT)
    if root is not None:
        return manifest_of(bucket, root)
    return read_manifest(folder) if is_staging(folder) and is_store(folder) else None


def shard_numbers(name: str) -> tuple[int, int] | None:
    """Read slot and block off the name of a site's shard; None of any other name."""
    match = _KEY.fullmatch(name)
    return None if match is None else (int(match[1]), int(match[2]))


def is_column(name: str) -> bool:
    """Tell whether a name is that of a shard of tokens, flags or sequences."""
    return _COLUMN.fullmatch(name) is not None


@dataclass
class Listing:
    """A bucket, as of one moment as far as that can be told.

    `root` and `manifest` are None where there is no store; `plan` has the bytes of the plan's other objects, `there`
    tells of each site which shards are there, `[slots, blocks]` bool, and `strange` names what is in a new site's way.
    """

    root: bytes | None
    manifest: Manifest | None
    plan: dict[str, int] = field(default_factory=dict)
    there: dict[str, np.ndarray] = field(default_factory=dict)
    strange: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, bucket: Bucket, sites: Collection[str]) -> Listing:
        """List a bucket; blocks until then.

        Args:
            bucket: the store's.
            sites: those that a job makes, of which the bucket may have none yet.

        Raises:
            ReadOnlyError: it is a store that `extract` does not make.
            CorruptError: its root is damaged, or a shard has another size than it should.
            AccessError, RemoteError: as `Bucket.read`.
        """
        root = read_if_there(bucket, ROOT)
        while True:
            manifest = None if root is None else manifest_of(bucket, root)
            if manifest is not None and manifest.kind != "planned":
                raise ReadOnlyError(f"{bucket.url} holds a store that was not made by extract: choose another prefix")
            found = cls(root, manifest)
            try:
                found._list(bucket, sites)
            except CorruptError:
                # Of another plan, if somebody changes it at this moment.
                before, root = root, read_if_there(bucket, ROOT)
                if before == root:
                    raise
            else:
                return found

    def _list(self, bucket: Bucket, sites: Collection[str]) -> None:
        sizes = self._sizes()
        arrays = {*RESERVED, *(sites if self.manifest is None else self.manifest.sites)}
        fresh = {*arrays, TOKENIZER_FOLDER} if self.manifest is None else set(sites) - arrays
        for key, size, _ in itertools.chain.from_iterable(bucket.names()):
            array, _, name = key.partition("/")
            numbers = shard_numbers(name) if array in self.there else None
            if numbers is not None:
                there, (slot, block) = self.there[array], numbers
                if slot < there.shape[0] and block < there.shape[1]:
                    wanted = sizes[array][block == there.shape[1] - 1]
                    if size != wanted:
                        raise CorruptError(
                            f"{bucket.where(key)} has {size} bytes, and the shard that belongs there {wanted}: remove "
                            f"the object, and run the same command again"
                        )
                    there[slot, block] = True
            elif key == TOKENIZER or (array in arrays and (name == ROOT or (array in RESERVED and is_column(name)))):
                self.plan[key] = size
            elif array in fresh and name != ROOT:
                self.strange.append(bucket.where(key))

    def _sizes(self) -> dict[str, tuple[int, int]]:
        """Say of each site what its full shards and its last one take, and begin with none that is there."""
        manifest, sizes = self.manifest, {}
        if manifest is not None and manifest.n_tokens is not None:
            total = manifest.n_tokens
            for site in manifest.sites:
                spec = manifest.spec(site)
                blocks = spec.blocks(total)
                self.there[site] = np.zeros((len(manifest.slots(site)), blocks), bool)
                full, last = (Layout(spec, spec.rows_in_block(block, total)).size for block in (0, blocks - 1))
                sizes[site] = (full, last)
        return sizes

    def refuse(self, bucket: Bucket, sites: Collection[str]) -> None:
        """Refuse to make sites where something else is.

        Raises:
            StoreExistsError: there is no store, and something in its way.
            PlanMismatchError: there is one, and something in the way of another site.
        """
        if not self.strange:
            return
        if self.manifest is None:
            raise StoreExistsError(
                errno.EEXIST, f"there is no store, and {self.strange[0]} is in its way: choose another prefix",
                bucket.url,
            )  # fmt: skip
        fresh = ", ".join(sorted(set(sites) - set(self.manifest.sites)))
        raise PlanMismatchError(
            f"{self.strange[0]} is in the way of {fresh}, which is no site of that store yet: move it away"
        )
