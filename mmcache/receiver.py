"""Shards that are fetched from a bucket into a folder: a draft, which gets its name when all of it was verified."""

from __future__ import annotations

import contextlib
import errno
import json
from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from mmcache.bucket import PART_BYTES
from mmcache.carrier import Carrier, Shard
from mmcache.crew import Crew
from mmcache.draft import Draft
from mmcache.errors import CorruptError, IncompleteError, StoreExistsError
from mmcache.files import open_file
from mmcache.format import HEADER_BYTES, Layout
from mmcache.names import RESERVED, STATISTICS_FOLDER
from mmcache.places import SUMMARY, BucketPlace, FolderPlace, expected_bytes, metadata
from mmcache.shard_bytes import FileBytes
from mmcache.shards import ShardFolder
from mmcache.signed import ROOT
from mmcache.tokenizer_file import TOKENIZER

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence
    from concurrent.futures import Future
    from pathlib import Path

    from mmcache.bucket import Bucket
    from mmcache.manifest import Manifest
    from mmcache.places import Glance
    from mmcache.shard_bytes import ShardBytes

__all__ = ["Receiver"]

# Parts of a shard that are fetched at a time.
_PARTS = 4


class _Arriving(ShardFolder):
    """An array's shards, where the one that is asked for is in a draft still; errors name the object it comes from."""

    def __init__(self, path: Path, manifest: Manifest, array: str, object_at: str) -> None:
        super().__init__(path, manifest, array, manifest.rows(array))
        self.object_at, self.draft = object_at, path

    def where(self, slot: int, block: int) -> str:  # noqa: ARG002 -- it is this one
        return self.object_at

    def open_layout(
        self,
        slot: int,
        block: int,
        *,
        direct: bool = False,
        scattered: bool = False,  # noqa: ARG002 -- all of it is read
    ) -> tuple[ShardBytes, Layout]:
        fd, status = open_file(self.draft, what=f"the draft of {self.object_at}", direct=direct)
        shard = FileBytes(fd, status.size, direct=direct)
        try:
            return shard, self.check(slot, block, shard.head(), shard.size)
        except BaseException:
            shard.close()
            raise


class Receiver(Carrier):
    """From a bucket into a folder; the other arguments are those of `Carrier`."""

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
        self._folder, self._bucket = folder, bucket

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
        key, size = self.key(shard.array, shard.slot, shard.block), shard.size
        for last in (False, True):
            problem = self._fetch(shard, key, size)
            if problem is None:
                return size
            if not last:
                # Somebody may have put another one there since it was listed.
                size = self._bucket.size(key)
        raise CorruptError(
            f"{self._bucket.where(key)}: {problem}. It was fetched twice: the object is damaged. Delete it, and push "
            f"it again from a good copy"
        )

    def _fetch(self, shard: Shard, key: str, size: int) -> str | None:
        """Fetch a shard, verify it, and put it in place; what is wrong with it, or None."""
        array, manifest = shard.array, self._manifest
        least = expected_bytes(manifest, array, shard.block)
        most = least if self._exact(array) else Layout(manifest.spec(array), manifest.spec(array).shard_rows).size
        if not least <= size <= most:
            return f"it has {size} bytes, and {least} belong there"
        folder = _Arriving(self._folder, manifest, array, self._bucket.where(key))
        draft = Draft(self._folder / key, reserve=size)
        folder.draft = draft._temporary  # noqa: SLF001 -- to read what was written before it has its name
        done = 0
        try:
            with contextlib.closing(self._parts(key, size)) as parts:
                for start, data in parts:
                    if not start:
                        folder.check(shard.slot, shard.block, bytes(data[:HEADER_BYTES]), size)
                    draft.write(np.frombuffer(data, np.uint8), start, direct=True)
                    done += len(data)
                    self._tell(len(data))
            problem = self._problem(folder, shard.slot, shard.block, self._ids(shard, self._folder))
            if problem is None:
                draft.publish(size)
                return None
        except CorruptError as error:
            problem = str(error).removeprefix(folder.object_at).lstrip(": ")
        finally:
            draft.discard()
        self._tell(-done)
        return problem

    def _parts(self, key: str, size: int) -> Generator[tuple[int, memoryview]]:
        """Fetch an object in parts, several at a time: where each begins, in order, and its bytes."""
        if size <= PART_BYTES:
            yield 0, self._bucket.read(key, 0, size)
            return
        crew, asked = Crew(_PARTS, "pull"), deque[tuple[int, "Future[memoryview]"]]()
        try:
            for start in range(0, size, PART_BYTES):
                stop = min(start + PART_BYTES, size)
                asked.append((start, crew.submit(self._bucket.read, key, start, stop)))
                if len(asked) >= _PARTS:
                    first, answer = asked.popleft()
                    yield first, answer.result()
            for first, answer in asked:
                yield first, answer.result()
        finally:
            crew.close()
