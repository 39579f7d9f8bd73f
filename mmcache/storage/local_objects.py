"""What `file://` needs beyond its client: objects that are durable when they are there, and no link that is followed.

The client renames a file when all of it was written, and waits for no disk: after a power failure it may be empty under
its name.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from mmcache.errors import ArgumentError
from mmcache.system.files import explained, make_folder, sync_folder
from mmcache.system.no_symlinks import check_path

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["LocalObjects"]


class LocalObjects:
    """The folder that stands for a bucket.

    Args:
        url: its address.

    Raises:
        ArgumentError: it is of another machine.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.netloc:
            raise ArgumentError(f"{url}: expected an address of this machine's, with three slashes: file:///folder")
        self.root = Path(unquote(parts.path))

    @property
    def is_there(self) -> bool:
        """Whether there is such a folder."""
        return self.root.is_dir()

    def make(self) -> None:
        """Make the folder, durably. Raises WriteError."""
        make_folder(self.root)

    def check(self, keys: Iterable[str]) -> None:
        """Refuse to change files that lie behind a link, which may lead out of the folder.

        Raises:
            LinkError: there is one.
        """
        for folder in {key.rpartition("/")[0] for key in keys if "/" in key}:
            check_path(self.root, folder)

    def prepare(self, key: str) -> None:
        """Make the folder of an object, durably. Raises WriteError, and LinkError as `check`."""
        self.check([key])
        make_folder(self.root, key.rpartition("/")[0])

    def sync(self, key: str) -> None:
        """Make the bytes of an object durable. Raises WriteError."""
        with explained(self.root / key, "making the object durable"):
            fd = os.open(self.root / key, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def sync_name(self, key: str) -> None:
        """Make the name of an object durable. Raises WriteError."""
        sync_folder((self.root / key).parent)
