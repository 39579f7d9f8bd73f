"""Set a store's bad files aside, so that the rest can be read and `extract` can make them again."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from mmcache.errors import ArgumentError, MmcacheError
from mmcache.format.manifest import array_json, read_manifest
from mmcache.format.names import RESERVED, STATISTICS_FOLDER, check_no_links
from mmcache.format.signed_json import ROOT
from mmcache.ops.verify import verify
from mmcache.read.store import Store
from mmcache.storage.connection import placed
from mmcache.storage.tokenizer_file import TOKENIZER
from mmcache.system.arguments import a_callable, a_path, choice, optional, public
from mmcache.system.atomic import publish
from mmcache.system.files import set_aside
from mmcache.system.locks import FolderLock

if TYPE_CHECKING:
    from collections.abc import Callable

    from mmcache.format.manifest import Manifest
    from mmcache.ops.verify import Finding, Level, Report

__all__ = ["ASIDE", "Loss", "Repaired", "repair"]

# Names that begin with a dot are not part of a store.
ASIDE = ".set-aside"


@dataclass(frozen=True)
class Loss:
    """Rows of a site that are lost.

    Attributes:
        site: the site.
        layers: the layers that lost them, by the model's numbers.
        tokens: their positions, (first, stop).
        sequences: the numbers of the first and last sequence with such tokens; None if sequences cannot be read.
    """

    site: str
    layers: tuple[int, ...]
    tokens: tuple[int, int]
    sequences: tuple[int, int] | None


@dataclass(frozen=True)
class Repaired:
    """What `repair` did.

    Attributes:
        report: what was found before the repair.
        aside: the files set aside: old and new path, relative to the store's folder.
        rewritten: metadata files that were written again.
        lost: rows that are missing until they are made again.
        left: findings that could not be repaired: restore those files from a copy.
        remade_by_extract: whether `extract`, with the store's own settings, makes the lost rows again.
    """

    report: Report
    aside: tuple[tuple[str, str], ...]
    rewritten: tuple[str, ...]
    lost: tuple[Loss, ...]
    left: tuple[Finding, ...]
    remade_by_extract: bool


@public(path=a_path, level=choice("quick", "full"), progress=optional(a_callable))
def repair(
    path: str | os.PathLike[str], level: Level = "full", *, progress: Callable[[int, int], None] | None = None
) -> Repaired:
    """Verify a store, and move bad files of its sites into `.set-aside`. Nothing is deleted.

    Shards that are set aside are missing from then on. If `extract` made the store, it makes them again. In any other
    store they are lost; `mmcache.open(path, partial=True)` reads the rest. Metadata of arrays is written again. Merged
    statistics are set aside, and are computed again when needed. What only a copy can restore (the root's metadata,
    tokens, flags, sequences) is left as it is and reported in `left`. Blocks until everything is durable.

    Args:
        path: the store's folder.
        level: as `verify`.
        progress: as `verify`.

    Raises:
        StoreNotFoundError, CorruptError, VersionError: there is no store, or its root cannot be read.
        LockedError: a writer holds the store.
        LinkError: a file or folder of the store is a symbolic link. Nothing is moved then.
        WriteError: a file cannot be moved.
        ArgumentError: `path` is an address, not a folder.
    """
    if isinstance(folder := placed(path), str):
        raise ArgumentError(f"{folder} is an address: repair works on a folder; delete a bad object and push it again")
    manifest = read_manifest(folder)
    check_no_links(folder, (*manifest.sites, ASIDE))
    lock = FolderLock(folder)
    try:
        report = verify(folder, level, progress=progress)
        aside: dict[str, str] = {}
        rewritten: list[str] = []
        left: list[Finding] = []
        for finding in report.findings:
            file = finding.file
            if finding.kind == "missing" and finding.array in manifest.sites:
                continue  # lost, but there is nothing to move
            if file not in aside and _can_be_moved(folder, finding, manifest):
                aside[file] = set_aside(folder, file, (PurePosixPath(ASIDE) / file).parent.as_posix())
            if _is_array_metadata(finding) and finding.array is not None:
                publish(folder, file, array_json(manifest, finding.array, manifest.rows(finding.array)))
                rewritten.append(file)
            elif file not in aside:
                left.append(finding)
    finally:
        lock.release()
    lost = _losses(folder, manifest, report)
    return Repaired(report, tuple(aside.items()), tuple(rewritten), lost, tuple(left), manifest.kind == "planned")


def _is_array_metadata(finding: Finding) -> bool:
    return finding.kind == "metadata" and finding.file == f"{finding.array}/{ROOT}"


def _can_be_moved(folder: Path, finding: Finding, manifest: Manifest) -> bool:
    """Whether the file exists and can be moved without losing more than is lost already."""
    if finding.kind == "unreadable" or not os.path.lexists(folder / finding.file):
        return False
    shard_of_site = finding.array in manifest.sites and finding.kind in ("foreign", "damaged", "unexpected")
    merged = finding.kind == "metadata" and finding.file.startswith(f"{STATISTICS_FOLDER}/")
    return shard_of_site or merged or finding.file == TOKENIZER or _is_array_metadata(finding)


def _losses(folder: Path, manifest: Manifest, report: Report) -> tuple[Loss, ...]:
    """The rows of the site shards that are now missing, each shard once."""
    try:
        sequences = Store(folder, manifest).sequences
    except (MmcacheError, OSError):
        sequences = None  # a finding of its own
    lost = {}
    for finding in report.findings:
        if finding.array in RESERVED or finding.array is None or finding.tokens is None or finding.kind == "unreadable":
            continue
        first, stop = finding.tokens
        where = None if sequences is None else (sequences.find(first), sequences.find(stop - 1))
        lost[finding.file] = Loss(finding.array, finding.layers, finding.tokens, where)
    return tuple(lost.values())
