"""Files that appear under their name only when all of their bytes are on disk."""

from __future__ import annotations

import os
import secrets
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["publish", "remove_temporary"]


def publish(folder: Path, name: str, data: bytes) -> None:
    """Write a file under a temporary name, sync it, and rename it; a link in its place is replaced, not followed."""
    temporary = folder / f".{name}.{secrets.token_hex(4)}.tmp"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
    try:
        with open(fd, "wb") as file:  # noqa: PTH123 -- a descriptor
            file.write(data)
            file.flush()
            os.fsync(fd)
        temporary.replace(folder / name)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    # The rename is durable once the folder is.
    above = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(above)
    finally:
        os.close(above)


def remove_temporary(folder: Path, name: str) -> None:
    """Remove what a run that was killed has left of a file; only while no other run writes to the folder."""
    for path in folder.glob(f".{name}.*.tmp"):
        path.unlink()
