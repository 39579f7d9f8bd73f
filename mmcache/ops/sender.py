"""Shards that are sent from a folder into a bucket: verified first, so that damage does not travel."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from mmcache.errors import CorruptError, StoreExistsError
from mmcache.ops.carrier import Carrier, Shard
from mmcache.ops.endpoints import BucketPlace, FolderPlace
from mmcache.storage.object_store import PART_BYTES
from mmcache.storage.shard_folder import ShardFolder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mmcache.format.manifest import Manifest
    from mmcache.ops.endpoints import Glance
    from mmcache.storage.object_store import Bucket

__all__ = ["Sender"]


class Sender(Carrier):
    """From a folder into a bucket; the other arguments are those of `Carrier`."""

    def __init__(
        self,
        folder: Path,
        bucket: Bucket,
        manifest: Manifest,
        there: Manifest | None,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        super().__init__(FolderPlace(folder), BucketPlace(bucket), manifest, there, progress)
        self._folder, self._bucket = folder, bucket

    def _glance_there(self, array: str, slot: int, block: int) -> Glance | None:
        try:
            return self._target.glance(self._manifest, array, slot, block)
        except CorruptError as error:
            raise StoreExistsError(
                errno.EEXIST,
                f"the object that is there is not this store's shard ({error}): delete it, or push to another address",
                self._target.where(self.key(array, slot, block)),
            ) from error

    def _refuse(self, array: str, slot: int, block: int) -> None:
        key = self.key(array, slot, block)
        raise StoreExistsError(
            errno.EEXIST,
            f"the shard that is there has other rows or statistics than {self._source.where(key)}: it is another "
            f"store's or another run's, or one of the two is damaged (`mmcache verify` tells): delete the object, or "
            f"push to another address",
            self._target.where(key),
        )

    def _carry(self, shard: Shard) -> int:
        self._tell(0)
        array, slot, block = shard.array, shard.slot, shard.block
        key = self.key(array, slot, block)
        folder = ShardFolder(self._folder, self._manifest, array, self._manifest.rows(array))
        problem = self._problem(folder, slot, block, self._ids(shard, self._folder))
        if problem:
            raise CorruptError(
                f"{self._folder / key}: {problem}. It was not sent: `mmcache verify` lists all that is wrong, and "
                f"`mmcache repair` sets it aside"
            )
        file, replace = self._folder / key, shard.replace
        size, told = file.stat().st_size, -PART_BYTES

        def alive() -> None:
            # Called before it begins, and before each part.
            nonlocal told
            step = min(PART_BYTES, size - max(told, 0)) if told >= 0 else 0
            told = max(told, 0) + step
            self._tell(step)

        while not self._bucket.upload(key, file, alive, replace=replace):
            # Somebody else was quicker.
            if self._same(array, slot, block):
                size = 0
                break
            replace = True
        self._tell(shard.size - max(told, 0))
        return size
