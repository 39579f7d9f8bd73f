"""What is wrong with a store, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Finding", "Kind", "Level", "Report"]

Level = Literal["quick", "full"]
Kind = Literal["missing", "unreadable", "foreign", "damaged", "metadata", "sequences", "unexpected"]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with one file.

    Attributes:
        kind: `"missing"`: it is not there. `"unreadable"`: the system refuses to read it. `"foreign"`: it is not the
            shard that belongs there: cut short or extended, with a damaged header, moved, another store's, or no plain
            file. `"damaged"`: bytes that do not match their checksum. `"metadata"`: a `zarr.json` or the merged
            statistics. `"sequences"`: they do not follow each other. `"unexpected"`: a shard that no plan
            knows, or a key of a bucket that no store has.
        file: which, from the store's folder.
        what: what was found, and what was expected.
        array: the site, or `tokens`, `flags` or `sequences`; None for the store's own files.
        shard: (slot, block) of a shard.
        tokens: the positions that depend on it, from the first to before the last; None where that is not known.
        layers: the layers that it holds rows of, by the model's numbers; empty for what is of no site.
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
        level: how closely it was looked at.
        findings: all that is wrong, in the order of the store's arrays.
        shards: shards that were looked at.
        bytes: bytes that were read of them.
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
