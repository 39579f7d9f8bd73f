"""`zarr.json` files with a digest of their own bytes: made, read and checked.

zarr-python makes the metadata in memory. The digest is the SHA-256 of the file with the digest's 64 characters replaced
by zeros. It is in the attributes, as `mmcache.digest`, before any text of the user.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING, Any

from zarr.core.buffer import default_buffer_prototype
from zarr.core.group import GroupMetadata

from mmcache.errors import CorruptError, VersionError
from mmcache.format.shard import FORMAT_VERSIONS
from mmcache.system.files import read_file

if TYPE_CHECKING:
    from pathlib import Path

    from zarr.storage import MemoryStore

__all__ = ["ROOT", "attributes", "check_signed", "group_json", "read_signed", "signed"]

ROOT = "zarr.json"
_BLANK = "0" * 64


def attributes(version: int, **said: Any) -> dict[str, Any]:
    """Attributes of a node to be signed, in a store of that format version."""
    return {"mmcache": {"format": version, "digest": _BLANK, **said}}


def signed(memory: MemoryStore, key: str = ROOT) -> bytes:
    """The bytes of a `zarr.json` that zarr wrote to memory, with the digest filled in."""
    return _signed(memory._store_dict[key].to_bytes())  # noqa: SLF001 -- the synchronous way to a MemoryStore's bytes


def group_json(version: int, **said: Any) -> bytes:
    """The signed `zarr.json` of a group. From zarr's metadata, since creating a group waits for zarr's thread."""
    metadata = GroupMetadata(attributes=attributes(version, **said), zarr_format=3)
    return _signed(metadata.to_buffer_dict(default_buffer_prototype())[ROOT].to_bytes())


def _signed(text: bytes) -> bytes:
    return text.replace(_BLANK.encode(), hashlib.sha256(text).hexdigest().encode(), 1)


def read_signed(where: Path, limit: int) -> tuple[dict[str, Any], bytes]:
    """Read and check a `zarr.json`. Its attribute `mmcache`, and its bytes.

    Raises:
        StoreNotFoundError: there is no such file.
        VersionError: it has a format version that this library does not read.
        CorruptError: it is damaged, was changed by another program, or has no digest.
    """
    text = read_file(where, limit)
    return check_signed(text, where), text


def check_signed(text: bytes, where: Path | str) -> dict[str, Any]:
    """Check the bytes of a `zarr.json`. Its attribute `mmcache`. Errors as `read_signed`."""
    try:
        said = json.loads(text)["attributes"]["mmcache"]
        digest = said["digest"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptError(f"{where} is no mmcache store's: {error!r}") from error
    if not isinstance(said, dict) or not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        raise CorruptError(f"{where} is no mmcache store's: it has no digest")
    blanked = text.replace(digest.encode(), _BLANK.encode(), 1)
    version = said.get("format")
    if type(version) is not int or version not in FORMAT_VERSIONS:
        raise VersionError(
            f"{where} is of format version {version!r}, this library reads {' and '.join(map(str, FORMAT_VERSIONS))}: "
            f"open it with the mmcache that made it, or upgrade"
        )
    if hashlib.sha256(blanked).hexdigest() != digest:
        raise CorruptError(
            f"{where} does not match its own digest: it is damaged, or another program wrote to it; restore it"
        )
    found: dict[str, Any] = said
    return found
