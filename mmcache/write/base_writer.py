"""`BaseWriter`, shared by `Writer` and `FullActivationCache`: claiming a path, the writer's lock, the commit point."""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import warnings
import weakref
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

from mmcache.errors import ClosedError, MmcacheError, StoreExistsError, WriteError
from mmcache.format.manifest import array_json, is_store
from mmcache.format.names import RESERVED, TOKENIZER_FOLDER, check_no_links
from mmcache.format.signed_json import ROOT
from mmcache.storage.tokenizer_file import TOKENIZER, save_tokenizer
from mmcache.system.atomic import publish, remove_drafts
from mmcache.system.files import list_names, make_folder, remove_file
from mmcache.system.locks import FolderLock
from mmcache.system.memory import PAGE
from mmcache.write.pipeline import SLOT_BYTES, Pipeline
from mmcache.write.staging import Stager

if TYPE_CHECKING:
    from mmcache.format.manifest import Manifest

__all__ = ["BaseWriter", "claim", "close_after"]

_OPEN: weakref.WeakSet[BaseWriter] = weakref.WeakSet()


def claim(path: str | os.PathLike[str], sites: tuple[str, ...]) -> Path:
    """Check that a new store may be made at `path`; returns it. Writes nothing.

    Raises:
        StoreExistsError: the path has a store, or is a file, or has something under a name that the store would use.
        LinkError: a name that a store uses is a symbolic link.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise StoreExistsError(errno.EEXIST, "that is a file: a store needs a folder", str(folder))
    names = set(list_names(folder))
    if is_store(folder):
        raise StoreExistsError(
            errno.EEXIST,
            "the path already holds a store, which is never overwritten: open it, or choose another path",
            str(folder),
        )
    taken = sorted(names & {*sites, *RESERVED, TOKENIZER_FOLDER})
    if taken:
        raise StoreExistsError(
            errno.EEXIST, f"the folder already holds {', '.join(taken)}: choose another path", str(folder)
        )
    check_no_links(folder, sites)
    return folder


class BaseWriter:
    """A store that one writer grows: its pipeline, its lock, and the commit.

    A writer that is still open when Python exits is closed then, as files are.
    """

    _manifest: Manifest

    def __init__(self, path: Path, *, durable: bool = True) -> None:
        self._path, self._durable = path, durable
        self._pipeline: Pipeline | None = None
        self._stager: Stager | None = None
        # Not open before `_begin`: a writer whose `__init__` failed has nothing to close.
        self._closed = True
        self._process = os.getpid()
        # The operation in progress; if it is interrupted, the next commit would be torn.
        self._torn: str | None = None
        self._changed = self._ending = False
        make_folder(path)
        self._lock = FolderLock(path)
        try:
            remove_drafts(path)
        except BaseException:
            self._lock.release()
            raise

    def _begin(self) -> None:
        self._closed = False
        _OPEN.add(self)

    @property
    def path(self) -> Path:
        """The store's folder."""
        return self._path

    @property
    def closed(self) -> bool:
        """Whether the writer was closed."""
        return self._closed

    @property
    def ours(self) -> bool:
        """Whether this is the process that opened it, and not a fork of that."""
        return self._process == os.getpid()

    def _start(self, row_bytes: int) -> tuple[Pipeline, Stager]:
        """The pipeline and its stager, made with the first rows."""
        if self._pipeline is None or self._stager is None:
            # A slot holds at least one row, and whole pages.
            self._pipeline = Pipeline(max(SLOT_BYTES, -(-row_bytes // PAGE) * PAGE))
            self._stager = Stager(self._pipeline)
        return self._pipeline, self._stager

    def _check_open(self) -> None:
        if self._process != os.getpid():
            raise ClosedError(
                f"{self._path} is being written by process {self._process}, not by its fork {os.getpid()}"
            )
        if self._closed or self._ending:
            raise ClosedError(f"{self._path} was closed: open it again to go on")
        if self._pipeline is not None:
            self._pipeline.check()
        if self._torn is not None:
            raise WriteError(
                f"{self._torn} to {self._path} was interrupted half-way, and nothing can follow it: what was "
                f"committed before is intact; close this and go on from there"
            )

    def _create(self, manifest: Manifest, arrays: dict[str, int], tokenizer: str | None = None) -> None:
        """Commit an empty store, with the JSON of a tokenizer if there is one; on failure, leave the path as it was.

        The root is written first: a crash leaves a store, or a path that is free.
        """
        claim(self._path, tuple(manifest.sites))
        try:
            self._commit_root(replace(manifest, source={}), {})
            save_tokenizer(self._path, tokenizer, durable=self._durable)
            if arrays:
                self._commit_root(manifest, arrays)
        except BaseException:
            for file in (*(f"{array}/{ROOT}" for array in arrays), TOKENIZER, ROOT):
                # One that is not there yet is no reason to leave the root; a failure would hide the original error.
                with contextlib.suppress(OSError):
                    remove_file(self._path, file)
                    if (array := file.rpartition("/")[0]) and (self._path / array).is_dir():
                        remove_drafts(self._path, array)
                        (self._path / array).rmdir()
            raise

    def _commit_root(self, manifest: Manifest, arrays: dict[str, int]) -> None:
        """Move the commit point: the metadata of `arrays` (name to rows) first, the root last."""
        for array, rows in arrays.items():
            make_folder(self._path, array)
            publish(self._path, f"{array}/{ROOT}", array_json(manifest, array, rows), durable=self._durable)
        publish(self._path, ROOT, manifest.to_json(), durable=self._durable)
        self._manifest = manifest

    def _commit(self) -> None:
        """Make everything that was handed over durable, and commit it."""
        raise NotImplementedError

    def _abandon(self) -> None:
        """Remove the temporary files that are still open; the pipeline has ended."""

    def close(self) -> None:
        """Commit, and release the store. Safe to call twice.

        Raises:
            WriteError: the commit failed; the writer is closed all the same, and the store as of its last commit.
        """
        if self._closed or self._process != os.getpid():
            # A fork has the writer's memory, but none of its threads: only the process that made it may close it.
            return
        try:
            if not self._ending:
                self._check_open()
                self._commit()
        finally:
            # After an interrupt in between, the next call continues here, without another commit.
            self._ending = True
            if self._pipeline is not None:
                self._pipeline.close()
            self._abandon()
            self._lock.release()
            self._closed = True
            _OPEN.discard(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        close_after(self, error)

    def __del__(self) -> None:
        if not getattr(self, "_closed", True) and self.ours:
            warnings.warn(f"{self!r} was never closed", ResourceWarning, stacklevel=2)
            self.close()


class _Closable(Protocol):
    def close(self) -> None: ...


def close_after(store: _Closable, error: BaseException | None) -> None:
    """Close at the end of a `with`; a failure to close never hides the error that ended it."""
    try:
        store.close()
    except MmcacheError as failed:
        if error is None:
            raise
        error.add_note(f"mmcache: closing {store!r} failed too: {failed}")


@atexit.register
def _close_all() -> None:
    # Close every one, even if others fail.
    with contextlib.ExitStack() as stack:
        for store in list(_OPEN):
            stack.callback(store.close)
