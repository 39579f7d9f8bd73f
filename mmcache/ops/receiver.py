"""Shards that are fetched from a bucket into a folder: a draft, which gets its name when all of it was verified."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
from typing import TYPE_CHECKING

from mmcache.errors import CorruptError, IncompleteError, StoreExistsError
from mmcache.format.names import RESERVED, STATISTICS_FOLDER
from mmcache.format.shard import HEADER_BYTES, Layout
from mmcache.format.signed_json import ROOT
from mmcache.ops.carrier import Carrier, Shard
from mmcache.ops.endpoints import SUMMARY, BucketPlace, FolderPlace, expected_bytes, metadata
from mmcache.storage.mirror import STREAMS, Landing
from mmcache.storage.shard_check import ArrivingPart, check_ids, tail_problems
from mmcache.storage.shard_folder import FileBytes, ShardFolder
from mmcache.storage.tokenizer_file import TOKENIZER
from mmcache.system.atomic import Draft
from mmcache.system.files import open_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from mmcache.format.manifest import Manifest
    from mmcache.ops.endpoints import Glance
    from mmcache.storage.object_store import Bucket

__all__ = ["Receiver"]


class _Arriving(ShardFolder):
    """An array's shards on their way here; errors name the object that one comes from."""

    def __init__(self, path: Path, manifest: Manifest, array: str, object_at: str) -> None:
        super().__init__(path, manifest, array, manifest.rows(array))
        self.object_at = object_at

    def where(self, slot: int, block: int) -> str:  # noqa: ARG002 -- it is this one
        return self.object_at


class Receiver(Carrier):
    """From a bucket into a folder; the other arguments are those of `Carrier`."""

    # Each comes by one stream.
    copies = STREAMS

    def __init__(
        self,
        bucket: Bucket,
        folder: Path,
        manifest: Manifest,
        there: Manifest | None,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._place = BucketPlace(bucket)
        super().__init__(self._place, FolderPlace(folder), manifest, there, progress)
        self._folder, self._bucket, self._landing = folder, bucket, Landing(STREAMS)

    def stage(self, scratch: Path, sites: Sequence[str], *, sequences: bool) -> None:
        """Fetch all but shards and root into a folder that is thrown away, and check it; also the table of sequences.

        Raises:
            CorruptError: it does not match its checksums, and did not when it was fetched again.
            IncompleteError: the sequences are gone.
        """
        for last in (False, True):
            try:
                self._stage(scratch, sites, sequences=sequences)
                with self._place.naming(scratch):
                    for _ in metadata(scratch, self._manifest, sites):
                        pass
            except CorruptError:
                if last:
                    raise
            else:
                return

    def _stage(self, scratch: Path, sites: Sequence[str], *, sequences: bool) -> None:
        manifest = self._manifest
        kept = {key for batch in self._bucket.names(STATISTICS_FOLDER) for key, _, _ in batch}
        keys = [f"{array}/{ROOT}" for array in (*sites, *(RESERVED if manifest.has_tokens else ()))]
        keys += [f"{STATISTICS_FOLDER}/{site}/{name}" for site in sites for name in SUMMARY]
        keys += [f"{STATISTICS_FOLDER}/{ROOT}", *([TOKENIZER] if "tokenizer_bytes" in manifest.source else [])]
        for key in keys:
            if key in kept or not key.startswith(f"{STATISTICS_FOLDER}/"):
                self._place.fetch(key, scratch)
        blocks = manifest.spec("sequences").blocks(manifest.n_sequences) if sequences and manifest.has_tokens else 0
        for block in range(blocks):
            key = self.key("sequences", 0, block)
            if not self._place.fetch(key, scratch):
                raise IncompleteError(f"{self._bucket.where(key)} is gone, without which no sequence can be found")

    def _glance_there(self, array: str, slot: int, block: int) -> Glance | None:
        try:
            return self._target.glance(self._manifest, array, slot, block)
        except IncompleteError:
            return None
        except CorruptError as error:
            self._check_ours(self._folder / self.key(array, slot, block), error)
            return None

    def _check_ours(self, file: Path, error: CorruptError) -> None:
        """Refuse to replace a shard that says that it is another store's; what is damaged may say anything."""
        with contextlib.suppress(CorruptError, ValueError, KeyError, TypeError, RecursionError):
            fd, status = open_file(file, what="the shard")
            shard = FileBytes(fd, status.size)
            try:
                said = json.loads(shard.head()[8:])["__metadata__"]["store"]
            finally:
                shard.close()
            if said != self._manifest.store:
                raise StoreExistsError(
                    errno.EEXIST, f"another store's shard is there ({error}): choose another folder", str(file)
                ) from error

    def _refuse(self, array: str, slot: int, block: int) -> None:
        folder = ShardFolder(self._folder, self._manifest, array, self._manifest.rows(array))
        # One that is damaged is nobody's loss.
        if self._problem(folder, slot, block, None) is None:
            key = self.key(array, slot, block)
            raise StoreExistsError(
                errno.EEXIST,
                f"the shard that is there is whole, and has other rows or statistics than {self._bucket.where(key)}: "
                f"it is another run's, or the object is damaged: move the file away, or choose another folder",
                str(self._folder / key),
            )

    def _carry(self, shard: Shard) -> int:
        key, problem = self.key(shard.array, shard.slot, shard.block), ""
        # Once more: somebody may have put another one there since it was listed, or while it came.
        for _ in range(2):
            try:
                size, coming = self._bucket.whole(key)
                with contextlib.closing(coming):
                    problem = self._fetch(shard, key, size, coming)
            except CorruptError as error:
                problem = str(error).removeprefix(self._bucket.where(key)).lstrip(": ")
            if not problem:
                return size
        raise CorruptError(
            f"{self._bucket.where(key)}: {problem}. It was fetched twice: the object is damaged. Delete it, and push "
            f"it again from a good copy"
        )

    def _fetch(self, shard: Shard, key: str, size: int, coming: Iterator[memoryview]) -> str:
        """Put a shard in place as it comes, if every byte is what belongs there; what is wrong with it, or nothing."""
        array, manifest = shard.array, self._manifest
        least = expected_bytes(manifest, array, shard.block)
        most = least if self._exact(array) else Layout(manifest.spec(array), manifest.spec(array).shard_rows).size
        if not least <= size <= most:
            return f"it has {size} bytes, and {least} belong there"
        folder = _Arriving(self._folder, manifest, array, self._bucket.where(key))
        first = next(coming)
        layout = folder.check(shard.slot, shard.block, bytes(first[:HEADER_BYTES]), size)
        check_ids(bytes(first[:HEADER_BYTES]), self._ids(shard, self._folder))
        part = ArrivingPart(layout, 0)

        def seen(data: memoryview) -> None:
            part.add(data)
            self._tell(len(data))

        draft = Draft(self._folder, key, reserve=size)
        try:
            self._landing.land(itertools.chain([first], coming), draft, 0, seen)
            wrong = tail_problems(layout, part.crcs, bytes(part.tail))
            if not wrong:
                draft.publish(size)
                return ""
        except CorruptError:
            self._tell(-part.at)
            raise
        finally:
            draft.discard()
        self._tell(-size)
        return "; ".join(wrong)
