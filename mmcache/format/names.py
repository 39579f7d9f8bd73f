"""The names in a store: its reserved arrays and folders, and valid names of sites."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmcache.errors import ArgumentError
from mmcache.format.signed_json import ROOT
from mmcache.system.arguments import shown
from mmcache.system.no_symlinks import check_links

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

__all__ = [
    "DOCUMENTS_FOLDER",
    "RESERVED",
    "STATISTICS_FOLDER",
    "TOKENIZER_FOLDER",
    "check_no_links",
    "check_site_name",
    "site_name_problem",
]

# The arrays beside the sites: dtype, shape of one row, and fill value of missing rows.
RESERVED: dict[str, tuple[str, tuple[int, ...], int]] = {
    "tokens": ("int32", (), -1),
    "flags": ("uint8", (), 0),
    "sequences": ("int64", (3,), -1),
}
STATISTICS_FOLDER = "statistics"
TOKENIZER_FOLDER = "tokenizer"
# Reserved since format version 2: in a store of version 1 a site may have this name.
DOCUMENTS_FOLDER = "documents"


def check_no_links(path: Path, sites: Iterable[str]) -> None:
    """Check that there is no symbolic link where the writers of a store with these sites create or remove files.

    Every writer calls this first. Links created later are not followed either (`system/no_symlinks.py`).

    Raises:
        LinkError: there is one; nothing was changed yet.
    """
    own = (ROOT, ".lock", ".staging", *RESERVED, STATISTICS_FOLDER, TOKENIZER_FOLDER, DOCUMENTS_FOLDER)
    check_links(path, (*own, *sites))


def site_name_problem(name: object, version: int = 2) -> str | None:
    """Why a site cannot have this name in a store of that format version; None if it can. A site is a folder."""
    if not isinstance(name, str) or not name:
        return "it is no text"
    taken = (*RESERVED, STATISTICS_FOLDER, TOKENIZER_FOLDER, ROOT, *([DOCUMENTS_FOLDER] if version > 1 else []))
    if name in taken:
        return "the store keeps its own data under that name"
    if name.startswith((".", "__")) or not name.isprintable() or set("/\\\0") & set(name):
        return "a site is a folder: no slash, nothing unprintable, no '.' or '__' in front"
    if len(name.encode()) > 200:
        return "it is longer than 200 bytes"
    return None


def check_site_name(name: str) -> None:
    """Check that a name can be that of a site.

    Raises:
        ArgumentError: with the reason.
    """
    problem = site_name_problem(name)
    if problem:
        raise ArgumentError(f"{shown(name)} cannot be a site: {problem}")
