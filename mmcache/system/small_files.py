"""Small files put in place together: a folder that several of them are in, or are made in, is made durable once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mmcache.system.draft import Draft
from mmcache.system.files import make_folders, sync_folder

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["publish_all"]


def publish_all(root: Path, contents: Mapping[str, bytes]) -> None:
    """Put small files in place, and make them, their names and their folders durable; blocks until then.

    Each is there whole or not at all, and the first ones are where a later one fails. Folders are made where there
    are none.

    Args:
        root: the folder from which on no link is followed.
        contents: the files, by their names from there.

    Raises:
        LinkError: A folder below the root is a symbolic link.
    """
    folders = dict.fromkeys(name.rpartition("/")[0] for name in contents)
    changed = make_folders(root, folders)
    for name, data in contents.items():
        draft = Draft(root, name)
        try:
            draft.write(np.frombuffer(data, np.uint8), 0)
            draft.publish(len(data))
        except BaseException:
            draft.discard()
            raise
    for folder in dict.fromkeys([*changed, *(root / folder for folder in folders)]):
        sync_folder(folder)
