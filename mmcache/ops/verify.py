"""Verify a store: a list of everything that is wrong with it, not only the first problem.

Quick: presence, sizes, headers, indices and metadata. Full: every byte; each shard is read once, at the disk's speed.
"""

from __future__ import annotations

import contextlib
import errno
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mmcache.errors import AccessError, CorruptError, IncompleteError, LinkError, MmcacheError, RemoteError
from mmcache.format.manifest import ARRAY_LIMIT, read_array, read_manifest
from mmcache.format.names import RESERVED, STATISTICS_FOLDER
from mmcache.format.shard import ids_digest
from mmcache.format.signed_json import ROOT, read_signed
from mmcache.read.store import Store
from mmcache.stats.site_statistics import load_summary
from mmcache.storage.connection import placed
from mmcache.storage.listing import listed_shards, present_shards
from mmcache.storage.mirror import Mirror
from mmcache.storage.shard_check import check_shard
from mmcache.storage.shard_folder import ShardFolder
from mmcache.storage.tokenizer_file import TOKENIZER, read_tokenizer
from mmcache.system.arguments import a_callable, a_path, choice, optional, public
from mmcache.system.files import count_names, list_names
from mmcache.system.no_symlinks import check_path
from mmcache.system.threads import ThreadPool

if TYPE_CHECKING:
    import os
    from collections.abc import Callable
    from concurrent.futures import Future

    from mmcache.format.manifest import Manifest
    from mmcache.read.tokens import Sequences

__all__ = ["Finding", "Kind", "Level", "Report", "verify"]

Level = Literal["quick", "full"]
Kind = Literal["missing", "unreadable", "foreign", "damaged", "metadata", "sequences", "unexpected"]


@dataclass(frozen=True)
class Finding:
    """One problem with one file.

    Attributes:
        kind: `"missing"`: there is no such file. `"unreadable"`: the system refuses to read it. `"foreign"`: it is not
            the shard that belongs there: cut short or extended, with a damaged header, moved, another store's, or not a
            regular file. `"damaged"`: bytes that do not match their checksum. `"metadata"`: a bad `zarr.json` or merged
            statistics. `"sequences"`: they are not consecutive. `"unexpected"`: a shard that is not in the plan, or a
            key of a bucket that no store has.
        file: the file, relative to the store's folder.
        what: what was found, and what was expected.
        array: the site, or `tokens`, `flags` or `sequences`; None for the store's own files.
        shard: (slot, block) of a shard.
        tokens: the positions that depend on it, (first, stop); None if not known.
        layers: the layers that it holds rows of, by the model's numbers; empty if it belongs to no site.
    """

    kind: Kind
    file: str
    what: str
    array: str | None = None
    shard: tuple[int, int] | None = None
    tokens: tuple[int, int] | None = None
    layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Report:
    """What `verify` found.

    Attributes:
        path: the store.
        level: `"full"` or `"quick"`.
        findings: everything that is wrong, in the order of the store's arrays.
        shards: how many shards were checked.
        bytes: how many of their bytes were read.
    """

    path: str
    level: Level
    findings: tuple[Finding, ...]
    shards: int
    bytes: int

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings


# While one waits for the disk, another computes checksums.
_THREADS = 3
_AHEAD = 64
# A root may count this many shards, and 100 more per file; each missing one becomes a finding. If it counts more, the
# root itself is wrong.
_BELIEVABLE = 1 << 18


@public(path=a_path, level=choice("quick", "full"), progress=optional(a_callable))
def verify(
    path: str | os.PathLike[str], level: Level = "full", *, progress: Callable[[int, int], None] | None = None
) -> Report:
    """List everything that is wrong with a store. Nothing is written; blocks until all of it was checked.

    Full verify finds any flipped bit in any file of the store, and any file that was cut short, extended, moved,
    removed or replaced by another store's. A writer may be at work meanwhile: what is committed when `verify` begins is
    checked.

    Args:
        path: the store's folder, or its address in a bucket, from which every byte is read again.
        level: `"full"`: every byte. `"quick"`: presence, sizes, headers, indices and metadata; seconds for 10,000
            shards.
        progress: called now and then with the bytes checked and the total.

    Raises:
        StoreNotFoundError: there is no store.
        ArgumentError: no such level.
        AccessError, RemoteError: object storage refuses the request, or does not answer.
    """
    place = placed(path)
    try:
        remote = Mirror(place) if isinstance(place, str) else None
        folder = Path(place) if remote is None else remote.folder
        manifest = read_manifest(folder)
    except CorruptError as error:
        # An unknown format version too: it is as likely a flipped bit as a newer store.
        return Report(str(place), level, (Finding("metadata", ROOT, str(error)),), 0, 0)
    return _Verification(folder, manifest, level, progress, remote).run()


class _Verification:
    """One run of `verify` on one store."""

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        level: Level,
        progress: Callable[[int, int], None] | None,
        remote: Mirror | None,
    ) -> None:
        self._path, self._manifest, self._level, self._progress = path, manifest, level, progress
        self._remote, self._where = remote, str(path) if remote is None else remote.url
        self._findings: list[Finding] = []
        self._shards = self._bytes = self._done = 0
        self._total = sum(map(manifest.array_bytes, self._arrays()))
        self._sequences: Sequences | None = None

    def _arrays(self) -> list[str]:
        """The arrays that have rows."""
        sites = list(self._manifest.sites) if self._manifest.shard_tokens is not None else []
        return [
            array for array in (*sites, *(RESERVED if self._manifest.has_tokens else ())) if self._manifest.rows(array)
        ]

    def run(self) -> Report:
        if self._manifest.kind == "planned" and self._manifest.n_tokens is None:
            self._find("missing", ROOT, "the store is still being planned: run the same `mmcache extract` again")
        for array in self._arrays():
            self._check_metadata(array)
        if self._level == "full" and self._manifest.kind == "planned" and self._manifest.n_tokens:
            # Damage in them becomes a finding below.
            with contextlib.suppress(MmcacheError, OSError):
                self._sequences = self._store().sequences
        crew = ThreadPool(_THREADS, "verify")
        try:
            for array in self._arrays():
                self._check_array(array, crew)
                if self._level == "quick":
                    self._advance(self._manifest.array_bytes(array))
        finally:
            crew.close()
        if self._manifest.has_tokens and not any(finding.array == "sequences" for finding in self._findings):
            self._check_sequences()
        for key in () if self._remote is None else self._remote.strange:
            self._find("unexpected", key, "no store has such a key, and nothing reads it: remove the object")
        self._check_summaries()
        self._check_tokenizer()
        return Report(self._where, self._level, tuple(self._findings), self._shards, self._bytes)

    def _find(self, kind: Kind, file: str, what: str, **where: Any) -> None:
        # Error messages begin with the path, which a finding has already.
        self._findings.append(
            Finding(
                kind,
                file,
                what.removeprefix(f"{self._path / file}").removeprefix(f"{self._where}/{file}").lstrip(": "),
                **where,
            )
        )

    def _check_metadata(self, array: str) -> None:
        """Compare an array's `zarr.json` with the root; a grown store's may be ahead of the commit."""
        try:
            check_path(self._path, array)
            read_array(self._path, self._manifest, array)
        except LinkError:
            return  # `_check_array` reports it
        except (MmcacheError, OSError) as error:
            self._find("metadata", f"{array}/{ROOT}", str(error), array=array)

    def _check_array(self, array: str, crew: ThreadPool) -> None:
        manifest, rows = self._manifest, self._manifest.rows(array)
        try:
            folder = self._folder(array)
        except CorruptError as error:
            self._find("foreign", array, str(error), array=array)
            return
        expected = manifest.spec(array).blocks(rows) * len(manifest.slots(array))
        files = count_names(self._path / array)
        if expected > _BELIEVABLE + files * 100:
            self._find(
                "metadata", ROOT, f"it counts {expected} shards of {array}, which has {files} files", array=array
            )
            return
        there = present_shards(self._path, manifest, array, rows)
        asked: deque[tuple[tuple[int, int], Future[tuple[list[str], int]]]] = deque()
        for number in range(there.size):
            shard = divmod(number, there.shape[1])
            if not there[shard]:
                self._find_shard("missing", array, shard, "it is not there")
                continue
            asked.append((shard, crew.submit(self._look, array, folder, *shard)))
            if len(asked) >= _AHEAD:
                self._note(array, *asked.popleft())
        while asked:
            self._note(array, *asked.popleft())
        if manifest.kind == "planned" and array in manifest.sites:
            surplus = listed_shards(self._path, manifest, array, rows, expected=False)
            for slot, block in sorted(pair for some in surplus for pair in np.stack(some, axis=1).tolist()):
                file = f"{array}/{manifest.shard_key(array, block, slot)}"
                self._find("unexpected", file, "the plan has no such shard", array=array)

    def _store(self) -> Store:
        return Store(self._path, self._manifest, remote=self._remote)

    def _folder(self, array: str) -> ShardFolder:
        # `fresh`: of a bucket, check the objects, not their cached copies.
        rows = self._manifest.rows(array)
        return ShardFolder(self._path, self._manifest, array, rows, remote=self._remote, fresh=True)

    def _look(self, array: str, folder: ShardFolder, slot: int, block: int) -> tuple[list[str], int]:
        ids = None
        if self._sequences is not None and array in self._manifest.sites:
            ids = self._ids_of(block, self._sequences)
        return check_shard(folder, slot, block, full=self._level == "full", ids=ids, tell=self._tell)

    def _ids_of(self, block: int, sequences: Sequences) -> str | None:
        """The digest of the token ids of a block's rows; None if they cannot be read (their own finding)."""
        shard, total = self._manifest.shard_tokens or 1, self._manifest.n_tokens or 0
        context = sequences[sequences.find(block * shard)].start
        try:
            ids = self._folder("tokens").read(context, min((block + 1) * shard, total))
        except (MmcacheError, OSError):
            return None
        return ids_digest(ids.numpy())

    def _tell(self, count: int) -> None:
        # A quick check counts whole arrays instead.
        if self._level == "full":
            self._advance(count)

    def _advance(self, count: int) -> None:
        # Not locked: several threads add to it, and an update that is lost does not matter.
        self._done += count
        if self._progress is not None:
            self._progress(min(self._done, self._total), self._total)

    def _note(self, array: str, shard: tuple[int, int], look: Future[tuple[list[str], int]]) -> None:
        self._shards += 1
        try:
            wrong, size = look.result()
        except IncompleteError:
            self._find_shard("missing", array, shard, "it is not there")
        except CorruptError as error:
            self._find_shard("foreign", array, shard, str(error))
        except (AccessError, RemoteError):
            # An unreachable server says nothing about the store.
            raise
        except OSError as error:
            code = errno.errorcode.get(error.errno or 0, "?")
            self._find_shard("unreadable", array, shard, f"the system refuses to read it ({code}: {error.strerror})")
        else:
            self._bytes += size
            for what in wrong:
                self._find_shard("damaged", array, shard, what)

    def _find_shard(self, kind: Kind, array: str, shard: tuple[int, int], what: str) -> None:
        manifest, (slot, block) = self._manifest, shard
        tokens: tuple[int, int] | None = None
        layers: tuple[int, ...] = ()
        if array != "sequences":
            first = block * manifest.spec(array).shard_rows
            tokens = first, first + manifest.spec(array).rows_in_block(block, manifest.rows(array))
        if array in manifest.sites:
            layers = manifest.layers if manifest.layout == "token" else (manifest.layers[slot],)
        file = f"{array}/{manifest.shard_key(array, block, slot)}"
        self._find(kind, file, what, array=array, shard=shard, tokens=tokens, layers=layers)

    def _check_sequences(self) -> None:
        try:
            _ = self._store().sequences
        except (MmcacheError, OSError) as error:
            self._find("sequences", "sequences", str(error), array="sequences")

    def _check_summaries(self) -> None:
        above = f"{STATISTICS_FOLDER}/{ROOT}"
        try:
            check_path(self._path, STATISTICS_FOLDER)
            if ROOT in list_names(self._path / STATISTICS_FOLDER):
                read_signed(self._path / above, ARRAY_LIMIT)
        except (MmcacheError, OSError) as error:
            self._find("metadata", above, str(error))
        for site in self._manifest.sites:
            try:
                load_summary(self._path, self._manifest, site)
            except (MmcacheError, OSError) as error:
                self._find("metadata", f"{STATISTICS_FOLDER}/{site}", str(error), array=site)

    def _check_tokenizer(self) -> None:
        try:
            read_tokenizer(self._path, self._manifest)
        except (MmcacheError, OSError) as error:
            self._find("missing" if isinstance(error, FileNotFoundError) else "metadata", TOKENIZER, str(error))
