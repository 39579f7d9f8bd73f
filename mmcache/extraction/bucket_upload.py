"""Extraction into a bucket: plan and fill a staging folder of bounded size, and upload its shards."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from mmcache.errors import (
    ArgumentError,
    CorruptError,
    DiskFullError,
    LockedError,
    MmcacheError,
    PlanMismatchError,
    RemoteError,
    StoreNotFoundError,
    WriteError,
)
from mmcache.extraction.bucket_plan import BucketFolder, read_planned
from mmcache.extraction.missing_shards import bytes_to_write
from mmcache.extraction.staging_claims import STAGING, Claims
from mmcache.format.manifest import read_manifest
from mmcache.format.shard import Layout
from mmcache.format.signed_json import ROOT
from mmcache.read.store import open_store
from mmcache.stats.site_statistics import load_summary, save_summary
from mmcache.storage.bucket_metadata import manifest_of, read_if_there
from mmcache.storage.cache_folder import cache_folder, private_folder
from mmcache.storage.connection import placed
from mmcache.storage.object_store import ObjectStore
from mmcache.storage.shard_check import check_shard
from mmcache.storage.shard_folder import ShardFolder
from mmcache.system.atomic import AtomicFile
from mmcache.system.files import free_bytes, remove_file
from mmcache.system.locks import FolderLock
from mmcache.system.threads import ThreadPool
from mmcache.urls import is_url

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Collection, Mapping, Sequence

    import numpy as np

    from mmcache.format.manifest import Manifest
    from mmcache.read.store import Store

__all__ = ["BucketOutput", "UploadQueue", "outgoing_for", "planned_in_bucket", "staging_folder"]

# Concurrent uploads, each in several parts.
_THREADS = 3
# Seconds between two looks at other uploads.
_LOOK_AT_UPLOADS = 0.2


class _StoppedError(Exception):
    """The queue was stopped, or an upload failed."""


class UploadQueue:
    """Uploads this process's shards from a staging folder, in a thread pool.

    `send` is called by one thread at a time, everything else by the job's thread.

    Args:
        bucket: where to.
        folder: the staging folder.
        claims: this process's claims.
    """

    def __init__(self, bucket: ObjectStore, folder: Path, claims: Claims) -> None:
        self._bucket, self._folder, self._claims = bucket, folder, claims
        self._crew = ThreadPool(_THREADS, "upload")
        # `_queued` counts shards that are queued or being sent; `_failure` is the first error.
        self._changed = threading.Condition()
        self._queued, self._stopping = 0, False
        self._failure: BaseException | None = None
        # Whether an adopted shard was damaged, and so removed.
        self.damaged = False

    def reserve(self, sizes: Mapping[str, int], most: Callable[[int], int], alive: Callable[[], None]) -> None:
        """Claim room for shards; blocks until there is some. Raises errors of uploads, and of `alive`."""
        self.check()
        while not self._claims.claim(sizes, most):
            with self._changed:
                self._changed.wait(_LOOK_AT_UPLOADS)
            alive()
            self.check()

    def send(self, key: str) -> None:
        """Queue a finished shard; does not block."""
        self._submit(self._send, key)

    def adopt(self, sizes: Mapping[str, int], manifest: Manifest) -> bool:
        """Queue shards of dead processes, to be checked and sent, or removed. False if none of `sizes` is unclaimed."""

        def check_and_send(key: str) -> None:
            if self._is_whole(key, manifest):
                self._send(key)
            else:
                remove_file(self._folder, key)
                self._claims.release([key])
                self.damaged = True

        keys = self._claims.adopt(sizes)
        for key in keys:
            self._submit(check_and_send, key)
        return bool(keys)

    def _submit(self, work: Callable[[str], None], key: str) -> None:
        with self._changed:
            if not self._stopping:
                self._queued += 1
                self._crew.submit(self._guarded, work, key)

    def _guarded(self, work: Callable[[str], None], key: str) -> None:
        try:
            self._alive()
            work(key)
        except _StoppedError:
            pass
        except BaseException as error:  # noqa: BLE001 -- raised again in the caller's thread
            with self._changed:
                self._failure = self._failure or error
        finally:
            with self._changed:
                self._queued -= 1
                self._changed.notify_all()

    def _alive(self, _done: int = 0) -> None:
        if self._stopping or self._failure is not None:
            raise _StoppedError

    def _send(self, key: str) -> None:
        if not self._is_there(key):
            self._bucket.upload(key, self._folder / key, self._alive)
        draft = AtomicFile(self._folder, key)
        try:
            draft.publish(0, durable=False)
        finally:
            draft.discard()
        self._claims.release([key])

    def _is_there(self, key: str) -> bool:
        """Whether another process sent the shard first: saves an upload that would be refused."""
        with contextlib.suppress(StoreNotFoundError):
            self._bucket.size(key, self._alive)
            return True
        return False

    def _is_whole(self, key: str, manifest: Manifest) -> bool:
        site, _, name = key.partition("/")
        slot, block = (int(number) for number in name.split(".")[1:3])
        folder = ShardFolder(self._folder, manifest, site, manifest.n_tokens or 0)
        try:
            wrong, _ = check_shard(folder, slot, block, full=True, ids=None, tell=self._alive)
        except CorruptError:
            return False
        return not wrong

    def check(self) -> None:
        """Raise the first error of a thread, if any; the message says where unsent shards are."""
        failure = self._failure
        if failure is None:
            return
        left = f"What was made and not sent is in {self._folder}; the same command goes on from there"
        if isinstance(failure, OSError) and failure.errno is not None:
            kind = type(failure) if isinstance(failure, MmcacheError) else WriteError
            raise kind(failure.errno, f"{failure.strerror}. {left}", failure.filename) from failure
        if isinstance(failure, MmcacheError):
            raise type(failure)(f"{failure}. {left}") from failure
        raise RemoteError(f"sending to {self._bucket.url} failed ({failure!r}). {left}") from failure

    def wait(self, waiting: Callable[[int], None] = lambda _: None) -> None:
        """Wait until the queue is empty; `waiting` is called with the number left. Raises errors of uploads."""
        while True:
            with self._changed:
                if self._queued and self._failure is None:
                    self._changed.wait(_LOOK_AT_UPLOADS)
                left = self._queued
            self.check()
            if not left:
                return
            waiting(left)

    def stop(self) -> None:
        """Send nothing more. Uploads in progress end at their next part, in the background."""
        with self._changed:
            self._stopping = True
        self._crew.close()


# Default limit of staged shards: bytes, and the fraction of the free space (1 / _SHARE).
_MOST, _SHARE = 4 << 30, 4
# Blocks per process that are allowed in any case: one is made while another is sent.
_BLOCKS = 2
# Seconds between two looks at what other processes send: first, and at most.
_AGAIN, _AGAIN_AT_LAST = 0.2, 30.0


def staging_folder(url: str, staging: str | os.PathLike[str] | None) -> Path:
    """The staging folder of a store in a bucket: as given, or one per address in the cache folder."""
    if staging is not None:
        return Path(staging)
    return cache_folder() / "staging" / hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16]


def outgoing_for(
    path: str | os.PathLike[str], staging: str | os.PathLike[str] | None, staging_bytes: int | None
) -> BucketOutput | None:
    """The output for an address of a bucket; None for a folder. Raises ArgumentError as `BucketOutput`."""
    place = placed(path)
    if isinstance(place, str):
        return BucketOutput(place, staging, staging_bytes)
    if staging is not None or staging_bytes is not None:
        raise ArgumentError(f"{path} is a folder, in which shards are made at once: staging is for a store in a bucket")
    return None


def planned_in_bucket(path: str, staging: str | os.PathLike[str] | None) -> Manifest | None:
    """The plan that exists at an address, if any; None for a folder. Errors as `ObjectStore.read`."""
    return BucketOutput(path, staging, None).planned() if is_url(path) else None


class BucketOutput:
    """The output of an extraction into a bucket. The constructor writes nothing.

    Call `plan` first, then the methods that `ShardFiller` calls, `drain`, `complete`; and `stop` always. Used by one
    thread, except for `published`.

    Args:
        url: the store's address.
        staging: the staging folder; None for one in the cache folder.
        staging_bytes: limit of the shards in it, for all processes that use it; None for 4 GiB, or a quarter of the
            free space if that is less, and at least two blocks per process.

    Raises:
        ArgumentError, AccessError: as `ObjectStore`; or `staging_bytes` is less than 1.
    """

    def __init__(self, url: str, staging: str | os.PathLike[str] | None, staging_bytes: int | None) -> None:
        if staging_bytes is not None and staging_bytes < 1:
            raise ArgumentError(f"staging_bytes is {staging_bytes}: expected what the shards that wait may take")
        self._bucket = ObjectStore(url)
        self.url, self.folder = self._bucket.url, staging_folder(self._bucket.url, staging)
        self._here = BucketFolder(self._bucket, self.folder)
        self._asked, self._block, self._staging = staging_bytes, 0, staging
        self._claims: Claims | None = None
        self._made: UploadQueue | None = None
        self._planned: Manifest | None = None

    def planned(self) -> Manifest | None:
        """The plan in the bucket or else the staging folder, if any; writes nothing. Errors as `ObjectStore.read`."""
        return read_planned(self._bucket, self.folder)

    def sent(self) -> Manifest | None:
        """The plan in the bucket, or None; writes nothing. Errors as `ObjectStore.read`."""
        root = read_if_there(self._bucket, ROOT)
        return None if root is None else manifest_of(self._bucket, root)

    @property
    def _uploads(self) -> UploadQueue:
        if self._made is None:
            raise AssertionError("plan comes first")
        return self._made

    @property
    def _manifest(self) -> Manifest:
        if self._planned is None:
            raise AssertionError("plan comes first")
        return self._planned

    def plan(
        self,
        sites: Collection[str],
        open_plan: Callable[[], Manifest],
        join_plan: Callable[[], Manifest],
        waiting: Callable[[], None],
    ) -> Manifest:
        """Plan, or compare with the existing plan, here and in the bucket; first send shards left here; blocks.

        Args:
            sites: the sites that the job makes.
            open_plan: plans in the folder, or compares with the plan there.
            join_plan: compares all but the corpus.
            waiting: called repeatedly while another process of this machine plans.

        Raises:
            StoreExistsError: folder or prefix have other content.
            LinkError: the folder contains a symbolic link.
            MmcacheError: errors of `open_plan` and `BucketFolder.fetch`.
        """
        if self._staging is None:
            private_folder(cache_folder(), "staging")
        self._here.mark(sites)
        self._claims = self._claims or Claims(self.folder)
        self._made = self._made or UploadQueue(self._bucket, self.folder, self._claims)
        lock = FolderLock.wait(self.folder / STAGING, waiting)
        try:
            self._fetch(sites)
            manifest = open_plan()
            while not self._here.send():
                # Another machine was first. The corpus may be readable only once: compare what the plans record.
                self._fetch(sites)
                ours, manifest = manifest, join_plan()
                self._compare(ours, manifest)
        except PlanMismatchError as error:
            # The user knows the address, not the staging folder.
            raise PlanMismatchError(str(error).replace(str(self.folder), self.url)) from error
        finally:
            lock.release()
        self._planned = manifest
        self._bucket.warn_of(self._bucket.refused)
        return manifest

    def _compare(self, ours: Manifest, theirs: Manifest) -> None:
        said = [(plan.source.get("tokenised"), plan.source.get("max_tokens")) for plan in (ours, theirs)]
        if said[0] != said[1]:
            raise PlanMismatchError(
                f"{self.url} was planned at this moment by another machine, with other texts or another max_tokens: "
                f"give the same to all"
            )

    def _fetch(self, sites: Collection[str]) -> None:
        left = self._here.fetch(sites)
        sizes = {key: (self.folder / key).stat().st_size for key in left}
        if sizes and self._uploads.adopt(sizes, read_manifest(self.folder)):
            self._uploads.wait()

    def check_room(self, missing: Mapping[str, np.ndarray]) -> None:
        """Check that the staging folder has room for the shards that wait to be sent.

        Args:
            missing: of each site, `[slots, blocks]` bool.

        Raises:
            ArgumentError: one block is larger than `staging_bytes`.
            DiskFullError: with the bytes needed and free.
        """
        manifest = self._manifest
        rows = min(manifest.shard_tokens or 1, manifest.n_tokens or 0)
        specs = [(manifest.spec(site), len(manifest.slots(site))) for site, which in missing.items() if which.any()]
        self._block = sum(Layout(spec, rows).size * slots for spec, slots in specs)
        if self._asked is not None and self._block > self._asked:
            raise ArgumentError(
                f"staging_bytes is {self._asked}, and one block of this job takes {self._block}: give at least that, "
                f"better twice as much, so that one is made while another is sent"
            )
        free = free_bytes(self.folder)
        needed = min(bytes_to_write(manifest, dict(missing)), self._most(1))
        if needed > free:
            raise DiskFullError(
                errno.ENOSPC,
                f"shards that wait to be sent to {self.url} take {needed} bytes there, and {free} are free: make room, "
                f"choose another folder with --staging (staging=…), or let them take less with --staging-bytes "
                f"(staging_bytes=…; a block takes {self._block})",
                str(self.folder),
            )

    def _most(self, processes: int) -> int:
        if self._asked is not None:
            return self._asked
        return max(min(_MOST, free_bytes(self.folder) // _SHARE), _BLOCKS * self._block * processes)

    def refresh(self) -> None:
        """List the bucket's shards again if it is time. Errors as `BucketFolder.refresh`."""
        self._here.refresh(self._manifest)

    def reserve(self, files: Mapping[Path, int], alive: Callable[[], None]) -> None:
        """Wait until there is room for more shards, and claim it.

        Args:
            files: their paths and bytes.
            alive: called repeatedly; raises to end the wait.

        Raises:
            MmcacheError: an upload failed.
        """
        self._uploads.reserve({self._key(file): size for file, size in files.items()}, self._most, alive)

    def release(self, files: Collection[Path]) -> None:
        """Release the room of shards that will not be made."""
        if self._claims is not None:
            self._claims.release([self._key(file) for file in files])

    def published(self, files: Sequence[Path]) -> None:
        """Queue finished shards for upload; does not block. Called by one thread at a time."""
        for file in files:
            self._uploads.send(self._key(file))

    def _key(self, file: Path) -> str:
        return file.relative_to(self.folder).as_posix()

    def drain(self, waiting: Callable[[int], None] = lambda _: None) -> bool:
        """Wait until all shards here are in the bucket, whoever made them. False if damaged ones must be made again.

        Args:
            waiting: called repeatedly with the number of shards that are still to be sent.

        Raises:
            MmcacheError: an upload failed.
        """
        uploads, manifest = self._uploads, self._manifest
        uploads.damaged, pause = False, _AGAIN
        uploads.wait(waiting)
        while left := self._here.unsent(manifest):
            waiting(len(left))
            if uploads.adopt(left, manifest):
                uploads.wait(waiting)
                continue
            time.sleep(pause)
            pause = min(1.5 * pause, _AGAIN_AT_LAST)
        return not uploads.damaged

    def complete(self) -> Store:
        """Open the finished store; upload merged statistics; empty the staging folder if no other process uses it."""
        self._here.fetch_statistics()
        store = open_store(self.url)
        with contextlib.suppress(LockedError):
            lock = FolderLock(self.folder / STAGING)
            try:
                for site in store.sites:
                    if not self._has_statistics(site):
                        save_summary(self.folder, self._manifest, site, store[site].statistics)
                        self._here.send_statistics(site)
            finally:
                lock.release()
        if self._claims is not None:
            self._claims.leave(self._here.forget)
        return store

    def _has_statistics(self, site: str) -> bool:
        try:
            return load_summary(self.folder, self._manifest, site) is not None
        except CorruptError:
            return False

    def stop(self) -> None:
        """Send nothing more; unsent shards stay in the folder. Does not wait for uploads in progress."""
        if self._made is not None:
            self._made.stop()
        if self._claims is not None:
            self._claims.leave()
