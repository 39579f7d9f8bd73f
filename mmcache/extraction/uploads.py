"""Shards that wait in a staging folder: room for them, threads that send them, an empty file once they are sent."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

from mmcache.errors import CorruptError, MmcacheError, RemoteError, StoreNotFoundError, WriteError
from mmcache.storage.shard_check import check_shard
from mmcache.storage.shard_folder import ShardFolder
from mmcache.system.atomic import Draft
from mmcache.system.files import remove_file
from mmcache.system.threads import Crew

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from mmcache.extraction.staging_claims import Claims
    from mmcache.format.manifest import Manifest
    from mmcache.storage.object_store import Bucket

__all__ = ["Uploads"]

# Shards that are sent at a time, each in several parts.
_THREADS = 3
# Seconds between two looks at what others are doing.
_AGAIN = 0.2


class _StoppedError(Exception):
    """Nothing more is to be sent."""


class Uploads:
    """The shards that this process has in a staging folder. `send` by one thread at a time, the rest by the job's.

    Args:
        bucket: where they go.
        folder: where they are.
        claims: says that they are ours.
    """

    def __init__(self, bucket: Bucket, folder: Path, claims: Claims) -> None:
        self._bucket, self._folder, self._claims = bucket, folder, claims
        self._crew = Crew(_THREADS, "upload")
        # What is queued or being sent, the first failure, and whether it is over.
        self._changed = threading.Condition()
        self._queued, self._stopping = 0, False
        self._failure: BaseException | None = None
        # Whether a shard that was left here was removed.
        self.damaged = False

    def reserve(self, sizes: Mapping[str, int], most: Callable[[int], int], alive: Callable[[], None]) -> None:
        """Claim room for shards; blocks until there is some. Raises what failed, and what `alive` raises meanwhile."""
        self.check()
        while not self._claims.claim(sizes, most):
            with self._changed:
                self._changed.wait(_AGAIN)
            alive()
            self.check()

    def send(self, key: str) -> None:
        """Queue a shard that is made; does not block."""
        self._submit(self._send, key)

    def adopt(self, sizes: Mapping[str, int], manifest: Manifest) -> bool:
        """Queue what processes that died have left, to be checked and sent, or removed; False where it is nobody's."""

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
        except BaseException as error:  # noqa: BLE001 -- kept, and raised again in the caller's thread
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
        draft = Draft(self._folder, key)
        try:
            draft.publish(0, durable=False)
        finally:
            draft.discard()
        self._claims.release([key])

    def _is_there(self, key: str) -> bool:
        """Tell whether somebody else was quicker: a large one is not sent to be refused."""
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
        """Raise what failed in a thread, if anything did, and say where the rest is."""
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
        """Wait until all that is queued is sent; `waiting` hears now and then how much is left. Raises what failed."""
        while True:
            with self._changed:
                if self._queued and self._failure is None:
                    self._changed.wait(_AGAIN)
                left = self._queued
            self.check()
            if not left:
                return
            waiting(left)

    def stop(self) -> None:
        """Send nothing more. What is under way ends with its next part, in its thread."""
        with self._changed:
            self._stopping = True
        self._crew.close()
